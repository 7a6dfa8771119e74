//! The in-flight entries of a split ring.
//!
//! ```text
//! queue region, 64-byte aligned:
//!   0  features u64        10 desc_num u16         14 used_idx u16
//!   8  version  u16        12 last_batch_head u16
//!   16 desc_num entries of: inflight u8, padding [u8; 5], next u16, counter u64
//! ```
//!
//! A region whose `version` is 0 was never used by a ring: [`SplitInflight::recover`] then starts
//! from the ring's own `used->idx`, and so never takes entry 0 for the end of an unfinished batch.

use std::mem::{offset_of, size_of};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::VERSION;
use crate::memory::Mapping;

/// Fixed part of a queue's region (`QueueRegionSplit` without its entries).
#[repr(C)]
struct QueueRegionHeader {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

/// One entry per descriptor head (`DescStateSplit`).
#[repr(C)]
struct DescState {
    inflight: AtomicU8,
    padding: [u8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = assert!(size_of::<QueueRegionHeader>() == 16);
const _: () = assert!(offset_of!(QueueRegionHeader, used_idx) == 14);
const _: () = assert!(size_of::<DescState>() == 16);
const _: () = assert!(offset_of!(DescState, next) == 6 && offset_of!(DescState, counter) == 8);

/// What a ring finds in its region when it starts.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Heads to resubmit, oldest first.
    pub heads: Vec<u16>,
    /// The region did not belong to this ring (the guest had reset it) and was started afresh.
    pub was_stale: bool,
}

/// The in-flight entries of one ring.
#[derive(Debug)]
pub struct SplitInflight {
    header: NonNull<QueueRegionHeader>,
    entries: NonNull<DescState>,
    ring_size: u16,
    next_counter: u64,
    batch_len: u16,
    _mapping: Arc<Mapping>,
}

// SAFETY: the pointers lead into `_mapping`, which is kept alive here, and every field behind
// them is atomic.
unsafe impl Send for SplitInflight {}

impl SplitInflight {
    /// # Safety
    /// [`region_bytes`] for `ring_size` must be mapped by `mapping` at `base`, 8-byte aligned.
    pub(super) unsafe fn new(base: NonNull<u8>, ring_size: u16, mapping: Arc<Mapping>) -> Self {
        SplitInflight {
            header: base.cast(),
            // SAFETY: the entries follow the header, and the caller vouches for both.
            entries: unsafe { base.add(size_of::<QueueRegionHeader>()).cast() },
            ring_size,
            next_counter: 0,
            batch_len: 0,
            _mapping: mapping,
        }
    }

    /// Finishes the batch that a dead backend may have left half done and returns what is to be
    /// resubmitted. `used_idx` and `avail_idx` are the ring's, as the guest sees them.
    ///
    /// Within one life of a ring all heads in flight lie between `used_idx` and `avail_idx`, and
    /// the last batch is no longer than the ring. A region that says otherwise dates from before
    /// a reset of the ring; replaying it would complete requests the driver never made.
    pub fn recover(&mut self, used_idx: u16, avail_idx: u16) -> Recovered {
        self.next_counter = 0;
        self.batch_len = 0;
        let header = self.header();
        if header.version.load(Ordering::Acquire) == 0 {
            self.reset(used_idx);
            return Recovered {
                heads: Vec::new(),
                was_stale: false,
            };
        }
        let last_batch_len = used_idx.wrapping_sub(header.used_idx.load(Ordering::Acquire));
        if last_batch_len > self.ring_size {
            self.reset(used_idx);
            return Recovered {
                heads: Vec::new(),
                was_stale: true,
            };
        }
        self.finish_batch(last_batch_len, used_idx);

        let mut in_flight: Vec<(u64, u16)> = (0..self.ring_size)
            .filter(|&head| self.entry(head).inflight.load(Ordering::Acquire) != 0)
            .map(|head| (self.entry(head).counter.load(Ordering::Relaxed), head))
            .collect();
        if in_flight.len() > usize::from(avail_idx.wrapping_sub(used_idx)) {
            self.reset(used_idx);
            return Recovered {
                heads: Vec::new(),
                was_stale: true,
            };
        }
        in_flight.sort_unstable();
        self.next_counter = in_flight
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        Recovered {
            heads: in_flight.into_iter().map(|(_, head)| head).collect(),
            was_stale: false,
        }
    }

    /// The ring took `head` from the driver.
    #[inline]
    pub fn begin(&mut self, head: u16) {
        let counter = self.next_counter;
        self.next_counter = counter.wrapping_add(1);
        let entry = self.entry(head);
        entry.counter.store(counter, Ordering::Relaxed);
        entry.inflight.store(1, Ordering::Release);
    }

    /// `head` was put back: the driver's once more.
    pub fn cancel(&mut self, head: u16) {
        self.entry(head).inflight.store(0, Ordering::Release);
    }

    /// `head` joins the batch that the next [`SplitInflight::batch_published`] ends. To be called
    /// before `used->idx` moves.
    #[inline]
    pub fn add_to_batch(&mut self, head: u16) {
        let header = self.header();
        self.entry(head).next.store(
            header.last_batch_head.load(Ordering::Relaxed),
            Ordering::Relaxed,
        );
        header.last_batch_head.store(head, Ordering::Release);
        self.batch_len += 1;
    }

    /// `used->idx` moved to `used_idx`: the batch is the driver's.
    #[inline]
    pub fn batch_published(&mut self, used_idx: u16) {
        let batch_len = std::mem::take(&mut self.batch_len);
        self.finish_batch(batch_len, used_idx);
    }

    /// Nothing is in flight and the ring ends its life: the next ring starts with a fresh region.
    pub fn retire(&mut self) {
        self.header().version.store(0, Ordering::Release);
    }

    fn finish_batch(&self, batch_len: u16, used_idx: u16) {
        let header = self.header();
        let mut head = header.last_batch_head.load(Ordering::Acquire);
        for _ in 0..batch_len {
            if head >= self.ring_size {
                break;
            }
            let entry = self.entry(head);
            entry.inflight.store(0, Ordering::Release);
            head = entry.next.load(Ordering::Relaxed);
        }
        header.used_idx.store(used_idx, Ordering::Release);
    }

    fn reset(&mut self, used_idx: u16) {
        let header = self.header();
        header.version.store(0, Ordering::Release);
        for head in 0..self.ring_size {
            self.entry(head).inflight.store(0, Ordering::Release);
        }
        header.features.store(0, Ordering::Relaxed);
        header.desc_num.store(self.ring_size, Ordering::Relaxed);
        header.last_batch_head.store(0, Ordering::Relaxed);
        header.used_idx.store(used_idx, Ordering::Release);
        header.version.store(VERSION, Ordering::Release);
    }

    fn header(&self) -> &QueueRegionHeader {
        // SAFETY: `header` is 64-byte aligned, inside the mapping that `_mapping` keeps alive,
        // and consists of atomics, so sharing it with the frontend is sound.
        unsafe { self.header.as_ref() }
    }

    #[inline]
    fn entry(&self, head: u16) -> &DescState {
        assert!(
            head < self.ring_size,
            "descriptor head {head} outside the in-flight region"
        );
        // SAFETY: `head` was just checked against the number of entries in the mapping; the
        // fields are atomics except padding, which nobody reads.
        unsafe { self.entries.add(usize::from(head)).as_ref() }
    }
}

/// Bytes of a ring's region.
pub(super) fn region_bytes(ring_size: u16) -> usize {
    size_of::<QueueRegionHeader>() + usize::from(ring_size) * size_of::<DescState>()
}

#[cfg(test)]
mod tests;
