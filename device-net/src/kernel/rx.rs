//! Frames from the kernel to the driver.
//!
//! Small frames come in batches: one system call puts many into slots of ours, from which they are
//! copied to the driver's buffers; what the driver cannot finish is finished in between. Once they are large, copying would cost more than calling, and
//! one `readv` puts each right into a window of popped chains, with an overflow buffer of our own
//! behind them for what does not fit.
//!
//! ```text
//!              queue readable                      window covers the frame
//!   waiting ------------------> frames received ---------------------------> delivered, waiting
//!      |  ^                        |    ^
//!      |  | kick                   |    | kick
//!      v  |                        v    |
//!   starved (no buffers,        starved with frames: one is dropped when the whole ring is in
//!   queue not polled)           the window already; all are when the ring stops
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use vhost_user::backend::{QueueHandler, Wake};
use vhost_user::ring::{Ring, RingError};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use filter::Direction as Way;

use super::Shared;
use super::alarm::Alarm;
use super::inbox::Inbox;
use super::packet::{self, TAG_AT, Tag};
use super::window::{Room, Window};
use crate::guard::{self, Guard, HEAD_LEN_BYTES, Mishap};
use crate::nic::header::{
    Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads, has, header_len_bytes,
};
use crate::nic::receive_filter::{LOOKED_AT_BYTES, ReceiveFilter};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// System calls for frames before the ring's thread looks at commands again; the queue wakes it
/// anew.
const MAX_CALLS: usize = 16;

/// Segments in one `readv` at most; leaves room for header and overflow below IOV_MAX.
const MAX_SEGMENTS: usize = 1000;

/// From this length on a frame is large. Two ordinary ones have room.
const LARGE_BYTES: usize = 4096;

/// Positions in [`QueueHandler::event_fds`].
const EVENT_FRAMES: usize = 0;
const EVENT_STEERING: usize = 1;
const EVENT_ALARM: usize = 2;

/// One receive ring.
pub(super) struct RxQueue {
    shared: Arc<Shared>,
    nic: Arc<NicState>,
    pair: u16,
    header_len_bytes: usize,
    offloads: Offloads,
    filter: Arc<ReceiveFilter>,
    filter_version: u64,
    window: Window,
    inbox: Inbox,
    /// When what waits in `inbox`, or as `large`, was received at the earliest.
    received_at: Instant,
    /// The last frame was large, so the next one may be as well.
    expects_large: bool,
    overflow: Box<[u8]>,
    /// A large frame, part of which is in the window already.
    large: Option<Large>,
    /// The guard let the frame at the front pass, but it must wait for `alarm`.
    is_held: bool,
    /// What happens to the frame at the front.
    mishap: Mishap,
    alarm: Alarm,
    has_buffers: bool,
    /// Nothing can be done before the driver supplies buffers.
    is_starved: bool,
    /// The interface was deleted.
    is_gone: bool,
    /// Emptied after each frame; kept for its storage.
    iovecs: Vec<libc::iovec>,
}

/// A frame that `readv` put into the window and, behind it, into the overflow buffer.
#[derive(Clone, Copy)]
struct Large {
    header: Header,
    /// The driver's header and the frame.
    len_bytes: usize,
    /// How much of that is in the window; the rest is in the overflow buffer.
    in_window_bytes: usize,
}

/// What came of an attempt.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Made,
    /// There was nothing to be had.
    None,
}

