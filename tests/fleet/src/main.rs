//! A real controller with thousands of simulated hosts and tens of thousands of VMs: how fast it places,
//! answers, plans a host's death anew, and starts again; and what it costs. `cargo lab bench control`
//! runs it.
//!
//! ```text
//! host        a node agent without a host; thousands in this process
//! agents      ten thousand, in processes of their own
//! controller  the program under test, as a process
//! load        what is asked of it
//! ```

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use api::controller::hosts_client::HostsClient;
use api::controller::*;
use clap::{Parser, ValueEnum};
use serde::Serialize;
use tonic::transport::Channel;

use agents::Agents;
use controller::{Controller, PATIENCE, Setup};
use host::Served;

mod agents;
mod controller;
mod host;
mod load;

/// Descriptors that a host takes at most: listener, two connections, twice each.
const DESCRIPTORS_PER_HOST: u64 = 5;

#[derive(Debug, Parser)]
struct Options {
    /// The controller's program.
    #[arg(long, value_name = "FILE", required_unless_present = "agents_in")]
    controller: Option<PathBuf>,
    /// Only serve hosts, on sockets in DIR, until stdin ends
    #[arg(long, value_name = "DIR", hide = true)]
    agents_in: Option<PathBuf>,
    /// The number of the first of these
    #[arg(long, default_value_t = 0, hide = true)]
    first: usize,
    #[arg(long, default_value_t = 1_000)]
    hosts: usize,
    #[arg(long, default_value_t = 50_000)]
    vms: usize,
    /// How long requests are asked at a steady rate.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Of these, each second.
    #[arg(long, default_value_t = 200)]
    requests: u32,
    /// Hosts of the growth curve, with as many VMs each as --curve-vms says.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1_000, 10_000])]
    curve: Vec<usize>,
    #[arg(long, default_value_t = 3_000)]
    curve_vms: usize,
    /// Where the controller keeps its state. The variable ETCD names the program of the second.
    #[arg(long, value_enum, default_value = "embedded")]
    store: Store,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Store {
    Embedded,
    Etcd,
}

/// Members of an etcd cluster, each site has one of its own.
const ETCD_MEMBERS: usize = 3;

/// One figure beside what it should be.
#[derive(Debug, Serialize)]
struct Row {
    row: String,
    value: f64,
    unit: &'static str,
    /// At most, or of rates at least, this.
    target: Option<f64>,
    met: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Report {
    store: Store,
    hosts: usize,
    vms: usize,
    rows: Vec<Row>,
}

impl Report {
    fn at_most(&mut self, row: &str, value: f64, unit: &'static str, target: Option<f64>) {
        let met = target.map(|target| value <= target);
        self.add(row, value, unit, target, met);
    }

    fn at_least(&mut self, row: &str, value: f64, unit: &'static str, target: Option<f64>) {
        let met = target.map(|target| value >= target);
        self.add(row, value, unit, target, met);
    }

