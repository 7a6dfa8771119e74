//! dnsmasq for one network: DHCP with fixed addresses, the VMs' names, router advertisements. It runs
//! as a process of its own that outlives the agent; the next agent finds it by its command line and
//! keeps it if its configuration is what is wanted.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use api::node::{DhcpLease, NetworkKind, NetworkSpec};
use ipnet::IpNet;
use nix::sys::signal::Signal;

use super::{error::NetworkError, programs};
use crate::process::{self, Identity, Process};

/// From exec to the line that says it serves.
const UP_WITHIN: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
const STOP_WITHIN: Duration = Duration::from_secs(3);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// One that ran this long may be started again at once.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// Clients renew at half of it, so a change of the network is known by then.
const LEASE_TIME: &str = "1h";
/// Seconds that hosts keep a router they heard of; three advertisements may be lost.
const ROUTER_LIFETIME_S: u32 = 1800;
const ADVERTISE_INTERVAL_S: u32 = 60;

/// What one server is started with.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    id: String,
    program: PathBuf,
    dir: PathBuf,
    config: String,
}

/// A server that is kept running until [`Server::stop`].
#[derive(Debug)]
pub(super) struct Server {
    plan: Plan,
    shared: Arc<Mutex<Shared>>,
    supervisor: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    process: Option<Process>,
    restarts: u64,
}

/// Its stderr.
pub(super) fn log(dir: &Path) -> PathBuf {
    dir.join("dnsmasq.log")
}

/// Whether the network has one.
pub(super) fn is_wanted(spec: &NetworkSpec) -> bool {
    spec.dhcp || spec.dns
}

impl Plan {
    /// For a network on `bridge`, with files in `dir`.
    ///
    /// # Errors
    /// When dnsmasq is not installed.
    pub(super) fn new(spec: &NetworkSpec, bridge: &str, dir: &Path) -> Result<Self, NetworkError> {
        Ok(Self {
            id: spec.id.clone(),
            program: programs::find(&spec.id, programs::DNSMASQ)?,
            dir: dir.to_owned(),
            config: render(spec, bridge, dir),
        })
    }

    fn config_file(&self) -> PathBuf {
        self.dir.join("dnsmasq.conf")
    }

    /// Keeps what runs if it is configured like this; else replaces it.
    ///
    /// # Errors
    /// When it does not come up, with its last words.
    pub(super) async fn ensure(self, current: Option<Server>) -> Result<Server, NetworkError> {
        if let Some(current) = current {
            if current.plan.config == self.config && current.is_alive() {
                return Ok(current);
            }
            current.stop().await;
        } else if fs::read_to_string(self.config_file()).is_ok_and(|text| text == self.config)
            && let Some(process) = running(&self.dir)
        {
            tracing::info!(network = self.id, pid = process.pid(), "adopted dnsmasq");
            return Ok(Server::supervise(self, process));
        }
        stop_strays(&self.dir).await;
        prune_leases(&self.dir, &self.config);
        let process = self.start().await?;
        Ok(Server::supervise(self, process))
    }

    async fn start(&self) -> Result<Process, NetworkError> {
        let path = self.config_file();
        fs::write(&path, &self.config).map_err(NetworkError::io(&self.id, "writing", &path))?;
        let log = log(&self.dir);
        let _ = process::bound_log(&log);
        let begin = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let mut config = OsString::from("--conf-file=");
        config.push(path);
        let args = [OsString::from("--keep-in-foreground"), config];
        let guard =
            Process::spawn(&self.program, &args, &log).map_err(|source| NetworkError::Spawn {
                id: self.id.clone(),
                source,
            })?;
        let deadline = Instant::now() + UP_WITHIN;
        loop {
            if said(&log, begin).contains(": started, version") {
                return Ok(guard.keep());
            }
            if let Some(exit) = guard.exited_within(LOOK_INTERVAL).await {
                let words = process::last_line(&log).unwrap_or_default();
                return Err(NetworkError::Server {
                    id: self.id.clone(),
                    message: format!("dnsmasq {exit}: {}", words.trim_start_matches("dnsmasq: ")),
                });
            }
            if Instant::now() > deadline {
                return Err(NetworkError::Server {
                    id: self.id.clone(),
                    message: format!(
                        "dnsmasq did not start within {UP_WITHIN:?}; see {}",
                        log.display()
                    ),
                });
            }
        }
    }
}

