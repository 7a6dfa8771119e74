//! A payload both ways over a stream, verified at both ends.
//!
//! ```text
//! guest                          host
//! payload(seed), bytes     ->
//!                          <-    SHA-256 of what came
//!                          <-    payload(!seed), bytes
//! SHA-256 of what came     ->
//! ```

use std::fmt;
use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

use crate::pattern::{BLOCK_LEN, fill};

/// Of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hash([u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The guest's part; returns the hash of what it received.
///
/// # Errors
/// When the stream fails or a payload did not arrive as it was sent, in either direction.
pub fn as_guest(mut stream: impl Read + Write, seed: u64, bytes: u64) -> Result<Hash, String> {
    let sent = send(&mut stream, seed, bytes).map_err(at("send"))?;
    let mut arrived = [0; 32];
    stream
        .read_exact(&mut arrived)
        .map_err(at("receive the host's hash"))?;
    if Hash(arrived) != sent {
        return Err("the host received something else than was sent".into());
    }
    let received = receive(&mut stream, bytes).map_err(at("receive"))?;
    stream.write_all(&received.0).map_err(at("send the hash"))?;
    if received != expected(!seed, bytes) {
        return Err("something else was received than the host was to send".into());
    }
    Ok(received)
}

/// The host's part; returns the hash of what it received.
///
/// # Errors
/// When the stream fails or a payload did not arrive as it was sent, in either direction.
pub fn as_host(mut stream: impl Read + Write, seed: u64, bytes: u64) -> Result<Hash, String> {
    let received = receive(&mut stream, bytes).map_err(at("receive"))?;
    stream.write_all(&received.0).map_err(at("send the hash"))?;
    let sent = send(&mut stream, !seed, bytes).map_err(at("send"))?;
    let mut arrived = [0; 32];
    stream
        .read_exact(&mut arrived)
        .map_err(at("receive the guest's hash"))?;
    if received != expected(seed, bytes) {
        return Err("something else was received than the guest was to send".into());
    }
    if Hash(arrived) != sent {
        return Err("the guest received something else than was sent".into());
    }
    Ok(received)
}

fn at(step: &str) -> impl Fn(io::Error) -> String {
    move |error| format!("{step}: {error}")
}

fn send(stream: &mut impl Write, seed: u64, bytes: u64) -> io::Result<Hash> {
    each_block(seed, bytes, |block| stream.write_all(block))
}

fn expected(seed: u64, bytes: u64) -> Hash {
    each_block(seed, bytes, |_| Ok::<_, std::convert::Infallible>(()))
        .unwrap_or_else(|e| match e {})
}

fn each_block<E>(
    seed: u64,
    bytes: u64,
    mut each: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<Hash, E> {
    let mut hash = Sha256::new();
    let mut block = [0; BLOCK_LEN];
    for index in 0..bytes / BLOCK_LEN as u64 {
        fill(seed, index, &mut block);
        hash.update(block);
        each(&block)?;
    }
    Ok(Hash(hash.finalize().into()))
}

fn receive(stream: &mut impl Read, bytes: u64) -> io::Result<Hash> {
    let mut hash = Sha256::new();
    let mut block = [0; BLOCK_LEN];
    for _ in 0..bytes / BLOCK_LEN as u64 {
        stream.read_exact(&mut block)?;
        hash.update(block);
    }
    Ok(Hash(hash.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;

    #[test]
    fn both_ends_agree_on_an_honest_stream() {
        let (guest, host) = UnixStream::pair().unwrap();
        let far = thread::spawn(move || as_host(host, 5, 1 << 20));
        let near = as_guest(guest, 5, 1 << 20).unwrap();
        assert_ne!(near, far.join().unwrap().unwrap());
    }

    #[test]
    fn a_payload_of_another_seed_is_refused_by_both() {
        let (guest, host) = UnixStream::pair().unwrap();
        let far = thread::spawn(move || as_host(host, 6, 4096));
        let near = as_guest(guest, 5, 4096).unwrap_err();
        assert!(near.contains("something else was received"), "{near}");
        let far = far.join().unwrap().unwrap_err();
        assert!(far.contains("something else was received"), "{far}");
    }
}
