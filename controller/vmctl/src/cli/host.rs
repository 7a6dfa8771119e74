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