impl Server {
    fn supervise(plan: Plan, process: Process) -> Self {
        let shared = Arc::new(Mutex::new(Shared {
            process: Some(process.clone()),
            restarts: 0,
        }));
        let supervisor = tokio::spawn(keep_running(plan.clone(), process, shared.clone()));
        Self {
            plan,
            shared,
            supervisor,
        }
    }

    /// Process id and restarts; 0 while it is being restarted.
    pub(super) fn state(&self) -> (u32, u64) {
        let shared = self.shared.lock().expect("nothing panics under this lock");
        let pid = shared
            .process
            .as_ref()
            .map_or(0, |process| process.pid() as u32);
        (pid, shared.restarts)
    }

    fn is_alive(&self) -> bool {
        let shared = self.shared.lock().expect("nothing panics under this lock");
        shared
            .process
            .as_ref()
            .is_some_and(|process| process.exit().is_none())
    }

    /// Ends it.
    pub(super) async fn stop(self) {
        self.supervisor.abort();
        // A start that is cut off here kills what it began.
        let _ = self.supervisor.await;
        let process = {
            let mut shared = self.shared.lock().expect("nothing panics under this lock");
            shared.process.take()
        };
        if let Some(process) = process {
            end(&process).await;
        }
    }
}

async fn keep_running(plan: Plan, mut process: Process, shared: Arc<Mutex<Shared>>) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let begun = Instant::now();
        let exit = process.exited().await;
        tracing::warn!(network = plan.id, "dnsmasq {exit}; starting it again");
        shared
            .lock()
            .expect("nothing panics under this lock")
            .process = None;
        if begun.elapsed() > STABLE_AFTER {
            backoff = FIRST_BACKOFF;
        }
        process = loop {
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
            match plan.start().await {
                Ok(process) => break process,
                Err(error) => tracing::warn!("{}", crate::vm::error_chain(&error)),
            }
        };
        let mut shared = shared.lock().expect("nothing panics under this lock");
        shared.process = Some(process.clone());
        shared.restarts += 1;
    }
}

/// Ends whatever serves from `dir`.
pub(super) async fn stop_strays(dir: &Path) {
    while let Some(process) = running(dir) {
        end(&process).await;
    }
}

async fn end(process: &Process) {
    process.signal(Signal::SIGTERM);
    if process.exited_within(STOP_WITHIN).await.is_none() {
        process.kill().await;
    }
}

/// The dnsmasq that has its configuration in `dir`.
fn running(dir: &Path) -> Option<Process> {
    let wanted = format!("--conf-file={}", dir.join("dnsmasq.conf").display());
    let entries = fs::read_dir("/proc").ok()?;
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids {
        let Ok(cmdline) = fs::read(format!("/proc/{pid}/cmdline")) else {
            continue;
        };
        if !cmdline
            .split(|&byte| byte == 0)
            .any(|arg| arg == wanted.as_bytes())
        {
            continue;
        }
        if let Some(start_ticks) = process::start_ticks(pid)
            && let Some(process) = Process::adopt(Identity { pid, start_ticks })
        {
            return Some(process);
        }
    }
    None
}

/// What the log has gained since it was `begin` bytes long.
fn said(log: &Path, begin: u64) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let begin = usize::try_from(begin).unwrap_or(0).min(bytes.len());
    String::from_utf8_lossy(&bytes[begin..]).into_owned()
}

