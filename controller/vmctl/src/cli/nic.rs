//! `vmctl nic ...`

use std::path::PathBuf;

use api::controller as pb;
use clap::{Args, Subcommand, ValueEnum};

use super::WaitArgs;

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum NicCommand {
    /// List a VM's NICs with their traffic
    List {
        /// The VM
        vm: String,
    },
    /// Show everything about a NIC, drops by reason included
    Show {
        /// The VM
        vm: String,
        /// Its NIC
        nic: String,
    },
    /// Write what a running VM's NIC carries to a pcap file
    #[command(after_help = "Examples:
  vmctl nic capture web eth0 -w web.pcap
  vmctl nic capture web eth0 --filter 'tcp port 80 and host 192.0.2.7' --seconds 30 -w web.pcap
  vmctl nic capture web eth0 -w - | tcpdump -n -r -
  vmctl nic capture web eth0 --frames dropped -w dropped.pcap

Ctrl-C ends a capture; the file is whole at any time. Filters are a subset of tcpdump's.")]
    Capture(CaptureArgs),
    /// List a running VM's connections
    #[command(after_help = "Examples:
  vmctl nic flows web eth0
  vmctl nic flows web eth0 --filter 'tcp port 443'

Connections are tracked where security groups need it, and on NICs made with track-flows.")]
    Flows {
        /// The VM
        vm: String,
        /// Its NIC
        nic: String,
        /// Only these, as in captures
        #[arg(
            long,
            value_name = "EXPRESSION",
            default_value = "",
            hide_default_value = true
        )]
        filter: String,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=65536))]
        max: u32,
    },
    /// Unplug a NIC's cable, or plug it in
    Link {
        /// The VM
        vm: String,
        /// Its NIC
        nic: String,
        /// up or down
        #[arg(value_enum)]
        state: LinkState,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Limit a NIC, also of a running VM; 0 takes a limit away, what is not given stays
    #[command(after_help = "Examples:
  vmctl nic set-limits web eth0 --egress-bps 100M --ingress-bps 1G
  vmctl nic set-limits web eth0 --egress-pps 10000 --egress-pps-burst 20000
  vmctl nic set-limits web eth0 --egress-bps 0

Bits and packets a second, in powers of 1000. Ingress is what the guest receives.")]
    SetLimits(NicLimitsArgs),
}

/// Of a cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LinkState {
    /// Plugged in
    Up,
    /// Unplugged
    Down,
}

/// `vmctl nic capture`
#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// The VM
    pub(crate) vm: String,
    /// Its NIC
    pub(crate) nic: String,
    /// File to write, - for stdout
    #[arg(short = 'w', long = "write", value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Which frames, in tcpdump's language [default: all]
    #[arg(
        long,
        value_name = "EXPRESSION",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) filter: String,
    /// What the guest receives, what it sends, or both
    #[arg(long, value_enum, default_value_t = Way::Both)]
    pub(crate) direction: Way,
    /// All frames, those that were dropped, or those that passed
    #[arg(long, value_enum, default_value_t = Frames::All)]
    pub(crate) frames: Frames,
    /// Bytes kept of each frame, 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) snaplen: u32,
    /// End after so many frames, 0 for no limit
    #[arg(short = 'c', long, value_name = "N", default_value_t = 0)]
    pub(crate) count: u64,
    /// End before the file is larger, 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = crate::spec::parse_size)]
    pub(crate) max_size: u64,
    /// End after so long, 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seconds: u32,
}

/// Direction of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// What the guest receives
    Ingress,
    /// What it sends
    Egress,
    /// Both
    Both,
}

/// Frames by their fate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Frames {
    /// All
    All,
    /// Dropped by the policy
    Dropped,
    /// Passed
    Passed,
}

/// `vmctl nic set-limits`
#[derive(Debug, Args)]
pub(crate) struct NicLimitsArgs {
    /// The VM
    pub(crate) vm: String,
    /// Its NIC
    pub(crate) nic: String,
    /// Bits a second that the guest receives, such as 100M
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) ingress_bps: Option<u64>,
    /// Packets a second that the guest receives
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) ingress_pps: Option<u64>,
    /// Bits at once after a pause [default: a tenth of a second's]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(crate) ingress_bps_burst: Option<u64>,
    /// Packets at once after a pause [default: a tenth of a second's]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(crate) ingress_pps_burst: Option<u64>,
    /// Bits a second that the guest sends, such as 100M
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) egress_bps: Option<u64>,
    /// Packets a second that the guest sends
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) egress_pps: Option<u64>,
    /// Bits at once after a pause [default: a tenth of a second's]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(crate) egress_bps_burst: Option<u64>,
    /// Packets at once after a pause [default: a tenth of a second's]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(crate) egress_pps_burst: Option<u64>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

impl Way {
    /// In the API's words.
    pub(crate) fn direction(self) -> pb::CaptureDirection {
        match self {
            Self::Both => pb::CaptureDirection::Unspecified,
            Self::Ingress => pb::CaptureDirection::Ingress,
            Self::Egress => pb::CaptureDirection::Egress,
        }
    }
}

impl Frames {
    /// In the API's words.
    pub(crate) fn captured(self) -> pb::CapturedFrames {
        match self {
            Self::All => pb::CapturedFrames::All,
            Self::Dropped => pb::CapturedFrames::Dropped,
            Self::Passed => pb::CapturedFrames::Passed,
        }
    }
}

/// Parses `100M`, `1G` or a plain number: powers of 1000, as networks count.
fn parse_rate(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is no rate; write a number and K, M, G or T, such as 100M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        _ => return Err(error()),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(factor).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_powers_of_1000() {
        assert_eq!(parse_rate("100M"), Ok(100_000_000));
        assert_eq!(parse_rate("1g"), Ok(1_000_000_000));
        assert_eq!(parse_rate("0"), Ok(0));
        for bad in ["", "M", "1X", "1.5G", "99999999T"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }
}
