//! Verified network I/O over the first NIC.
//!
//! ```text
//! guest                          host
//! payload(seed), bytes     ->
//!                          <-    SHA-256 of what came
//!                          <-    payload(!seed), bytes
//! SHA-256 of what came     ->
//! ```

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use guest::pattern::{BLOCK_LEN, fill};
use guest::report::Report;
use sha2::{Digest, Sha256};

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
    let mut stream = connect(peer)?;
    let step = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    stream
        .set_read_timeout(Some(LIMIT))
        .map_err(step("socket"))?;
    stream
        .set_write_timeout(Some(LIMIT))
        .map_err(step("socket"))?;
    let sent = send(&mut stream, seed, bytes).map_err(step("send"))?;
    let mut arrived = [0; 32];
    stream
        .read_exact(&mut arrived)
        .map_err(step("receive the host's hash"))?;
    if arrived != sent {
        return Err("the host received something else than was sent".into());
    }
    let received = receive(&mut stream, bytes).map_err(step("receive"))?;
    stream.write_all(&received).map_err(step("send the hash"))?;
    if received != expected(!seed, bytes) {
        return Err("something else was received than the host was to send".into());
    }
    Ok(received.iter().map(|byte| format!("{byte:02x}")).collect())
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

fn send(stream: &mut TcpStream, seed: u64, bytes: u64) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut block = [0; BLOCK_LEN];
    for index in 0..bytes / BLOCK_LEN as u64 {
        fill(seed, index, &mut block);
        hash.update(block);
        stream.write_all(&block)?;
    }
    Ok(hash.finalize().into())
}

fn receive(stream: &mut TcpStream, bytes: u64) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut block = [0; BLOCK_LEN];
    for _ in 0..bytes / BLOCK_LEN as u64 {
        stream.read_exact(&mut block)?;
        hash.update(block);
    }
    Ok(hash.finalize().into())
}

fn expected(seed: u64, bytes: u64) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut block = [0; BLOCK_LEN];
    for index in 0..bytes / BLOCK_LEN as u64 {
        fill(seed, index, &mut block);
        hash.update(block);
    }
    hash.finalize().into()
}
