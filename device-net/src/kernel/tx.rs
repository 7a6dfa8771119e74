//! Frames from the driver to the kernel.
//!
//! A small frame is copied once, checked, and sent with others by one system call; its chain goes
//! back to the driver before that call. A large one is sent from where it lies, behind the
//! checked copy of its header.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use filter::Direction as Way;
use vhost_user::backend::{Polling, QueueHandler, Wake};
use vhost_user::eventfd::EventFd;
use vhost_user::ring::{Batch, Ring, RingError};

use super::Shared;
use super::alarm::Alarm;
use super::batch::{SEND_SLOT_BYTES, SendBatch};
use super::interface;
use crate::guard::{self, HEAD_LEN_BYTES, Mishap, SentFrame};
use crate::nic::header::{
    Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads, header_len_bytes,
};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// Frames sent before the ring's thread looks at commands again: a full ring of usual size.
const MAX_FRAMES: usize = 1024;

/// Frames taken from the ring at once.
const BATCH: usize = 64;

/// What the kernel takes in one call.
const MAX_IOVECS: usize = 1024;

/// Positions in [`QueueHandler::event_fds`].
const EVENT_MORE: usize = 0;
const EVENT_ALARM: usize = 1;

/// One transmit ring.
pub(super) struct TxQueue {
    shared: Arc<Shared>,
    nic: Arc<NicState>,
    pair: u16,
    header_len_bytes: usize,
    offloads: Offloads,
    polling: Polling,
    /// Chains that are not done with; none between two calls, unless a frame is held.
    taken: Batch,
    /// When the frames in `batch` were taken.
    taken_at: Instant,
    batch: SendBatch,
    /// A frame that the guard let pass, but not yet.
    held: Option<Frame>,
    /// The first bytes of the last large frame that the guard looked at.
    head: Box<[u8; HEAD_LEN_BYTES]>,
    alarm: Alarm,
    /// Rung when frames were left.
    more: EventFd,
    /// What happens to the frame that was taken last.
    mishap: Mishap,
    /// Frames that others are to go ahead of.
    behind: Vec<Behind>,
    /// Emptied after each frame; kept for its storage.
    iovecs: Vec<libc::iovec>,
}

