//! Frames from the tap to the driver.
//!
//! The ring holds a window of popped chains, and one `readv` puts a frame right into them; behind
//! them an overflow buffer of our own takes what does not fit. With mergeable buffers the overflow
//! is copied to further chains as the driver supplies them; without, the frame is dropped.
//!
//! ```text
//!              tap readable                      window covers the frame
//!   waiting ------------------> frame received ---------------------------> delivered, waiting
//!      |  ^                        |    ^
//!      |  | kick                   |    | kick
//!      v  |                        v    |
//!   starved (no buffers,        starved with a frame: dropped when the whole ring is in the
//!   tap not polled)             window already, and when the ring stops
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use vhost_user::backend::{QueueHandler, Wake};
use vhost_user::ring::{DescChain, Ring, RingError};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::Shared;
use crate::nic::header::{
    Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads, has, header_len_bytes,
};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// Frames delivered before the ring's thread looks at commands again; the tap wakes it anew.
const BATCH: usize = 64;

/// Chains in the window at most. A frame of 64 KiB needs 45 of Linux's mergeable buffers.
const MAX_WINDOW_CHAINS: usize = 256;

/// Segments in one `readv` at most; leaves room for header and overflow below IOV_MAX.
const MAX_SEGMENTS: usize = 1000;

/// Bytes of the window while frames are small: two ordinary frames.
const SMALL_WINDOW_BYTES: usize = 4096;

/// Positions in [`QueueHandler::event_fds`].
const EVENT_TAP: usize = 0;
const EVENT_STEERING: usize = 1;

/// One receive ring.
pub(super) struct RxQueue {
    shared: Arc<Shared>,
    nic: Arc<NicState>,
    pair: u16,
    header_len_bytes: usize,
    offloads: Offloads,
    is_mergeable: bool,
    window: VecDeque<DescChain>,
    window_bytes: usize,
    /// The last frame did not fit a small window, so the next one may not either.
    wants_large_window: bool,
    overflow: Box<[u8]>,
    frame: Option<Received>,
    /// Nothing can be done before the driver supplies buffers.
    is_starved: bool,
    /// The interface was deleted.
    is_tap_gone: bool,
    /// Emptied after each frame; kept for its storage.
    iovecs: Vec<libc::iovec>,
}

/// A frame that waits for enough buffers.
#[derive(Clone, Copy)]
struct Received {
    header: Header,
    /// Header and frame.
    len_bytes: usize,
    /// How much of that `readv` put into the window, or passed over for the header; the rest is
    /// in the overflow buffer.
    in_window_bytes: usize,
}

impl RxQueue {
    pub(super) fn new(shared: Arc<Shared>, nic: Arc<NicState>, pair: u16, features: u64) -> Self {
        Self {
            shared,
            nic,
            pair,
            header_len_bytes: header_len_bytes(features),
            offloads: Offloads::to_driver(features),
            is_mergeable: has(features, VIRTIO_NET_F_MRG_RXBUF),
            window: VecDeque::new(),
            window_bytes: 0,
            wants_large_window: false,
            overflow: vec![0; MAX_FRAME_LEN_BYTES].into_boxed_slice(),
            frame: None,
            is_starved: true,
            is_tap_gone: false,
            iovecs: Vec::new(),
        }
    }

