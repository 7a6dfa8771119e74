//! Frames from the driver to the tap.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vhost_user::backend::{QueueHandler, Wake};
use vhost_user::eventfd::EventFd;
use vhost_user::ring::{DescChain, Ring, RingError};

use super::Shared;
use crate::nic::header::{
    Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads, header_len_bytes,
};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// Frames sent before the ring's thread looks at commands again: a full ring of usual size.
const BATCH: usize = 256;

/// What the kernel takes in one call.
const MAX_IOVECS: usize = 1024;

/// One transmit ring.
pub(super) struct TxQueue {
    shared: Arc<Shared>,
    nic: Arc<NicState>,
    pair: u16,
    header_len_bytes: usize,
    offloads: Offloads,
    /// Rung when a batch ended with frames left.
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
            shared,
            nic,
            pair,
            header_len_bytes: header_len_bytes(features),
            offloads: Offloads::to_device(features),
            more: EventFd::new()?,
            iovecs: Vec::new(),
        })
    }

    fn send(&mut self, chain: &DescChain) -> Result<usize, DropReason> {
        let len_bytes = chain.readable_len_bytes() as usize;
        let frame_len_bytes = len_bytes
            .checked_sub(self.header_len_bytes)
            .filter(|frame| (1..=MAX_FRAME_LEN_BYTES).contains(frame))
            .ok_or(DropReason::Malformed)?;
        let mut bytes = [0; MAX_HEADER_LEN_BYTES];
        chain.read_at(0, &mut bytes[..self.header_len_bytes]);
        let header = Header::checked(&bytes, frame_len_bytes, self.offloads)
            .map_err(|_| DropReason::Malformed)?;

        self.iovecs.clear();
        self.iovecs.push(libc::iovec {
            iov_base: header.as_bytes().as_ptr().cast_mut().cast(),
            iov_len: self.header_len_bytes,
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
        self.write().map_err(|_| DropReason::Refused)?;
        Ok(frame_len_bytes)
    }

    /// A queue that does not take part cannot be written either: queue 0 always can.
    fn write(&self) -> io::Result<()> {
        let tap = &self.shared.tap;
        match tap.send(self.pair, &self.iovecs) {
            Err(error) if self.pair != 0 && error.raw_os_error() == Some(libc::EBADFD) => {
                tap.send(0, &self.iovecs)
            }
            result => result,
        }
    }

    fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].tx.0
    }
}

impl QueueHandler for TxQueue {
    fn event_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.more.as_fd()]
    }

    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError> {
        if let Wake::Event(_) = wake {
            self.more.take().map_err(RingError::Device)?;
        }
        for _ in 0..BATCH {
            let Some(chain) = ring.pop()? else {
                return Ok(());
            };
            match self.send(&chain) {
                Ok(frame_len_bytes) => self.counters().count(frame_len_bytes),
                Err(reason) => self.counters().count_drop(reason),
            }
            ring.complete(chain, 0);
        }
        self.more.ring();
        Ok(())
    }
}
