//! The server of a shared disk: who writes it, and who wrote it.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// Disks by the names of their exports. As device-blk's NBD server: a higher generation fences those
/// before.
pub(crate) struct Server {
    /// Looks at generations.
    fenced: bool,
    disks: Mutex<BTreeMap<String, Disk>>,
}

#[derive(Default)]
struct Disk {
    /// Generation and copy of the latest client.
    owner: (u64, u64),
    /// Of the last write that was taken.
    last: (u64, u64),
    refused: u64,
}

impl Server {
    pub(crate) fn new(fenced: bool) -> Self {
        Self {
            fenced,
            disks: Mutex::default(),
        }
    }

    /// A client presents its generation; whether it is let in. Within a generation the latest one stays.
    pub(crate) fn admit(&self, export: &str, generation: u64, copy: u64) -> bool {
        let mut disks = self.disks.lock().unwrap();
        let disk = disks.entry(export.to_owned()).or_default();
        let is_stale = generation < disk.owner.0;
        if !is_stale {
            disk.owner = (generation, copy);
        }
        !is_stale || !self.fenced
    }

    /// A write arrives; what is wrong if it was taken and should not have been.
    pub(crate) fn write(&self, export: &str, generation: u64, copy: u64) -> Result<(), String> {
        let mut disks = self.disks.lock().unwrap();
        let disk = disks.entry(export.to_owned()).or_default();
        if (generation, copy) < disk.owner {
            disk.refused += 1;
            if self.fenced {
                return Ok(());
            }
        }
        let before = std::mem::replace(&mut disk.last, (generation, copy));
        match before.0 > generation {
            true => Err(format!(
                "stale write: {export} took generation {generation} after {}",
                before.0
            )),
            false => Ok(()),
        }
    }

    pub(crate) fn refused(&self) -> u64 {
        self.disks
            .lock()
            .unwrap()
            .values()
            .map(|disk| disk.refused)
            .sum()
    }
}
