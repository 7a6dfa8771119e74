//! Growing a disk while it is used.

use std::sync::PoisonError;

use crate::error::Error;
use crate::header::{self, at, put32, put64};
use crate::image::{Image, Live};
use crate::storage::{Buffer, SECTOR_BYTES};

impl Image {
    /// Makes the disk larger; what is added reads zeroes. The size it has already is fine too.
    ///
    /// # Errors
    /// Smaller than now, no whole sectors, larger than the format allows, or the kernel's.
    pub fn resize(&self, capacity_bytes: u64) -> Result<(), Error> {
        let live = self
            .live()
            .map_err(Error::io("change an image that is open read-only"))?;
        let _turn = live.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.capacity_bytes();
        self.check_new_size(old, capacity_bytes)?;
        if capacity_bytes == old {
            return Ok(());
        }
        self.grow_l1(live, capacity_bytes)?;
        self.adopt(live, capacity_bytes);
        let written = self.clear_new_part(live, old, capacity_bytes);
        if written.is_err() {
            self.adopt(live, old);
        }
        written
    }

    /// Uses a size in memory. Pages that reach over the end have zeroes behind it, so they go.
    fn adopt(&self, live: &Live, capacity_bytes: u64) {
        self.set_capacity_bytes(capacity_bytes);
        live.map.quiet(|| self.flat.clear());
    }

    fn check_new_size(&self, old: u64, new: u64) -> Result<(), Error> {
        if new < old {
            return Err(Error::Invalid(format!(
                "the disk has {old} bytes and cannot shrink to {new}; name a larger size"
            )));
        }
        if !new.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::Invalid(format!(
                "{new} bytes; use a multiple of 512"
            )));
        }
        let max = self.header().max_capacity_bytes();
        if new > max {
            return Err(Error::Invalid(format!(
                "{new} bytes are too many for clusters of {}; {max} are possible",
                self.header().cluster_bytes()
            )));
        }
        Ok(())
    }

    /// Moves the L1 table when it is too short. Nothing changes it meanwhile: entries come with
    /// publishing, which waits for the map's lock.
    fn grow_l1(&self, live: &Live, capacity_bytes: u64) -> Result<(), Error> {
        let entries = self.header().l1_entries_for(capacity_bytes) as usize;
        if entries <= live.map.l1_len() {
            return Ok(());
        }
        let cluster_bytes = self.header().cluster_bytes();
        let clusters = (entries as u64 * 8).div_ceil(cluster_bytes);
        let first = live
            .allocator
            .take_table(clusters)
            .map_err(Error::io("allocate an L1 table"))?;
        live.metadata.add(first..first + clusters);
        let offset = first << self.header().cluster_bits;
        let write = |l1: &[u64]| {
            let mut bytes = Buffer::new((clusters * cluster_bytes) as usize);
            for (entry, bytes) in l1.iter().zip(bytes.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&entry.to_be_bytes());
            }
            live.storage
                .write(&bytes, offset)
                .map_err(Error::io("write the L1 table"))?;
            live.storage
                .sync()
                .map_err(Error::io("flush the L1 table"))?;
            header::rewrite(&live.storage, |sector| {
                put64(sector, at::L1_OFFSET, offset);
                put32(sector, at::L1_SIZE, entries as u32);
            })
        };
        let old = live.map.move_l1(entries, offset, write)?;
        // Only now: the header names the new table, and if this fails, entries must go there all
        // the same. The old one stays counted then.
        live.storage.sync().map_err(Error::io("flush the header"))?;
        let old_first = old.offset >> self.header().cluster_bits;
        let old_clusters = (old.len as u64 * 8).div_ceil(cluster_bytes);
        live.metadata.remove(old_first..old_first + old_clusters);
        let old = crate::alloc::Run {
            first: old_first,
            count: old_clusters,
            zeroed: false,
        };
        live.allocator.free([old], false);
        Ok(())
    }

    /// A backing image that is longer than the disk was must not show up, nor what the last
    /// cluster has behind the old end. The new size is written when that is certain.
    fn clear_new_part(&self, live: &Live, old: u64, new: u64) -> Result<(), Error> {
        let below = self.layers.get(1).map_or(0, |layer| layer.capacity_bytes());
        let cluster_end = old.next_multiple_of(self.header().cluster_bytes());
        let end = below.max(cluster_end).min(new);
        if end > old {
            self.write_zeroes(old, end - old, true)
                .map_err(Error::io("clear what the disk gains"))?;
        }
        live.storage.sync().map_err(Error::io("flush the image"))?;
        header::rewrite(&live.storage, |sector| put64(sector, at::SIZE, new))?;
        live.storage.sync().map_err(Error::io("flush the header"))
    }
}
