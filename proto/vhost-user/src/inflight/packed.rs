//! The in-flight entries of a packed ring.
//!
//! ```text
//! queue region, 64-byte aligned:
//!   0  features u64     12 free_head u16          20 used_wrap_counter u8
//!   8  version  u16     14 old_free_head u16      21 old_used_wrap_counter u8
//!   10 desc_num u16     16 used_idx u16           22 padding [u8; 10]
//!                       18 old_used_idx u16
//!   32 desc_num entries of: inflight u8, padding u8, next u16, last u16, num u16, counter u64,
//!                           id u16, flags u16, len u32, addr u64
//! ```
//!
//! Entries are linked: the free ones from `free_head` on, up to one whose `next` is `desc_num`, and
//! those of a chain from its head to its `last`. A step begins in the fields without `old_` and is
//! done when the `old_` ones agree; [`PackedInflight::recover`] finishes or undoes what was begun.
//! Each such pair is stored at once, so that no crash can leave it half done.

use std::mem::{offset_of, size_of};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::VERSION;
use crate::memory::Mapping;
use crate::ring::Position;

/// Fixed part of a queue's region (`QueueRegionPacked` without its entries).
#[repr(C)]
struct QueueRegionHeader {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    /// `free_head` and `old_free_head`.
    free_heads: AtomicU32,
    /// `used_idx`, `old_used_idx`, and the wrap counters.
    used: AtomicU64,
    padding: [u8; 8],
}

/// One entry per descriptor (`DescStatePacked`).
#[repr(C)]
struct DescState {
    inflight: AtomicU8,
    padding: u8,
    next: AtomicU16,
    last: AtomicU16,
    num: AtomicU16,
    counter: AtomicU64,
    id: AtomicU16,
    flags: AtomicU16,
    len: AtomicU32,
    addr: AtomicU64,
}

const _: () = assert!(size_of::<QueueRegionHeader>() == 32);
const _: () = assert!(offset_of!(QueueRegionHeader, free_heads) == 12);
const _: () = assert!(offset_of!(QueueRegionHeader, used) == 16);
const _: () = assert!(size_of::<DescState>() == 32);
const _: () = assert!(offset_of!(DescState, counter) == 8 && offset_of!(DescState, addr) == 24);

/// Bytes of a ring's region.
pub(super) fn region_bytes(ring_size: u16) -> usize {
    size_of::<QueueRegionHeader>() + usize::from(ring_size) * size_of::<DescState>()
}

/// A descriptor as it was taken from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredDesc {
    pub(crate) id: u16,
    pub(crate) flags: u16,
    pub(crate) len_bytes: u32,
    pub(crate) gpa: u64,
}

/// What a ring finds in its region when it starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PackedRecovered {
    /// Where the next used descriptor goes.
    pub(crate) used: Position,
    /// First entries of the chains to resubmit, oldest first.
    pub(crate) heads: Vec<u16>,
    /// The same chains, in any order.
    pub(crate) chains: Vec<StoredChain>,
    /// Links of all entries, and the first free one.
    pub(crate) next: Vec<u16>,
    pub(crate) free_head: u16,
    /// The region contradicted itself and was started afresh.
    pub(crate) was_stale: bool,
}

/// A chain in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredChain {
    pub(crate) head: u16,
    pub(crate) last: u16,
    pub(crate) count: u16,
    pub(crate) id: u16,
    counter: u64,
}

/// Entries that were met while following links.
struct Met(Vec<bool>);

impl Met {
    /// None for an entry that is not there or was met before.
    fn first_time(&mut self, index: u16) -> Option<()> {
        let met = self.0.get_mut(usize::from(index))?;
        (!std::mem::replace(met, true)).then_some(())
    }
}

/// A field and its `old_` twin.
#[derive(Clone, Copy)]
struct Used {
    now: Position,
    old: Position,
}

/// The in-flight entries of one packed ring.
#[derive(Debug)]
pub struct PackedInflight {
    header: NonNull<QueueRegionHeader>,
    entries: NonNull<DescState>,
    ring_size: u16,
    next_counter: u64,
    /// What is in the region now, and was when the last step was done.
    free_head: u16,
    old_free_head: u16,
    used: Position,
    _mapping: Arc<Mapping>,
}

// SAFETY: the pointers lead into `_mapping`, which is kept alive here, and every field behind
// them is atomic.
unsafe impl Send for PackedInflight {}

impl PackedInflight {
    /// # Safety
    /// [`region_bytes`] for `ring_size` must be mapped by `mapping` at `base`, 8-byte aligned.
    pub(super) unsafe fn new(base: NonNull<u8>, ring_size: u16, mapping: Arc<Mapping>) -> Self {
        PackedInflight {
            header: base.cast(),
            // SAFETY: the entries follow the header, and the caller vouches for both.
            entries: unsafe { base.add(size_of::<QueueRegionHeader>()).cast() },
            ring_size,
            next_counter: 0,
            free_head: 0,
            old_free_head: 0,
            used: Position::of_raw(0),
            _mapping: mapping,
        }
    }

