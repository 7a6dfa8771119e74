//! Serving one virtqueue of a disk: requests from the ring to the image and back.
//!
//! [`BlkQueue`] belongs to its ring's thread, which alone touches it. It takes requests off
//! the ring, checks them ([`crate::request`]), runs them as [`job`]s through the thread's own
//! io_uring ([`uring`]) and answers each as soon as it is done, in any order:
//!
//! ```text
//! ring.pop ─► parse ─► Job ─► io_uring ─► completion ─► status byte ─► ring.complete
//!               └─ refused, GET_ID: answered at once ──────┘
//! ```
//!
//! Guest buffers go to the kernel as they are; only buffers that `O_DIRECT` would refuse are
//! [`bounce`]d. Nothing here blocks except `drain`, which has a deadline.

pub(crate) mod bounce;
pub(crate) mod buffer;
mod job;
pub(crate) mod uring;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_user::backend::{QueueHandler, Wake};
use vhost_user::ring::{DescChain, Ring, RingError};

use crate::image::RawImage;
use crate::request::{
    self, ByteRange, HEADER_BYTES, ID_BYTES, Limits, MAX_RANGES, OpKind, RANGE_BYTES, RangeOp,
    Request, Status,
};
use crate::stats::QueueStats;
use bounce::BouncePool;
use job::{Backing, Direction, Job, Next};
use uring::{Uring, UringError};

/// Largest ring served, and so the most requests a queue has in flight.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;
/// Rounds of work before the thread looks at its commands again.
const MAX_ROUNDS: u32 = 64;
/// How long a queue that ends waits for the kernel to let go of guest memory.
const TEARDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// Between two complaints about failing I/O on one queue.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// What a queue serves, shared with the device it belongs to.
#[derive(Clone, Debug)]
pub(crate) struct Backend {
    pub(crate) image: Arc<RawImage>,
    /// The answer to GET_ID.
    pub(crate) serial: [u8; ID_BYTES],
    pub(crate) limits: Limits,
    pub(crate) cache: CacheMode,
    /// Set when requests outlived their queue: see [`BlkQueue`]'s `Drop`.
    pub(crate) has_ghosts: Arc<AtomicBool>,
}

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
    backend: Backend,
    stats: Arc<QueueStats>,
    uring: Uring,
    slots: Vec<Slot>,
    free_slots: Vec<usize>,
    /// Slots of jobs that need a bounce buffer, in order.
    waiting: VecDeque<usize>,
    bounce: BouncePool,
    zero_range_works: bool,
    complaints: Complaints,
}

/// A place for a job; its index is the `user_data` of the job's operations.
#[derive(Default)]
struct Slot {
    job: Option<Job>,
    /// Scratch space of the job, kept for the next one.
    iovecs: Vec<libc::iovec>,
}

impl BlkQueue {
    /// Sets up the calling thread's io_uring.
    pub(crate) fn new(backend: Backend, stats: Arc<QueueStats>) -> Result<Self, UringError> {
        Ok(Self {
            backend,
            stats,
            uring: Uring::new(MAX_QUEUE_SIZE)?,
            slots: Vec::new(),
            free_slots: Vec::new(),
            waiting: VecDeque::new(),
            bounce: BouncePool::default(),
            zero_range_works: true,
            complaints: Complaints::default(),
        })
    }