    fn add(
        &mut self,
        row: &str,
        value: f64,
        unit: &'static str,
        target: Option<f64>,
        met: Option<bool>,
    ) {
        let mark = match met {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "",
        };
        let wanted = target.map_or_else(String::new, |target| format!(" (target {target})"));
        eprintln!("{row:42} {value:>12.3} {unit}{wanted} {mark}");
        self.rows.push(Row {
            row: row.to_owned(),
            value,
            unit,
            target,
            met,
        });
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    raise_descriptors(options.hosts as u64 * DESCRIPTORS_PER_HOST + 1024)?;
    if let Some(dir) = &options.agents_in {
        return agents::serve(dir, options.first, options.hosts).await;
    }
    // The controller has one for each host, and another one while it asks who that is.
    let most = options.curve.iter().copied().max().unwrap_or(0);
    raise_descriptors(most as u64 + most as u64 / 2 + 1024)?;
    let mut report = Report {
        store: options.store,
        hosts: options.hosts,
        vms: options.vms,
        rows: Vec::new(),
    };
    hold(&options, &mut report).await?;
    curve(&options, &mut report).await?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

/// Hosts and a controller that knows them.
struct Site {
    setup: Setup,
    /// Those of this process.
    hosts: Vec<Served>,
    _agents: Option<Agents>,
    _etcd: Option<etcd::Cluster>,
    _dir: tempfile::TempDir,
}

impl Site {
    /// Hosts that are other processes' can do nothing of their own.
    fn new(options: &Options, count: usize, elsewhere: bool) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let sockets = dir.path().join("hosts");
        std::fs::create_dir(&sockets)?;
        let (hosts, agents) = match elsewhere {
            true => (Vec::new(), Some(Agents::start(&sockets, count)?)),
            false => {
                let hosts = (0..count).map(|number| Served::start(&sockets, number));
                (hosts.collect::<Result<Vec<_>>>()?, None)
            }
        };
        let addresses = (0..count).map(|number| agents::address(&sockets, number));
        let etcd = match options.store {
            Store::Embedded => None,
            Store::Etcd => Some(etcd::Cluster::start(ETCD_MEMBERS).context("there is no etcd")?),
        };
        let endpoints = etcd.as_ref().map(etcd::Cluster::endpoints);
        Ok(Self {
            setup: Setup {
                program: options.controller.clone().unwrap_or_default(),
                dir: dir.path().to_owned(),
                etcd: endpoints.unwrap_or_default(),
                hosts: addresses.collect(),
            },
            hosts,
            _agents: agents,
            _etcd: etcd,
            _dir: dir,
        })
    }

    /// Waits until all hosts that are alive are connected.
    async fn connected(&self, channel: &Channel, alive: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut count = 0;
            let mut page_token = String::new();
            loop {
                let request = ListHostsRequest {
                    page_size: 1000,
                    page_token,
                    filter: "connected = true".into(),
                    ..Default::default()
                };
                let mut client = HostsClient::new(channel.clone());
                let page = client.list_hosts(request).await?.into_inner();
                count += page.hosts.len();
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            if count >= alive {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{count} of {alive} hosts are connected"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn channels(controller: &Controller) -> Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for _ in 0..load::CONNECTIONS {
        channels.push(controller.connect().await?);
    }
    Ok(channels)
}

/// The whole load at once, a host's death and a restart.
async fn hold(options: &Options, report: &mut Report) -> Result<()> {
    let embedded = options.store == Store::Embedded;
    let mut site = Site::new(options, options.hosts, false)?;
    let controller = site.setup.start()?;
    let connections = channels(&controller).await?;
    site.connected(&connections[0], options.hosts).await?;
    let empty_bytes = controller.anonymous_bytes()?;

    let took = load::create(&connections, 0, options.vms).await?;
    let vms = load::list(&connections[0], "").await?;
    let unplaced = vms.iter().filter(|vm| host_of(vm).is_empty()).count();
    ensure!(
        unplaced == 0,
        "{unplaced} of {} VMs are on no host",
        vms.len()
    );
    let rate = options.vms as f64 / took.as_secs_f64();
    report.at_least(
        "create to placed",
        rate,
        "VMs/s",
        embedded.then_some(2_000.0),
    );
    let took = load::start(&connections, 0, options.vms).await?;
    report.at_least(
        "start accepted",
        options.vms as f64 / took.as_secs_f64(),
        "VMs/s",
        None,
    );
    let running = running(&site, options.vms).await?;
    report.at_most(
        "start accepted to all running",
        running.as_secs_f64(),
        "s",
        None,
    );

    // 1 % of the VMs change each second, in the steps of a clock that ticks 100 times a second.
    let hosts: Vec<host::Host> = site
        .hosts
        .iter()
        .map(|served| served.host.clone())
        .collect();
    let each_tick = (options.vms / 100).div_ceil(100).max(1);
    let disturbing = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        let mut number = 0usize;
        loop {
            ticks.tick().await;
            for _ in 0..each_tick {
                number = number.wrapping_add(7919);
                hosts[number % hosts.len()].disturb(number / hosts.len());
            }
        }
    });
    let used = controller.cpu_seconds()?;
    let begun = Instant::now();
    let length = Duration::from_secs(options.seconds);
    let times = load::steady(&connections, options.vms, options.requests, length).await?;
    let share = (controller.cpu_seconds()? - used) / begun.elapsed().as_secs_f64();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    report.at_most(
        "API p50 under load",
        ms(load::quantile(&times, 0.5)),
        "ms",
        None,
    );
    report.at_most(
        "API p99 under load",
        ms(load::quantile(&times, 0.99)),
        "ms",
        Some(20.0),
    );
    report.at_most(
        "API max under load",
        ms(load::quantile(&times, 1.0)),
        "ms",
        None,
    );
    report.at_most("CPUs of the controller under load", share, "CPUs", None);
    disturbing.abort();
    let grown = controller.anonymous_bytes()?.saturating_sub(empty_bytes);
    let per_vm = grown as f64 / options.vms as f64;
    report.at_most("heap growth", per_vm, "bytes/VM", Some(4096.0));

    death(&mut site, &connections[0], report).await?;
    controller.stop()?;
    let begun = Instant::now();
    let controller = site.setup.start()?;
    let channel = controller.connect().await?;
    let first = load::vm_id(0);
    let mut client = vms_client::VmsClient::new(channel.clone());
    let name = format!("projects/default/vms/{first}");
    client.get_vm(GetVmRequest { name }).await?;
    report.at_most(
        "restart to serving",
        begun.elapsed().as_secs_f64(),
        "s",
        Some(3.0),
    );
    site.connected(&channel, site.hosts.len()).await?;
    report.at_most(
        "restart to all hosts connected",
        begun.elapsed().as_secs_f64(),
        "s",
        None,
    );
    controller.stop()
}

/// One host dies: how long until its VMs have others, from when it counts as lost.
async fn death(site: &mut Site, channel: &Channel, report: &mut Report) -> Result<()> {
    let dead = site.hosts.swap_remove(0);
    let name = dead.host.name();
    let filter = format!("status.host = \"{name}\"");
    let there = load::list(channel, &filter).await?;
    // Others stay, whatever becomes of their host.
    let there = there.iter().filter(|vm| load::roams(&vm.name)).count();
    let mut events = events_client::EventsClient::new(channel.clone())
        .watch_events(WatchEventsRequest {
            after_revision: u64::MAX,
            ..Default::default()
        })
        .await?
        .into_inner();
    let begun = Instant::now();
    drop(dead);
    let mut lost = None;
    let mut placed = 0;
    let all = async {
        while let Some(message) = events.message().await? {
            let Some(watch_events_response::Message::Event(event)) = message.message else {
                continue;
            };
            match event.reason.as_str() {
                "VM_TAKEN" => {
                    lost.get_or_insert_with(Instant::now);
                }
                "VM_PLACED" if lost.is_some() => placed += 1,
                _ => {}
            }
            if placed >= there && lost.is_some() {
                return Ok(());
            }
        }
        Err(tonic::Status::unavailable("the events ended"))
    };
    tokio::time::timeout(PATIENCE, all)
        .await
        .with_context(|| format!("{placed} of {there} VMs were placed again"))??;
    let lost = lost.context("nobody said that the host is lost")?;
    let detected = lost.duration_since(begun).as_secs_f64();
    report.at_most("host death to lost", detected, "s", None);
    let replanned = lost.elapsed().as_secs_f64();
    report.at_most("lost to re-planned", replanned, "s", Some(1.0));
    Ok(())
}

fn host_of(vm: &Vm) -> &str {
    vm.status.as_ref().map_or("", |status| &status.host)
}

/// Waits until so many VMs run, as their hosts say.
async fn running(site: &Site, wanted: usize) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        let count: usize = site.hosts.iter().map(|served| served.host.running()).sum();
        if count >= wanted {
            return Ok(begun.elapsed());
        }
        ensure!(begun.elapsed() < PATIENCE, "{count} of {wanted} VMs run");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a placement costs with few and with many hosts.
async fn curve(options: &Options, report: &mut Report) -> Result<()> {
    let mut costs: Vec<(usize, f64)> = Vec::new();
    for hosts in options.curve.iter().copied() {
        let site = Site::new(options, hosts, true)?;
        let controller = site.setup.start()?;
        let connections = channels(&controller).await?;
        site.connected(&connections[0], hosts).await?;
        // What connections and heartbeats take is not placing.
        let idle = controller.cpu_seconds()?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let idle = (controller.cpu_seconds()? - idle) / 3.0;
        let used = controller.cpu_seconds()?;
        let took = load::create(&connections, 0, options.curve_vms).await?;
        let used = controller.cpu_seconds()? - used - idle * took.as_secs_f64();
        let cost = used.max(0.0) * 1e6 / options.curve_vms as f64;
        report.at_most(
            &format!("placement with {hosts} hosts"),
            cost,
            "us CPU",
            None,
        );
        costs.push((hosts, cost));
        controller.stop()?;
    }
    for pair in costs.windows(2) {
        let [(few, cheap), (many, dear)] = pair else {
            continue;
        };
        // 1 would be linear: ten times the hosts, ten times the cost.
        let growth = (dear / cheap.max(1.0)) / (*many as f64 / *few as f64);
        report.at_most(
            &format!("growth from {few} to {many} hosts"),
            growth,
            "of linear",
            Some(1.0),
        );
    }
    Ok(())
}

fn raise_descriptors(wanted: u64) -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).with_context(|| {
            format!("this takes {wanted} descriptors and {hard} are allowed; raise ulimit -Hn")
        })?;
    }
    Ok(())
}
