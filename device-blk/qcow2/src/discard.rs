//! Discard and write-zeroes: whole clusters by the map alone, the rest by writing zeroes.
//!
//! The map is changed first. Then the host clusters are waited for until nobody uses them, their
//! blocks go back to the file system, and after a later flush their counts go down.

use std::io;
use std::ops::Range;
use std::time::Duration;

use crate::alloc::{Run, runs_of};
use crate::entry::Mapping;
use crate::image::{Image, Live};
use crate::publish::Changes;
use crate::storage::Buffer;

/// Clusters changed at a time: as many as a slice of the map has.
const MAX_CLUSTERS: u64 = 512;
/// How long a discard waits for those that still use what it frees. Past that the blocks are
/// given back later.
const DRAIN_PATIENCE: Duration = Duration::from_millis(20);
/// Zeroes written at a time.
const ZEROES_BYTES: u64 = 256 << 10;

impl Image {
    /// The content no longer matters. Clusters that lie wholly inside read zeroes afterwards and
    /// are given back; nothing else changes.
    ///
    /// # Errors
    /// The kernel's, or that the map is broken there.
    pub fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let live = self.live()?;
        self.check_range(offset_bytes, len_bytes)?;
        if !self.can_hide() {
            return Ok(());
        }
        let whole = self.whole_clusters(live, offset_bytes..offset_bytes + len_bytes);
        self.clear(live, whole, true)
    }

    /// The bytes read zeroes afterwards. `unmap` lets clusters be given back.
    ///
    /// # Errors
    /// The kernel's, or that the map is broken there.
    pub fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> io::Result<()> {
        let live = self.live()?;
        self.check_range(offset_bytes, len_bytes)?;
        let range = offset_bytes..offset_bytes + len_bytes;
        if !self.can_hide() {
            return self.fill_with_zeroes(range);
        }
        let bits = live.map.geometry().cluster_bits;
        let whole = self.whole_clusters(live, range.clone());
        if whole.is_empty() {
            return self.fill_with_zeroes(range);
        }
        self.fill_with_zeroes(range.start..whole.start << bits)?;
        self.fill_with_zeroes((whole.end << bits).min(range.end)..range.end)?;
        self.clear(live, whole, unmap)
    }

    /// Clusters that lie wholly in a range. The last one of the disk may be shorter.
    fn whole_clusters(&self, live: &Live, range: Range<u64>) -> Range<u64> {
        let bits = live.map.geometry().cluster_bits;
        let start = range.start.div_ceil(1 << bits);
        let end = if range.end == self.capacity_bytes() {
            range.end.div_ceil(1 << bits)
        } else {
            range.end >> bits
        };
        start..end.max(start)
    }

    /// Lets clusters read zeroes.
    fn clear(&self, live: &Live, clusters: Range<u64>, unmap: bool) -> io::Result<()> {
        let per_slice = live.map.geometry().slice_entries().min(MAX_CLUSTERS);
        let mut first = clusters.start;
        let mut gave_back = false;
        while first < clusters.end {
            let end = clusters.end.min((first / per_slice + 1) * per_slice);
            gave_back |= self.clear_slice(live, first..end, unmap)?;
            first = end;
        }
        if gave_back {
            live.allocator.reclaim(DRAIN_PATIENCE)?;
        }
        Ok(())
    }

    /// Returns whether host clusters became free.
    fn clear_slice(&self, live: &Live, clusters: Range<u64>, unmap: bool) -> io::Result<bool> {
        let bits = live.map.geometry().cluster_bits;
        let hides = self.layers.len() > 1;
        let version = self.header().version;
        let _taken = live.ranges.take(clusters.clone());
        let (slice, _) = live.map.geometry().slice_of(clusters.start);
        if !hides && live.map.slice(slice)?.is_none() {
            return Ok(false);
        }
        let mut changes = Changes::new();
        let mut freed: Vec<u64> = Vec::new();
        for cluster in clusters {
            let old = self.mapping(live, cluster)?;
            let kept = match old {
                Mapping::Data(host) | Mapping::Zero { host: Some(host) }
                    if version >= 3 && !unmap && host.copied =>
                {
                    Some(host)
                }
                _ => None,
            };
            let new = match (kept, hides) {
                (None, false) => Mapping::Absent,
                (host, _) => Mapping::Zero { host },
            };
            if new == old {
                continue;
            }
            match old {
                Mapping::Data(host) | Mapping::Zero { host: Some(host) }
                    if kept.is_none() && host.copied =>
                {
                    freed.push(host.offset >> bits);
                }
                Mapping::Compressed(stretch) => freed.extend(stretch.clusters(bits)),
                _ => {}
            }
            changes.push((cluster, new.encode(bits)));
        }
        self.publish(live, changes, false)?;
        let gave_back = !freed.is_empty();
        live.allocator.free(join(freed), true);
        Ok(gave_back)
    }

    fn fill_with_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        let mut offset = range.start;
        if range.is_empty() || self.reads_zeroes(range.clone())? {
            return Ok(());
        }
        let zeroes = Buffer::new(ZEROES_BYTES.min(range.end - range.start) as usize);
        while offset < range.end {
            let len = ZEROES_BYTES.min(range.end - offset);
            self.write(offset, &&zeroes[..len as usize])?;
            offset += len;
        }
        Ok(())
    }
}

/// Clusters as runs.
fn join(clusters: Vec<u64>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs_of(clusters) {
        match joined.last_mut() {
            Some(last) if last.first + last.count == run.first => last.count += 1,
            _ => joined.push(run),
        }
    }
    joined
}