/// A lease of somebody who is gone would keep the address from whoever has it now. Those of IPv6 do
/// not say whose they are, and clients get the same address again.
fn prune_leases(dir: &Path, config: &str) {
    let path = dir.join("leases");
    let Ok(text) = fs::read_to_string(&path) else {
        return;
    };
    let kept: String = text
        .lines()
        .filter(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            fields.len() > 3 && config.contains(&format!("dhcp-host={},{}", fields[1], fields[2]))
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    if let Err(error) = fs::write(&path, kept) {
        tracing::warn!("writing {}: {error}", path.display());
    }
}

/// The leases that are known in `dir`.
pub(super) fn leases(dir: &Path) -> Vec<DhcpLease> {
    let text = fs::read_to_string(dir.join("leases")).unwrap_or_default();
    parse_leases(&text)
}

/// `EXPIRY MAC ADDRESS HOSTNAME CLIENT-ID`; for IPv6 there is an association's number for the MAC.
fn parse_leases(text: &str) -> Vec<DhcpLease> {
    text.lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [expires_at, mac, address, hostname, ..] = fields[..] else {
                return None;
            };
            Some(DhcpLease {
                mac: match mac.contains(':') {
                    true => mac.to_owned(),
                    false => String::new(),
                },
                address: address.parse::<std::net::IpAddr>().ok()?.to_string(),
                hostname: hostname.trim_start_matches('*').to_owned(),
                expires_at: expires_at.parse().ok()?,
            })
        })
        .collect()
}

/// The user that it becomes once its sockets are open. Where there is none but root it stays root.
fn user() -> &'static str {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let has = |name: &str| {
        passwd
            .lines()
            .any(|line| line.split(':').next() == Some(name))
    };
    ["dnsmasq", "nobody"]
        .into_iter()
        .find(|name| has(name))
        .unwrap_or("root")
}

fn render(spec: &NetworkSpec, bridge: &str, dir: &Path) -> String {
    let mut text = String::new();
    let nets: Vec<IpNet> = [&spec.ipv4_gateway, &spec.ipv6_gateway]
        .into_iter()
        .filter_map(|net| net.parse().ok())
        .collect();
    let _ = writeln!(
        text,
        "interface={bridge}\nexcept-interface=lo\nbind-dynamic"
    );
    let _ = writeln!(text, "user={}\npid-file\nlog-facility=-\nno-hosts", user());
    dns(&mut text, spec);
    if spec.dhcp {
        dhcp(&mut text, spec, bridge, &nets);
        let _ = writeln!(text, "dhcp-leasefile={}", dir.join("leases").display());
    }
    text
}

fn dns(text: &mut String, spec: &NetworkSpec) {
    if !spec.dns {
        text.push_str("port=0\n");
        return;
    }
    text.push_str("domain-needed\nbogus-priv\n");
    if !spec.dns_servers.is_empty() {
        text.push_str("no-resolv\n");
        for server in &spec.dns_servers {
            let _ = writeln!(text, "server={server}");
        }
    }
    let domain = &spec.dns_domain;
    if !domain.is_empty() {
        let _ = writeln!(text, "domain={domain}\nlocal=/{domain}/");
    }
    for endpoint in spec
        .endpoints
        .iter()
        .filter(|endpoint| !endpoint.hostname.is_empty())
    {
        let addresses: Vec<&str> = [&endpoint.ipv4_address, &endpoint.ipv6_address]
            .into_iter()
            .filter(|address| !address.is_empty())
            .map(String::as_str)
            .collect();
        if addresses.is_empty() {
            continue;
        }
        let name = &endpoint.hostname;
        let names = match domain.as_str() {
            "" => name.clone(),
            domain => format!("{name}.{domain},{name}"),
        };
        let _ = writeln!(text, "host-record={names},{}", addresses.join(","));
    }
}