impl TxQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        nic: Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Self> {
        Ok(Self {
            polling: shared.polling,
            shared,
            nic,
            pair,
            header_len_bytes: header_len_bytes(features),
            offloads: Offloads::to_device(features),
            taken: Batch::new(),
            taken_at: Instant::now(),
            batch: SendBatch::new()?,
            held: None,
            head: Box::new([0; HEAD_LEN_BYTES]),
            alarm: Alarm::new()?,
            more: EventFd::new()?,
            mishap: Mishap::default(),
            behind: Vec::new(),
            iovecs: Vec::new(),
        })
    }

    /// Takes what the driver has, up to [`MAX_FRAMES`]. Returns whether there may be more.
    fn take(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        let watch = self.nic.guard.is_active().then(guard::monotonic_ns);
        if let Some(frame) = self.held.take() {
            if !self.admit(ring, frame, watch) {
                return Ok(false);
            }
            // It was taken long before those that follow.
            self.flush();
        }
        for _ in 0..MAX_FRAMES {
            if self.taken.is_empty() {
                let popped = ring.pop_batch(&mut self.taken, BATCH);
                if self.taken.is_empty() {
                    return popped.map(|_| false);
                }
                if self.batch.len() == 0 {
                    self.taken_at = Instant::now();
                }
            }
            let frame = match self.accept(watch) {
                Err(reason) => {
                    self.counters().count_drop(reason);
                    ring.complete_next(&mut self.taken, 0);
                    continue;
                }
                Ok(frame) => frame,
            };
            if let Frame::Small { .. } = frame {
                ring.complete_next(&mut self.taken, 0);
            }
            if !self.admit(ring, frame, watch) {
                return Ok(false);
            }
            if self.batch.is_full() {
                // The driver has buffers again before they are sent.
                ring.publish();
                self.flush();
                ring.notify();
            }
        }
        Ok(true)
    }

    /// Lets a frame go that the guard has looked at, or holds it until the alarm rings.
    fn admit(&mut self, ring: &mut Ring, frame: Frame, watch: Option<u64>) -> bool {
        if let Some(now_ns) = watch {
            let len_bytes = match &frame {
                Frame::Small { len_bytes } => len_bytes - self.shared.interface.header_len_bytes(),
                Frame::Large(large) => large.frame_len_bytes,
            };
            if let Err(at_ns) = self.nic.guard.admit(Way::Egress, len_bytes, now_ns) {
                self.alarm.set(at_ns);
                self.hold(frame);
                return false;
            }
        }
        let gone_ahead = u32::from(self.mishap.behind.is_none());
        self.let_go(ring, frame);
        if !self.behind.is_empty() {
            self.let_go_behind(gone_ahead, false);
        }
        true
    }

    /// Keeps a frame for later. Those before it go.
    fn hold(&mut self, frame: Frame) {
        let slot = self.batch.len();
        self.flush();
        if let Frame::Small { len_bytes } = &frame {
            self.batch.move_to_front(slot, *len_bytes);
        }
        self.held = Some(frame);
    }

    fn let_go(&mut self, ring: &mut Ring, frame: Frame) {
        match frame {
            Frame::Small { len_bytes } if self.mishap == Mishap::default() => {
                self.batch.push(len_bytes);
            }
            Frame::Small { len_bytes } => self.let_go_amiss(len_bytes),
            Frame::Large(large) => {
                self.mishap = Mishap::default();
                // Frames keep their order.
                self.flush();
                match self.send_large(&large) {
                    Ok(()) => {
                        let counters = self.counters();
                        counters.count(large.frame_len_bytes);
                        counters.record_latency(self.taken_at.elapsed(), 1);
                    }
                    Err(reason) => self.counters().count_drop(reason),
                }
                ring.complete_next(&mut self.taken, 0);
            }
        }
    }

    /// Copies the oldest frame that was taken into the batch's next slot, or what of it must be checked.
    #[inline]
    fn accept(&mut self, watch: Option<u64>) -> Result<Frame, DropReason> {
        let chain = self.taken.chain(0);
        let frame_len_bytes = (chain.readable_len_bytes() as usize)
            .checked_sub(self.header_len_bytes)
            .filter(|frame| (1..=MAX_FRAME_LEN_BYTES).contains(frame))
            .ok_or(DropReason::Malformed)?;
        if !self.nic.is_link_up() {
            return Err(DropReason::LinkDown);
        }
        let mut bytes = [0; MAX_HEADER_LEN_BYTES];
        chain.read_at(0, &mut bytes[..self.header_len_bytes]);
        let header = Header::checked(&bytes, frame_len_bytes, self.offloads)
            .map_err(|_| DropReason::Malformed)?;

        let kernel_header = &header.as_bytes()[..self.shared.interface.header_len_bytes()];
        let len_bytes = kernel_header.len() + frame_len_bytes;
        if len_bytes > SEND_SLOT_BYTES {
            return self.accept_large(header, frame_len_bytes, watch);
        }
        let slot = self.batch.next_slot();
        let (in_header, in_frame) = slot[..len_bytes].split_at_mut(kernel_header.len());
        in_header.copy_from_slice(kernel_header);
        chain.read_at(self.header_len_bytes, in_frame);
        if let Some(now_ns) = watch {
            let frame = &*in_frame;
            let shown = guard::Frame {
                head: &frame[..frame.len().min(HEAD_LEN_BYTES)],
                bytes: &frame,
                len_bytes: frame.len(),
                checksum_at: header.checksum_at(),
            };
            let verdict = self.nic.guard.check(Way::Egress, &shown, now_ns);
            verdict.map_err(|_| DropReason::Guarded)?;
            let mishap = (self.nic.guard).mishap(Way::Egress, in_frame, in_frame.len(), now_ns);
            mishap.spoil(in_frame);
            self.mishap = mishap;
            if mishap.is_lost {
                return Err(DropReason::Fault);
            }
        }
        Ok(Frame::Small { len_bytes })
    }

    fn accept_large(
        &mut self,
        header: Header,
        frame_len_bytes: usize,
        watch: Option<u64>,
    ) -> Result<Frame, DropReason> {
        let mut large = Large {
            header,
            frame_len_bytes,
            head_len_bytes: 0,
        };
        if let Some(now_ns) = watch {
            let chain = self.taken.chain(0);
            large.head_len_bytes = frame_len_bytes.min(HEAD_LEN_BYTES);
            let head = &mut self.head[..large.head_len_bytes];
            chain.read_at(self.header_len_bytes, head);
            let shown = guard::Frame {
                head,
                bytes: &SentFrame {
                    chain,
                    header_len_bytes: self.header_len_bytes,
                },
                len_bytes: frame_len_bytes,
                checksum_at: large.header.checksum_at(),
            };
            let verdict = self.nic.guard.check(Way::Egress, &shown, now_ns);
            verdict.map_err(|_| DropReason::Guarded)?;
            let mishap = (self.nic.guard).mishap(Way::Egress, head, frame_len_bytes, now_ns);
            mishap.spoil(&mut self.head[..large.head_len_bytes]);
            self.mishap = mishap;
            if mishap.is_lost {
                return Err(DropReason::Fault);
            }
        }
        Ok(Frame::Large(large))
    }

    /// Sends the oldest frame that was taken.
    fn send_large(&mut self, large: &Large) -> Result<(), DropReason> {
        self.iovecs.clear();
        let header_len_bytes = self.shared.interface.header_len_bytes();
        let head = &self.head[..large.head_len_bytes];
        for bytes in [&large.header.as_bytes()[..header_len_bytes], head] {
            if !bytes.is_empty() {
                self.iovecs.push(libc::iovec {
                    iov_base: bytes.as_ptr().cast_mut().cast(),
                    iov_len: bytes.len(),
                });
            }
        }
        // What was looked at is what is sent, whatever the driver made of its memory since.
        let at = self.header_len_bytes + head.len();
        let chain = self.taken.chain(0);
        for segment in chain.readable_range(at, large.frame_len_bytes - head.len()) {
            if self.iovecs.len() == MAX_IOVECS {
                return Err(DropReason::Malformed);
            }
            self.iovecs.push(libc::iovec {
                iov_base: segment.as_ptr().cast(),
                iov_len: segment.len(),
            });
        }
        let interface = &self.shared.interface;
        let sent = interface::send(interface.queue(self.pair), &self.iovecs);
        or_by_first_queue(sent, self.pair, || {
            interface::send(interface.queue(0), &self.iovecs)
        })
        .map_err(|_| DropReason::Refused)
    }

    fn flush(&mut self) {
        if self.batch.len() == 0 {
            return;
        }
        let interface = &self.shared.interface;
        let counters = &self.nic.stats[usize::from(self.pair)].tx.0;
        let header_len_bytes = interface.header_len_bytes();
        let (mut frames, mut bytes) = (0, 0);
        self.batch
            .flush(interface.queue(self.pair), |frame, result| {
                let sent = or_by_first_queue(result, self.pair, || {
                    let iovec = libc::iovec {
                        iov_base: frame.as_ptr().cast_mut().cast(),
                        iov_len: frame.len(),
                    };
                    interface::send(interface.queue(0), &[iovec])
                });
                match sent {
                    Ok(()) => {
                        frames += 1;
                        bytes += (frame.len() - header_len_bytes) as u64;
                    }
                    Err(_) => counters.count_drop(DropReason::Refused),
                }
            });
        counters.count_many(frames, bytes);
        counters.record_latency(self.taken_at.elapsed(), frames);
    }

    /// A frame goes more than once, or behind others.
    #[cold]
    fn let_go_amiss(&mut self, len_bytes: usize) {
        let mishap = std::mem::take(&mut self.mishap);
        let frame = self.batch.next_slot()[..len_bytes].to_vec();
        if let Some((ahead, until_ns)) = mishap.behind {
            self.alarm.set(until_ns);
            self.behind.push(Behind {
                frame,
                ahead,
                until_ns,
            });
            return;
        }
        for _ in 0..=mishap.copies {
            self.push_copy(&frame);
        }
    }

    fn push_copy(&mut self, frame: &[u8]) {
        if self.batch.is_full() {
            self.flush();
        }
        self.batch.next_slot()[..frame.len()].copy_from_slice(frame);
        self.batch.push(frame.len());
    }

    /// Lets frames go that others have gone ahead of, or that have waited long enough.
    #[cold]
    fn let_go_behind(&mut self, gone_ahead: u32, all: bool) {
        let now_ns = guard::monotonic_ns();
        for behind in &mut self.behind {
            behind.ahead = behind.ahead.saturating_sub(gone_ahead);
        }
        let (go, stay) = std::mem::take(&mut self.behind)
            .into_iter()
            .partition(|behind: &Behind| all || behind.ahead == 0 || behind.until_ns <= now_ns);
        self.behind = stay;
        for behind in go {
            self.push_copy(&behind.frame);
        }
    }

    fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].tx.0
    }
}

