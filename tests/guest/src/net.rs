//! The first NIC: its addresses, its cable, and verified I/O over it.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use guest::datagrams;
use guest::exchange::as_guest;
use guest::pattern::BLOCK_LEN;
use guest::report::{Reached, Report};

use crate::stall::Watch;
use crate::system::wait_for;

const NIC: &str = "eth0";
/// What the DHCP client runs with its findings in variables; kept beside it.
const SCRIPT: &str = "/tmp/dhcp-script";
const SCRIPT_TEXT: &str =
    "#!/bin/busybox sh\n[ \"$1\" = bound ] && /bin/busybox env > /tmp/lease\nexit 0\n";
const LEASE: &str = "/tmp/lease";
/// As the NIC's driver finds its device.
const APPEARS_WITHIN: Duration = Duration::from_secs(20);
/// Emulated machines are slow; a healthy exchange never comes near it.
const LIMIT: Duration = Duration::from_secs(60);

/// Gives the NIC its address and brings it up.
pub(crate) fn set_address(cidr: &str) -> Report {
    let error = bring_up()
        .and_then(|()| ip(&["addr", "add", cidr, "dev", NIC]))
        .err();
    Report::Address {
        mac: attribute("address"),
        error,
    }
}

fn bring_up() -> Result<(), String> {
    let dir = format!("/sys/class/net/{NIC}");
    wait_for(NIC, APPEARS_WITHIN, || fs::exists(&dir).unwrap_or(false))?;
    ip(&["link", "set", NIC, "up"])
}

/// What sysfs says of the NIC; empty if it doesn't.
fn attribute(name: &str) -> String {
    let text = fs::read_to_string(format!("/sys/class/net/{NIC}/{name}"));
    text.unwrap_or_default().trim().to_owned()
}

/// Asks for a lease and uses it.
pub(crate) fn configure() -> Report {
    let (lease, error) = match bring_up().and_then(|()| lease()) {
        Ok(lease) => {
            let error = use_lease(&lease).err();
            (lease, error)
        }
        Err(error) => (BTreeMap::new(), Some(error)),
    };
    let value = |name: &str| lease.get(name).cloned().unwrap_or_default();
    Report::Lease {
        mac: attribute("address"),
        address: format!("{}/{}", value("ip"), value("mask")),
        router: first(&value("router")),
        name_server: first(&value("dns")),
        domain: value("domain"),
        mtu: attribute("mtu").parse().unwrap_or(0),
        error,
    }
}

fn lease() -> Result<BTreeMap<String, String>, String> {
    let _ = fs::remove_file(LEASE);
    fs::write(SCRIPT, SCRIPT_TEXT).map_err(|error| format!("{SCRIPT}: {error}"))?;
    busybox(&["chmod", "755", SCRIPT])?;
    busybox(&[
        "udhcpc", "-i", NIC, "-n", "-q", "-f", "-t", "10", "-T", "3", "-O", "mtu", "-s", SCRIPT,
    ])?;
    let text = fs::read_to_string(LEASE).map_err(|error| format!("no lease: {error}"))?;
    let variables = text.lines().filter_map(|line| line.split_once('='));
    Ok(variables
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect())
}

fn use_lease(lease: &BTreeMap<String, String>) -> Result<(), String> {
    let value = |name: &str| lease.get(name).map(String::as_str);
    let (Some(address), Some(prefix)) = (value("ip"), value("mask")) else {
        return Err("the lease has no address".into());
    };
    ip(&["-4", "addr", "flush", "dev", NIC])?;
    ip(&["addr", "add", &format!("{address}/{prefix}"), "dev", NIC])?;
    if let Some(mtu) = value("mtu") {
        ip(&["link", "set", NIC, "mtu", mtu])?;
    }
    if let Some(router) = value("router") {
        ip(&["route", "add", "default", "via", &first(router)])?;
    }
    crate::dns::use_server(&first(value("dns").unwrap_or_default()))
}

