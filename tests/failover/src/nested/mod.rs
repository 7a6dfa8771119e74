//! Two emulated hosts with a KVM of their own, on one network with a 3-member etcd, two controllers and
//! the server of a shared disk. One host is killed without warning; its VM, a Linux guest that verifies
//! its disk itself, runs again on the other one; then the dead host returns.
//!
//! ```text
//!   this process's network namespace: etcd x 3, controller x 2, device-blk nbd-serve
//!          │ bridge
//!    ┌─────┴─────┐ taps
//!   QEMU        QEMU      node-agent, vmm-core, device-blk; `failover host` says what runs there
//! ```
//!
//! [`story`] tells it; [`ground`] makes the network, [`machines`] are the hosts, [`control`] is all that
//! tells them what to do, [`host`] runs inside of them.

pub mod control;
pub mod ground;
pub mod host;
pub mod machines;
pub mod story;

use std::fmt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

/// For whatever an emulated host does on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(240);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What it takes; `cargo lab demo --hosts 2` has it all.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Where controller and device-blk are.
    pub bin_dir: PathBuf,
    /// Finds its libraries and firmware.
    pub qemu: PathBuf,
    /// Makes hosts' state disks.
    pub mke2fs: PathBuf,
    /// Hosts' kernel, ELF.
    pub kernel: PathBuf,
    /// Hosts' file system: ends up in `failover host`.
    pub initrd: PathBuf,
    /// Of a host.
    pub memory_mib: u32,
    /// Where consoles and logs are kept.
    pub log_dir: PathBuf,
}

/// A host that was not switched off is off.
#[derive(Debug)]
struct Ended {
    host: usize,
    status: ExitStatus,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {} ended by itself: {}", self.host, self.status)
    }
}

impl std::error::Error for Ended {}

/// Asks again until there is an answer.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Controllers take turns, and machines are busy: what goes wrong now may go well in a moment.
        let trouble = match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => None,
            Err(error) if error.is::<Ended>() => return Err(error),
            Err(error) => Some(error),
        };
        if Instant::now() > deadline {
            return Err(match trouble {
                Some(error) => error.context(format!("{what} did not come")),
                None => anyhow!("{what} did not come within {} s", PATIENCE.as_secs()),
            });
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
