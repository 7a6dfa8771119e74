//! `vmctl device ...`

use clap::{Args, Subcommand};

use super::WaitArgs;

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// List a VM's devices: who serves them, and how that goes
    List {
        /// The VM
        vm: String,
    },
    /// Show everything about a device, its last outages included
    Show {
        /// The VM
        vm: String,
        /// Its disk, NIC or vhost-user device
        device: String,
    },
    /// Say what is done while no daemon serves a device; also during an outage
    #[command(after_help = "Examples:
  vmctl device set-policy web root error-after=30s   requests fail after 30 s until a daemon is back
  vmctl device set-policy web root pause-vm          the VM stands still meanwhile
  vmctl device set-policy web root stall             requests wait, without limit: the default")]
    SetPolicy(SetPolicyArgs),
    /// Exchange the daemons that serve devices for another version while guests use them
    #[command(after_help = "Examples:
  vmctl device upgrade web/root --binary /opt/mortise/2.1/device-blk   what serves this disk
  vmctl device upgrade web --binary /opt/mortise/2.1/device-net        all NICs of a VM
  vmctl device upgrade --host HOST --binary /opt/mortise/2.1/device-blk --max-unavailable 8
  vmctl device upgrade web                                             fresh processes of the same version

PATH is on the host, which keeps a copy: later restarts use it as well. A daemon serves several devices of
its VM and is exchanged whole. Requests are delayed, none fails; a version that does not start, does not
answer, does not connect or fails requests is rolled back, and no further wave begins. Ctrl-C ends the
waiting alone; vmctl op cancel ends the upgrade after the wave that is under way.")]
    Upgrade(UpgradeArgs),
}

/// Of a policy.
#[derive(Debug, Args)]
pub(crate) struct SetPolicyArgs {
    /// The VM
    pub(crate) vm: String,
    /// Its disk, NIC or vhost-user device
    pub(crate) device: String,
    /// stall, pause-vm or error-after=TIME (disks only, 1 s to a day)
    pub(crate) policy: String,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// Of an upgrade.
#[derive(Debug, Args)]
pub(crate) struct UpgradeArgs {
    /// The VM, or one of its devices
    #[arg(value_name = "VM[/DEVICE]", required_unless_present = "host")]
    pub(crate) target: Option<String>,
    /// All VMs of this host that run
    #[arg(long, value_name = "HOST", conflicts_with = "target")]
    pub(crate) host: Option<String>,
    /// The device-blk or device-net to use, on the host [default: what each daemon runs now]
    #[arg(long, value_name = "PATH")]
    pub(crate) binary: Option<String>,
    /// Daemons of this kind alone: device-blk or device-net
    #[arg(long, value_name = "NAME")]
    pub(crate) program: Option<String>,
    /// Devices at risk at one time; a daemon with more is exchanged alone
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_unavailable: u32,
    /// How long a new process has to pass its health gate [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) gate: Option<f64>,
    /// How long it is watched while it serves [default: 0.3]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) watch: Option<f64>,
    /// How long requests in flight have to complete before the new process replays them [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) drain: Option<f64>,
    /// What the new process must say its version is [default: what the binary says]
    #[arg(long, value_name = "VERSION")]
    pub(crate) expect_version: Option<String>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}
