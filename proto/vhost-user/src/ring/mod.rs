//! Split virtqueues as the device sees them (Virtio 1.2 section 2.7).
//!
//! A [`Ring`] is a plain struct without threads or locks: one owner pops [`DescChain`]s, completes
//! them in any order, publishes completions in batches and signals the driver. Pointers to the
//! three areas are resolved once per start or memory change. When an in-flight region is attached,
//! every step is recorded there in the order that the specification demands, so that a successor
//! can take over after a crash at any instant.
//!
//! ```text
//!   avail->idx ..... driver's
//!   next_avail  ---> pop() -> in flight -> complete() -> used_next
//!                                          publish()  -> used->idx (driver's), batch leaves the region
//!                                          notify()   -> call eventfd, if the driver wants it
//! ```

mod chain;
mod error;
mod fault;
mod layout;
mod walk;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::eventfd::Doorbell;
use crate::inflight::QueueInflight;
use crate::log_limit::LogLimit;
use crate::memory::MemoryTable;
pub use chain::{DescChain, MemoryPin, Segment, SegmentRange};
use chain::{PinnedMemory, SegmentVec};
pub use error::RingError;
pub use fault::ChainFault;
pub use layout::RingAddresses;
use layout::RingAreas;
pub use walk::MAX_INDIRECT_DESCS;
use walk::{Buffers, Walk};

/// Largest split ring (Virtio 1.2 section 2.7).
pub const MAX_RING_SIZE: u16 = 32768;

/// What a ring is started from.
#[derive(Debug)]
pub struct RingConfig {
    /// Queue index in the device.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Acknowledged feature bits.
    pub features: u64,
    /// Where the three areas are.
    pub addresses: RingAddresses,
    /// The frontend's memory.
    pub memory: Arc<MemoryTable>,
    /// First entry of the available ring to take, unless the in-flight region knows better.
    pub next_avail: u16,
    /// This ring's part of the in-flight region.
    pub inflight: Option<QueueInflight>,
    /// Signals the driver.
    pub call: Option<Doorbell>,
}

/// What [`Ring::pop`] yields. Completions go on in every state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intake {
    /// Requests left by a dead predecessor, then the driver's new ones.
    Open,
    /// Only what a dead predecessor left: the ring is to end with nothing in flight.
    Draining,
    /// Nothing.
    Closed,
}

/// Where a ring stands; enough to start a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// `used->idx` as published.
    pub used_idx: u16,
    /// Chains popped, or to be resubmitted, and not completed.
    pub in_flight: u16,
    /// Of these, the ones to be resubmitted.
    pub left_to_resubmit: u16,
}

/// A running split virtqueue. See the module's description.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    features: u64,
    event_idx: bool,
    indirect_desc: bool,
    intake: Intake,
    areas: RingAreas,
    addresses: RingAddresses,
    memory: Arc<PinnedMemory>,
    region_hint: usize,
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
    call: Option<Doorbell>,
    inflight: Option<QueueInflight>,
    /// Left by a dead predecessor, oldest first; to be popped before new entries.
    resubmit: VecDeque<u16>,
    /// One bit per head popped and not completed.
    outstanding: Vec<u64>,
    outstanding_count: u16,
    /// Storage of long chains, to be used again.
    spare: Vec<SegmentVec>,
    completed_total: u64,
    complaints: LogLimit,
}

