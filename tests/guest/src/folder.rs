//! Verified I/O in a shared folder (virtio-fs).

use std::fs;

use guest::pattern::{BLOCK_LEN, fill, first_mismatch};
use guest::report::Report;

use crate::system::mount_on;

const MOUNT_POINT: &str = "/mnt";

/// Mounts the folder, compares its `from-host` and writes as much to `from-guest`.
pub(crate) fn check(tag: &str, seed: u64) -> Report {
    match try_check(tag, seed) {
        Ok(bytes) => Report::Folder { bytes, error: None },
        Err(error) => Report::Folder {
            bytes: 0,
            error: Some(error),
        },
    }
}

fn try_check(tag: &str, seed: u64) -> Result<u64, String> {
    mount_on("virtiofs", tag, MOUNT_POINT)?;
    let path = |name: &str| format!("{MOUNT_POINT}/{name}");
    let mut data = fs::read(path("from-host")).map_err(|error| format!("from-host: {error}"))?;
    if data.is_empty() || !data.len().is_multiple_of(BLOCK_LEN) {
        return Err(format!(
            "from-host has {} bytes, not whole blocks",
            data.len()
        ));
    }
    if let Some(block) = first_mismatch(seed, 0, &data) {
        return Err(format!(
            "from-host: block {block} is not what the host wrote"
        ));
    }
    fill(!seed, 0, &mut data);
    fs::write(path("from-guest"), &data).map_err(|error| format!("from-guest: {error}"))?;
    nix::mount::umount(MOUNT_POINT).map_err(|error| format!("unmount: {error}"))?;
    Ok(data.len() as u64)
}