fn first(list: &str) -> String {
    list.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Waits for an address that was made of a router's advertisement, say.
pub(crate) fn wait_for_ipv6() -> Report {
    let error = wait_for("an IPv6 address", Duration::from_secs(30), || {
        ipv6_address().is_some()
    })
    .err();
    Report::Ipv6 {
        address: ipv6_address().unwrap_or_default(),
        error,
    }
}

/// The first of global scope that no longer is tentative (proc(5): if_inet6).
fn ipv6_address() -> Option<String> {
    const TENTATIVE: u32 = 0x40;
    let text = fs::read_to_string("/proc/net/if_inet6").ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [address, _, _, "00", flags, NIC] = fields[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let bits = u128::from_str_radix(address, 16).ok()?;
        (flags & TENTATIVE == 0).then(|| Ipv6Addr::from_bits(bits).to_string())
    })
}

/// Waits until the cable is in, or out.
pub(crate) fn wait_for_carrier(up: bool) -> Report {
    let wanted = if up { "1" } else { "0" };
    let error = wait_for("the cable's other state", LIMIT, || {
        attribute("carrier") == wanted
    })
    .err();
    Report::Carrier { up, error }
}

/// Counts echoes.
pub(crate) fn ping(peer: IpAddr) -> Report {
    let output = Command::new("/bin/busybox")
        .args(["ping", "-c", "3", "-W", "2", &peer.to_string()])
        .output();
    let (echoes, error) = match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let echoes = text.lines().filter(|line| line.contains(" seq=")).count();
            (echoes as u32, None)
        }
        Err(error) => (0, Some(format!("cannot run ping: {error}"))),
    };
    Report::Ping { echoes, error }
}

/// Tries once to connect.
pub(crate) fn reach(peer: SocketAddr) -> Report {
    let outcome = match TcpStream::connect_timeout(&peer, Duration::from_secs(4)) {
        Ok(_) => Reached::Connected,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Reached::Refused,
        Err(_) => Reached::Nothing,
    };
    Report::Reach {
        outcome,
        error: None,
    }
}

/// Has datagrams answered.
pub(crate) fn ask(peer: SocketAddr, seed: u64, datagrams: u64) -> Report {
    match datagrams::ask(peer, seed, datagrams, LIMIT) {
        Ok(repeated) => Report::Udp {
            answered: datagrams,
            repeated,
            error: None,
        },
        Err(error) => Report::Udp {
            answered: 0,
            repeated: 0,
            error: Some(error),
        },
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    busybox(&[&["ip"], args].concat())
}

fn busybox(args: &[&str]) -> Result<(), String> {
    let output = Command::new("/bin/busybox")
        .args(args)
        .output()
        .map_err(|error| format!("cannot run busybox: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// Exchanges payloads with somebody who listens.
pub(crate) fn exchange(peer: SocketAddr, seed: u64, bytes: u64) -> Report {
    match try_exchange(peer, seed, bytes) {
        Ok(received_sha256) => Report::Net {
            bytes,
            received_sha256,
            error: None,
        },
        Err(error) => Report::Net {
            bytes: 0,
            received_sha256: String::new(),
            error: Some(error),
        },
    }
}

fn try_exchange(peer: SocketAddr, seed: u64, bytes: u64) -> Result<String, String> {
    if !bytes.is_multiple_of(BLOCK_LEN as u64) {
        return Err(format!("{bytes} is not a whole number of blocks"));
    }
    let stream = connect(peer)?;
    let socket = |error: std::io::Error| format!("socket: {error}");
    stream.set_read_timeout(Some(LIMIT)).map_err(socket)?;
    stream.set_write_timeout(Some(LIMIT)).map_err(socket)?;
    let _watch = Watch::over(&stream);
    as_guest(stream, seed, bytes).map(|received| received.to_string())
}

/// The other end may come up later than ours.
fn connect(peer: SocketAddr) -> Result<TcpStream, String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match TcpStream::connect_timeout(&peer, Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(format!("cannot connect to {peer}: {error}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