impl RxQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        nic: Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Self> {
        let header_len_bytes = header_len_bytes(features);
        let offloads = Offloads::to_driver(features);
        let (filter, filter_version) = nic.receive_filter();
        Ok(Self {
            nic,
            pair,
            header_len_bytes,
            offloads,
            filter,
            filter_version,
            window: Window::new(header_len_bytes, has(features, VIRTIO_NET_F_MRG_RXBUF)),
            inbox: Inbox::new(
                shared.interface.source(),
                shared.interface.header_len_bytes(),
                offloads,
            )?,
            received_at: Instant::now(),
            shared,
            expects_large: false,
            overflow: vec![0; MAX_FRAME_LEN_BYTES].into_boxed_slice(),
            large: None,
            is_held: false,
            mishap: Mishap::default(),
            alarm: Alarm::new()?,
            has_buffers: false,
            is_starved: true,
            is_gone: false,
            iovecs: Vec::new(),
        })
    }

    /// Delivers what was received. None is left if there are buffers.
    fn deliver(&mut self, ring: &mut Ring) -> Result<Progress, RingError> {
        if let Some(large) = self.large
            && self.deliver_large(ring, large)? == Progress::None
        {
            return Ok(Progress::None);
        }
        let (mut frames, mut bytes) = (0, 0);
        let mut progress = Progress::Made;
        let watch = self.nic.guard.is_active().then(guard::monotonic_ns);
        if watch.is_none() {
            self.mishap = Mishap::default();
        }
        while let Some(prepared) = self.inbox.prepare() {
            let frame = self.inbox.frame();
            let header = match prepared.and_then(|header| {
                self.check_wanted(frame)?;
                Ok(header)
            }) {
                Ok(header) => header,
                Err(reason) => {
                    self.counters().count_drop(reason);
                    self.inbox.pop();
                    continue;
                }
            };
            let len_bytes = self.header_len_bytes + frame.len();
            let useless = self.window.make_room(ring, len_bytes)?;
            for _ in 0..useless {
                self.counters().count_drop(DropReason::NoBuffers);
            }
            match self.window.room(ring, len_bytes) {
                Room::Enough => {
                    if let Some(now_ns) = watch {
                        let mishap = &mut self.mishap;
                        match pass(
                            &self.nic.guard,
                            &header,
                            frame,
                            self.is_held,
                            mishap,
                            now_ns,
                        ) {
                            Passage::Free => self.is_held = false,
                            Passage::Refused(reason) => {
                                self.counters().count_drop(reason);
                                self.inbox.pop();
                                continue;
                            }
                            Passage::NotBefore(at_ns) => {
                                self.is_held = true;
                                self.alarm.set(at_ns);
                                progress = Progress::None;
                                break;
                            }
                        }
                    }
                    if self.mishap.spoils() {
                        let mut spoilt = frame.to_vec();
                        self.mishap.spoil(&mut spoilt);
                        self.window.write(self.header_len_bytes, &spoilt);
                    } else {
                        self.window.write(self.header_len_bytes, frame);
                    }
                    frames += 1;
                    bytes += frame.len() as u64;
                    self.expects_large = len_bytes > LARGE_BYTES;
                    self.window.complete(ring, &header, len_bytes);
                    if self.mishap.copies == 0 {
                        self.inbox.pop();
                        if watch.is_some() {
                            self.mishap = Mishap::default();
                        }
                    } else {
                        // Once more, as it was judged.
                        self.mishap.copies -= 1;
                        self.is_held = true;
                    }
                }
                Room::NotYet => {
                    self.is_starved = true;
                    progress = Progress::None;
                    break;
                }
                Room::Never => {
                    self.counters().count_drop(DropReason::NoBuffers);
                    self.inbox.pop();
                }
            }
        }
        if frames > 0 {
            self.counters().count_many(frames, bytes);
            let elapsed = self.received_at.elapsed();
            self.counters().record_latency(elapsed, frames);
        }
        self.note_buffers();
        Ok(progress)
    }

    fn check_wanted(&self, head: &[u8]) -> Result<(), DropReason> {
        if !self.nic.is_link_up() {
            return Err(DropReason::LinkDown);
        }
        if !self.filter.is_open() && !self.filter.accepts(head) {
            return Err(DropReason::Unwanted);
        }
        Ok(())
    }

    fn deliver_large(&mut self, ring: &mut Ring, large: Large) -> Result<Progress, RingError> {
        let useless = self.window.make_room(ring, large.len_bytes)?;
        self.count_useless(useless);
        match self.window.room(ring, large.len_bytes) {
            Room::Enough => {
                let in_overflow_bytes = large.len_bytes - large.in_window_bytes;
                self.window
                    .write(large.in_window_bytes, &self.overflow[..in_overflow_bytes]);
                self.window.complete(ring, &large.header, large.len_bytes);
                let frame_len_bytes = large.len_bytes - self.header_len_bytes;
                self.counters().count(frame_len_bytes);
                let elapsed = self.received_at.elapsed();
                self.counters().record_latency(elapsed, 1);
            }
            Room::NotYet => {
                self.is_starved = true;
                return Ok(Progress::None);
            }
            Room::Never => self.counters().count_drop(DropReason::NoBuffers),
        }
        self.large = None;
        Ok(Progress::Made)
    }

    /// Receives what comes next. There are buffers for some of it.
    fn receive(&mut self, ring: &mut Ring) -> Result<Progress, RingError> {
        let goal_bytes = if self.expects_large {
            self.header_len_bytes + MAX_FRAME_LEN_BYTES
        } else {
            1
        };
        let useless = self.window.make_room(ring, goal_bytes)?;
        self.count_useless(useless);
        self.note_buffers();
        if self.window.is_empty() {
            self.is_starved = true;
            return Ok(Progress::None);
        }
        self.received_at = Instant::now();
        // What the guard is to look at must not be in the driver's hands yet.
        let received = if self.expects_large && !self.nic.guard.is_active() {
            self.receive_large()
        } else {
            self.inbox.receive(self.shared.interface.queue(self.pair))
        };
        match received {
            Ok(true) => Ok(Progress::Made),
            // What there was is delivered, and the queue then looked at by others.
            Ok(false) => Ok(Progress::None),
            Err(error) => Ok(self.consider(&error)),
        }
    }

    /// Reads one frame into the window. Returns whether there may be more.
    fn receive_large(&mut self) -> io::Result<bool> {
        let mut bytes = [0; MAX_HEADER_LEN_BYTES];
        let kernel_header_bytes = self.shared.interface.header_len_bytes();
        self.iovecs.clear();
        self.iovecs.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: kernel_header_bytes,
        });
        let mut in_window_bytes = self.header_len_bytes;
        // The driver's header is written last, once it is known.
        let mut skip_bytes = self.header_len_bytes;
        'window: for chain in self.window.chains() {
            for segment in chain.writable_range(skip_bytes, usize::MAX) {
                if self.iovecs.len() > MAX_SEGMENTS {
                    break 'window;
                }
                in_window_bytes += segment.len();
                self.iovecs.push(libc::iovec {
                    iov_base: segment.as_ptr().cast(),
                    iov_len: segment.len(),
                });
            }
            skip_bytes = 0;
        }
        self.iovecs.push(libc::iovec {
            iov_base: self.overflow.as_mut_ptr().cast(),
            iov_len: self.overflow.len(),
        });
        let interface = &self.shared.interface;
        // SAFETY: header and overflow are ours and borrowed by nobody; the segments are guest
        // memory that the chains in the window keep mapped, and guest memory is never referenced.
        let received = unsafe { interface.read_scattered(self.pair, &self.iovecs) };
        let (received_bytes, tag) = match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            result => result?,
        };
        let frame_len_bytes = received_bytes.saturating_sub(kernel_header_bytes);
        let len_bytes = self.header_len_bytes + frame_len_bytes;
        self.expects_large = len_bytes > LARGE_BYTES;
        let mut large = Large {
            header: Header::default(),
            len_bytes,
            in_window_bytes: in_window_bytes.min(len_bytes),
        };
        if let Some(tag) = tag {
            packet::lengthen(&mut bytes);
            self.put_tag_back(&mut large, in_window_bytes, tag);
        }
        match self.inspect_large(&bytes, large) {
            Ok(header) => self.large = Some(Large { header, ..large }),
            Err(reason) => self.counters().count_drop(reason),
        }
        Ok(true)
    }

    /// Puts a tag into a frame in the window, which has room for `room_bytes`, and in the overflow buffer.
    #[cold]
    fn put_tag_back(&mut self, large: &mut Large, room_bytes: usize, tag: Tag) {
        let in_overflow_bytes = large.len_bytes - large.in_window_bytes;
        let mut frame = vec![0; large.in_window_bytes.saturating_sub(self.header_len_bytes)];
        self.window.read(self.header_len_bytes, &mut frame);
        frame.extend_from_slice(&self.overflow[..in_overflow_bytes.min(self.overflow.len())]);
        if frame.len() < TAG_AT {
            return;
        }
        frame.splice(TAG_AT..TAG_AT, tag.bytes());
        large.len_bytes = self.header_len_bytes + frame.len();
        large.in_window_bytes = room_bytes.min(large.len_bytes);
        let inside_bytes = large.in_window_bytes.saturating_sub(self.header_len_bytes);
        let (inside, outside) = frame.split_at(inside_bytes);
        self.window.write(self.header_len_bytes, inside);
        // One that is longer than any frame is malformed, whatever is in it.
        let outside = &outside[..outside.len().min(self.overflow.len())];
        self.overflow[..outside.len()].copy_from_slice(outside);
    }

    fn inspect_large(
        &self,
        header: &[u8; MAX_HEADER_LEN_BYTES],
        large: Large,
    ) -> Result<Header, DropReason> {
        let frame_len_bytes = large.len_bytes - self.header_len_bytes;
        if !(1..=MAX_FRAME_LEN_BYTES).contains(&frame_len_bytes) {
            return Err(DropReason::Malformed);
        }
        let header = Header::checked(header, frame_len_bytes, self.offloads)
            .map_err(|_| DropReason::Malformed)?;
        let mut head = [0; LOOKED_AT_BYTES];
        let head_len = self.window.read(self.header_len_bytes, &mut head);
        self.check_wanted(&head[..head_len.min(frame_len_bytes)])?;
        Ok(header)
    }

    /// Whether the queue is worth another look at once.
    fn consider(&mut self, error: &io::Error) -> Progress {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Progress::None,
            Some(libc::EINTR) => Progress::Made,
            // The queue was just taken out of the tap's set, or the tap is gone.
            _ if !self.shared.steering.is_attached(self.pair) => Progress::None,
            // The interface went down or up: told once, and nothing is wrong with the socket.
            Some(libc::ENETDOWN) => Progress::Made,
            _ => {
                tracing::error!(pair = self.pair, %error, "interface fails, receiving ends; was it deleted?");
                self.is_gone = true;
                Progress::None
            }
        }
    }

    fn renew_filter(&mut self) {
        if self.nic.filter_version() != self.filter_version {
            (self.filter, self.filter_version) = self.nic.receive_filter();
        }
    }

    /// Frames may be steered to this ring.
    fn note_buffers(&mut self) {
        if !self.has_buffers && !self.window.is_empty() {
            self.has_buffers = true;
            let Shared {
                interface,
                steering,
                ..
            } = &*self.shared;
            steering.set_has_buffers(interface, self.pair, true);
        }
    }

    fn put_window_back(&mut self, ring: &mut Ring) {
        let waiting = self.inbox.len() + usize::from(self.large.take().is_some());
        for _ in 0..waiting {
            self.counters().count_drop(DropReason::NoBuffers);
        }
        self.inbox.clear();
        self.is_held = false;
        self.window.put_back(ring);
        self.is_starved = true;
    }

    fn count_useless(&self, chains: u64) {
        for _ in 0..chains {
            self.counters().count_drop(DropReason::NoBuffers);
        }
    }

    fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].rx.0
    }
}

