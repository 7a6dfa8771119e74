//! Virtqueues as the device sees them, [split] (Virtio 1.2 section 2.7) and [packed] (section 2.8).
//!
//! A [`Ring`] is a plain struct without threads or locks: one owner pops [`DescChain`]s, completes
//! them in any order, publishes completions in batches and signals the driver. Pointers to the
//! ring's areas are resolved once per start or memory change. When an in-flight region is attached,
//! every step is recorded there in the order that the specification demands, so that a successor
//! can take over after a crash at any instant.
//!
//! ```text
//!   driver's ---> pop() -> in flight -> complete() -> publish() -> driver's
//!                                                     notify()  -> call eventfd, if it wants it
//! ```
//!
//! A request that makes no sense is yielded as a chain with a [`ChainFault`]; only what makes the
//! ring itself meaningless is a [`RingError`].

mod batch;
mod chain;
mod error;
mod fault;
mod misbehaviour;
mod packed;
mod reminder;
mod split;
mod walk;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use faults::Point;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use crate::eventfd::Doorbell;
use crate::inflight::QueueInflight;
use crate::log_limit::LogLimit;
use crate::memory::MemoryTable;
pub use batch::{Batch, BatchChain};
pub use chain::{DescChain, MemoryPin, Segment, SegmentRange};
use chain::{PinnedMemory, SegmentVec};
pub use error::RingError;
pub use fault::ChainFault;
use misbehaviour::RingFaults;
use packed::PackedRing;
pub(crate) use packed::Position;
use reminder::Reminder;
use split::SplitRing;
pub use walk::MAX_INDIRECT_DESCS;
use walk::{Buffers, Walk};

/// Largest ring (Virtio 1.2 sections 2.7 and 2.8.10.1).
pub const MAX_RING_SIZE: u16 = 32768;

/// How driver and device share a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFormat {
    /// Descriptor table, available ring and used ring.
    Split,
    /// One descriptor ring that both write.
    Packed,
}

impl RingFormat {
    /// What acknowledged feature bits say.
    pub fn of(features: u64) -> RingFormat {
        match features & (1 << VIRTIO_F_RING_PACKED) {
            0 => RingFormat::Split,
            _ => RingFormat::Packed,
        }
    }
}

/// Where a ring's areas are, in the frontend's addresses (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table, or descriptor ring.
    pub desc: u64,
    /// Available ring, or driver event suppression.
    pub avail: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
}

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
    /// First entry to take, unless the in-flight region knows better: see
    /// [`RingState::next_avail`].
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

/// How whoever serves a ring next learns where it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successor {
    /// From the frontend, which is told or begins anew.
    Told,
    /// By itself, as after a crash: the session ended, and nobody asked.
    Alone,
}

/// Where a ring stands; enough to start a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Next entry of the available ring; in a packed ring the next descriptor, and its wrap
    /// counter in the highest bit.
    pub next_avail: u16,
    /// `used->idx` as published; in a packed ring where the next used descriptor goes, likewise.
    pub used_idx: u16,
    /// Chains popped, or to be resubmitted, and not completed.
    pub in_flight: u16,
    /// Of these, the ones to be resubmitted.
    pub left_to_resubmit: u16,
}

/// A running virtqueue. See the module's description.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    features: u64,
    intake: Intake,
    queue: Queue,
    addresses: RingAddresses,
    memory: Arc<PinnedMemory>,
    region_hint: usize,
    call: Option<Doorbell>,
    /// Left by a dead predecessor, oldest first; to be popped before new entries.
    resubmit: VecDeque<u16>,
    /// Storage of long chains, to be used again.
    spare: Vec<SegmentVec>,
    completed_total: u64,
    reminder: Reminder,
    /// Points at which something may go wrong on purpose; 0 but in experiments.
    armed: u32,
    faults: Option<Box<RingFaults>>,
}

/// Of the process: a driver makes rings anew as often as it likes.
static COMPLAINTS: Mutex<LogLimit> = Mutex::new(LogLimit::new());

/// What depends on the ring's format. An enum, because a worker meets either, and a branch that
/// always goes the same way costs nothing beside the rest of a request.
#[derive(Debug)]
enum Queue {
    Split(SplitRing),
    Packed(PackedRing),
}

/// Calls a method that both kinds of ring have.
macro_rules! either {
    ($queue:expr, $ring:ident => $call:expr) => {
        match $queue {
            Queue::Split($ring) => $call,
            Queue::Packed($ring) => $call,
        }
    };
}

