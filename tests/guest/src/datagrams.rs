//! Datagrams that are answered, each verified at both ends.
//!
//! ```text
//! asking                                     answering
//! seed, index, payload(seed, index)     ->
//!                                       <-   seed, index, payload(!seed, index)
//! ```
//!
//! A datagram may be lost, so one that is not answered is sent again; one that says something else
//! than it should is an error. What no one asked for is ignored.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::pattern::{BLOCK_LEN, fill};

const HEADER_LEN: usize = 16;
const PAYLOAD_LEN: usize = 1024;
const LEN: usize = HEADER_LEN + PAYLOAD_LEN;
/// Longer than an emulated machine needs for an answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sends `count` datagrams, each once the one before was answered; returns how many had to be sent
/// again.
///
/// # Errors
/// When an answer is wrong, or not all came within `limit`.
pub fn ask(peer: SocketAddr, seed: u64, count: u64, limit: Duration) -> Result<u64, String> {
    let deadline = Instant::now() + limit;
    let at = |error: io::Error| format!("socket: {error}");
    let any: SocketAddr = match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).map_err(at)?;
    socket.connect(peer).map_err(at)?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(at)?;
    let mut repeated = 0;
    for index in 0..count {
        let question = datagram(seed, seed, index);
        // One that cannot be sent now is as good as lost.
        let _ = socket.send(&question);
        while !is_answered(&socket, seed, index)? {
            if Instant::now() > deadline {
                return Err(format!(
                    "datagram {index} of {count} to {peer} was not answered within {} s",
                    limit.as_secs()
                ));
            }
            repeated += 1;
            let _ = socket.send(&question);
        }
    }
    Ok(repeated)
}

/// Waits for an answer for some time. Answers to what was asked before, and twice, are passed over.
fn is_answered(socket: &UdpSocket, seed: u64, index: u64) -> Result<bool, String> {
    let started = Instant::now();
    let mut buffer = [0; LEN + 1];
    while started.elapsed() < PATIENCE {
        let len = match socket.recv(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            // Nobody listens yet.
            Err(_) => {
                std::thread::sleep(Duration::from_millis(100));
                return Ok(false);
            }
        };
        let said = &buffer[..len];
        let Some((of, number)) = header(said) else {
            return Err(format!("an answer of {len} bytes"));
        };
        if of != seed || number > index || said != datagram(seed, !seed, number) {
            return Err(format!("a wrong answer to datagram {number}"));
        }
        if number == index {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Answers right questions until the socket fails; wrong ones get no answer.
///
/// # Errors
/// Of the socket.
pub fn answer(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = [0; LEN + 1];
    loop {
        let (len, peer) = socket.recv_from(&mut buffer)?;
        let question = &buffer[..len];
        if let Some((seed, index)) = header(question)
            && question == datagram(seed, seed, index)
        {
            // The asking end asks again.
            let _ = socket.send_to(&datagram(seed, !seed, index), peer);
        }
    }
}

fn header(datagram: &[u8]) -> Option<(u64, u64)> {
    let (seed, rest) = datagram.split_first_chunk()?;
    let index = rest.first_chunk()?;
    Some((u64::from_le_bytes(*seed), u64::from_le_bytes(*index)))
}

fn datagram(named_seed: u64, payload_seed: u64, index: u64) -> [u8; LEN] {
    let mut block = [0; BLOCK_LEN];
    fill(payload_seed, index, &mut block);
    let mut datagram = [0; LEN];
    datagram[..8].copy_from_slice(&named_seed.to_le_bytes());
    datagram[8..HEADER_LEN].copy_from_slice(&index.to_le_bytes());
    datagram[HEADER_LEN..].copy_from_slice(&block[..PAYLOAD_LEN]);
    datagram
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn served_by(serve: impl FnOnce(UdpSocket) + Send + 'static) -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        thread::spawn(move || serve(socket));
        address
    }

    #[test]
    fn an_honest_end_answers_all() {
        let peer = served_by(|socket| drop(answer(&socket)));
        assert!(ask(peer, 7, 50, Duration::from_secs(20)).is_ok());
    }

    #[test]
    fn an_echo_is_no_answer() {
        let peer = served_by(|socket| {
            let mut buffer = [0; LEN];
            let (len, peer) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..len], peer).unwrap();
        });
        let error = ask(peer, 7, 1, Duration::from_secs(20)).unwrap_err();
        assert_eq!(error, "a wrong answer to datagram 0");
    }

    #[test]
    fn silence_ends_with_the_limit() {
        let peer = served_by(|socket| drop(socket.recv(&mut [0; 1])));
        let error = ask(peer, 7, 1, Duration::from_millis(1)).unwrap_err();
        assert!(error.contains("datagram 0 of 1"), "{error}");
    }
}