/// Whether a frame may pass.
enum Passage {
    Free,
    Refused(DropReason),
    /// It has to wait.
    NotBefore(u64),
}

/// Asks the guard about a frame for the driver; one that was held has been looked at.
fn pass(
    guard: &Guard,
    header: &Header,
    frame: &[u8],
    was_held: bool,
    mishap: &mut Mishap,
    now_ns: u64,
) -> Passage {
    if !was_held {
        let shown = guard::Frame {
            head: &frame[..frame.len().min(HEAD_LEN_BYTES)],
            bytes: &frame,
            len_bytes: frame.len(),
            checksum_at: header.checksum_at(),
        };
        if guard.check(Way::Ingress, &shown, now_ns).is_err() {
            return Passage::Refused(DropReason::Guarded);
        }
        *mishap = guard.mishap(Way::Ingress, shown.head, frame.len(), now_ns);
        if mishap.is_lost {
            return Passage::Refused(DropReason::Fault);
        }
    }
    match guard.admit(Way::Ingress, frame.len(), now_ns) {
        Ok(()) => Passage::Free,
        Err(at_ns) => Passage::NotBefore(at_ns),
    }
}

impl QueueHandler for RxQueue {
    fn event_fds(&self) -> Vec<BorrowedFd<'_>> {
        let Shared {
            interface,
            steering,
            ..
        } = &*self.shared;
        vec![
            interface.queue(self.pair).as_fd(),
            steering.changed(self.pair).as_fd(),
            self.alarm.event(),
        ]
    }

    fn wants_event(&self, index: usize) -> bool {
        match index {
            EVENT_FRAMES => {
                !self.is_starved
                    && !self.is_held
                    && !self.is_gone
                    && self.shared.steering.is_attached(self.pair)
            }
            _ => true,
        }
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        if wake == Wake::Event(EVENT_STEERING) {
            let changed = self.shared.steering.changed(self.pair);
            changed.take().map_err(RingError::Device)?;
        }
        if wake == Wake::Event(EVENT_ALARM) {
            self.alarm.take();
        }
        if ring.is_paused() {
            self.put_window_back(ring);
            return Ok(());
        }
        // While there are buffers only the kernel has news.
        if wake == Wake::Kick && !self.is_starved {
            return Ok(());
        }
        self.is_starved = false;
        self.renew_filter();
        // Frames that are held wait for the alarm, or else it is set anew.
        let mut progress = self.deliver(ring)?;
        for _ in 0..MAX_CALLS {
            if progress == Progress::None {
                break;
            }
            progress = self.receive(ring)?;
            if self.deliver(ring)? == Progress::None {
                break;
            }
            ring.notify();
        }
        Ok(())
    }

    fn drain(&mut self, ring: &mut Ring, _: Instant) -> usize {
        self.put_window_back(ring);
        0
    }
}

impl Drop for RxQueue {
    fn drop(&mut self) {
        let Shared {
            interface,
            steering,
            ..
        } = &*self.shared;
        steering.set_has_buffers(interface, self.pair, false);
    }
}
