//! The command line.

use std::path::PathBuf;

use api::listen::Address;
use clap::Parser;

/// Runs virtual machines on this host as a controller wishes.
///
/// VMs go on when the agent ends, for whatever reason; the next agent on the same state directory
/// adopts them.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    /// Where to serve gRPC: HOST:PORT or unix:PATH. There is no authentication yet: keep it local.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Address,
    /// Records of VMs, and volumes; must survive reboots.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Sockets and logs of running VMs. Keep the path short: socket paths hold 107 bytes.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
    /// Directory of vmm-core, device-blk and device-net [default: that of node-agent].
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Converts images of other formats at their import [default: beside node-agent, or in PATH].
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu_img: Option<PathBuf>,
    /// This host's address that other hosts send to what overlay networks carry.
    #[arg(long, value_name = "IP")]
    pub(crate) underlay_address: Option<std::net::IpAddr>,
    /// Makes user networks [default: beside node-agent, or in PATH].
    #[arg(long, value_name = "FILE", env = "MORTISE_PASST")]
    pub(crate) passt: Option<PathBuf>,
    /// Keep a started, confined process ready for each daemon of every VM, so that one that dies is
    /// replaced without an exec. Costs a few MiB each; VMs can also ask for it one by one.
    #[arg(long)]
    pub(crate) warm_spares: bool,
    /// Serve /metrics for Prometheus over HTTP here: HOST:PORT or unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics_listen: Option<Address>,
}
