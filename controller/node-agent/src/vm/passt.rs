//! passt (passt.top) as a VM's NIC: it makes the guest's connections as ordinary sockets of the host, so
//! neither tap nor privilege is needed. One process serves one NIC; it confines itself, and as root it
//! becomes nobody first.
//!
//! It has no control socket: it serves once it has bound its vhost-user socket and is confined.

use std::{
    ffi::OsString,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use api::device::DaemonInfo;

use super::daemon::{DaemonError, Listeners, Up};
use crate::{
    process::{Guard, Process},
    spec::{Spec, UserNetwork},
};

/// Name of the program.
pub(crate) const PROGRAM: &str = "passt";
/// It reads the host's routes and resolvers and is there.
const UP_WITHIN: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Printing a page of text.
const HELP_DEADLINE: Duration = Duration::from_secs(5);
/// The guest's resolver. Link-local, so that it is nobody's: queries go to passt, which passes them on to
/// the host's own resolver, even to one that listens on loopback only.
const DNS: &str = "169.254.1.1";
/// VIRTIO_NET_F_MTU and VIRTIO_NET_F_MAC (Virtio 1.2 section 5.1.3).
const NET_F_MTU: u64 = 1 << 3;
const NET_F_MAC: u64 = 1 << 5;
/// Linux's `Seccomp:` in /proc/PID/status when a filter is in force.
const SECCOMP_FILTER: &str = "2";

/// Why there is no user network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PasstError {
    /// Not installed.
    #[error(
        "passt, which makes user networks, is not installed; install it (Debian 13 and newer: apt-get install passt), or name it with node-agent's --passt"
    )]
    Missing,
    /// An old one.
    #[error("{path} cannot serve vhost-user; install passt of November 2024 or newer (Debian 13 has one), or name one with node-agent's --passt", path = .path.display())]
    TooOld {
        /// The program.
        path: PathBuf,
    },
    /// It does not work.
    #[error("{path} cannot be run; install passt anew", path = .path.display())]
    Broken {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// The program for a spec's user networks: the one that was named, one beside ours, or one in PATH. Where the
/// spec has no user network nothing is looked for.
///
/// # Errors
/// When there is none, or it is too old.
pub(super) async fn find(
    named: Option<&Path>,
    bin_dir: &Path,
    spec: &Spec,
) -> Result<PathBuf, PasstError> {
    if spec.nics.iter().all(|nic| nic.user.is_none()) {
        return Ok(PROGRAM.into());
    }
    checked(named, bin_dir).await
}

async fn checked(named: Option<&Path>, bin_dir: &Path) -> Result<PathBuf, PasstError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::iter::once(bin_dir.to_owned())
                .chain(std::env::split_paths(&path))
                .map(|dir| dir.join(PROGRAM))
                .find(|program| program.is_file())
                .ok_or(PasstError::Missing)?
        }
    };
    let broken = |source| PasstError::Broken {
        path: path.clone(),
        source,
    };
    let help = tokio::process::Command::new(&path)
        .arg("--help")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let help = tokio::time::timeout(HELP_DEADLINE, help)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(broken)?;
    let text = [help.stdout, help.stderr].concat();
    let knows = String::from_utf8_lossy(&text).contains("--vhost-user");
    if knows {
        Ok(path)
    } else {
        Err(PasstError::TooOld { path })
    }
}

/// What `vmm-core` is told of a NIC, beyond its socket: passt serves no configuration space.
pub(super) fn device_options(mac: &str, mtu: u32) -> String {
    let mac: String = mac.split(':').collect();
    // Status and number of queue pairs, which no feature asks for; then the MTU.
    let (mtu, features) = match u16::try_from(mtu) {
        Ok(mtu) if mtu > 0 => (mtu, NET_F_MAC | NET_F_MTU),
        _ => (0, NET_F_MAC),
    };
    let mtu: String = mtu.to_le_bytes().map(|byte| format!("{byte:02x}")).concat();
    format!(",config=hex:{mac}00000000{mtu},config-features={features:#x}")
}

/// Its command line.
pub(super) fn args(
    socket: &Path,
    network: &UserNetwork,
    mtu: u32,
    resolver: Option<Ipv4Addr>,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = ["--vhost-user", "--foreground", "--socket"]
        .map(OsString::from)
        .into();
    args.push(socket.into());
    let mut option = |name: &str, value: String| args.extend([name.into(), value.into()]);
    if let Some(resolver) = resolver {
        option("--dns", DNS.into());
        option("--dns-forward", DNS.into());
        // Not found by itself once --dns is given.
        option("--dns-host", resolver.to_string());
    }
    if mtu > 0 {
        option("--mtu", mtu.to_string());
    }
    match network.host_loopback {
        Some(address) => option("--map-host-loopback", address.to_string()),
        // Else the gateway's address would be the host's loopback, with all that trusts it.
        None => option("--map-host-loopback", "none".into()),
    }
    for forward in &network.port_forwards {
        let name = match forward.udp {
            false => "--tcp-ports",
            true => "--udp-ports",
        };
        let ports = format!("{}:{}", forward.host_port, forward.guest_port);
        option(
            name,
            match forward.host_address {
                Some(address) => format!("{address}/{ports}"),
                None => ports,
            },
        );
    }
    args
}

