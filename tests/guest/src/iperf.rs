//! Load by a program of other people: iperf3, which is on the root disk.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use guest::plan::Protocol;
use guest::report::Report;
use serde_json::Value;

const PROGRAM: &str = "/usr/bin/iperf3";
/// Small enough that no datagram is cut, of a packet of 1450 bytes.
const DATAGRAM_BYTES: &str = "1400";
/// What an emulated guest can send beside the one that receives.
const DATAGRAMS_RATE: &str = "4M";

/// Serves one load after the other, until the guest ends.
pub(crate) fn serve(port: u16) -> Report {
    let server = Command::new(PROGRAM)
        .args(["--server", "--port", &port.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    Report::IperfServer {
        port,
        error: server.err().map(|error| format!("{PROGRAM}: {error}")),
    }
}

/// Sends for some seconds to a guest that serves.
pub(crate) fn run(peer: SocketAddr, protocol: Protocol, seconds: u32) -> Report {
    let mut command = Command::new(PROGRAM);
    command
        .args(["--client", &peer.ip().to_string()])
        .args(["--port", &peer.port().to_string()])
        .args(["--time", &seconds.to_string()])
        .args(["--connect-timeout", "10000", "--json"]);
    if protocol == Protocol::Udp {
        command.args([
            "--udp",
            "--length",
            DATAGRAM_BYTES,
            "--bitrate",
            DATAGRAMS_RATE,
        ]);
    }
    let (figures, error) = match said(&mut command) {
        Ok(figures) => (figures, None),
        Err(error) => (Figures::default(), Some(error)),
    };
    Report::Iperf {
        sent_bytes: figures.sent_bytes,
        received_bytes: figures.received_bytes,
        lost_datagrams: figures.lost_datagrams,
        error,
    }
}

#[derive(Default)]
struct Figures {
    sent_bytes: u64,
    received_bytes: u64,
    lost_datagrams: u64,
}

fn said(command: &mut Command) -> Result<Figures, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{PROGRAM}: {error}"))?;
    let said: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("{PROGRAM}: {error}: {}", output.status))?;
    if let Some(error) = said.get("error") {
        return Err(format!("{PROGRAM}: {error}"));
    }
    let end = &said["end"];
    let number = |sum: &str, name: &str| end[sum][name].as_u64();
    let datagrams_lost = number("sum", "lost_packets").unwrap_or(0);
    let datagram_bytes = number("sum", "bytes").unwrap_or(0);
    let arrived_share = |datagrams: u64| {
        let arrived = datagrams.saturating_sub(datagrams_lost);
        (datagram_bytes * arrived)
            .checked_div(datagrams)
            .unwrap_or(0)
    };
    Ok(Figures {
        sent_bytes: number("sum_sent", "bytes").unwrap_or(datagram_bytes),
        received_bytes: number("sum_received", "bytes")
            .unwrap_or_else(|| arrived_share(number("sum", "packets").unwrap_or(0))),
        lost_datagrams: datagrams_lost,
    })
}
