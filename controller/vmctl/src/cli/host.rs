//! `vmctl host ...`, and where VMs may run.

use clap::{Args, Subcommand};

use super::WaitArgs;

/// `vmctl host ...`
#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// List hosts
    List,
    /// Show everything about a host
    Show {
        /// The host
        host: String,
    },
    /// Change what is decided about a host
    #[command(after_help = "Examples:
  vmctl host set h1 --label disk=nvme --zone east
  vmctl host set h1 --taint gpu=yes --cpu-overcommit 4 --memory-overcommit 1")]
    Set(HostSetArgs),
    /// Place nothing more on a host; what is there stays
    Cordon {
        /// The host
        host: String,
    },
    /// Take that back, and end a drain
    Uncordon {
        /// The host
        host: String,
    },
    /// Cordon a host and move from it what can be moved; what stays is named
    Drain {
        /// The host
        host: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Exchange the agents and daemons of many hosts for another version, some hosts at a time
    #[command(after_help = "Examples:
  vmctl host upgrade --all --agent-binary /opt/mortise/2.1/node-agent
  vmctl host upgrade --selector rack=r7 --agent-binary /opt/mortise/2.1/node-agent \\
                     --device-blk /opt/mortise/2.1/device-blk --max-unavailable 2
  vmctl host upgrade h1 h2 --agent-binary /opt/mortise/2.1/node-agent --validate-only

PATHs are on the hosts. VMs and their daemons run on while an agent is exchanged. A new agent that does not
start, hangs, or does not find the host as well as it was gives its place back to the old one, and no further
host begins. Ctrl-C ends the waiting alone; vmctl op cancel ends the upgrade after the hosts under way.")]
    Upgrade(HostUpgradeArgs),
    /// Let new hosts in
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Forget a host that is gone for good; its certificate counts no more
    Delete {
        /// The host
        host: String,
        /// Even if VMs or volumes are on it, which are then lost
        #[arg(long)]
        force: bool,
    },
}

/// `vmctl host upgrade`
#[derive(Debug, Args)]
pub(crate) struct HostUpgradeArgs {
    /// The hosts, in the order in which they are taken
    #[arg(value_name = "HOST", required_unless_present_any = ["all", "selector"])]
    pub(crate) hosts: Vec<String>,
    /// All hosts that have this label; repeat for those that have several
    #[arg(long, value_name = "KEY=VALUE", conflicts_with_all = ["hosts", "all"])]
    pub(crate) selector: Vec<String>,
    /// All hosts
    #[arg(long, conflicts_with = "hosts")]
    pub(crate) all: bool,
    /// The node-agent to use, on each host [default: agents stay]
    #[arg(long, value_name = "PATH")]
    pub(crate) agent_binary: Option<String>,
    /// The device-blk to use, on each host [default: these stay]
    #[arg(long, value_name = "PATH")]
    pub(crate) device_blk: Option<String>,
    /// The device-net to use, on each host [default: these stay]
    #[arg(long, value_name = "PATH")]
    pub(crate) device_net: Option<String>,
    /// Hosts unavailable at one time, those of the fleet that do not answer included
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_unavailable: u32,
    /// Devices at risk at one time on each host while its daemons are exchanged
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_devices_unavailable: u32,
    /// How long a new agent has to come up and be found well [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=600))]
    pub(crate) confirm: Option<u32>,
    /// Have every host check the binaries, and change nothing
    #[arg(long)]
    pub(crate) validate_only: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `vmctl host token ...`
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token with which one host joins, once
    #[command(after_help = "Examples:
  vmctl host token create                       any new host
  vmctl host token create --host h7 --ttl 10m   that one alone; for one that was there before, too

What is printed is to be run on the host; the token is shown nowhere else.")]
    Create {
        /// The only host that may use it
        #[arg(long, value_name = "HOST")]
        host: Option<String>,
        /// How long it is good: 90s, 30m, 1h, 7d
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = super::parse_seconds)]
        ttl: u32,
    },
    /// List tokens, and who used them
    List,
    /// Withdraw a token
    Delete {
        /// The token's name
        token: String,
    },
}

/// `vmctl host set`
#[derive(Debug, Args)]
pub(crate) struct HostSetArgs {
    /// The host
    pub(crate) host: String,
    /// KEY=VALUE, or KEY- to take it away; repeat for more
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,
    /// KEY=VALUE that keeps VMs away which do not tolerate it, or KEY- to take it away; repeat for more
    #[arg(long = "taint", value_name = "KEY=VALUE")]
    pub(crate) taints: Vec<String>,
    /// Hosts of one zone fail together; empty: as its agent says
    #[arg(long)]
    pub(crate) zone: Option<String>,
    /// vCPUs promised for each CPU; 0 for no limit
    #[arg(long, value_name = "RATIO")]
    pub(crate) cpu_overcommit: Option<f64>,
    /// Memory promised for each byte; 0 for no limit
    #[arg(long, value_name = "RATIO")]
    pub(crate) memory_overcommit: Option<f64>,
}

/// Where a VM may run.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PlacementArgs {
    /// The host it is to be on
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// A zone it may be in; repeat for more [default: any]
    #[arg(long = "zone", value_name = "ZONE")]
    pub(crate) zones: Vec<String>,
    /// A label that its host must have; repeat for more
    #[arg(long = "node-selector", value_name = "KEY=VALUE")]
    pub(crate) node_selector: Vec<String>,
    /// A taint of hosts that does not keep it away; repeat for more
    #[arg(long = "toleration", value_name = "KEY[=VALUE]")]
    pub(crate) tolerations: Vec<String>,
    /// A label of the VM, for the affinity of others; repeat for more
    #[arg(long = "vm-label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,
    /// Near VMs with this label: [host:|zone:|daemon:]KEY=VALUE[,preferred]; repeat for more
    #[arg(long = "near", value_name = "TERM")]
    pub(crate) near: Vec<String>,
    /// Away from VMs with this label, as --near
    #[arg(long = "away-from", value_name = "TERM")]
    pub(crate) away_from: Vec<String>,
    /// At most so many VMs, this one included, behind any one device daemon of it
    #[arg(long, value_name = "N")]
    pub(crate) max_vms_per_daemon: Option<u32>,
}
