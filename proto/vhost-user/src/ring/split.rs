//! Split virtqueues as the device sees them (Virtio 1.2 section 2.7).
//!
//! ```text
//!   avail->idx ..... driver's
//!   next_avail  ---> take_next() -> in flight -> complete() -> used_next
//!                                                publish()  -> used->idx (driver's), batch leaves
//!                                                              the in-flight region
//! ```

mod areas;

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
    VRING_USED_F_NO_NOTIFY,
};

use super::batch::{Batch, prefetch_read, prefetch_write};
use super::walk::Walk;
use super::{RingAddresses, RingError};
use crate::inflight::SplitInflight;
use crate::memory::MemoryTable;
use areas::SplitAreas;

/// Entries that are looked at together: enough to hide what one look takes, few enough that what
/// was asked for early is still in the cache when it is used.
const RUN: usize = 64;

const CACHE_LINE_BYTES: usize = 64;

/// From here on a cache line has room for no more than a virtio-net header.
const FEW_BYTES_LEFT: usize = CACHE_LINE_BYTES - 16;

/// A split ring, without what it has in common with a packed one. Its chains are known by the
/// index of their first descriptor.
#[derive(Debug)]
pub(super) struct SplitRing {
    areas: SplitAreas,
    event_idx: bool,
    indirect_desc: bool,
    next_avail: u16,
    /// `avail->idx` as last read.
    seen_avail: u16,
    /// Where the next used element goes.
    used_next: u16,
    /// `used->idx` as last written.
    published: u16,
    /// `used->idx` when the driver was last considered for a signal; None after a start in the
    /// middle of a ring's life, when the predecessor may have died before signalling.
    signalled: Option<u16>,
    inflight: Option<SplitInflight>,
    /// One bit per head popped and not completed.
    outstanding: Vec<u64>,
    outstanding_count: u16,
}

impl SplitRing {
    /// The ring, and the heads that a dead predecessor left, oldest first.
    pub(super) fn start(
        index: u16,
        features: u64,
        areas: (&MemoryTable, &RingAddresses, u16),
        next_avail: u16,
        mut inflight: Option<SplitInflight>,
    ) -> Result<(SplitRing, VecDeque<u16>), RingError> {
        let (memory, addresses, size) = areas;
        let areas = SplitAreas::resolve(memory, addresses, size)?;
        let used_idx = areas.used_idx();
        let mut next_avail = next_avail;
        let mut left = VecDeque::new();
        if let Some(inflight) = &mut inflight {
            let avail_idx = areas.avail_idx();
            let recovered = inflight.recover(used_idx, avail_idx);
            if recovered.was_stale {
                tracing::warn!(
                    queue = index,
                    used_idx,
                    avail_idx,
                    "in-flight region does not belong to this ring, starting afresh"
                );
            }
            if !recovered.heads.is_empty() {
                next_avail = used_idx.wrapping_add(recovered.heads.len() as u16);
            }
            left = recovered.heads.into();
        }
        let is_fresh = used_idx == 0 && next_avail == 0;
        let ring = SplitRing {
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect_desc: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            outstanding: vec![0; usize::from(size).div_ceil(64)],
            outstanding_count: 0,
            areas,
            next_avail,
            seen_avail: next_avail,
            used_next: used_idx,
            published: used_idx,
            signalled: is_fresh.then_some(used_idx),
            inflight,
        };
        Ok((ring, left))
    }

    pub(super) fn check_areas(
        memory: &MemoryTable,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<(), RingError> {
        SplitAreas::resolve(memory, addresses, size).map(|_| ())
    }

    pub(super) fn set_memory(
        &mut self,
        memory: &MemoryTable,
        addresses: &RingAddresses,
    ) -> Result<(), RingError> {
        self.areas = SplitAreas::resolve(memory, addresses, self.areas.size())?;
        Ok(())
    }

    pub(super) fn size(&self) -> u16 {
        self.areas.size()
    }

    /// Next entry of the available ring, and `used->idx`.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.next_avail, self.published)
    }

    pub(super) fn outstanding_count(&self) -> u16 {
        self.outstanding_count
    }

