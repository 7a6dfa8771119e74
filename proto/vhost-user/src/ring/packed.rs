//! Packed virtqueues as the device sees them (Virtio 1.2 section 2.8).
//!
//! Driver and device go around one ring of descriptors, and say by two flags of each, against the
//! wrap counter of the lap, whose it is:
//!
//! ```text
//!          published         used_next                  next_avail
//!   used ────┼─── completed ────┼──── in flight, Σ count ────┼─── driver's, or seen ahead
//! ```
//!
//! Requests complete in any order, so a used descriptor overwrites the place of any of them: what
//! a chain consisted of is known afterwards only to the in-flight region. A chain in flight
//! therefore holds as many [`Slots`] as it has descriptors, which are the region's entries, and is
//! known by the first of them.

mod areas;
mod slots;

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::walk::{Desc, Walk};
use super::{ChainFault, RingAddresses, RingError};
use crate::inflight::PackedInflight;
use crate::memory::MemoryTable;
use areas::{PackedAreas, PackedDesc, Wanted};
use slots::{Chain, Slots};

/// A place in the ring, in one of two alternating laps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) index: u16,
    /// The lap's wrap counter.
    pub(crate) wrap: bool,
}

impl Position {
    const WRAP: u16 = 1 << 15;

    /// As event suppression and SET_VRING_BASE have it.
    pub(crate) fn of_raw(raw: u16) -> Position {
        Position {
            index: raw & !Position::WRAP,
            wrap: raw & Position::WRAP != 0,
        }
    }

    pub(crate) fn raw(self) -> u16 {
        self.index | if self.wrap { Position::WRAP } else { 0 }
    }

    /// `count` (at most `size`) descriptors further.
    #[inline]
    pub(crate) fn advanced(self, count: u16, size: u16) -> Position {
        let index = u32::from(self.index) + u32::from(count);
        let wraps = index >= u32::from(size);
        let index = if wraps {
            index - u32::from(size)
        } else {
            index
        };
        Position {
            index: index as u16,
            wrap: self.wrap != wraps,
        }
    }

    /// Descriptors from `earlier` to here, if that is less than two laps.
    pub(crate) fn since(self, earlier: Position, size: u16) -> u32 {
        let laps = 2 * u32::from(size);
        let linear = |at: Position| u32::from(at.index) + if at.wrap { 0 } else { u32::from(size) };
        (linear(self) + laps - linear(earlier)) % laps
    }
}

/// A completed chain whose used descriptor lacks its flags.
#[derive(Clone, Copy, Debug)]
struct Completed {
    head: u16,
    at: Position,
    has_written: bool,
}

/// A packed ring, without what it has in common with a split one.
#[derive(Debug)]
pub(super) struct PackedRing {
    areas: PackedAreas,
    event_idx: bool,
    indirect_desc: bool,
    next_avail: Position,
    /// Descriptors from `next_avail` on that are known to be available.
    ahead: u16,
    used_next: Position,
    published: Position,
    /// Chains between `published` and `used_next`, in that order.
    batch: Vec<Completed>,
    /// Descriptors published and not yet considered for a signal. None after a start, when a
    /// predecessor may have died before signalling.
    unsignalled: Option<u32>,
    slots: Slots,
    outstanding_count: u16,
    inflight: Option<PackedInflight>,
}

impl PackedRing {
    /// The ring, and the chains that a dead predecessor left, oldest first.
    pub(super) fn start(
        index: u16,
        features: u64,
        areas: (&MemoryTable, &RingAddresses, u16),
        next_avail: u16,
        mut inflight: Option<PackedInflight>,
    ) -> Result<(PackedRing, VecDeque<u16>), RingError> {
        let (memory, addresses, size) = areas;
        let areas = PackedAreas::resolve(memory, addresses, size)?;
        let mut base = Position::of_raw(next_avail);
        if base.index >= size {
            return Err(RingError::BadHead { head: base.index });
        }
        let mut slots = Slots::new(size);
        let mut left = VecDeque::new();
        let mut next_avail = base;
        if let Some(inflight) = &mut inflight {
            let recovered = inflight.recover(
                base,
                |at| areas.is_available(at),
                |at| areas.unmark_used(at),
            );
            if recovered.was_stale {
                tracing::warn!(
                    queue = index,
                    "in-flight region makes no sense, starting afresh"
                );
            }
            base = recovered.used;
            slots = Slots::recovered(size, &recovered, |slot| inflight.stored(slot));
            left = recovered.heads.into();
            next_avail = base.advanced(slots.in_use(), size);
        }
        let ring = PackedRing {
            areas,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect_desc: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            next_avail,
            ahead: 0,
            used_next: base,
            published: base,
            batch: Vec::new(),
            unsignalled: None,
            slots,
            outstanding_count: 0,
            inflight,
        };
        Ok((ring, left))
    }