impl Ring {
    /// Starts the device's side of a ring, recovering what the in-flight region holds.
    ///
    /// # Errors
    /// [`RingError::BadSize`] and [`RingError::BadArea`].
    pub fn start(config: RingConfig) -> Result<Ring, RingError> {
        let RingConfig {
            index,
            size,
            features,
            addresses,
            memory,
            call,
            ..
        } = config;
        let areas = RingAreas::resolve(&memory, &addresses, size)?;
        let used_idx = areas.used_idx();
        let mut next_avail = config.next_avail;
        let mut resubmit = VecDeque::new();
        let mut inflight = config.inflight;
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
                tracing::info!(
                    queue = index,
                    count = recovered.heads.len(),
                    "resubmitting requests in flight"
                );
                next_avail = used_idx.wrapping_add(recovered.heads.len() as u16);
            }
            resubmit = recovered.heads.into();
        }
        let is_fresh = used_idx == 0 && next_avail == 0;
        Ok(Ring {
            index,
            features,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect_desc: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            intake: Intake::Open,
            outstanding: vec![0; usize::from(size).div_ceil(64)],
            outstanding_count: 0,
            areas,
            addresses,
            memory: Arc::new(PinnedMemory { table: memory }),
            region_hint: 0,
            next_avail,
            seen_avail: next_avail,
            used_next: used_idx,
            published: used_idx,
            signalled: is_fresh.then_some(used_idx),
            call,
            inflight,
            resubmit,
            spare: Vec::new(),
            completed_total: 0,
            complaints: LogLimit::default(),
        })
    }

    /// Whether a ring of `size` with areas at `addresses` lies in `memory`.
    ///
    /// # Errors
    /// [`RingError::BadSize`] and [`RingError::BadArea`].
    pub fn check_areas(
        memory: &MemoryTable,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<(), RingError> {
        RingAreas::resolve(memory, addresses, size).map(|_| ())
    }

    /// Takes the next request. Requests that a dead predecessor left come first, in their order.
    /// One that the driver broke is yielded like any other: see [`DescChain::fault`].
    ///
    /// # Errors
    /// [`RingError`] when the driver broke the ring; nothing is taken then.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<DescChain>, RingError> {
        if self.intake != Intake::Open || !self.resubmit.is_empty() {
            return self.pop_resubmitted();
        }
        if self.next_avail == self.seen_avail && !self.look_for_available()? {
            return Ok(None);
        }
        let head = self.areas.avail_entry(self.next_avail);
        if head >= self.areas.size() {
            return Err(RingError::BadHead { head });
        }
        let chain = self.resolve(head)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(head);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Returns a chain to the driver with `written_bytes` device-written bytes. The driver sees
    /// it after [`Ring::publish`] or [`Ring::notify`].
    #[inline]
    pub fn complete(&mut self, mut chain: DescChain, written_bytes: u32) {
        let head = chain.head;
        // A sound driver never has more than a ring's worth of them. One that offers descriptors
        // again before it gets them back must not make the batch, or the index, run over.
        if self.used_next.wrapping_sub(self.published) == self.areas.size() {
            self.publish();
        }
        self.settle(&mut chain);
        self.areas.write_used(
            self.used_next,
            head,
            written_bytes.min(chain.written_limit_bytes),
        );
        self.used_next = self.used_next.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.add_to_batch(head);
        }
        self.completed_total += 1;
    }

    /// Puts back a chain that nothing was done with; of several, the one popped last comes first.
    /// It is popped again before all others.
    pub fn unpop(&mut self, mut chain: DescChain) {
        self.settle(&mut chain);
        let previous = self.next_avail.wrapping_sub(1);
        if self.resubmit.is_empty() && self.areas.avail_entry(previous) == chain.head {
            self.next_avail = previous;
            if let Some(inflight) = &mut self.inflight {
                inflight.cancel(chain.head);
            }
        } else {
            // Left by a predecessor: its place in the region and in the order stays.
            self.resubmit.push_front(chain.head);
        }
    }

    /// Makes completed chains visible to the driver, without signalling it.
    #[inline]
    pub fn publish(&mut self) {
        if self.published == self.used_next {
            return;
        }
        self.areas.set_used_idx(self.used_next);
        self.published = self.used_next;
        if let Some(inflight) = &mut self.inflight {
            inflight.batch_published(self.published);
        }
    }

    /// Publishes, and signals the driver when it asked to hear of these completions.
    #[inline]
    pub fn notify(&mut self) {
        self.publish();
        if self.driver_wants_signal()
            && let Some(call) = &self.call
        {
            call.ring();
        }
    }

    /// Whether `pop` would yield something.
    pub fn has_available(&mut self) -> bool {
        if self.intake != Intake::Open {
            return self.intake == Intake::Draining && !self.resubmit.is_empty();
        }
        if !self.resubmit.is_empty() || self.next_avail != self.seen_avail {
            return true;
        }
        // A broken index counts as available: `pop` is who reports it.
        self.look_for_available().unwrap_or(true)
    }

    /// Whether the driver added requests since this ring last looked, here or elsewhere. Unlike
    /// [`Ring::has_available`] it does not tell again of those that were left unpopped.
    ///
    /// # Errors
    /// [`RingError::AvailIdxJump`].
    #[inline]
    pub fn has_new(&mut self) -> Result<bool, RingError> {
        let seen_before = self.seen_avail;
        self.look_for_available()?;
        Ok(self.intake == Intake::Open && self.seen_avail != seen_before)
    }

    /// Asks the driver not to kick, for as long as the device polls the ring.
    pub fn disable_notification(&mut self) {
        if !self.event_idx {
            self.areas
                .set_used_flags(virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Asks the driver to kick when it adds to what the device has seen. Returns true when it
    /// added something in the meantime: then look again before going to sleep.
    ///
    /// # Errors
    /// [`RingError::AvailIdxJump`].
    pub fn enable_notification(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            self.areas.set_avail_event(self.seen_avail);
        } else {
            self.areas.set_used_flags(0);
        }
        fence(Ordering::SeqCst);
        self.has_new()
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.areas.size()
    }

    /// Queue index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Acknowledged feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Chains popped, or waiting to be resubmitted, and not completed.
    pub fn in_flight(&self) -> u16 {
        self.outstanding_count + self.resubmit.len() as u16
    }

    /// Chains completed since the start; shows progress.
    pub fn completed_total(&self) -> u64 {
        self.completed_total
    }

    /// Where the ring stands.
    pub fn state(&self) -> RingState {
        RingState {
            next_avail: self.next_avail,
            used_idx: self.published,
            in_flight: self.in_flight(),
            left_to_resubmit: self.left_to_resubmit(),
        }
    }

    /// Where the three areas are.
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// What `pop` yields from now on.
    pub fn set_intake(&mut self, intake: Intake) {
        self.intake = intake;
    }

    /// What `pop` yields.
    pub fn intake(&self) -> Intake {
        self.intake
    }

    /// Whether the driver's new requests are left alone.
    pub fn is_paused(&self) -> bool {
        self.intake != Intake::Open
    }

    /// Requests of a dead predecessor that `pop` has yet to yield.
    pub fn left_to_resubmit(&self) -> u16 {
        self.resubmit.len() as u16
    }

    /// Replaces the eventfd that signals the driver.
    pub fn set_call(&mut self, call: Option<Doorbell>) {
        self.call = call;
    }

    /// Goes over to another memory table. Chains in flight keep the mappings they came with.
    ///
    /// # Errors
    /// [`RingError::BadArea`] when the ring is not in the new table; the old one stays in use.
    pub fn set_memory(&mut self, memory: Arc<MemoryTable>) -> Result<(), RingError> {
        self.areas = RingAreas::resolve(&memory, &self.addresses, self.areas.size())?;
        self.memory = Arc::new(PinnedMemory { table: memory });
        self.region_hint = 0;
        Ok(())
    }

    /// Ends the ring's life in order. When nothing is in flight, the region forgets the ring.
    pub fn finish(mut self) -> RingState {
        self.publish();
        self.rewind_untouched();
        let state = self.state();
        if state.in_flight == 0
            && let Some(inflight) = &mut self.inflight
        {
            inflight.retire();
        }
        state
    }

    /// Makes what is left to resubmit the driver's again, where that is possible: when these are
    /// exactly the entries that follow `used->idx` in the available ring. (A receive queue holds
    /// buffers that no packet came for, and completes in order.)
    fn rewind_untouched(&mut self) {
        let first = self.published;
        let is_next = |(offset, head): (u16, &u16)| {
            self.areas.avail_entry(first.wrapping_add(offset)) == *head
        };
        if self.outstanding_count > 0 || !(0..).zip(&self.resubmit).all(is_next) {
            return;
        }
        self.next_avail = self.next_avail.wrapping_sub(self.resubmit.len() as u16);
        for head in self.resubmit.drain(..) {
            if let Some(inflight) = &mut self.inflight {
                inflight.cancel(head);
            }
        }
    }

    /// `chain` is no longer in flight.
    #[inline]
    fn settle(&mut self, chain: &mut DescChain) {
        let head = chain.head;
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        assert!(
            self.outstanding
                .get(word)
                .is_some_and(|bits| bits & bit != 0),
            "chain {head} returned to a ring it was not popped from"
        );
        self.outstanding[word] &= !bit;
        self.outstanding_count -= 1;
        if chain.segments.spilled() && self.spare.len() < usize::from(self.areas.size()) {
            let mut storage = std::mem::take(&mut chain.segments);
            storage.clear();
            self.spare.push(storage);
        }
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

    #[cold]
    fn pop_resubmitted(&mut self) -> Result<Option<DescChain>, RingError> {
        if self.intake == Intake::Closed {
            return Ok(None);
        }
        let Some(&head) = self.resubmit.front() else {
            return Ok(None);
        };
        // Its entry is marked in flight already, with the counter that keeps its place in the order.
        let chain = self.resolve(head)?;
        self.resubmit.pop_front();
        Ok(Some(chain))
    }

    /// Walks the chain at `head` and marks it outstanding.
    fn resolve(&mut self, head: u16) -> Result<DescChain, RingError> {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        if self.outstanding[word] & bit != 0 {
            return Err(RingError::HeadInFlight { head });
        }
        let storage = self.spare.pop().unwrap_or_default();
        let mut walk = Walk::new(&self.memory.table, &mut self.region_hint, storage);
        self.areas.walk(head, self.indirect_desc, &mut walk);
        let Buffers {
            segments,
            writable_from,
            len_bytes: [readable_len_bytes, writable_len_bytes],
            written_limit_bytes,
            fault,
        } = walk.finish();
        if let Some(fault) = &fault {
            self.complain(head, fault);
        }
        self.outstanding[word] |= bit;
        self.outstanding_count += 1;
        Ok(DescChain {
            head,
            writable_from,
            readable_len_bytes,
            writable_len_bytes,
            written_limit_bytes,
            fault,
            segments,
            memory: Arc::clone(&self.memory),
        })
    }

    /// The driver can break any number of requests; the log need not hear of each.
    #[cold]
    fn complain(&mut self, head: u16, fault: &ChainFault) {
        if let Some(withheld) = self.complaints.admit() {
            let queue = self.index;
            tracing::warn!(queue, head, %fault, withheld, "broken request, answered as such");
        }
    }

    /// Virtio 1.2 sections 2.7.7 and 2.7.10.
    fn driver_wants_signal(&mut self) -> bool {
        let new = self.published;
        let old = self.signalled.replace(new);
        if old == Some(new) {
            return false;
        }
        // The driver writes its wish and then looks at used->idx; we write used->idx and then
        // look at its wish. Without the fence both could miss the other.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.areas.avail_flags()
                & virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT as u16
                == 0;
        }
        let Some(old) = old else { return true };
        let used_event = self.areas.used_event();
        new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

#[cfg(test)]
mod tests;