    /// Whether the driver made a chain available that was not taken.
    #[inline]
    pub(super) fn has_next(&mut self) -> Result<bool, RingError> {
        if self.next_avail != self.seen_avail {
            return Ok(true);
        }
        self.look_for_available()
    }

    /// Takes the chain that [`SplitRing::has_next`] saw.
    #[inline]
    pub(super) fn take_next(&mut self, walk: &mut Walk<'_>) -> Result<u16, RingError> {
        let head = self.areas.avail_entry(self.next_avail);
        if head >= self.areas.size() {
            return Err(RingError::BadHead { head });
        }
        self.take(head, walk)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(head);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(head)
    }

    /// Takes up to `max` of the next chains, as long as each is a single buffer inside one memory
    /// region: what a packet usually is. Returns how many; whatever comes then is for
    /// [`SplitRing::take_next`].
    ///
    /// Other CPUs wrote all that is read here, so each look goes over a whole run of entries
    /// before the next one depends on it.
    #[inline]
    pub(super) fn take_singles(
        &mut self,
        table: &MemoryTable,
        region_hint: &mut usize,
        batch: &mut Batch,
        max: usize,
    ) -> Result<usize, RingError> {
        if !self.has_next()? {
            return Ok(0);
        }
        let ahead = usize::from(self.seen_avail.wrapping_sub(self.next_avail));
        let count = ahead.min(max).min(RUN);
        let mut heads = [0; RUN];
        for (offset, head) in (0..).zip(&mut heads[..count]) {
            *head = self.areas.avail_entry(self.next_avail.wrapping_add(offset));
            self.areas.prefetch_desc(*head);
        }
        let mut taken = 0;
        for &head in &heads[..count] {
            // What is wrong is told by `take_next`.
            let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
            if head >= self.areas.size() || self.outstanding[word] & bit != 0 {
                break;
            }
            let Some((segment, is_writable)) = self.areas.single(head, table, region_hint) else {
                break;
            };
            let address = segment.as_ptr().cast_const();
            if is_writable {
                // The end of a line has a header at most, which may be there already: to ask for the line to
                // write would take it from the driver.
                match address.addr() % CACHE_LINE_BYTES {
                    FEW_BYTES_LEFT.. => prefetch_read(address),
                    _ => prefetch_write(address),
                }
                prefetch_write(address.wrapping_add(CACHE_LINE_BYTES));
            } else {
                prefetch_read(address);
                prefetch_read(address.wrapping_add(CACHE_LINE_BYTES));
            }
            self.outstanding[word] |= bit;
            if let Some(inflight) = &mut self.inflight {
                inflight.begin(head);
            }
            batch.push_single(head, segment, is_writable);
            taken += 1;
        }
        self.outstanding_count += taken;
        self.next_avail = self.next_avail.wrapping_add(taken);
        Ok(usize::from(taken))
    }

