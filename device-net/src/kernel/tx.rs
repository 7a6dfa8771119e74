//! Frames from the driver to the kernel.
//!
//! A small frame is copied once, checked, and sent with others by one system call; its chain goes
//! back to the driver as soon as it is copied. A large one is sent from where it lies, behind the
//! checked copy of its header.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vhost_user::backend::{Polling, QueueHandler, Wake};
use vhost_user::eventfd::EventFd;
use vhost_user::ring::{DescChain, Ring, RingError};

use super::Shared;
use super::batch::{SEND_SLOT_BYTES, SendBatch};
use super::interface;
use crate::nic::header::{
    Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads, header_len_bytes,
};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// Frames sent before the ring's thread looks at commands again: a full ring of usual size.
const MAX_FRAMES: usize = 256;

/// What the kernel takes in one call.
const MAX_IOVECS: usize = 1024;

/// One transmit ring.
pub(super) struct TxQueue {
    shared: Arc<Shared>,
    nic: Arc<NicState>,
    pair: u16,
    header_len_bytes: usize,
    offloads: Offloads,
    polling: Polling,
    batch: SendBatch,
    /// Rung when frames were left.
    more: EventFd,
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
            batch: SendBatch::new()?,
            more: EventFd::new()?,
            iovecs: Vec::new(),
        })
    }

    /// Takes what the driver has, up to [`MAX_FRAMES`]. Returns whether there may be more.
    fn take(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        for _ in 0..MAX_FRAMES {
            let Some(chain) = ring.pop()? else {
                return Ok(false);
            };
            if let Err(reason) = self.accept(&chain) {
                self.counters().count_drop(reason);
            }
            ring.complete(chain, 0);
            if self.batch.is_full() {
                self.flush();
                // The driver has buffers again before the rest is sent.
                ring.notify();
            }
        }
        Ok(true)
    }

    /// Copies a frame into the batch, or sends it.
    fn accept(&mut self, chain: &DescChain) -> Result<(), DropReason> {
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
            return self.send_large(chain, &header, frame_len_bytes);
        }
        let slot = self.batch.next_slot();
        let (in_header, in_frame) = slot[..len_bytes].split_at_mut(kernel_header.len());
        in_header.copy_from_slice(kernel_header);
        chain.read_at(self.header_len_bytes, in_frame);
        self.batch.push(len_bytes);
        Ok(())
    }

    fn send_large(
        &mut self,
        chain: &DescChain,
        header: &Header,
        frame_len_bytes: usize,
    ) -> Result<(), DropReason> {
        // Frames keep their order.
        self.flush();
        self.iovecs.clear();
        self.iovecs.push(libc::iovec {
            iov_base: header.as_bytes().as_ptr().cast_mut().cast(),
            iov_len: self.shared.interface.header_len_bytes(),
        });
        for segment in chain.readable_range(self.header_len_bytes, frame_len_bytes) {
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
        .map_err(|_| DropReason::Refused)?;
        self.counters().count(frame_len_bytes);
        Ok(())
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
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
    }

    fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].tx.0
    }
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
        vec![self.more.as_fd()]
    }

    fn polling(&self) -> Polling {
        self.polling
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        if let Wake::Event(_) = wake {
            self.more.take().map_err(RingError::Device)?;
        }
        let taken = self.take(ring);
        // What was completed is sent, whatever became of the ring.
        self.flush();
        if taken? {
            self.more.ring();
        }
        Ok(())
    }
}