/// A frame that others are to go ahead of.
struct Behind {
    frame: Vec<u8>,
    ahead: u32,
    until_ns: u64,
}

/// A frame on its way.
enum Frame {
    /// In the batch's next slot, with its header.
    Small { len_bytes: usize },
    /// Still in the driver's memory: the oldest chain that was taken.
    Large(Large),
}

struct Large {
    header: Header,
    frame_len_bytes: usize,
    /// Of the copy that the guard looked at; none if there was no need to.
    head_len_bytes: usize,
}

/// A tap's queue that does not take part cannot be written either: queue 0 always can.
fn or_by_first_queue(
    sent: io::Result<()>,
    pair: u16,
    again: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match sent {
        Err(error) if pair != 0 && error.raw_os_error() == Some(libc::EBADFD) => again(),
        result => result,
    }
}

impl QueueHandler for TxQueue {
    fn event_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.more.as_fd(), self.alarm.event()]
    }

    fn polling(&self) -> Polling {
        self.polling
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        match wake {
            Wake::Event(EVENT_MORE) => drop(self.more.take().map_err(RingError::Device)?),
            Wake::Event(EVENT_ALARM) => self.alarm.take(),
            _ => {}
        }
        let taken = self.take(ring);
        if !self.behind.is_empty() {
            self.let_go_behind(0, false);
        }
        ring.publish();
        // What was completed is sent, whatever became of the ring.
        self.flush();
        if taken? {
            self.more.ring();
        }
        Ok(())
    }

    /// What waits goes at once: the ring is to end with nothing in flight.
    fn drain(&mut self, ring: &mut Ring, _: Instant) -> usize {
        if let Some(frame) = self.held.take() {
            self.let_go(ring, frame);
        }
        self.let_go_behind(0, true);
        self.flush();
        ring.unpop_all(&mut self.taken);
        0
    }
}
