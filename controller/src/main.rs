//! The controller's program: see the library.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use api::controller::certificates_server::CertificatesServer;
use api::controller::states_server::StatesServer;
use api::listen::{Address, Listener};
use api::serve;
use clap::{CommandFactory as _, Parser as _};

use controller::agent::Agent;
use controller::api::{Api, CertificateService, StateService};
use controller::certificates::Certificates;
use controller::faults::Experiments;
use controller::host_upgrades;
use controller::hosts::Hosts;
use controller::leader::{Candidate, Epoch, Term};
use controller::leases::Leases;
use controller::metrics;
use controller::options::{self, Command, Options, StateDir};
use controller::reconciler::{self, Reconciler};
use controller::store::schema::{self, SchemaError};
use controller::store::{SharedStore, StoreError};

/// Tens of thousands of small records come and go, on all threads: less of what they leave behind is kept than
/// by the C library.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// For the last words to the store.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(3);
/// A state that cannot be led is looked at again after this.
const SCHEMA_RETRY: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let options = Options::parse();
    if options.command.is_none() && !options.has_hosts() {
        let missing = "no host to manage: --standalone for this machine, --node for others, or --listen https://HOST:PORT for hosts that join";
        let kind = clap::error::ErrorKind::MissingRequiredArgument;
        Options::command().error(kind, missing).exit();
    }
    let done = match &options.command {
        Some(Command::Migrate(migrate)) => move_state(migrate),
        None => run(options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("controller: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(options: Options) -> anyhow::Result<()> {
    options.transport.check(&options.listen, &options.nodes)?;
    let telemetry = telemetry::init("controller", options.access.otlp.as_deref())?;
    let state_dir = StateDir::lock(&options.state_dir)?;
    let agent = if options.standalone {
        options::create_dir(&options.run_dir)?;
        let bin_dir = options
            .bin_dir()
            .context("cannot find this program's directory")?;
        let agent = Agent::new(&options.state_dir, &options.run_dir, &bin_dir)?;
        let agent = agent.with_metrics(options.agent_metrics_listen.clone());
        Some(agent.with_faults(options.allow_faults))
    } else {
        None
    };
    let opened = options.store.open(state_dir).await?;
    let store = opened.store.clone();
    let listeners: Result<Vec<_>, _> = options.listen.iter().map(Listener::bind).collect();
    let listeners = listeners?;
    let metrics_listener = options
        .metrics_listen
        .as_ref()
        .map(Listener::bind)
        .transpose()?;
    let certificates = options
        .transport
        .certificates(&store, &options.state_dir, &options.listen, &options.nodes)
        .await?;
    let asks = options.listen.iter().any(Address::is_tls);
    let gate = options.access.gate(&store, asks).await?;
    if let Some(open) = options.listen.iter().find(|address| !address.is_private())
        && !gate.authenticates()
    {
        tracing::warn!("the API is open to everybody who reaches {open}");
    }

    let addresses: Vec<Address> = listeners.iter().map(Listener::address).collect();
    let main = addresses.iter().find(|address| address.is_tls());
    let address = main.or(addresses.first()).map(ToString::to_string);
    let address = address.unwrap_or_default();
    let mut candidate = Candidate::new(store.clone(), address, options.store.lease_period());
    let mut epoch = candidate.epoch();
    if !opened.shared {
        candidate = candidate.alone();
        epoch = Epoch::none();
    }
    let leader = candidate.leader();
    let hosts = Hosts::new()
        .with_epoch(epoch)
        .with_certificates(certificates.clone());
    if let Some(certificates) = certificates.clone() {
        tokio::spawn(certificates.keep());
    }
    let mut named = options.nodes.clone();
    if let Some(agent) = agent {
        named.push(agent.address());
        tokio::spawn(agent.supervise());
    }
    for address in named {
        tokio::spawn(hosts.clone().register(store.clone(), address));
    }
    tokio::spawn(hosts.clone().run(store.clone()));
    let experiments = Experiments::new(store.clone(), hosts.clone(), options.allow_faults);
    let leases = Leases::new(options.lease_terms());
    let leading = tokio::spawn({
        let (hosts, experiments) = (hosts.clone(), experiments.clone());
        let work = move |term| lead(term, hosts.clone(), leases.clone(), experiments.clone());
        candidate.run(work)
    });
    if let Some(listener) = metrics_listener {
        serve_metrics(listener, store.clone(), hosts.clone());
    }
    let terminated = serve::terminated();
    addresses.iter().for_each(announce);
    let state = StateService::new(store.clone(), opened.kind(), leader.clone());
    let services = Api::new(store.clone(), hosts, experiments).services(&gate);
    let services = services.with(gate.guard(StatesServer::new(state)));
    let tls = certificates.as_ref().map(Certificates::server);
    let issuing = CertificateService::new(certificates);
    let services = services.with(gate.guard(CertificatesServer::new(issuing)));
    serve::on_all(listeners, tls, services, terminated).await?;
    leading.abort();
    let _ = leading.await;
    let last = leader.borrow().clone();
    if let Some(leader) = last {
        let resigned = tokio::time::timeout(RESIGN_TIMEOUT, leader.resign(&store)).await;
        if !matches!(resigned, Ok(Ok(()))) {
            tracing::warn!("the next leader must wait for the end of this one's lease");
        }
    }
    tracing::info!("stopped; VMs and the node agent run on");
    tokio::task::block_in_place(|| telemetry.shutdown());
    Ok(())
}

/// What one controller does at a time: everything that changes something by itself. Ends when it leads
/// no more.
async fn lead(term: Term, hosts: Hosts, leases: Leases, experiments: Experiments) {
    let Term { epoch, store } = term;
    loop {
        match schema::bring_up_to_date(&store, &[]).await {
            Ok(()) => break,
            Err(SchemaError::Store(StoreError::Deposed)) => return,
            Err(error) => {
                tracing::error!(error = %reconciler::with_source(&error), "cannot lead");
                tokio::time::sleep(SCHEMA_RETRY).await;
            }
        }
    }
    if let Err(error) = experiments.recover().await {
        tracing::warn!(
            error = %error.with_causes(),
            "cannot end fault experiments of an earlier run"
        );
    }
    let hosts = hosts.with_epoch(epoch);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(
        leases
            .clone()
            .run(store.clone(), hosts.clone(), Arc::new(hosts.clone())),
    );
    tasks.spawn(host_upgrades::run(store.clone(), hosts.clone()));
    tasks.spawn(Reconciler::new(store, hosts).with_leases(leases).run());
    tasks.join_next().await;
}

#[tokio::main]
async fn move_state(migrate: &options::Migrate) -> anyhow::Result<()> {
    let moved = migrate.run().await?;
    println!("moved {moved} records to {}", migrate.to);
    Ok(())
}

/// The address on stdout, for whoever started this with port 0.
fn announce(address: &Address) {
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "listening on {address}").and_then(|()| stdout.flush());
    tracing::info!(%address, "serving");
}

fn serve_metrics(listener: Listener, store: SharedStore, hosts: Hosts) {
    let runtime = tokio::runtime::Handle::current();
    let render = move || {
        let fleet = hosts.fleet();
        let desired = tokio::task::block_in_place(|| runtime.block_on(reconciler::load(&store)));
        desired
            .map(|desired| metrics::render(&desired, &fleet))
            .unwrap_or_default()
    };
    tokio::spawn(async move {
        if let Err(error) = api::metrics::serve_http(listener, render).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
}
