//! Serving one virtqueue of a disk: requests from the ring to the image and back.
//!
//! [`BlkQueue`] belongs to its ring's thread, which alone touches it. It takes requests off
//! the ring, checks them ([`request`]), runs them as [`job`]s through the thread's own
//! io_uring ([`uring`]) or the disk's [`workers`], and answers each as soon as it is done, in any
//! order:
//!
//! ```text
//! ring.pop ─► parse ─► admitted ─► Job ─► io_uring, worker ─► completion ─► status ─► ring.complete
//!               │         └─ held until the rate limit allows it              │
//!               └─ refused, GET_ID: answered at once; in memory: done at once ┘
//! ```
//!
//! Guest buffers go to the kernel as they are; only buffers that `O_DIRECT` would refuse, and
//! what a cipher changes, are [`bounce`]d. Nothing here blocks except `drain`, which has a
//! deadline.
//!
//! What queues share is the [`backend`]; the [`gate`] stops them all at one instant.

pub(crate) mod affinity;
pub(crate) mod alarm;
pub(crate) mod allowance;
pub(crate) mod backend;
pub(crate) mod bounce;
pub(crate) mod buffer;
mod complaints;
pub(crate) mod gate;
mod gather;
mod ghosts;
mod job;
pub(crate) mod misbehaviour;
mod ranges;
pub(crate) mod ring_maker;
mod sync;
mod teardown;
mod throttle;
mod transfer;
pub(crate) mod uring;
mod workers;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vhost_user::backend::{Polling, QueueHandler, Wake};
use vhost_user::ring::{DescChain, Ring, RingError};

use crate::image::{Access, SECTOR_BYTES};
use crate::latency::SlowRequest;
use crate::stats::QueueStats;
use alarm::{Alarm, monotonic_ns};
pub(crate) use backend::Backend;
use bounce::BouncePool;
use complaints::Complaints;
use job::{Backing, Job, Next, Served};
use misbehaviour::Misbehaviour;
use request::{
    self, ByteRange, HEADER_BYTES, ID_BYTES, LIFETIME_BYTES, Limits, MAX_RANGES, OpKind,
    RANGE_BYTES, RangeOp, Request, Status,
};
use sync::Nowait;
use uring::{Uring, UringError};
use workers::{Held, Item, Operation, Results};

/// Largest ring served, and so the most requests a queue has in flight.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;
/// Rounds of work before the thread looks at its commands again.
const MAX_ROUNDS: u32 = 64;
/// Requests that are answered as soon as they are taken, before the driver hears of them.
const ANSWERS_UNPUBLISHED: u32 = 8;

/// Positions in [`BlkQueue::event_fds`].
const EVENT_ALARM: usize = 1;

/// When a write counts as done (Virtio 1.2 section 5.2.6.2).
#[derive(Clone, Debug)]
pub(crate) enum CacheMode {
    /// When it is on stable storage: the driver cannot flush.
    WriteThrough,
    /// A flush makes it so.
    WriteBack,
    /// As the driver says in the configuration; true for write-back.
    Toggled(Arc<AtomicBool>),
}

impl CacheMode {
    fn is_write_through(&self) -> bool {
        match self {
            Self::WriteThrough => true,
            Self::WriteBack => false,
            Self::Toggled(write_back) => !write_back.load(Ordering::Acquire),
        }
    }
}

/// One virtqueue being served.
pub(crate) struct BlkQueue {
    backend: Arc<Backend>,
    stats: Arc<QueueStats>,
    cache: CacheMode,
    served: Served,
    /// Of the gate, when it was last looked at.
    turns: u64,
    gate_id: u64,
    uring: Uring,
    results: Arc<Results>,
    /// Operations that workers have and have not answered.
    with_workers: usize,
    slots: Vec<Slot>,
    free_slots: Vec<usize>,
    /// Slots of jobs that need a bounce buffer, in order.
    waiting: VecDeque<usize>,
    /// Slots of jobs that may take no further step: the time that the disk was allowed is over.
    stopped: VecDeque<usize>,
    /// Reads and writes that were not admitted yet, in order.
    held: [VecDeque<Job>; 2],
    /// When the first of each may be.
    held_until_ns: [u64; 2],
    alarm: Alarm,
    bounce: BouncePool,
    zero_range_works: bool,
    nowait: Nowait,
    complaints: Complaints,
    misbehaviour: Misbehaviour,
    /// The last reading of the clock.
    now_ns: u64,
    unpublished: u32,
    /// The last round of work was not the end of it.
    is_unfinished: bool,
    /// The time that the disk was allowed was over when the queue last looked.
    is_stopped: bool,
}

