//! Where a stretch of a disk is, and what keeps it there while it is used.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;

/// What a stretch is looked up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Where a stretch is. Lengths are whole sectors, at least one and no more than was asked for.
#[derive(Debug)]
pub(crate) enum Place {
    /// In a file: the queue reads or writes there by io_uring. `offset_bytes` is the file's. With
    /// [`Image::direct`](super::Image::direct) it is a multiple of 512.
    File {
        fd: RawFd,
        offset_bytes: u64,
        len_bytes: u64,
        /// Held until the I/O is over, also when it outlives its queue.
        ticket: Option<Ticket>,
    },
    /// Nowhere; reads as zeroes. Only for [`Access::Read`].
    Zeroes { len_bytes: u64 },
    /// To be worked out by [`Image::perform`](super::Image::perform).
    Worker { len_bytes: u64 },
}

/// Says that a stretch is in use: it is neither freed nor moved, and its file stays open. Made
/// without an allocation; dropping it tells the issuer.
pub(crate) struct Ticket {
    issuer: Arc<dyn TicketIssuer>,
    key: u64,
}

/// Who keeps count of the tickets that are out.
pub(crate) trait TicketIssuer: Send + Sync {
    /// The I/O that the ticket with this key was for is over. Must not block.
    fn give_back(&self, key: u64);
}

impl Ticket {
    /// `key` is the issuer's own, and need not be unique.
    pub(crate) fn new(issuer: Arc<dyn TicketIssuer>, key: u64) -> Self {
        Self { issuer, key }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.issuer.give_back(self.key);
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({:#x})", self.key)
    }
}