    /// Finishes or undoes what a dead backend may have left half done and returns what is to be
    /// resubmitted. `base` is where a ring starts whose region was never used; `is_available`
    /// tells whether the ring's descriptor at a position is the device's; `take_back` makes it so
    /// if it is marked used: a backend that does not get to the descriptor that publishes a batch
    /// may have marked others of it.
    pub(crate) fn recover(
        &mut self,
        base: Position,
        is_available: impl Fn(Position) -> bool,
        take_back: impl Fn(Position),
    ) -> PackedRecovered {
        let version = self.header().version.load(Ordering::Acquire);
        if version == 0 {
            return self.start_afresh(base, false);
        }
        self.try_recover(is_available, take_back)
            .unwrap_or_else(|| self.start_afresh(base, true))
    }

    fn try_recover(
        &mut self,
        is_available: impl Fn(Position) -> bool,
        take_back: impl Fn(Position),
    ) -> Option<PackedRecovered> {
        let size = self.ring_size;
        let header = self.header();
        let Used { now, old } = used_of(header.used.load(Ordering::Acquire));
        let free_heads = header.free_heads.load(Ordering::Acquire);
        let (free_now, free_old) = (free_heads as u16, (free_heads >> 16) as u16);
        if header.desc_num.load(Ordering::Relaxed) != size || now.index >= size || old.index >= size
        {
            return None;
        }
        // The batch is the driver's if its first descriptor is.
        let is_published = now != old && !is_available(old);
        let (used, free_head) = match is_published {
            true => (now, free_now),
            false => (old, free_old),
        };

        let mut recovered = PackedRecovered {
            used,
            heads: Vec::new(),
            chains: Vec::new(),
            next: (0..size)
                .map(|index| self.entry(index).next.load(Ordering::Relaxed))
                .collect(),
            free_head,
            was_stale: false,
        };
        let mut met = Met(vec![false; usize::from(size)]);
        let mut free = Vec::new();
        let mut index = free_head;
        while index != size {
            met.first_time(index)?;
            free.push(index);
            index = recovered.next[usize::from(index)];
        }
        let mut num_met = free.len();
        for head in 0..size {
            let entry = self.entry(head);
            if entry.inflight.load(Ordering::Acquire) == 0 || met.0[usize::from(head)] {
                continue;
            }
            let chain = StoredChain {
                head,
                last: entry.last.load(Ordering::Relaxed),
                count: entry.num.load(Ordering::Relaxed),
                id: 0,
                counter: entry.counter.load(Ordering::Relaxed),
            };
            let mut last = head;
            met.first_time(head)?;
            for _ in 1..chain.count {
                last = recovered.next[usize::from(last)];
                met.first_time(last)?;
            }
            if chain.count == 0 || chain.last != last {
                return None;
            }
            num_met += usize::from(chain.count);
            let id = self.stored(last).id;
            recovered.chains.push(StoredChain { id, ..chain });
        }
        if num_met != usize::from(size) {
            return None;
        }

        recovered.chains.sort_unstable_by_key(|chain| chain.counter);
        recovered.heads = recovered.chains.iter().map(|chain| chain.head).collect();
        if !is_published {
            let undone = now.since(old, size).min(u32::from(size)) as u16;
            (0..undone).for_each(|count| take_back(old.advanced(count, size)));
        }
        let newest = recovered.chains.last();
        self.next_counter = newest.map_or(0, |chain| chain.counter.wrapping_add(1));
        self.set_free_heads(free_head, free_head);
        self.set_used(used, used);
        for index in free {
            self.entry(index).inflight.store(0, Ordering::Release);
        }
        Some(recovered)
    }

    /// The ring took a descriptor; to be called for each of a chain before
    /// [`PackedInflight::begin`].
    #[inline]
    pub(crate) fn store(&mut self, index: u16, desc: &StoredDesc) {
        let entry = self.entry(index);
        entry.id.store(desc.id, Ordering::Relaxed);
        entry.flags.store(desc.flags, Ordering::Relaxed);
        entry.len.store(desc.len_bytes, Ordering::Relaxed);
        entry.addr.store(desc.gpa, Ordering::Relaxed);
    }

    /// What [`PackedInflight::store`] noted.
    pub(crate) fn stored(&self, index: u16) -> StoredDesc {
        let entry = self.entry(index);
        StoredDesc {
            id: entry.id.load(Ordering::Relaxed),
            flags: entry.flags.load(Ordering::Relaxed),
            len_bytes: entry.len.load(Ordering::Relaxed),
            gpa: entry.addr.load(Ordering::Relaxed),
        }
    }

