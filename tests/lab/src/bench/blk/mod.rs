//! `cargo lab bench blk`: device-blk's disks beside raw io_uring on the same file and
//! qemu-storage-daemon's export of it, all driven by the same third-party driver.

mod density;
mod formats;
mod serving;
mod speed;

use anyhow::{Result, ensure};

use super::Session;
use super::ground::Medium;
use super::process::Load;

/// The limit: the same program on the file itself.
const LIMIT: &str = "raw-io_uring";
/// The same, set up for a single thread as well as the kernel can.
const DEFERRED_LIMIT: &str = "raw-io_uring-deferred";
const OURS: &str = "ours";
const STORAGE_DAEMON: &str = "qemu-storage-daemon";

/// A column of the results.
#[derive(Clone, Copy)]
struct Column {
    name: &'static str,
    load: Load,
}

const fn column(
    name: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
) -> Column {
    let load = Load {
        pattern,
        block,
        depth,
    };
    Column { name, load }
}

const QD1: Column = column("randread-4k/qd1", "randread", "4k", 1);
const QD32: Column = column("randread-4k/qd32", "randread", "4k", 32);
const QD128: Column = column("randread-4k/qd128", "randread", "4k", 128);
const BIG_READ: Column = column("read-128k/qd8", "read", "128k", 8);
const BIG_WRITE: Column = column("write-128k/qd8", "write", "128k", 8);

pub(super) fn run(session: &mut Session) -> Result<()> {
    if let Some(ground) = &session.ground {
        ground.program("device-blk")?;
        ensure!(
            ground.allows_direct(Medium::FileDirect),
            "{} cannot be read past the page cache; name a directory on a disk with --dir",
            ground.dir(Medium::FileDirect).display()
        );
    }
    for medium in Medium::ALL {
        speed::run(session, medium)?;
    }
    for medium in Medium::ALL {
        formats::run(session, medium)?;
    }
    density::run(session)
}