/// The host's resolver, for guests: its first one of IPv4. `None` leaves it to passt what to tell them.
pub(super) fn resolver() -> Option<Ipv4Addr> {
    parse_resolver(&std::fs::read_to_string("/etc/resolv.conf").ok()?)
}

fn parse_resolver(resolv_conf: &str) -> Option<Ipv4Addr> {
    let servers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()
    });
    servers.flat_map(str::parse).next()
}

/// Starts it; on return it can be connected to.
pub(super) async fn bring_up(
    program: &Path,
    args: &[OsString],
    socket: &Path,
    log: &Path,
) -> Result<Up, DaemonError> {
    // Of the last incarnation.
    let _ = std::fs::remove_file(socket);
    let process = Process::spawn(program, args, log)?;
    let exited = process.exited();
    let sandbox = tokio::select! {
        exit = exited => return Err(DaemonError::Exited(super::ending(PROGRAM, exit, log))),
        ready = tokio::time::timeout(UP_WITHIN, ready(&process, socket)) => match ready {
            Ok(sandbox) => sandbox,
            Err(_) => return Err(DaemonError::Silent {
                program: PROGRAM,
                last_line: crate::process::last_line(log),
            }),
        },
    };
    Ok(Up {
        process,
        listeners: Listeners::new(),
        info: info(sandbox),
    })
}

/// What it would say of itself.
pub(super) fn info(sandbox: Vec<String>) -> DaemonInfo {
    DaemonInfo {
        name: PROGRAM.to_owned(),
        sandbox,
        ..DaemonInfo::default()
    }
}

async fn ready(process: &Guard, socket: &Path) -> Vec<String> {
    loop {
        if socket.exists()
            && let Some(sandbox) = sandbox(process.pid())
        {
            return sandbox;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// What keeps it in; `None` while it is on its way there.
pub(super) fn sandbox(pid: i32) -> Option<Vec<String>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    parse_sandbox(&status)
}

fn parse_sandbox(status: &str) -> Option<Vec<String>> {
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.split_whitespace().next()
    };
    if field("Seccomp:")? != SECCOMP_FILTER {
        return None;
    }
    let mut found = vec!["seccomp".to_owned(), "namespaces".to_owned()];
    if field("NoNewPrivs:") == Some("1") {
        found.push("no_new_privs".to_owned());
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::spec::PortForward;

    fn text(args: &[OsString]) -> String {
        let words: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn ports_and_nothing_of_the_host_reach_the_guest() {
        let network = UserNetwork {
            port_forwards: vec![
                PortForward {
                    udp: false,
                    host_address: Some(IpAddr::from([127, 0, 0, 1])),
                    host_port: 2222,
                    guest_port: 22,
                },
                PortForward {
                    udp: true,
                    host_address: None,
                    host_port: 53,
                    guest_port: 5353,
                },
            ],
            host_loopback: None,
        };
        let resolver = Some(Ipv4Addr::new(127, 0, 0, 53));
        let args = text(&args(Path::new("/run/eth0.vu"), &network, 1400, resolver));
        for wanted in [
            "--dns-host 127.0.0.53",
            "--tcp-ports 127.0.0.1/2222:22",
            "--udp-ports 53:5353",
            "--map-host-loopback none",
            "--mtu 1400",
            "--socket /run/eth0.vu",
        ] {
            assert!(args.contains(wanted), "{wanted}: {args}");
        }
    }

    #[test]
    fn configuration_space_has_the_address_and_the_mtu_where_the_driver_looks() {
        assert_eq!(
            device_options("52:54:00:0a:0b:0c", 0),
            ",config=hex:5254000a0b0c000000000000,config-features=0x20"
        );
        assert_eq!(
            device_options("52:54:00:0a:0b:0c", 1400),
            ",config=hex:5254000a0b0c000000007805,config-features=0x28"
        );
    }

    #[test]
    fn first_resolver_of_ipv4_is_taken() {
        let text = "# nameserver 192.0.2.1\nsearch example\nnameserver ::1\nnameserver 127.0.0.53\nnameserver 192.0.2.2\n";
        assert_eq!(parse_resolver(text), Some(Ipv4Addr::new(127, 0, 0, 53)));
        assert_eq!(parse_resolver("nameserver fe80::1%eth0\n"), None);
    }

    #[test]
    fn process_without_its_filter_is_not_up() {
        assert_eq!(parse_sandbox("Name:\tpasst\nSeccomp:\t0\n"), None);
        let found = parse_sandbox("NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n").unwrap();
        assert!(found.contains(&"no_new_privs".to_owned()), "{found:?}");
    }

    #[tokio::test]
    async fn missing_and_old_programs_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let error = checked(Some(&dir.path().join("none")), dir.path())
            .await
            .unwrap_err();
        assert!(matches!(error, PasstError::Broken { .. }), "{error}");
        // It knows no such option.
        let error = checked(Some(Path::new("/bin/true")), dir.path())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("Debian 13"), "{error}");
    }
}