    /// The ring took a chain, whose `count` entries were the first free ones.
    #[inline]
    pub(crate) fn begin(&mut self, head: u16, last: u16, count: u16, free_head: u16) {
        let counter = self.next_counter;
        self.next_counter = counter.wrapping_add(1);
        let entry = self.entry(head);
        entry.num.store(count, Ordering::Relaxed);
        entry.last.store(last, Ordering::Relaxed);
        entry.counter.store(counter, Ordering::Relaxed);
        entry.inflight.store(1, Ordering::Release);
        self.set_free_heads(free_head, free_head);
    }

    /// A chain was put back: the driver's once more.
    pub(crate) fn cancel(&mut self, head: u16, last: u16) {
        let entry = self.entry(last);
        entry.next.store(self.free_head, Ordering::Release);
        // An entry that is free is not in flight, whatever it says.
        self.set_free_heads(head, head);
        self.entry(head).inflight.store(0, Ordering::Release);
    }

    /// A chain is part of the batch that [`PackedInflight::batch_published`] ends.
    #[inline]
    pub(crate) fn add_to_batch(&mut self, head: u16, last: u16) {
        let entry = self.entry(last);
        entry.next.store(self.free_head, Ordering::Release);
        self.set_free_heads(head, self.old_free_head);
    }

    /// To be called before the ring's descriptors are the driver's.
    #[inline]
    pub(crate) fn batch_ends_at(&mut self, used: Position) {
        self.set_used(used, self.used);
    }

    /// The batch's descriptors are the driver's.
    #[inline]
    pub(crate) fn batch_published(&mut self, heads: impl Iterator<Item = u16>) {
        self.clear_batch(heads);
        self.set_free_heads(self.free_head, self.free_head);
        self.set_used(self.used, self.used);
    }

    /// None of the batch is in flight any more.
    #[inline]
    pub(crate) fn clear_batch(&self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            self.entry(head).inflight.store(0, Ordering::Release);
        }
    }

    /// Nothing is in flight and the ring ends its life: the next ring starts with a fresh region.
    pub(crate) fn retire(&mut self) {
        self.header().version.store(0, Ordering::Release);
    }

    fn start_afresh(&mut self, base: Position, was_stale: bool) -> PackedRecovered {
        let size = self.ring_size;
        let header = self.header();
        header.version.store(0, Ordering::Release);
        let next: Vec<u16> = (0..size).map(|index| index + 1).collect();
        for (index, &next) in (0..).zip(&next) {
            let entry = self.entry(index);
            entry.inflight.store(0, Ordering::Release);
            entry.next.store(next, Ordering::Relaxed);
        }
        header.features.store(0, Ordering::Relaxed);
        header.desc_num.store(size, Ordering::Relaxed);
        self.next_counter = 0;
        self.set_free_heads(0, 0);
        self.set_used(base, base);
        self.header().version.store(VERSION, Ordering::Release);
        PackedRecovered {
            used: base,
            heads: Vec::new(),
            chains: Vec::new(),
            next,
            free_head: 0,
            was_stale,
        }
    }

    #[inline]
    fn set_free_heads(&mut self, now: u16, old: u16) {
        (self.free_head, self.old_free_head) = (now, old);
        let both = u32::from(now) | u32::from(old) << 16;
        self.header().free_heads.store(both, Ordering::Release);
    }

    #[inline]
    fn set_used(&mut self, now: Position, old: Position) {
        self.used = now;
        let indices = u64::from(now.index) | u64::from(old.index) << 16;
        let wraps = u64::from(now.wrap) | u64::from(old.wrap) << 8;
        let both = indices | wraps << 32;
        self.header().used.store(both, Ordering::Release);
    }

    fn header(&self) -> &QueueRegionHeader {
        // SAFETY: `header` is 64-byte aligned, inside the mapping that `_mapping` keeps alive,
        // and consists of atomics and padding, so sharing it with the frontend is sound.
        unsafe { self.header.as_ref() }
    }

    #[inline]
    fn entry(&self, index: u16) -> &DescState {
        assert!(
            index < self.ring_size,
            "entry {index} outside the in-flight region"
        );
        // SAFETY: `index` was just checked against the number of entries in the mapping; the
        // fields are atomics except padding, which nobody reads.
        unsafe { self.entries.add(usize::from(index)).as_ref() }
    }
}

fn used_of(both: u64) -> Used {
    let position = |index: u64, wrap: u64| Position {
        index: index as u16,
        wrap: wrap & 1 != 0,
    };
    Used {
        now: position(both, both >> 32),
        old: position(both >> 16, both >> 40),
    }
}

#[cfg(test)]
mod tests;
