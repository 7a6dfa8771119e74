//! `device-blk`: serves disk images as vhost-user-blk devices to any VMM.
//!
//! ```text
//! control socket ─ api::daemon ─┐
//!                               ├─ daemon: Disk ─ vhost_user::Server ─ device ─ engine ─ image
//! --disk ─ cli ─ assembly ──────┤                  (one thread a queue)   │
//! control socket ─ disks ───────┘                                      request
//!                 (service Disks: limits, resize, snapshots, jobs)
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`], [`daemon`], [`confinement`] | starting up and confining the process |
//! | [`assembly`] | a disk's image, made of what was opened for it |
//! | [`disk`], [`disks`], [`jobs`] | an attached disk, and what is asked of it while it is served |
//! | [`limiter`], [`tracking`] | which requests may begin, and what they wrote |
//! | [`device`] | features, configuration space, queues |
//! | `request` (a crate) | what drivers ask for, checked; no I/O |
//! | [`engine`] | doing it with io_uring, one ring for each queue's thread |
//! | [`image`] | files, their alignment and their locks |
//! | [`nbd_serve`] | the other way round: an image for other hosts |
//! | [`remote`] | disks on other hosts, and the process that connects to them |
//! | [`stats`], [`latency`] | counters and histograms |

mod assembly;
mod cli;
mod confinement;
mod daemon;
mod device;
mod disk;
mod disks;
mod engine;
mod image;
mod jobs;
mod latency;
mod leases;
mod limiter;
mod nbd_serve;
mod remote;
mod stats;
mod tracking;

use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1).peekable();
    let result = if words
        .next_if(|word| word == nbd_serve::SUBCOMMAND)
        .is_some()
    {
        start_log();
        nbd_serve::run(words)
    } else {
        let args = cli::parse();
        start_log();
        daemon::run(&args)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device-blk: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log() {
    let filter = EnvFilter::try_from_env("MORTISE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}