    /// Takes a chain that a dead predecessor left. Its entry is marked in flight already, with the
    /// counter that keeps its place in the order.
    pub(super) fn take(&mut self, head: u16, walk: &mut Walk<'_>) -> Result<(), RingError> {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        if self.outstanding[word] & bit != 0 {
            return Err(RingError::HeadInFlight { head });
        }
        self.areas.walk(head, self.indirect_desc, walk);
        self.outstanding[word] |= bit;
        self.outstanding_count += 1;
        Ok(())
    }

    #[inline]
    pub(super) fn complete(&mut self, head: u16, written_bytes: u32) {
        // A sound driver never has more than a ring's worth of them. One that offers descriptors
        // again before it gets them back must not make the batch, or the index, run over.
        if self.used_next.wrapping_sub(self.published) == self.areas.size() {
            self.publish();
        }
        self.settle(head);
        self.areas.write_used(self.used_next, head, written_bytes);
        self.used_next = self.used_next.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.add_to_batch(head);
        }
    }

    /// Makes a chain the driver's again if it was the last one taken; `may_rewind` unless a
    /// predecessor's chains wait.
    pub(super) fn put_back(&mut self, head: u16, may_rewind: bool) -> bool {
        self.settle(head);
        let previous = self.next_avail.wrapping_sub(1);
        if !may_rewind || self.areas.avail_entry(previous) != head {
            return false;
        }
        self.next_avail = previous;
        if let Some(inflight) = &mut self.inflight {
            inflight.cancel(head);
        }
        true
    }

    #[inline]
    pub(super) fn publish(&mut self) {
        if self.published == self.used_next {
            return;
        }
        self.areas.set_used_idx(self.used_next);
        self.published = self.used_next;
        if let Some(inflight) = &mut self.inflight {
            inflight.batch_published(self.published);
        }
    }

    pub(super) fn disable_notification(&mut self) {
        // The driver looks at the same cache line: it is written when that changes something.
        let no_notify = VRING_USED_F_NO_NOTIFY as u16;
        if !self.event_idx && self.areas.used_flags() != no_notify {
            self.areas.set_used_flags(no_notify);
        }
    }

    pub(super) fn enable_notification(&mut self) {
        if self.event_idx {
            self.areas.set_avail_event(self.seen_avail);
        } else {
            self.areas.set_used_flags(0);
        }
        fence(Ordering::SeqCst);
    }

    /// Whether the driver added something since the last look.
    #[inline]
    pub(super) fn has_new(&mut self) -> Result<bool, RingError> {
        let seen_before = self.seen_avail;
        self.look_for_available()?;
        Ok(self.seen_avail != seen_before)
    }

    /// Virtio 1.2 sections 2.7.7 and 2.7.10.
    #[inline]
    pub(super) fn driver_wants_signal(&mut self) -> bool {
        let new = self.published;
        let old = self.signalled.replace(new);
        if old == Some(new) {
            return false;
        }
        // The driver writes its wish and then looks at used->idx; we write used->idx and then
        // look at its wish. Without the fence both could miss the other.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.areas.avail_flags() & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0;
        }
        let Some(old) = old else { return true };
        let used_event = self.areas.used_event();
        new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Whether the driver asked to be signalled of something that is published, and has not asked anew. It
    /// may have taken what there is and want to hear of nothing more.
    pub(super) fn driver_waits_for_published(&self) -> bool {
        if !self.event_idx {
            return self.areas.avail_flags() & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0;
        }
        let behind = self.published.wrapping_sub(self.areas.used_event());
        (1..=self.areas.size()).contains(&behind)
    }

    /// Makes what a predecessor left the driver's again, where that is possible: when these are
    /// exactly the entries that follow `used->idx` in the available ring.
    pub(super) fn rewind(&mut self, left: &VecDeque<u16>) -> bool {
        let first = self.published;
        let is_next = |(offset, head): (u16, &u16)| {
            self.areas.avail_entry(first.wrapping_add(offset)) == *head
        };
        if self.outstanding_count > 0 || !(0..).zip(left).all(is_next) {
            return false;
        }
        self.next_avail = self.next_avail.wrapping_sub(left.len() as u16);
        // The last one first: what is left after a crash are the first ones, as if only those had
        // been taken.
        for &head in left.iter().rev() {
            if let Some(inflight) = &mut self.inflight {
                inflight.cancel(head);
            }
        }
        true
    }

    /// The ring ends with nothing in flight.
    pub(super) fn retire(&mut self) {
        if let Some(inflight) = &mut self.inflight {
            inflight.retire();
        }
    }

    /// `head` is no longer in flight.
    #[inline]
    fn settle(&mut self, head: u16) {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        assert!(
            self.outstanding
                .get(word)
                .is_some_and(|bits| bits & bit != 0),
            "chain {head} returned to a ring it was not popped from"
        );
        self.outstanding[word] &= !bit;
        self.outstanding_count -= 1;
    }

    fn look_for_available(&mut self) -> Result<bool, RingError> {
        let (avail_idx, next_avail, size) =
            (self.areas.avail_idx(), self.next_avail, self.areas.size());
        if avail_idx.wrapping_sub(next_avail) > size {
            return Err(RingError::AvailIdxJump {
                avail_idx,
                next_avail,
                size,
            });
        }
        self.seen_avail = avail_idx;
        Ok(avail_idx != next_avail)
    }
}

#[cfg(test)]
impl SplitRing {
    /// A crash in the middle of publishing: `used->idx` moves, the region does not hear of it.
    pub(super) fn publish_half(&mut self) {
        self.areas.set_used_idx(self.used_next);
    }
}