impl Ring {
    /// Starts the device's side of a ring, recovering what the in-flight region holds.
    ///
    /// # Errors
    /// [`RingError::BadSize`], [`RingError::BadArea`], and [`RingError::NoInflightSlot`] for a
    /// region of the other format.
    pub fn start(config: RingConfig) -> Result<Ring, RingError> {
        let RingConfig {
            index,
            size,
            features,
            addresses,
            memory,
            next_avail,
            inflight,
            call,
        } = config;
        let areas = (&*memory, &addresses, size);
        let mismatch = RingError::NoInflightSlot { index, size };
        let (queue, resubmit) = match RingFormat::of(features) {
            RingFormat::Split => {
                let inflight = match inflight {
                    Some(QueueInflight::Split(inflight)) => Some(inflight),
                    Some(QueueInflight::Packed(_)) => return Err(mismatch),
                    None => None,
                };
                let (ring, left) = SplitRing::start(index, features, areas, next_avail, inflight)?;
                (Queue::Split(ring), left)
            }
            RingFormat::Packed => {
                let inflight = match inflight {
                    Some(QueueInflight::Packed(inflight)) => Some(inflight),
                    Some(QueueInflight::Split(_)) => return Err(mismatch),
                    None => None,
                };
                let (ring, left) = PackedRing::start(index, features, areas, next_avail, inflight)?;
                (Queue::Packed(ring), left)
            }
        };
        if !resubmit.is_empty() {
            let count = resubmit.len();
            tracing::info!(queue = index, count, "resubmitting requests in flight");
        }
        Ok(Ring {
            index,
            features,
            intake: Intake::Open,
            queue,
            addresses,
            memory: Arc::new(PinnedMemory { table: memory }),
            region_hint: 0,
            call,
            resubmit,
            spare: Vec::new(),
            completed_total: 0,
            reminder: Reminder::default(),
            armed: 0,
            faults: None,
        })
    }