fn dhcp(text: &mut String, spec: &NetworkSpec, bridge: &str, nets: &[IpNet]) {
    let routes = spec.kind() == NetworkKind::Nat;
    text.push_str("dhcp-authoritative\nquiet-dhcp\nquiet-dhcp6\nquiet-ra\ndhcp-lease-max=65536\n");
    for net in nets {
        match net {
            IpNet::V4(net) => {
                // Only whom the controller told of gets an address.
                let (network, mask) = (net.network(), net.netmask());
                let _ = writeln!(text, "dhcp-range={network},static,{mask},{LEASE_TIME}");
                if !routes {
                    text.push_str("dhcp-option=option:router\n");
                }
                if !spec.dns && !spec.dns_servers.is_empty() {
                    let servers = spec.dns_servers.join(",");
                    let _ = writeln!(text, "dhcp-option=option:dns-server,{servers}");
                }
                if spec.mtu != 0 {
                    let _ = writeln!(text, "dhcp-option=option:mtu,{}", spec.mtu);
                }
            }
            IpNet::V6(net) => {
                let (network, bits) = (net.network(), net.prefix_len());
                let _ = writeln!(
                    text,
                    "dhcp-range={network},static,slaac,{bits},{LEASE_TIME}"
                );
                let mtu = match spec.mtu {
                    0 => String::new(),
                    mtu => format!("mtu:{mtu},"),
                };
                let lifetime_s = if routes { ROUTER_LIFETIME_S } else { 0 };
                let _ = writeln!(
                    text,
                    "enable-ra\nra-param={bridge},{mtu}{ADVERTISE_INTERVAL_S},{lifetime_s}"
                );
            }
        }
    }
    for endpoint in &spec.endpoints {
        let mut fields = vec![endpoint.mac.clone()];
        if !endpoint.ipv4_address.is_empty() {
            fields.push(endpoint.ipv4_address.clone());
        }
        if !endpoint.ipv6_address.is_empty() {
            fields.push(format!("[{}]", endpoint.ipv6_address));
        }
        if !endpoint.hostname.is_empty() {
            fields.push(endpoint.hostname.clone());
        }
        let _ = writeln!(text, "dhcp-host={}", fields.join(","));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::node::Endpoint;

    fn spec() -> NetworkSpec {
        NetworkSpec {
            id: "front".into(),
            kind: NetworkKind::Nat as i32,
            ipv4_gateway: "10.20.0.1/24".into(),
            ipv6_gateway: "fd00:20::1/64".into(),
            dhcp: true,
            dns: true,
            dns_domain: "front.internal".into(),
            mtu: 1400,
            endpoints: vec![Endpoint {
                mac: "52:54:00:00:00:05".into(),
                ipv4_address: "10.20.0.5".into(),
                ipv6_address: "fd00:20::5".into(),
                hostname: "web".into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn endpoints_have_fixed_addresses_and_names() {
        let text = render(&spec(), "mb-front", Path::new("/run/x"));
        for line in [
            "interface=mb-front",
            "dhcp-range=10.20.0.0,static,255.255.255.0,1h",
            "dhcp-range=fd00:20::,static,slaac,64,1h",
            "dhcp-host=52:54:00:00:00:05,10.20.0.5,[fd00:20::5],web",
            "host-record=web.front.internal,web,10.20.0.5,fd00:20::5",
            "dhcp-option=option:mtu,1400",
            "ra-param=mb-front,mtu:1400,60,1800",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }

    #[test]
    fn host_only_networks_have_no_router() {
        let mut spec = spec();
        spec.kind = NetworkKind::HostOnly as i32;
        let text = render(&spec, "mb-front", Path::new("/run/x"));
        assert!(text.contains("dhcp-option=option:router\n"), "{text}");
        assert!(text.contains("ra-param=mb-front,mtu:1400,60,0\n"), "{text}");
    }

    #[test]
    fn leases_of_both_families_are_read() {
        let text = "1700000000 52:54:00:00:00:05 10.20.0.5 web 01:52:54:00:00:00:05\nduid 00:01\n1700000001 12345 fd00:20::5 * 00:03\n";
        let leases = parse_leases(text);
        assert_eq!(leases.len(), 2);
        assert_eq!(leases[0].hostname, "web");
        assert_eq!(
            (leases[1].mac.as_str(), leases[1].address.as_str()),
            ("", "fd00:20::5")
        );
    }

    #[test]
    fn leases_of_others_are_forgotten_before_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let mine = "1 52:54:00:00:00:05 10.20.0.5 web *\n";
        let text = format!("{mine}1 52:54:00:00:00:06 10.20.0.6 db *\nduid 00:01\n");
        fs::write(dir.path().join("leases"), text).unwrap();
        prune_leases(dir.path(), &render(&spec(), "mb-front", dir.path()));
        assert_eq!(fs::read_to_string(dir.path().join("leases")).unwrap(), mine);
    }
}
