//! `vmctl project`, `vmctl quota` and `vmctl audit`

use clap::{Args, Subcommand};

use crate::spec::parse_size;

/// `vmctl project ...`
#[derive(Debug, Subcommand)]
pub(crate) enum ProjectCommand {
    /// Create a project
    #[command(after_help = "Examples:
  vmctl project create web --vms 20 --vcpus 64 --memory 256G --volume-bytes 4T")]
    Create {
        /// A lower-case letter, then at most 62 of a-z, 0-9 and hyphen
        name: String,
        /// For people
        #[arg(long, value_name = "TEXT")]
        display_name: Option<String>,
        #[command(flatten)]
        quota: QuotaFigures,
        /// The same id again answers the same project
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
    },
    /// List projects
    List {
        /// Which ones, such as 'quota.vms > 10'
        #[arg(long, value_name = "FILTER")]
        filter: Option<String>,
        /// Such as 'create_time desc'
        #[arg(long, value_name = "FIELDS")]
        order_by: Option<String>,
    },
    /// Show a project, what it may have and what it has
    Show {
        /// The project
        name: String,
    },
    /// Delete a project that nothing is in
    Delete {
        /// The project
        name: String,
    },
}

/// `vmctl quota ...`
#[derive(Debug, Subcommand)]
pub(crate) enum QuotaCommand {
    /// Show what a project may have and what it has
    Show {
        /// The project [default: that of --project]
        name: Option<String>,
    },
    /// Say how much a project may have; what is not given stays as it is
    #[command(after_help = "Examples:
  vmctl quota set web --vms 20 --memory 256G
  vmctl quota set web --vms 0      any number again")]
    Set {
        /// The project
        name: String,
        #[command(flatten)]
        quota: QuotaFigures,
    },
}

/// How much there may be; 0 is any number.
#[derive(Debug, Args)]
pub(crate) struct QuotaFigures {
    /// VMs, started or not
    #[arg(long, value_name = "NUMBER")]
    pub(crate) vms: Option<u64>,
    /// vCPUs of all VMs
    #[arg(long, value_name = "NUMBER")]
    pub(crate) vcpus: Option<u64>,
    /// Memory of all VMs, such as 256G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Volumes
    #[arg(long, value_name = "NUMBER")]
    pub(crate) volumes: Option<u64>,
    /// Size of all volumes, such as 4T
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) volume_bytes: Option<u64>,
    /// Networks
    #[arg(long, value_name = "NUMBER")]
    pub(crate) networks: Option<u64>,
}

/// `vmctl audit ...`
#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Show who asked for what, oldest first
    #[command(after_help = "Examples:
  vmctl audit list --filter 'caller = alice AND method : DeleteVm'
  vmctl audit list --filter 'code != 0' --limit 20 -o json")]
    List {
        /// Which entries
        #[arg(long, value_name = "FILTER")]
        filter: Option<String>,
        /// At most so many, the newest
        #[arg(long, value_name = "NUMBER", default_value_t = 100)]
        limit: usize,
    },
    /// Print entries as they come
    Watch {
        /// Which entries
        #[arg(long, value_name = "FILTER")]
        filter: Option<String>,
    },
}