    /// Submits, completes and takes requests until nothing moves.
    fn work(&mut self, ring: &mut Ring) -> Result<(), RingError> {
        for _ in 0..MAX_ROUNDS {
            self.uring.submit();
            let reaped = self.reap(ring);
            let accepted = self.accept(ring)?;
            if !reaped && !accepted {
                return Ok(());
            }
        }
        self.uring.submit();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Takes as many requests as there are, or as there is room for; no more than a ring holds,
    /// since a driver can offer requests that are answered at once faster than they are taken.
    fn accept(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        let mut progress = false;
        for _ in 0..MAX_QUEUE_SIZE {
            if self.in_flight() >= usize::from(MAX_QUEUE_SIZE) {
                break;
            }
            let Some(chain) = ring.pop()? else { break };
            self.stats.start();
            self.begin(ring, chain);
            progress = true;
        }
        Ok(progress)
    }

    /// Answers a request, or makes it a job.
    fn begin(&mut self, ring: &mut Ring, chain: DescChain) {
        let mut header = [0; HEADER_BYTES];
        if chain.read_at(0, &mut header) < HEADER_BYTES || chain.writable_len_bytes() == 0 {
            return self.answer(ring, chain, OpKind::Unknown, 0, Status::IoErr);
        }
        let kind = OpKind::of(&header);
        let data_out_bytes = chain.readable_len_bytes() - HEADER_BYTES as u32;
        let data_in_bytes = chain.writable_len_bytes() - 1;
        let limits = &self.backend.limits;
        let job = match request::parse(&header, data_out_bytes, data_in_bytes, limits) {
            Ok(Request::Read {
                offset_bytes,
                len_bytes,
            }) => Job::transfer(chain, Direction::Read, offset_bytes, len_bytes),
            Ok(Request::Write {
                offset_bytes,
                len_bytes,
            }) => Job::transfer(chain, Direction::Write, offset_bytes, len_bytes),
            Ok(Request::Flush) => Job::flush(chain),
            Ok(Request::Discard { payload_bytes }) => {
                match copy_ranges(&chain, RangeOp::Discard, payload_bytes, limits) {
                    Ok(ranges) => Job::ranges(chain, RangeOp::Discard, ranges),
                    Err(status) => return self.answer(ring, chain, kind, 0, status),
                }
            }
            Ok(Request::WriteZeroes { payload_bytes }) => {
                match copy_ranges(&chain, RangeOp::WriteZeroes, payload_bytes, limits) {
                    Ok(ranges) => Job::ranges(chain, RangeOp::WriteZeroes, ranges),
                    Err(status) => return self.answer(ring, chain, kind, 0, status),
                }
            }
            Ok(Request::GetId) => {
                let len_bytes = ID_BYTES.min(data_in_bytes as usize);
                chain.write_at(0, &self.backend.serial[..len_bytes]);
                return self.answer(ring, chain, kind, len_bytes as u64, Status::Ok);
            }
            Err(status) => return self.answer(ring, chain, kind, 0, status),
        };
        let index = self.free_slots.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[index].job = Some(job);
        self.advance(ring, index);
    }

    /// Lets the job in a slot take its next step.
    fn advance(&mut self, ring: &mut Ring, index: usize) {
        let Slot { job, iovecs } = &mut self.slots[index];
        let job = job.as_mut().expect("completions and waits belong to jobs");
        let mut backing = Backing {
            image: &self.backend.image,
            write_through: self.backend.cache.is_write_through(),
            bounce: &mut self.bounce,
            zero_range_works: &mut self.zero_range_works,
        };
        match job.next(&mut backing, iovecs) {
            // SAFETY: the job's chain keeps guest memory mapped, its bounce buffer and its
            // slot's vectors stay with it, and it leaves the slot only after its completion;
            // `drop` leaks jobs that have none.
            Next::Submit(entry) => unsafe { self.uring.push(entry.user_data(index as u64)) },
            Next::NeedsBounce => self.waiting.push_back(index),
            Next::Done(status) => self.retire(ring, index, status),
        }
    }

    /// Takes completions; true when there were any.
    fn reap(&mut self, ring: &mut Ring) -> bool {
        let mut progress = false;
        while let Some((user_data, result)) = self.uring.next_completion() {
            progress = true;
            let index = user_data as usize;
            let job = self.slots[index]
                .job
                .as_mut()
                .expect("completions belong to jobs");
            let mut backing = Backing {
                image: &self.backend.image,
                write_through: self.backend.cache.is_write_through(),
                bounce: &mut self.bounce,
                zero_range_works: &mut self.zero_range_works,
            };
            match job.completed(result, &mut backing) {
                Ok(()) => self.advance(ring, index),
                Err(errno) => {
                    let kind = job.kind;
                    self.complaints
                        .complain(self.backend.image.name(), kind, errno);
                    self.retire(ring, index, Status::IoErr);
                }
            }
            self.resume_waiting(ring);
        }
        progress
    }

    /// Lets the first waiting job have the bounce buffer that may be free now.
    fn resume_waiting(&mut self, ring: &mut Ring) {
        let before = self.waiting.len();
        if let Some(index) = self.waiting.pop_front() {
            self.advance(ring, index);
            if self.waiting.len() == before {
                self.waiting.rotate_right(1);
            }
        }
    }

    fn retire(&mut self, ring: &mut Ring, index: usize, status: Status) {
        let job = self.slots[index].job.take().expect("only jobs retire");
        self.free_slots.push(index);
        let (kind, bytes) = (job.kind, job.payload_bytes());
        self.answer(ring, job.chain, kind, bytes, status);
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
        vec![self.uring.completion_event()]
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        if let Wake::Event(_) = wake {
            self.uring.take_completion_event();
        }
        self.uring.mute();
        let worked = self.work(ring);
        if self.uring.unmute() {
            self.uring.raise_completion_event();
        }
        worked
    }

    fn drain(&mut self, ring: &mut Ring, deadline: Instant) -> usize {
        self.uring.submit();
        self.reap(ring);
        while self.in_flight() > 0 && Instant::now() < deadline {
            self.uring.wait(deadline);
            self.reap(ring);
        }
        self.in_flight()
    }
}

impl Drop for BlkQueue {
    /// Requests that `drain` left behind will be submitted again by the next session. They
    /// must have ended before: a late write would overwrite a newer one, and a late read would
    /// land in memory that belongs to something else by then.
    fn drop(&mut self) {
        self.stats.forget(self.in_flight() as u64);
        if self.uring.unanswered() == 0 {
            return;
        }
        let deadline = Instant::now() + TEARDOWN_PATIENCE;
        self.uring.cancel_all();
        while self.uring.unanswered() > 0 && Instant::now() < deadline {
            while self.uring.next_completion().is_some() {}
            if self.uring.unanswered() > 0 {
                self.uring.wait(deadline);
            }
        }
        if self.uring.unanswered() > 0 {
            tracing::error!(
                image = self.backend.image.name(),
                "{} requests still run in the kernel; this disk stays stopped until the daemon \
                 is restarted",
                self.uring.unanswered()
            );
            self.backend.has_ghosts.store(true, Ordering::Release);
            // Their memory must outlive them, whenever they end.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// Says that I/O fails, but not for each of a million requests.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    withheld: u64,
}

impl Complaints {
    fn complain(&mut self, image: &str, kind: OpKind, errno: i32) {
        if self
            .last
            .is_some_and(|last| last.elapsed() < COMPLAINT_INTERVAL)
        {
            self.withheld += 1;
            return;
        }
        self.last = Some(Instant::now());
        let error = std::io::Error::from_raw_os_error(errno);
        let withheld = std::mem::take(&mut self.withheld);
        tracing::warn!(image, op = kind.name(), %error, withheld, "request failed; the guest gets IOERR");
    }
}

#[cfg(test)]
mod tests;
