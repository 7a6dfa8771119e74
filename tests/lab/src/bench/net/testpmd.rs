//! DPDK's testpmd: the frontend of every contender, and the backend of some.
//!
//! It is told what to do through standard input, and asked for its counters through DPDK's
//! telemetry socket.

use std::cell::OnceCell;
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

use super::super::interrupt;
use super::super::process::Daemon;
use crate::artifacts::dpdk::Dpdk;
use crate::inside::child;

/// Of DPDK's files; short, since a socket's path is bounded. Directories keep processes apart.
const PREFIX: &str = "pmd";
/// The largest answer of telemetry.
const ANSWER_BYTES: usize = 16 << 10;
const PATIENCE_SECONDS: i64 = 10;
/// For ports to come up.
const PATIENCE: Duration = Duration::from_secs(30);

/// The CPU that forwards packets, and the one for everything else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cores {
    pub(super) forwarding: usize,
    pub(super) other: usize,
}

/// A running testpmd.
pub(super) struct Testpmd {
    pub(super) process: Daemon,
    dir: PathBuf,
    telemetry: OnceCell<OwnedFd>,
}

/// Packets of a port since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl Testpmd {
    /// Starts it with virtual devices and waits for the sockets that it is to make.
    pub(super) fn start(
        dpdk: &Dpdk,
        dir: &Path,
        name: &str,
        cores: Cores,
        devices: &[String],
        options: &[String],
        sockets: Vec<PathBuf>,
    ) -> Result<Self> {
        // Telemetry's socket goes there.
        let dir = dir.join(name);
        fs::create_dir_all(&dir)?;
        let mut command = dpdk.testpmd.command();
        command
            .env("RUNTIME_DIRECTORY", &dir)
            .arg("-l")
            .arg(format!("{},{}", cores.forwarding, cores.other))
            .args(["--main-lcore", &cores.other.to_string()])
            .args(["--no-pci", "--no-huge", "-m", "512", "--no-shconf"])
            .args(["--file-prefix", PREFIX])
            .arg("-d")
            .arg(&dpdk.driver_dir);
        for device in devices {
            command.args(["--vdev", device]);
        }
        command
            .args(["--", "-i", "--no-lsc-interrupt"])
            .args(options)
            .stdin(Stdio::piped());
        Ok(Self {
            process: Daemon::start_with(name, &mut command, sockets, &dir)?,
            dir,
            telemetry: OnceCell::new(),
        })
    }

    /// Gives it a command, which it obeys when it has begun.
    pub(super) fn tell(&mut self, line: &str) -> Result<()> {
        let input = self.process.child().stdin.as_mut();
        let input = input.context("testpmd has no input")?;
        writeln!(input, "{line}").with_context(|| self.process.last_words())
    }

    /// Waits until the link of each of its ports is up, which it is when they are started.
    pub(super) fn await_ports(&self, ports: usize) -> Result<()> {
        child::poll(&format!("the link of {ports} ports"), PATIENCE, || {
            interrupt::check()?;
            // Telemetry comes up before the ports do.
            let is_up = |port| {
                let answer = self.ask("/ethdev/link_status", port);
                answer.is_ok_and(|link| link["status"] == "UP")
            };
            Ok((0..ports).all(is_up).then_some(()))
        })
        .with_context(|| self.process.last_words())
    }

    /// The sum over the first ports.
    pub(super) fn counters(&self, ports: usize) -> Result<Counters> {
        let mut sum = Counters::default();
        for port in 0..ports {
            let counters = self.port_counters(port);
            let counters = counters.with_context(|| self.process.last_words())?;
            sum.received += counters.received;
            sum.sent += counters.sent;
        }
        Ok(sum)
    }

    fn port_counters(&self, port: usize) -> Result<Counters> {
        parse_counters(&self.ask("/ethdev/stats", port)?)
    }

    /// Telemetry's answer about a port.
    fn ask(&self, what: &str, port: usize) -> Result<Value> {
        let socket = match self.telemetry.get() {
            Some(socket) => socket,
            None => {
                let socket = connect(&self.telemetry_path())?;
                self.telemetry.get_or_init(|| socket)
            }
        };
        let request = format!("{what},{port}");
        socket::send(socket.as_raw_fd(), request.as_bytes(), MsgFlags::empty())?;
        let mut answer: Value =
            serde_json::from_slice(&receive(socket)?).context("telemetry sent no JSON")?;
        Ok(answer[what].take())
    }

    fn telemetry_path(&self) -> PathBuf {
        self.dir.join("dpdk").join(PREFIX).join("dpdk_telemetry.v2")
    }
}

fn connect(path: &Path) -> Result<OwnedFd> {
    let connection = socket::socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let patience = TimeVal::seconds(PATIENCE_SECONDS);
    socket::setsockopt(&connection, socket::sockopt::ReceiveTimeout, &patience)?;
    socket::connect(connection.as_raw_fd(), &UnixAddr::new(path)?)
        .context("testpmd's telemetry cannot be reached")?;
    // It says its version first.
    receive(&connection)?;
    Ok(connection)
}

fn receive(socket: &OwnedFd) -> Result<Vec<u8>> {
    let mut answer = vec![0; ANSWER_BYTES];
    let len = socket::recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())
        .context("testpmd's telemetry does not answer")?;
    answer.truncate(len);
    Ok(answer)
}

fn parse_counters(answer: &Value) -> Result<Counters> {
    let count = |key: &str| answer[key].as_u64().context("testpmd has no such port");
    Ok(Counters {
        received: count("ipackets")?,
        sent: count("opackets")?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn counters_are_found_among_others() {
        let answer = json!({"ipackets": 7, "opackets": 9, "ibytes": 448, "q_errors": [0]});
        let expected = Counters {
            received: 7,
            sent: 9,
        };
        assert_eq!(parse_counters(&answer).unwrap(), expected);
        assert!(parse_counters(&Value::Null).is_err());
    }
}
