//! `device-blk`: serves disk images as vhost-user-blk devices to any VMM.
//!
//! ```text
//! control socket ─ api::daemon ─┐
//!                               ├─ daemon: Disk ─ vhost_user::Server ─ device ─ engine ─ image
//! --disk ─ cli ─────────────────┘                  (one thread a queue)   │
//!                                                                      request
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`], [`daemon`], [`confinement`] | starting up and confining the process |
//! | [`device`] | features, configuration space, queues |
//! | [`request`] | what drivers ask for, checked; no I/O |
//! | [`engine`] | doing it with io_uring, one ring for each queue's thread |
//! | [`image`] | files, their alignment and their locks |
//! | [`stats`] | counters |

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
mod limiter;
mod request;
mod stats;
mod tracking;

use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = cli::parse();
    let filter = EnvFilter::try_from_env("MORTISE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match daemon::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device-blk: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
