//! An interface of the host, as queues' descriptors: a tap, or packet sockets.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::batch::Source;
use super::packet::{self, PacketSockets, Tag};
use super::tap::Tap;
use crate::nic::header::{MAX_HEADER_LEN_BYTES, Offloads};

/// One descriptor for each queue pair. Each takes and gives one frame a call, behind a header of
/// [`Interface::header_len_bytes`], whatever the driver's is.
#[derive(Debug)]
pub(crate) enum Interface {
    Tap(Tap),
    Packet(PacketSockets),
}

impl Interface {
    /// One for each queue pair.
    pub(super) fn num_queues(&self) -> u16 {
        match self {
            Self::Tap(tap) => tap.num_queues(),
            Self::Packet(sockets) => sockets.num_queues(),
        }
    }

    /// The descriptor of one queue; non-blocking.
    pub(crate) fn queue(&self, pair: u16) -> &OwnedFd {
        match self {
            Self::Tap(tap) => tap.queue(pair),
            Self::Packet(sockets) => sockets.queue(pair),
        }
    }

    /// Of the header before each frame: all of it, or without `num_buffers`.
    pub(crate) fn header_len_bytes(&self) -> usize {
        match self {
            Self::Tap(_) => MAX_HEADER_LEN_BYTES,
            Self::Packet(_) => packet::HEADER_LEN_BYTES,
        }
    }

    /// Whether the kernel segments UDP, and leaves it to us.
    pub(crate) fn has_uso(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.has_uso(),
            // Whether a socket does is not told before the first frame.
            Self::Packet(_) => false,
        }
    }

    /// Reads one frame of the first queue behind its header, as it was on the wire; returns the length of both.
    /// `slot` has [`TAG_ROOM_BYTES`](packet::TAG_ROOM_BYTES) more than the longest frame takes.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub(crate) fn read(&self, slot: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tap(tap) => {
                // SAFETY: a buffer of ours and its length.
                let len = unsafe {
                    libc::read(
                        tap.queue(0).as_raw_fd(),
                        slot.as_mut_ptr().cast(),
                        slot.len(),
                    )
                };
                usize::try_from(len).map_err(|_| io::Error::last_os_error())
            }
            Self::Packet(sockets) => packet::receive(sockets.queue(0), slot),
        }
    }

    /// Reads one frame of queue `pair`; returns the length of header and frame together, and a tag that belongs
    /// into it.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    ///
    /// # Safety
    /// Each of `iovecs` must be memory that may be written and that no reference covers.
    pub(super) unsafe fn read_scattered(
        &self,
        pair: u16,
        iovecs: &[libc::iovec],
    ) -> io::Result<(usize, Option<Tag>)> {
        match self {
            Self::Tap(tap) => {
                // SAFETY: the caller vouches for the iovecs.
                let len_bytes = unsafe {
                    libc::readv(
                        tap.queue(pair).as_raw_fd(),
                        iovecs.as_ptr(),
                        iovecs.len() as libc::c_int,
                    )
                };
                let len_bytes =
                    usize::try_from(len_bytes).map_err(|_| io::Error::last_os_error())?;
                Ok((len_bytes, None))
            }
            // SAFETY: as above.
            Self::Packet(sockets) => unsafe {
                packet::receive_scattered(sockets.queue(pair), iovecs)
            },
        }
    }

    /// Where frames of a batch come from.
    pub(super) fn source(&self) -> Source {
        match self {
            Self::Tap(_) => Source::Reads,
            Self::Packet(_) => Source::Packets,
        }
    }

    /// What frames for the driver may leave unfinished. Packet sockets know no such limit: what the
    /// driver cannot take is finished here.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_offloads(offloads),
            Self::Packet(_) => Ok(()),
        }
    }

    /// Shows the host a cable that is in or out, where the other end is ours to show.
    pub(super) fn set_carrier(&self, is_up: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_carrier(is_up),
            Self::Packet(_) => Ok(()),
        }
    }

    /// Lets the kernel put frames into this queue, or keeps it from doing so.
    pub(super) fn set_queue_attached(&self, pair: u16, attached: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_queue_attached(pair, attached),
            Self::Packet(_) => Ok(()),
        }
    }
}

/// Writes one frame: `iovecs` are header and frame, in memory that is mapped.
pub(super) fn send(queue: &OwnedFd, iovecs: &[libc::iovec]) -> io::Result<()> {
    // SAFETY: the caller's iovecs name memory that is mapped for as long as it borrows them.
    let written = unsafe {
        libc::writev(
            queue.as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as libc::c_int,
        )
    };
    usize::try_from(written)
        .map(drop)
        .map_err(|_| io::Error::last_os_error())
}
