//! `vmctl pool`

use std::path::PathBuf;

use clap::{ArgGroup, Subcommand};

/// `vmctl pool ...`
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Tell of a place for volumes that hosts share
    #[command(
        after_help = "Examples:
  vmctl pool create fast --nbd 10.0.0.9:10809
  vmctl pool create nfs --shared-directory /srv/volumes      not fenced: see docs/fleet.md
  vmctl volume create data --pool fast --size 10G",
        group = ArgGroup::new("place").required(true).args(["nbd", "shared_directory"])
    )]
    Create {
        /// Name of the pool: a-z, 0-9 and hyphen
        name: String,
        /// An NBD server, such as device-blk nbd-serve --generation-file: it refuses whoever had a
        /// volume before
        #[arg(long, value_name = "HOST:PORT")]
        nbd: Option<String>,
        /// File on every host with PEM: CA certificates, then optionally a certificate and its key
        #[arg(long, value_name = "FILE", requires = "nbd")]
        tls_file: Option<PathBuf>,
        /// Name that the server's certificate must have [default: the host of --nbd]
        #[arg(long, value_name = "NAME", requires = "nbd")]
        tls_hostname: Option<String>,
        /// A directory that every host has at this place; nothing keeps a host that was frozen from
        /// writing there later
        #[arg(long, value_name = "DIR")]
        shared_directory: Option<PathBuf>,
        /// The same id again answers the same pool
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
    },
    /// List pools; the hosts' own, `local`, is always there
    List,
    /// Show a pool
    Show {
        /// The pool
        name: String,
    },
    /// Forget a pool without volumes; what is in it stays there
    Delete {
        /// The pool
        name: String,
    },
}