/// A place for a job; its index is the `user_data` of the job's operations.
#[derive(Default)]
struct Slot {
    job: Option<Job>,
    /// Scratch space of the job, kept for the next one.
    iovecs: Vec<libc::iovec>,
}

/// Why a queue cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    #[error(transparent)]
    Uring(#[from] UringError),
    #[error("no timer for rate limits")]
    Alarm(#[source] std::io::Error),
}

impl BlkQueue {
    /// Sets up the calling thread's io_uring.
    pub(crate) fn new(
        backend: Arc<Backend>,
        cache: CacheMode,
        stats: Arc<QueueStats>,
    ) -> Result<Self, QueueError> {
        let uring = Uring::new(MAX_QUEUE_SIZE)?;
        let waker = uring.waker();
        let alarm = Alarm::new().map_err(QueueError::Alarm)?;
        let gate_id = backend.gate.join(Arc::clone(&waker));
        Ok(Self {
            // No number that the gate has: the first request reads anew what is served.
            turns: u64::MAX,
            served: Served::of(&backend),
            gate_id,
            results: Arc::new(Results::new(waker)),
            backend,
            stats,
            cache,
            uring,
            with_workers: 0,
            slots: Vec::new(),
            free_slots: Vec::new(),
            waiting: VecDeque::new(),
            stopped: VecDeque::new(),
            held: Default::default(),
            held_until_ns: [0; 2],
            alarm,
            bounce: BouncePool::default(),
            zero_range_works: true,
            nowait: Nowait::default(),
            complaints: Complaints::default(),
            misbehaviour: Misbehaviour::default(),
            now_ns: monotonic_ns(),
            unpublished: 0,
            is_unfinished: false,
            is_stopped: false,
        })
    }

    /// Submits, completes and takes requests until nothing moves.
    fn work(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        self.is_unfinished = false;
        for _ in 0..MAX_ROUNDS {
            self.resume_stopped(ring);
            self.uring.submit();
            let reaped = self.reap(ring);
            let accepted = self.accept(ring)?;
            if !reaped && !accepted {
                return Ok(());
            }
        }
        // Requests that the ring has seen may be left, of which it does not tell again.
        self.is_unfinished = true;
        self.uring.submit();
        Ok(())
    }

    /// Requests that were begun and are not answered.
    fn in_flight(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    fn held(&self) -> usize {
        self.held.iter().map(VecDeque::len).sum::<usize>() + self.misbehaviour.held()
    }

    /// Takes as many requests as there are, or as there is room for; no more than a ring holds,
    /// since a driver can offer requests that are answered at once faster than they are taken.
    fn accept(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        if !self.pass_gate() || !self.is_allowed() {
            return Ok(false);
        }
        let limited = self.backend.options.admission.is_limited();
        let is_faulty = misbehaviour::is_armed(&self.backend.options.faults);
        let mut progress = self.held() > 0 && self.admit_held(ring, limited);
        if self.misbehaviour.is_holding() {
            progress |= self.release_held_back(ring, limited, false);
            if self.misbehaviour.is_paused() {
                self.set_alarm();
                return Ok(progress);
            }
        }
        let mut taken = 0;
        while taken < MAX_QUEUE_SIZE {
            if self.in_flight() + self.held() >= usize::from(MAX_QUEUE_SIZE) {
                break;
            }
            let Some(chain) = ring.pop()? else {
                if taken > 0 && self.gathers() && gather::await_more(ring)? {
                    continue;
                }
                break;
            };
            if taken == 0 {
                self.now_ns = monotonic_ns();
            }
            taken += 1;
            self.stats.start();
            if let Some(mut job) = self.parse(ring, chain) {
                job.accepted_ns = self.now_ns;
                if is_faulty {
                    self.misbehave(ring, job, limited);
                    if self.misbehaviour.is_paused() {
                        break;
                    }
                } else {
                    self.begin_or_hold(ring, job, limited);
                }
            }
        }
        progress |= taken > 0;
        if self.held() > 0 {
            self.set_alarm();
        }
        Ok(progress)
    }

    /// Whether requests that follow soon are worth waiting for: the storage has enough to do
    /// meanwhile, and takes several at once for little more than one.
    fn gathers(&self) -> bool {
        self.uring.unanswered() >= gather::MIN_UNANSWERED
    }

    /// False while the gate is closed. Afterwards, what is served is read anew.
    fn pass_gate(&mut self) -> bool {
        let turns = self.backend.gate.turns();
        if turns == self.turns && !gate::is_closed(turns) {
            return true;
        }
        self.turns = turns;
        if gate::is_closed(turns) {
            if self.in_flight() == 0 {
                self.backend.gate.park(self.gate_id);
            }
            return false;
        }
        self.served = Served::of(&self.backend);
        self.zero_range_works = true;
        self.nowait = Nowait::default();
        true
    }

    /// False once the time that the disk was allowed is over. Requests stay where they are; whoever
    /// allows more wakes the queue.
    #[inline]
    fn is_allowed(&mut self) -> bool {
        self.is_stopped = self.backend.allowance().is_over();
        !self.is_stopped
    }

    /// Answers a request, or makes it a job.
    fn parse(&mut self, ring: &mut Ring, chain: DescChain) -> Option<Job> {
        let mut header = [0; HEADER_BYTES];
        if chain.read_at(0, &mut header) < HEADER_BYTES || chain.writable_len_bytes() == 0 {
            self.answer_now(ring, chain, OpKind::Unknown, 0, Status::IoErr);
            return None;
        }
        let kind = OpKind::of(&header);
        let data_out_bytes = chain.readable_len_bytes() - HEADER_BYTES as u32;
        let data_in_bytes = chain.writable_len_bytes() - 1;
        let limits = &self.served.limits;
        let status = match request::parse(&header, data_out_bytes, data_in_bytes, limits) {
            Ok(Request::Read {
                offset_bytes,
                len_bytes,
            }) => return Some(Job::transfer(chain, Access::Read, offset_bytes, len_bytes)),
            Ok(Request::Write {
                offset_bytes,
                len_bytes,
            }) => return Some(Job::transfer(chain, Access::Write, offset_bytes, len_bytes)),
            Ok(Request::Flush) => return Some(Job::flush(chain)),
            Ok(Request::Discard { payload_bytes }) => {
                match copy_ranges(&chain, RangeOp::Discard, payload_bytes, limits) {
                    Ok(ranges) => return Some(Job::ranges(chain, RangeOp::Discard, ranges)),
                    Err(status) => status,
                }
            }
            Ok(Request::WriteZeroes { payload_bytes }) => {
                match copy_ranges(&chain, RangeOp::WriteZeroes, payload_bytes, limits) {
                    Ok(ranges) => return Some(Job::ranges(chain, RangeOp::WriteZeroes, ranges)),
                    Err(status) => status,
                }
            }
            Ok(Request::GetId) => {
                let len_bytes = ID_BYTES.min(data_in_bytes as usize);
                chain.write_at(0, &self.backend.options.serial[..len_bytes]);
                self.answer_now(ring, chain, kind, len_bytes as u64, Status::Ok);
                return None;
            }
            // Section 5.2.6: zero for what is not known.
            Ok(Request::GetLifetime) => {
                chain.zero_at(0, LIFETIME_BYTES);
                self.answer_now(ring, chain, kind, LIFETIME_BYTES as u64, Status::Ok);
                return None;
            }
            Err(status) => status,
        };
        self.answer_now(ring, chain, kind, 0, status);
        None
    }

    /// Begins the request, or holds it until the rate limit allows it.
    #[inline]
    fn begin_or_hold(&mut self, ring: &mut Ring, job: Job, limited: bool) {
        if !limited || self.admit(&job) {
            self.begin(ring, job);
        } else if let Some((access, _)) = job.cost() {
            self.held[access as usize].push_back(job);
        }
    }

    /// Puts a job into a slot of its own.
    #[inline]
    fn place(&mut self, job: Job) -> usize {
        let index = self.free_slots.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[index].job = Some(job);
        index
    }

    fn begin(&mut self, ring: &mut Ring, job: Job) {
        let index = self.place(job);
        if self.advance(ring, index) {
            self.note_answer(ring);
        }
    }

    /// Lets the job in a slot take its next step; true when that answered it. A job of many steps
    /// begins none after the time that the disk was allowed.
    fn advance(&mut self, ring: &mut Ring, index: usize) -> bool {
        if self.backend.allowance().is_over() {
            self.stopped.push_back(index);
            return false;
        }
        let Slot { job, iovecs } = &mut self.slots[index];
        let job = job.as_mut().expect("completions and waits belong to jobs");
        let mut backing = Backing {
            served: &self.served,
            write_through: self.cache.is_write_through(),
            bounce: &mut self.bounce,
            zero_range_works: &mut self.zero_range_works,
            nowait: &mut self.nowait,
        };
        match job.next(&mut backing, iovecs) {
            // SAFETY: the job's chain keeps guest memory mapped, its bounce buffer and its
            // slot's vectors stay with it, and it leaves the slot only after its completion;
            // `drop` leaks jobs that have none.
            Next::Submit(entry) => unsafe { self.uring.push(entry.user_data(index as u64)) },
            Next::Perform(operation) => self.perform(index, operation),
            Next::NeedsBounce => self.waiting.push_back(index),
            Next::Done(status) => {
                self.retire(ring, index, status);
                return true;
            }
            Next::Failed(errno) => {
                self.fail(ring, index, errno);
                return true;
            }
        }
        false
    }

    fn perform(&mut self, index: usize, operation: Operation) {
        let Slot { job, iovecs } = &mut self.slots[index];
        let job = job.as_ref().expect("operations belong to jobs");
        let held = Held {
            image: Arc::clone(&self.served.image),
            pin: job.chain.pin(),
        };
        let iovecs = std::mem::take(iovecs);
        let allowance = Arc::clone(&self.backend.options.allowance);
        let results = Arc::clone(&self.results);
        let item = Item::new(held, operation, iovecs, index, results, allowance);
        self.with_workers += 1;
        self.backend.workers.submit(item);
    }

    /// Takes completions; true when there were any.
    fn reap(&mut self, ring: &mut Ring) -> bool {
        let mut progress = false;
        while let Some((user_data, result)) = self.uring.next_completion() {
            self.note_progress(&mut progress);
            self.completed(ring, user_data as usize, result);
        }
        if self.with_workers > 0 {
            while let Some(done) = self.results.take() {
                self.note_progress(&mut progress);
                self.with_workers -= 1;
                self.slots[done.slot].iovecs = done.iovecs;
                self.completed(ring, done.slot, done.result);
            }
        }
        progress
    }

    /// The clock is read once for all completions that are there.
    fn note_progress(&mut self, progress: &mut bool) {
        if !std::mem::replace(progress, true) {
            self.now_ns = monotonic_ns();
        }
    }

    fn completed(&mut self, ring: &mut Ring, index: usize, result: i32) {
        let job = self.slots[index]
            .job
            .as_mut()
            .expect("completions belong to jobs");
        let mut backing = Backing {
            served: &self.served,
            write_through: self.cache.is_write_through(),
            bounce: &mut self.bounce,
            zero_range_works: &mut self.zero_range_works,
            nowait: &mut self.nowait,
        };
        match job.completed(result, &mut backing) {
            Ok(()) => drop(self.advance(ring, index)),
            Err(errno) => self.fail(ring, index, errno),
        }
        if !self.waiting.is_empty() {
            self.resume_waiting(ring);
        }
    }

    /// Lets waiting jobs have the bounce buffers that may be free now. One that went on without
    /// (what it reads was discarded meanwhile) leaves its buffer to the next.
    fn resume_waiting(&mut self, ring: &mut Ring) {
        let before = self.waiting.len();
        for _ in 0..before {
            let left = self.waiting.len();
            let Some(index) = self.waiting.pop_front() else {
                return;
            };
            self.advance(ring, index);
            if self.waiting.len() == left {
                return self.waiting.rotate_right(1);
            }
        }
    }

    /// Lets jobs go on that could take no step, once the disk is allowed more time.
    #[inline]
    fn resume_stopped(&mut self, ring: &mut Ring) {
        if self.stopped.is_empty() || !self.is_allowed() {
            return;
        }
        for index in std::mem::take(&mut self.stopped) {
            self.advance(ring, index);
        }
    }

    #[cold]
    fn fail(&mut self, ring: &mut Ring, index: usize, errno: i32) {
        let kind = self.slots[index].job.as_ref().map(|job| job.kind);
        self.complaints.complain(
            self.served.image.name(),
            kind.unwrap_or(OpKind::Unknown),
            errno,
        );
        self.retire(ring, index, Status::IoErr);
    }

    fn retire(&mut self, ring: &mut Ring, index: usize, status: Status) {
        let job = self.slots[index].job.take().expect("only jobs retire");
        self.free_slots.push(index);
        let observer = &self.backend.options.observer;
        job.each_change(|offset_bytes, len_bytes| observer.mark(offset_bytes, len_bytes));
        let request = SlowRequest {
            image: self.served.image.name(),
            op: job.kind,
            sector: job.offset_bytes() / SECTOR_BYTES,
            len_bytes: job.payload_bytes(),
        };
        let elapsed_ns = self.now_ns.saturating_sub(job.accepted_ns);
        self.stats.took(&request, elapsed_ns);
        let (kind, bytes) = (request.op, request.len_bytes);
        self.answer(ring, job.chain, kind, bytes, status);
    }

    /// Answers a request that never became a job.
    fn answer_now(
        &mut self,
        ring: &mut Ring,
        chain: DescChain,
        kind: OpKind,
        bytes: u64,
        status: Status,
    ) {
        self.answer(ring, chain, kind, bytes, status);
        self.note_answer(ring);
    }

    /// A request was answered while others are still being taken: the driver need not wait for
    /// all of them.
    fn note_answer(&mut self, ring: &mut Ring) {
        self.now_ns = monotonic_ns();
        self.unpublished += 1;
        if self.unpublished >= ANSWERS_UNPUBLISHED {
            self.unpublished = 0;
            ring.notify();
        }
    }

    /// Writes the status byte, the last writable one, and returns the chain. A chain without
    /// any writable byte goes back as it is.
    fn answer(
        &mut self,
        ring: &mut Ring,
        chain: DescChain,
        kind: OpKind,
        bytes: u64,
        status: Status,
    ) {
        let writable_bytes = chain.writable_len_bytes();
        if let Some(status_at) = writable_bytes.checked_sub(1) {
            chain.write_at(status_at as usize, &[status as u8]);
        }
        let ok = status == Status::Ok;
        // Section 2.7.8.2: the length tells what was written from the start on, which for a
        // failed read is nothing.
        let written_bytes = if ok || writable_bytes == 1 {
            writable_bytes
        } else {
            0
        };
        self.stats.finish(kind, bytes, ok);
        ring.complete(chain, written_bytes);
    }
}

/// Copies and checks the ranges of a discard or write-zeroes.
fn copy_ranges(
    chain: &DescChain,
    op: RangeOp,
    payload_bytes: usize,
    limits: &Limits,
) -> Result<Vec<ByteRange>, Status> {
    let mut payload = [0; MAX_RANGES * RANGE_BYTES];
    let payload = &mut payload[..payload_bytes];
    chain.read_at(HEADER_BYTES, payload);
    request::parse_ranges(op, payload, limits)
}

impl QueueHandler for BlkQueue {
    fn event_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.uring.completion_event(), self.alarm.event()]
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        match wake {
            Wake::Event(EVENT_ALARM) => self.alarm.take(),
            Wake::Event(_) => self.uring.take_completion_event(),
            Wake::Kick => {}
        }
        self.uring.mute();
        // It may have grown.
        self.served.limits = self.backend.limits(&*self.served.image);
        self.work(ring)
    }

    fn polling(&self) -> Polling {
        self.backend.polling()
    }

    fn has_events(&mut self) -> bool {
        self.uring.has_news()
            || self.is_unfinished
            || self.backend.gate.turns() != self.turns
            || (self.with_workers > 0 && !self.results.is_empty())
            || (self.held() > 0
                && !gate::is_closed(self.turns)
                && !self.is_stopped
                && self.alarm.is_due())
    }

    fn prepare_sleep(&mut self) -> bool {
        self.uring.unmute()
            || self.is_unfinished
            || (self.with_workers > 0 && !self.results.is_empty())
    }

    fn drain(&mut self, ring: &mut Ring, deadline: Instant) -> usize {
        self.uring.mute();
        loop {
            // Whoever stops a ring does not wait for rate limits.
            if self.held() > 0 && self.pass_gate() && self.is_allowed() {
                self.admit_held(ring, false);
                self.release_held_back(ring, false, true);
            }
            self.resume_stopped(ring);
            self.uring.submit();
            self.reap(ring);
            if self.in_flight() == 0 {
                self.pass_gate();
            }
            let left = self.in_flight() + self.held();
            // What was held is begun by whoever serves the disk next, and is allowed to.
            let runs = self.in_flight() - self.stopped.len();
            let is_over = left == 0 || (self.is_stopped && runs == 0);
            if is_over || Instant::now() >= deadline {
                return left;
            }
            if self.results.is_empty() {
                self.uring.wait(deadline);
            }
        }
    }
}

#[cfg(test)]
mod tests;