    /// Whether a ring of `size` with areas at `addresses` lies in `memory`.
    ///
    /// # Errors
    /// [`RingError::BadSize`] and [`RingError::BadArea`].
    pub fn check_areas(
        format: RingFormat,
        memory: &MemoryTable,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<(), RingError> {
        match format {
            RingFormat::Split => SplitRing::check_areas(memory, addresses, size),
            RingFormat::Packed => PackedRing::check_areas(memory, addresses, size),
        }
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
        if !either!(&mut self.queue, queue => queue.has_next()?) {
            return Ok(None);
        }
        let storage = self.spare.pop().unwrap_or_default();
        let mut walk = Walk::new(&self.memory.table, &mut self.region_hint, storage);
        let head = either!(&mut self.queue, queue => queue.take_next(&mut walk)?);
        if self.armed & Point::Pop.bit() != 0
            && let Some(faults) = &self.faults
            && faults.breaks_request(self.index)
        {
            walk.spoil(ChainFault::Injected);
        }
        let buffers = walk.finish();
        Ok(Some(self.chain(head, buffers)))
    }

    /// Returns a chain to the driver with `written_bytes` device-written bytes. The driver sees
    /// it after [`Ring::publish`] or [`Ring::notify`].
    #[inline]
    pub fn complete(&mut self, mut chain: DescChain, written_bytes: u32) {
        let written_bytes = written_bytes.min(chain.written_limit_bytes);
        if self.armed & Point::Complete.bit() == 0 {
            self.complete_head(chain.head, written_bytes);
        } else {
            self.complete_armed(chain.head, written_bytes);
        }
        self.keep_storage(&mut chain);
        self.completed_total += 1;
    }

    /// Takes up to `max` requests at once, as [`Ring::pop`] would one after the other, and returns
    /// how many. Takes nothing while `batch` holds chains from before a change of the memory table.
    ///
    /// # Errors
    /// [`RingError`] when the driver broke the ring; what was taken before is in the batch.
    #[inline]
    pub fn pop_batch(&mut self, batch: &mut Batch, max: usize) -> Result<usize, RingError> {
        let max = max.min(usize::from(self.size()));
        if !batch.admits(&self.memory, max) {
            return Ok(0);
        }
        let mut taken = 0;
        while taken < max {
            if self.intake == Intake::Open
                && self.resubmit.is_empty()
                && self.armed & Point::Pop.bit() == 0
                && let Queue::Split(queue) = &mut self.queue
            {
                let table = &self.memory.table;
                let singles =
                    queue.take_singles(table, &mut self.region_hint, batch, max - taken)?;
                taken += singles;
                if singles > 0 && taken < max {
                    continue;
                }
                if taken == max || !queue.has_next()? {
                    break;
                }
            }
            let Some(mut chain) = self.pop()? else { break };
            batch.push(&chain);
            self.keep_storage(&mut chain);
            taken += 1;
        }
        if batch.is_empty() {
            batch.clear();
        }
        Ok(taken)
    }

    /// As [`Ring::complete`], of the oldest chain in `batch`.
    ///
    /// # Panics
    /// When the batch is empty, or was not taken from this ring.
    #[inline]
    pub fn complete_next(&mut self, batch: &mut Batch, written_bytes: u32) {
        let taken = batch.chains[batch.next];
        let written_bytes = written_bytes.min(taken.written_limit_bytes);
        if self.armed & Point::Complete.bit() == 0 {
            self.complete_head(taken.head, written_bytes);
        } else {
            self.complete_armed(taken.head, written_bytes);
        }
        self.completed_total += 1;
        batch.next += 1;
        if batch.is_empty() {
            batch.clear();
        }
    }

    /// Completes all chains in `batch` with nothing written.
    #[inline]
    pub fn complete_all(&mut self, batch: &mut Batch) {
        if self.armed & Point::Complete.bit() != 0 {
            while !batch.is_empty() {
                self.complete_next(batch, 0);
            }
            return;
        }
        either!(&mut self.queue, queue => {
            for taken in &batch.chains[batch.next..] {
                queue.complete(taken.head, 0);
            }
        });
        self.completed_total += batch.len() as u64;
        batch.clear();
    }

    /// As [`Ring::unpop`], of all chains that `batch` holds.
    pub fn unpop_all(&mut self, batch: &mut Batch) {
        while batch.chains.len() > batch.next
            && let Some(taken) = batch.chains.pop()
        {
            self.put_back(taken.head);
        }
        batch.clear();
    }

    /// Puts back a chain that nothing was done with; of several, the one popped last comes first.
    /// It is popped again before all others.
    pub fn unpop(&mut self, mut chain: DescChain) {
        self.put_back(chain.head);
        self.keep_storage(&mut chain);
    }

    fn put_back(&mut self, head: u16) {
        let may_rewind = self.resubmit.is_empty();
        let is_drivers = either!(&mut self.queue, queue => queue.put_back(head, may_rewind));
        if !is_drivers {
            // Left by a predecessor: its place in the region and in the order stays.
            self.resubmit.push_front(head);
        }
    }

    /// Makes completed chains visible to the driver, without signalling it.
    #[inline]
    pub fn publish(&mut self) {
        if self.armed & Point::Publish.bit() != 0 && self.is_publishing_stalled() {
            return;
        }
        either!(&mut self.queue, queue => queue.publish());
    }

    /// Publishes, and signals the driver when it asked to hear of these completions.
    #[inline]
    pub fn notify(&mut self) {
        self.publish();
        if either!(&mut self.queue, queue => queue.driver_wants_signal()) {
            if self.armed & Point::Call.bit() != 0 && self.loses_call() {
                return;
            }
            if let Some(call) = &self.call {
                call.ring();
            }
        }
    }

    /// Whether `pop` would yield something.
    pub fn has_available(&mut self) -> bool {
        if self.intake != Intake::Open {
            return self.intake == Intake::Draining && !self.resubmit.is_empty();
        }
        // A broken index counts as available: `pop` is who reports it.
        !self.resubmit.is_empty()
            || either!(&mut self.queue, queue => queue.has_next().unwrap_or(true))
    }

    /// Whether the driver added requests since this ring last looked, here or elsewhere. Unlike
    /// [`Ring::has_available`] it does not tell again of those that were left unpopped.
    ///
    /// # Errors
    /// [`RingError::AvailIdxJump`].
    #[inline]
    pub fn has_new(&mut self) -> Result<bool, RingError> {
        // A ring that takes nothing new does not look: a broken index must not keep what is in
        // flight from being completed.
        if self.intake != Intake::Open {
            return Ok(false);
        }
        either!(&mut self.queue, queue => queue.has_new())
    }

    /// Asks the driver not to kick, for as long as the device polls the ring.
    pub fn disable_notification(&mut self) {
        either!(&mut self.queue, queue => queue.disable_notification());
    }

    /// Asks the driver to kick when it adds to what the device has seen. Returns true when it
    /// added something in the meantime: then look again before going to sleep.
    ///
    /// # Errors
    /// [`RingError::AvailIdxJump`].
    pub fn enable_notification(&mut self) -> Result<bool, RingError> {
        either!(&mut self.queue, queue => queue.enable_notification());
        self.has_new()
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        either!(&self.queue, queue => queue.size())
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
        self.outstanding() + self.resubmit.len() as u16
    }

    /// Chains completed since the start; shows progress.
    pub fn completed_total(&self) -> u64 {
        self.completed_total
    }

    /// Where the ring stands.
    pub fn state(&self) -> RingState {
        let (next_avail, used_idx) = either!(&self.queue, queue => queue.position());
        RingState {
            next_avail,
            used_idx,
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
        either!(&mut self.queue, queue => queue.set_memory(&memory, &self.addresses)?);
        self.memory = Arc::new(PinnedMemory { table: memory });
        self.region_hint = 0;
        Ok(())
    }

    /// Ends the ring's life in order. What is left to resubmit becomes the driver's again where
    /// that is possible: a receive queue holds buffers that no packet came for. When nothing is in
    /// flight, the region forgets the ring, unless nothing else says where it goes on: the used
    /// index of a split ring is in guest memory, that of a packed one is not.
    pub fn finish(mut self, successor: Successor) -> RingState {
        self.publish();
        if either!(&mut self.queue, queue => queue.rewind(&self.resubmit)) {
            self.resubmit.clear();
        }
        let state = self.state();
        let is_told = successor == Successor::Told || matches!(self.queue, Queue::Split(_));
        if state.in_flight == 0 && is_told {
            either!(&mut self.queue, queue => queue.retire());
        }
        state
    }

    /// Chains popped and not completed.
    fn outstanding(&self) -> u16 {
        either!(&self.queue, queue => queue.outstanding_count())
    }

    #[inline]
    fn complete_head(&mut self, head: u16, written_bytes: u32) {
        either!(&mut self.queue, queue => queue.complete(head, written_bytes));
    }

    #[inline]
    fn keep_storage(&mut self, chain: &mut DescChain) {
        if chain.segments.spilled() && self.spare.len() < usize::from(self.size()) {
            let mut storage = std::mem::take(&mut chain.segments);
            storage.clear();
            self.spare.push(storage);
        }
    }

    #[cold]
    fn pop_resubmitted(&mut self) -> Result<Option<DescChain>, RingError> {
        if self.intake == Intake::Closed {
            return Ok(None);
        }
        let Some(&head) = self.resubmit.front() else {
            return Ok(None);
        };
        let storage = self.spare.pop().unwrap_or_default();
        let mut walk = Walk::new(&self.memory.table, &mut self.region_hint, storage);
        either!(&mut self.queue, queue => queue.take(head, &mut walk)?);
        let buffers = walk.finish();
        self.resubmit.pop_front();
        Ok(Some(self.chain(head, buffers)))
    }

    #[inline]
    fn chain(&mut self, head: u16, buffers: Buffers) -> DescChain {
        let Buffers {
            segments,
            writable_from,
            len_bytes: [readable_len_bytes, writable_len_bytes],
            written_limit_bytes,
            fault,
        } = buffers;
        if let Some(fault) = &fault {
            self.complain(head, fault);
        }
        DescChain {
            head,
            writable_from,
            readable_len_bytes,
            writable_len_bytes,
            written_limit_bytes,
            fault,
            segments,
            memory: Arc::clone(&self.memory),
        }
    }

    /// The driver can break any number of requests; the log need not hear of each.
    #[cold]
    fn complain(&self, head: u16, fault: &ChainFault) {
        let mut complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(withheld) = complaints.admit() {
            let queue = self.index;
            tracing::warn!(queue, head, %fault, withheld, "broken request, answered as such");
        }
    }
}

#[cfg(test)]
impl Ring {
    fn split(&mut self) -> &mut SplitRing {
        match &mut self.queue {
            Queue::Split(ring) => ring,
            Queue::Packed(_) => panic!("a packed ring"),
        }
    }

    fn packed(&mut self) -> &mut PackedRing {
        match &mut self.queue {
            Queue::Packed(ring) => ring,
            Queue::Split(_) => panic!("a split ring"),
        }
    }
}

#[cfg(test)]
mod tests;