    pub(super) fn check_areas(
        memory: &MemoryTable,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<(), RingError> {
        PackedAreas::resolve(memory, addresses, size).map(|_| ())
    }

    pub(super) fn set_memory(
        &mut self,
        memory: &MemoryTable,
        addresses: &RingAddresses,
    ) -> Result<(), RingError> {
        self.areas = PackedAreas::resolve(memory, addresses, self.areas.size())?;
        Ok(())
    }

    pub(super) fn size(&self) -> u16 {
        self.areas.size()
    }

    /// Next descriptor to take, and where the next used one goes.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.next_avail.raw(), self.published.raw())
    }

    pub(super) fn outstanding_count(&self) -> u16 {
        self.outstanding_count
    }

    /// Whether the driver made a chain available that was not taken.
    #[inline]
    pub(super) fn has_next(&mut self) -> Result<bool, RingError> {
        Ok(self.ahead > 0 || self.areas.is_available(self.next_avail))
    }

    /// Takes the chain that [`PackedRing::has_next`] saw.
    #[inline]
    pub(super) fn take_next(&mut self, walk: &mut Walk<'_>) -> Result<u16, RingError> {
        let size = self.areas.size();
        let mut chain = Chain::starting_at(self.next_avail, self.slots.first_free());
        let mut slot = chain.head;
        loop {
            // Where a sound driver's ring ends its longest chain.
            if chain.count == self.slots.free() {
                return Err(RingError::TooManyDescs { size });
            }
            let at = self.next_avail.advanced(chain.count, size);
            let desc = self.areas.desc(at.index);
            if let Some(inflight) = &mut self.inflight {
                inflight.store(slot, &desc.stored());
            }
            self.slots.store(slot, desc);
            self.add(&desc, walk);
            chain.count += 1;
            chain.last = slot;
            slot = self.slots.after(slot);
            if !desc.is_chained() {
                chain.id = desc.id();
                break;
            }
        }
        self.slots.take(&chain, slot);
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(chain.head, chain.last, chain.count, slot);
        }
        self.next_avail = self.next_avail.advanced(chain.count, size);
        self.ahead = self.ahead.saturating_sub(chain.count);
        self.outstanding_count += 1;
        Ok(chain.head)
    }

    /// Takes a chain that a dead predecessor left.
    pub(super) fn take(&mut self, head: u16, walk: &mut Walk<'_>) -> Result<(), RingError> {
        for desc in self.slots.descs(head) {
            self.add(&desc, walk);
        }
        self.outstanding_count += 1;
        Ok(())
    }

    #[inline]
    pub(super) fn complete(&mut self, head: u16, written_bytes: u32) {
        let Chain { id, count, .. } = self.slots.complete(head);
        self.outstanding_count -= 1;
        self.areas
            .write_used(self.used_next.index, id, written_bytes);
        self.batch.push(Completed {
            head,
            at: self.used_next,
            has_written: written_bytes > 0,
        });
        self.used_next = self.used_next.advanced(count, self.areas.size());
    }

    /// Makes a chain the driver's again if it was the last one taken; `may_rewind` unless a
    /// predecessor's chains wait.
    pub(super) fn put_back(&mut self, head: u16, may_rewind: bool) -> bool {
        self.outstanding_count -= 1;
        let Chain { start, count, .. } = *self.slots.in_flight(head);
        let is_last =
            start.is_some_and(|start| start.advanced(count, self.areas.size()) == self.next_avail);
        let Some(start) = start.filter(|_| is_last && may_rewind) else {
            // In the region it stays what a predecessor left.
            self.slots.detach(head);
            return false;
        };
        self.give_up(head);
        self.next_avail = start;
        self.ahead += count;
        true
    }

    #[inline]
    pub(super) fn publish(&mut self) {
        let Some((first, others)) = self.batch.split_first() else {
            return;
        };
        for completed in &self.batch {
            let last = self.slots.release(completed.head);
            if let Some(inflight) = &mut self.inflight {
                inflight.add_to_batch(completed.head, last);
            }
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.batch_ends_at(self.used_next);
        }
        // The driver looks at used descriptors in their order: the first one publishes the others.
        for completed in others {
            self.areas.mark_used(completed.at, completed.has_written);
        }
        self.areas.mark_used(first.at, first.has_written);
        if let Some(inflight) = &mut self.inflight {
            inflight.batch_published(self.batch.iter().map(|completed| completed.head));
        }
        self.batch.clear();
        let moved = self.used_next.since(self.published, self.areas.size());
        self.published = self.used_next;
        self.unsignalled = self.unsignalled.map(|count| count.saturating_add(moved));
    }

    pub(super) fn disable_notification(&mut self) {
        self.areas.set_device_wants(Wanted::Nothing);
    }

    pub(super) fn enable_notification(&mut self) {
        let size = self.areas.size();
        self.areas.set_device_wants(match self.event_idx {
            true => Wanted::At(self.next_avail.advanced(self.ahead, size)),
            false => Wanted::Everything,
        });
        fence(Ordering::SeqCst);
    }

    /// Whether the driver added something since the last look.
    #[inline]
    pub(super) fn has_new(&mut self) -> Result<bool, RingError> {
        let size = self.areas.size();
        let seen_before = self.ahead;
        while self.ahead < self.slots.free()
            && self
                .areas
                .is_available(self.next_avail.advanced(self.ahead, size))
        {
            self.ahead += 1;
        }
        Ok(self.ahead != seen_before)
    }

    /// Virtio 1.2 section 2.8.14.
    #[inline]
    pub(super) fn driver_wants_signal(&mut self) -> bool {
        let unsignalled = self.unsignalled.replace(0);
        if unsignalled == Some(0) {
            return false;
        }
        // The driver writes its wish and then looks at the descriptors; we write descriptors and
        // then look at its wish. Without the fence both could miss the other.
        fence(Ordering::SeqCst);
        match self.areas.driver_wants(self.event_idx) {
            Wanted::Everything => true,
            Wanted::Nothing => false,
            Wanted::At(event) if event.index >= self.areas.size() => true,
            Wanted::At(event) => {
                let size = self.areas.size();
                let behind = match self.published.since(event, size) {
                    // Two whole laps ago.
                    0 => 2 * u32::from(size),
                    behind => behind,
                };
                unsignalled.is_none_or(|moved| behind <= moved)
            }
        }
    }

    /// Whether the driver asked to be signalled of something that is published, and has not asked anew.
    pub(super) fn driver_waits_for_published(&self) -> bool {
        let size = self.areas.size();
        match self.areas.driver_wants(self.event_idx) {
            Wanted::Everything => true,
            Wanted::Nothing => false,
            Wanted::At(event) if event.index >= size => true,
            Wanted::At(event) => (1..=u32::from(size)).contains(&self.published.since(event, size)),
        }
    }

    /// Makes what a predecessor left the driver's again, where that is possible: when these are
    /// exactly the descriptors that follow the used ones in the ring.
    pub(super) fn rewind(&mut self, left: &VecDeque<u16>) -> bool {
        if self.outstanding_count > 0 {
            return false;
        }
        let size = self.areas.size();
        let mut at = self.used_next;
        for desc in left.iter().flat_map(|&head| self.slots.descs(head)) {
            if self.areas.desc(at.index).stored() != desc.stored() || !self.areas.is_available(at) {
                return false;
            }
            at = at.advanced(1, size);
        }
        // The last one first: what is left after a crash are the first ones, as if only those had
        // been taken.
        for &head in left.iter().rev() {
            self.give_up(head);
        }
        self.next_avail = self.used_next;
        self.ahead = 0;
        true
    }

    /// The ring ends with nothing in flight.
    pub(super) fn retire(&mut self) {
        if let Some(inflight) = &mut self.inflight {
            inflight.retire();
        }
    }

    #[inline]
    fn add(&self, desc: &PackedDesc, walk: &mut Walk<'_>) {
        if !desc.is_indirect() {
            return walk.add(desc.buffer());
        }
        let reason = match (self.indirect_desc, desc.is_chained()) {
            (true, false) => return walk.indirect::<PackedDesc>(desc.buffer()),
            (true, true) => "descriptor is both indirect and chained",
            (false, _) => "indirect descriptor, but the feature was not negotiated",
        };
        walk.spoil(ChainFault::BadIndirect { reason });
    }

    /// A chain is no longer in flight, and nothing was done with it.
    fn give_up(&mut self, head: u16) {
        let last = self.slots.release(head);
        if let Some(inflight) = &mut self.inflight {
            inflight.cancel(head, last);
        }
    }
}

#[cfg(test)]
impl PackedRing {
    /// A crash in the middle of publishing: after `step` of its five steps.
    pub(super) fn publish_up_to(&mut self, step: u32) {
        let inflight = self.inflight.as_mut().expect("a region");
        let Some((first, others)) = self.batch.split_first() else {
            return;
        };
        for completed in &self.batch {
            let last = self.slots.release(completed.head);
            inflight.add_to_batch(completed.head, last);
        }
        if step >= 2 {
            inflight.batch_ends_at(self.used_next);
        }
        if step >= 3 {
            for completed in others {
                self.areas.mark_used(completed.at, completed.has_written);
            }
        }
        if step >= 4 {
            self.areas.mark_used(first.at, first.has_written);
        }
        if step >= 5 {
            inflight.clear_batch(self.batch.iter().map(|completed| completed.head));
        }
    }
}
