//! What a test guest says on its console.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::oracle::{Spread, Summary};

/// The first line of userspace.
pub const UP_LINE: &str = "mortise-guest: userspace up";
/// The first line after the guest moved to its root disk.
pub const ON_ROOT_DISK_LINE: &str = "mortise-guest: running from the root disk";
/// Before each report.
pub const PREFIX: &str = "mortise-guest: ";

/// One line of JSON after [`PREFIX`]. A job succeeded if it has no `error`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub enum Report {
    /// CPUs really used.
    Smp {
        /// Online, as the kernel counts.
        online: u32,
        /// On which a pinned thread ran while all others did.
        used: u32,
        /// What went wrong.
        error: Option<String>,
    },
    /// Memory that the kernel may use.
    Memory {
        /// As the kernel counts.
        mib: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// A disk was written and read back, or only read.
    Disk {
        /// As in `/dev`.
        device: String,
        /// Verified in the guest.
        bytes: u64,
        /// The serial number that the device reports.
        serial: String,
        /// Whether a range past the pattern was discarded.
        discarded: bool,
        /// Whether a range past the pattern was zeroed and then read as zeroes.
        zeroed: bool,
        /// Of the pattern's write, flush and read.
        elapsed_ms: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// A disk under verified load; comes again and again until the load is over.
    Oracle {
        /// As in `/dev`.
        device: String,
        /// Since the load began.
        elapsed_ms: u64,
        /// The load is over, and the disk was read once more.
        last: bool,
        /// What was found so far.
        summary: Summary,
        /// Of all requests so far.
        latency: Spread,
        /// Of those since the last report.
        window: Spread,
        /// The long ones among them, in microseconds.
        stalls: Vec<u64>,
        /// Of the disk's content, in the last report.
        digest: String,
        /// What went wrong.
        error: Option<String>,
    },
    /// A disk that one guest after the other writes; comes again and again.
    Journal {
        /// As in `/dev`.
        device: String,
        /// Which guest this is, from 1.
        life: u64,
        /// Blocks that were as they must be when this guest began.
        verified: u64,
        /// Writes that were acknowledged, in all lives.
        last: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// A payload went both ways.
    Net {
        /// Each way.
        bytes: u64,
        /// SHA-256 of the payload received, as hex.
        received_sha256: String,
        /// What went wrong.
        error: Option<String>,
    },
    /// The NIC's address.
    Address {
        /// As the device gave it.
        mac: String,
        /// What went wrong.
        error: Option<String>,
    },
    /// What DHCP gave.
    Lease {
        /// Of the NIC.
        mac: String,
        /// With its prefix length.
        address: String,
        /// Empty if none was named.
        router: String,
        /// The first that was named.
        name_server: String,
        /// Empty if none was named.
        domain: String,
        /// Of the NIC, afterwards.
        mtu: u32,
        /// What went wrong.
        error: Option<String>,
    },
    /// An IPv6 address is there.
    Ipv6 {
        /// Of global scope.
        address: String,
        /// What went wrong.
        error: Option<String>,
    },
    /// A name server was asked.
    Resolve {
        /// As it was asked for.
        name: String,
        /// All that belong to it.
        addresses: Vec<String>,
        /// What went wrong.
        error: Option<String>,
    },
    /// The cable is as it was awaited.
    Carrier {
        /// Plugged in.
        up: bool,
        /// What went wrong.
        error: Option<String>,
    },
    /// Echoes were asked for. None that came is no error.
    Ping {
        /// How many came.
        echoes: u32,
        /// What went wrong.
        error: Option<String>,
    },
    /// A connection was tried. One that is not made is no error.
    Reach {
        /// What became of it.
        outcome: Reached,
        /// What went wrong.
        error: Option<String>,
    },
    /// Others may begin.
    Serve {
        /// Of both protocols.
        port: u16,
        /// What went wrong.
        error: Option<String>,
    },
    /// A connection that was served ended. Comes at any time.
    Served {
        /// Each way.
        bytes: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// All datagrams were answered, and rightly.
    Udp {
        /// How many.
        answered: u64,
        /// Sent once more, because no answer had come.
        repeated: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// The NoCloud seed was found, mounted and read.
    Seed {
        /// Its file of that name.
        user_data: String,
        /// Its file of that name.
        meta_data: String,
        /// Its file of that name.
        network_config: String,
        /// What went wrong.
        error: Option<String>,
    },
    /// Other guests may send by iperf3.
    IperfServer {
        /// Of both protocols.
        port: u16,
        /// What went wrong.
        error: Option<String>,
    },
    /// What iperf3 says of its load.
    Iperf {
        /// Payload.
        sent_bytes: u64,
        /// Of them, as the other end counted.
        received_bytes: u64,
        /// None of TCP.
        lost_datagrams: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// A file system was made, written, checked and read again.
    FileSystem {
        /// As in `/dev`.
        device: String,
        /// Of files that were written and verified.
        bytes: u64,
        /// Given back by fstrim.
        trimmed_bytes: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// A shared folder.
    Folder {
        /// Verified and written.
        bytes: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// The jobs are done.
    Done {
        /// How many had an error.
        failed: u32,
        /// A failure outside any job.
        error: Option<String>,
    },
}

/// What became of an attempt to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reached {
    /// Somebody listens.
    Connected,
    /// A machine answered that nobody does, or that it may not be.
    Refused,
    /// Nobody answered.
    Nothing,
}

impl Report {
    /// What went wrong, if anything did.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Smp { error, .. }
            | Self::Memory { error, .. }
            | Self::Disk { error, .. }
            | Self::Oracle { error, .. }
            | Self::Journal { error, .. }
            | Self::Net { error, .. }
            | Self::Address { error, .. }
            | Self::Lease { error, .. }
            | Self::Ipv6 { error, .. }
            | Self::Resolve { error, .. }
            | Self::Carrier { error, .. }
            | Self::Ping { error, .. }
            | Self::Reach { error, .. }
            | Self::Serve { error, .. }
            | Self::Served { error, .. }
            | Self::Udp { error, .. }
            | Self::Seed { error, .. }
            | Self::IperfServer { error, .. }
            | Self::Iperf { error, .. }
            | Self::FileSystem { error, .. }
            | Self::Folder { error, .. }
            | Self::Done { error, .. } => error.as_deref(),
        }
    }

    /// Takes a report out of a console line; kernel messages give `None`.
    #[must_use]
    pub fn from_line(line: &str) -> Option<Self> {
        let (_, json) = line.split_once(PREFIX)?;
        serde_json::from_str(json.trim()).ok()
    }

    /// Prints it in one write, so that kernel messages don't split it.
    pub fn print(&self) {
        print_line(&serde_json::to_string(self).unwrap_or_default());
    }
}

/// Prints `mortise-guest: TEXT`. A guest without a console goes on in silence.
pub fn print_line(text: &str) {
    let line = format!("{PREFIX}{text}\n");
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
    let _ = std::io::stdout().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_behind_noise() {
        let report = Report::Done {
            failed: 0,
            error: None,
        };
        let line = format!(
            "[    1.0] x {PREFIX}{}\r",
            serde_json::to_string(&report).unwrap()
        );
        assert_eq!(Report::from_line(&line), Some(report));
        assert_eq!(Report::from_line(UP_LINE), None);
    }
}