    /// One frame further; false when nothing more can be done now.
    fn advance(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        let frame = match self.frame {
            Some(frame) => frame,
            None => {
                self.fill_window(ring, self.window_goal_bytes())?;
                self.is_starved = self.window.is_empty();
                if self.is_starved {
                    return Ok(false);
                }
                match self.receive() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => return Ok(true),
                    Err(error) => return Ok(self.may_try_again(&error)),
                }
            }
        };
        self.wants_large_window = frame.len_bytes > SMALL_WINDOW_BYTES;
        self.frame = Some(frame);
        if frame.len_bytes > self.window_bytes && self.is_mergeable {
            self.fill_window(ring, frame.len_bytes)?;
        }
        if frame.len_bytes <= self.window_bytes {
            self.deliver(ring, frame);
            self.frame = None;
            return Ok(true);
        }
        let can_grow = self.is_mergeable
            && self.window.len() < MAX_WINDOW_CHAINS.min(usize::from(ring.size()));
        if can_grow {
            self.is_starved = true;
            return Ok(false);
        }
        self.drop_frame();
        Ok(true)
    }

    fn window_goal_bytes(&self) -> usize {
        if !self.is_mergeable {
            1
        } else if self.wants_large_window {
            self.header_len_bytes + MAX_FRAME_LEN_BYTES
        } else {
            SMALL_WINDOW_BYTES
        }
    }

    /// Pops chains until the window has `goal_bytes`. A chain that has no room for the header
    /// goes back to the driver empty.
    fn fill_window(&mut self, ring: &mut Ring, goal_bytes: usize) -> Result<(), RingError> {
        let was_empty = self.window.is_empty();
        // A driver that offers useless chains for ever must not keep this thread for ever.
        for _ in 0..ring.size() {
            if self.window_bytes >= goal_bytes || self.window.len() == MAX_WINDOW_CHAINS {
                break;
            }
            let Some(chain) = ring.pop()? else { break };
            let len_bytes = chain.writable_len_bytes() as usize;
            if len_bytes <= self.header_len_bytes {
                self.counters().count_drop(DropReason::NoBuffers);
                ring.complete(chain, 0);
                continue;
            }
            self.window_bytes += len_bytes;
            self.window.push_back(chain);
        }
        if was_empty && !self.window.is_empty() {
            let Shared { tap, steering, .. } = &*self.shared;
            steering.set_has_buffers(tap, self.pair, true);
        }
        Ok(())
    }

    /// Reads one frame; None when it had to be dropped.
    fn receive(&mut self) -> io::Result<Option<Received>> {
        let mut header = [0; MAX_HEADER_LEN_BYTES];
        self.iovecs.clear();
        self.iovecs.push(libc::iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: self.header_len_bytes,
        });
        let mut in_window_bytes = self.header_len_bytes;
        // The driver's header is written last, once it is known.
        let mut skip_bytes = self.header_len_bytes;
        'window: for chain in &self.window {
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
        // SAFETY: header and overflow are ours and borrowed by nobody; the segments are guest
        // memory that the chains in the window keep mapped, and guest memory is never referenced.
        let len_bytes = unsafe { self.shared.tap.receive(self.pair, &self.iovecs)? };
        let header = len_bytes
            .checked_sub(self.header_len_bytes)
            .filter(|frame| (1..=MAX_FRAME_LEN_BYTES).contains(frame))
            .and_then(|frame| Header::checked(&header, frame, self.offloads).ok());
        let Some(header) = header else {
            self.counters().count_drop(DropReason::NoBuffers);
            return Ok(None);
        };
        Ok(Some(Received {
            header,
            len_bytes,
            in_window_bytes: in_window_bytes.min(len_bytes),
        }))
    }

    /// Completes as many chains as the frame needs. The window covers it.
    fn deliver(&mut self, ring: &mut Ring, frame: Received) {
        let mut num_chains = 0;
        let mut covered_bytes = 0;
        for chain in &self.window {
            // What readv left in the overflow buffer.
            let chain_end = covered_bytes + chain.writable_len_bytes() as usize;
            let from = frame.in_window_bytes.max(covered_bytes);
            let to = frame.len_bytes.min(chain_end);
            if from < to {
                let base = frame.in_window_bytes;
                chain.write_at(from - covered_bytes, &self.overflow[from - base..to - base]);
            }
            num_chains += 1;
            covered_bytes = chain_end;
            if covered_bytes >= frame.len_bytes {
                break;
            }
        }
        let header = frame.header.with_num_buffers(num_chains);
        if let Some(first) = self.window.front() {
            first.write_at(0, &header.as_bytes()[..self.header_len_bytes]);
        }
        let mut left_bytes = frame.len_bytes;
        for chain in self.window.drain(..usize::from(num_chains)) {
            let chain_bytes = chain.writable_len_bytes() as usize;
            let written_bytes = left_bytes.min(chain_bytes);
            self.window_bytes -= chain_bytes;
            left_bytes -= written_bytes;
            ring.complete(chain, written_bytes as u32);
        }
        self.counters()
            .count(frame.len_bytes - self.header_len_bytes);
    }

    fn drop_frame(&mut self) {
        if self.frame.take().is_some() {
            self.counters().count_drop(DropReason::Malformed);
        }
    }

    /// Whether the tap is worth another look at once.
    fn may_try_again(&mut self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => false,
            Some(libc::EINTR) => true,
            // The queue was just taken out of the tap's set, or the tap is gone.
            _ if !self.shared.steering.is_attached(self.pair) => false,
            _ => {
                tracing::error!(pair = self.pair, %error, "tap fails, receiving ends; was it deleted?");
                self.is_tap_gone = true;
                false
            }
        }
    }

    fn put_window_back(&mut self, ring: &mut Ring) {
        self.drop_frame();
        while let Some(chain) = self.window.pop_back() {
            ring.unpop(chain);
        }
        self.window_bytes = 0;
        self.is_starved = true;
    }

    fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].rx.0
    }
}

impl QueueHandler for RxQueue {
    fn event_fds(&self) -> Vec<BorrowedFd<'_>> {
        let Shared { tap, steering, .. } = &*self.shared;
        vec![
            tap.queue(self.pair).as_fd(),
            steering.changed(self.pair).as_fd(),
        ]
    }

    fn wants_event(&self, index: usize) -> bool {
        match index {
            EVENT_TAP => {
                !self.is_starved && !self.is_tap_gone && self.shared.steering.is_attached(self.pair)
            }
            _ => true,
        }
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        if wake == Wake::Event(EVENT_STEERING) {
            let changed = self.shared.steering.changed(self.pair);
            changed.take().map_err(RingError::Device)?;
        }
        if ring.is_paused() {
            self.put_window_back(ring);
            return Ok(());
        }
        // While there are buffers only the tap has news.
        if wake == Wake::Kick && !self.is_starved {
            return Ok(());
        }
        self.is_starved = false;
        for _ in 0..BATCH {
            if !self.advance(ring)? {
                break;
            }
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
        let Shared { tap, steering, .. } = &*self.shared;
        steering.set_has_buffers(tap, self.pair, false);
    }
}
