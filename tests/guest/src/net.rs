//! Verified network I/O over the first NIC.

use std::fs;
use std::net::{SocketAddrV4, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use guest::exchange::as_guest;
use guest::pattern::BLOCK_LEN;
use guest::report::Report;

use crate::system::wait_for;

const NIC: &str = "eth0";
/// Emulated machines are slow; a healthy exchange never comes near it.
const LIMIT: Duration = Duration::from_secs(60);

/// Gives the NIC its address and brings it up.
pub(crate) fn set_address(cidr: &str) -> Report {
    let dir = format!("/sys/class/net/{NIC}");
    let error = wait_for(NIC, Duration::from_secs(20), || {
        fs::exists(&dir).unwrap_or(false)
    })
    .and_then(|()| ip(&["addr", "add", cidr, "dev", NIC]))
    .and_then(|()| ip(&["link", "set", NIC, "up"]))
    .err();
    let mac = fs::read_to_string(format!("{dir}/address"))
        .unwrap_or_default()
        .trim()
        .to_owned();
    Report::Address { mac, error }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("/bin/busybox")
        .arg("ip")
        .args(args)
        .output()
        .map_err(|error| format!("cannot run ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "ip {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// Exchanges payloads with the host.
pub(crate) fn exchange(peer: SocketAddrV4, seed: u64, bytes: u64) -> Report {
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

fn try_exchange(peer: SocketAddrV4, seed: u64, bytes: u64) -> Result<String, String> {
    if !bytes.is_multiple_of(BLOCK_LEN as u64) {
        return Err(format!("{bytes} is not a whole number of blocks"));
    }
    let stream = connect(peer)?;
    let socket = |error: std::io::Error| format!("socket: {error}");
    stream.set_read_timeout(Some(LIMIT)).map_err(socket)?;
    stream.set_write_timeout(Some(LIMIT)).map_err(socket)?;
    as_guest(stream, seed, bytes).map(|received| received.to_string())
}

/// The host's end of the link may come up later than ours.
fn connect(peer: SocketAddrV4) -> Result<TcpStream, String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match TcpStream::connect_timeout(&peer.into(), Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(format!("cannot connect to {peer}: {error}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
