//! Frames into one receive ring, from other guests' memory: one copy.

use std::ptr;

use vhost_user::ring::{Batch, BatchChain, Ring, RingError};

use super::frame::ETHERNET_LEN_BYTES;
use super::port::RingReceiver;
use crate::nic::header::{Header, MAX_HEADER_LEN_BYTES};
use crate::nic::stats::DropReason;

/// Buffers taken at once when a frame needs more than were expected.
const MORE_BUFFERS: usize = 16;

/// Bodies of so many bytes are copied in two pieces; that of the smallest frame has 46 to 50.
const SHORT_LEN_BYTES: usize = 32;
const LONGEST_SHORT_LEN_BYTES: usize = 2 * SHORT_LEN_BYTES;

/// A frame behind the bytes that the switch copied itself.
#[derive(Clone, Copy)]
pub(super) enum Body<'a> {
    /// The sender's chain from `skip_bytes` on.
    Chain {
        chain: BatchChain<'a>,
        skip_bytes: usize,
    },
    /// Bytes of ours.
    Own(&'a [u8]),
}

impl Body<'_> {
    #[inline]
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Chain { chain, skip_bytes } => chain.readable_len_bytes() as usize - skip_bytes,
            Self::Own(bytes) => bytes.len(),
        }
    }

    /// Copies bytes from `offset` on into `target`; returns how many there were.
    pub(super) fn read_at(&self, offset: usize, target: &mut [u8]) -> usize {
        let len = target.len().min(self.len().saturating_sub(offset));
        match self {
            Self::Own(bytes) => target[..len].copy_from_slice(&bytes[offset..offset + len]),
            Self::Chain { chain, skip_bytes } => {
                chain.read_at(skip_bytes + offset, &mut target[..len]);
            }
        }
        len
    }

    /// What comes after the first `len` bytes.
    pub(super) fn after(self, len: usize) -> Self {
        match self {
            Self::Own(bytes) => Self::Own(&bytes[len..]),
            Self::Chain { chain, skip_bytes } => Self::Chain {
                chain,
                skip_bytes: skip_bytes + len,
            },
        }
    }

    /// Copies all of it.
    pub(super) fn copy_into(&self, target: &mut Vec<u8>) {
        match self {
            Self::Own(bytes) => target.extend_from_slice(bytes),
            Self::Chain { .. } => {
                let filled = target.len();
                target.resize(filled + self.len(), 0);
                self.read_at(0, &mut target[filled..]);
            }
        }
    }
}

/// A receive ring that is locked for one batch.
pub(super) struct Delivery<'a> {
    receiver: &'a RingReceiver,
    ring: &'a mut Ring,
    /// Empty before and after.
    buffers: &'a mut Batch,
    error: Option<RingError>,
    packets: u64,
    bytes: u64,
}

/// What a [`Delivery`] did.
pub(super) struct Delivered {
    pub(super) packets: u64,
    pub(super) bytes: u64,
    /// The driver broke the ring.
    pub(super) error: Option<RingError>,
}

impl<'a> Delivery<'a> {
    /// For about `expected` frames.
    #[inline]
    pub(super) fn begin(
        receiver: &'a RingReceiver,
        ring: &'a mut Ring,
        buffers: &'a mut Batch,
        expected: usize,
    ) -> Self {
        let mut delivery = Self {
            receiver,
            ring,
            buffers,
            error: None,
            packets: 0,
            bytes: 0,
        };
        delivery.take_buffers(expected);
        delivery
    }

    /// Puts a frame, of `head` and `body`, into the ring.
    ///
    /// # Errors
    /// Why it is lost.
    #[inline]
    pub(super) fn put(
        &mut self,
        header: Option<&Header>,
        head: &[u8],
        body: Body<'_>,
    ) -> Result<(), DropReason> {
        let header_len_bytes = self.receiver.header_len_bytes;
        let frame_len_bytes = head.len() + body.len();
        let total_bytes = header_len_bytes + frame_len_bytes;
        if self.buffers.is_empty() && self.take_buffers(MORE_BUFFERS) == 0 {
            return Err(DropReason::NoBuffers);
        }
        let [segment] = self.buffers.chain(0).writable() else {
            return self.put_scattered(header, head, body);
        };
        if segment.len() < total_bytes {
            return self.put_scattered(header, head, body);
        }
        let header = header_bytes(header, 1);
        // SAFETY: the segment is mapped guest memory (the batch holds the mapping) of at least
        // header, head and body, which `copy_body` is told of; what is copied is ours.
        unsafe {
            let target = segment.as_ptr();
            // Usual lengths are copied without a call.
            match header_len_bytes {
                MAX_HEADER_LEN_BYTES => write_changed(target.cast(), header),
                _ => ptr::copy_nonoverlapping(header.as_ptr(), target, header_len_bytes),
            }
            let target = target.add(header_len_bytes);
            match <[u8; ETHERNET_LEN_BYTES]>::try_from(head) {
                Ok(head) => target
                    .cast::<[u8; ETHERNET_LEN_BYTES]>()
                    .write_unaligned(head),
                Err(_) => ptr::copy_nonoverlapping(head.as_ptr(), target, head.len()),
            }
            copy_body(body, target.add(head.len()));
        }
        self.ring.complete_next(self.buffers, total_bytes as u32);
        self.packets += 1;
        self.bytes += frame_len_bytes as u64;
        Ok(())
    }

    /// Gives back what was not used, and signals the driver.
    #[inline]
    pub(super) fn end(self) -> Delivered {
        self.ring.unpop_all(self.buffers);
        self.ring.notify();
        Delivered {
            packets: self.packets,
            bytes: self.bytes,
            error: self.error,
        }
    }

    /// Takes up to `count` more buffers; how many came.
    #[inline]
    fn take_buffers(&mut self, count: usize) -> usize {
        if self.error.is_some() {
            return 0;
        }
        let before = self.buffers.len();
        if let Err(error) = self.ring.pop_batch(self.buffers, count) {
            self.error = Some(error);
        }
        self.buffers.len() - before
    }

    /// A frame that does not go into the next buffer as one piece.
    fn put_scattered(
        &mut self,
        header: Option<&Header>,
        head: &[u8],
        body: Body<'_>,
    ) -> Result<(), DropReason> {
        let header_len_bytes = self.receiver.header_len_bytes;
        let frame_len_bytes = head.len() + body.len();
        let total_bytes = header_len_bytes + frame_len_bytes;
        let (mut count, mut room_bytes) = (0, 0);
        while room_bytes < total_bytes {
            if count == self.buffers.len() && self.take_buffers(MORE_BUFFERS) == 0 {
                return Err(DropReason::NoBuffers);
            }
            let chain_bytes = self.buffers.chain(count).writable_len_bytes() as usize;
            if count == 0 && chain_bytes <= header_len_bytes {
                // Nothing ever fits in there.
                self.ring.complete_next(self.buffers, 0);
                continue;
            }
            room_bytes += chain_bytes;
            count += 1;
            if room_bytes < total_bytes
                && (!self.receiver.is_mergeable || count == usize::from(u16::MAX))
            {
                return Err(DropReason::TooLong);
            }
        }
        let header = header_bytes(header, count as u16);
        let mut writer = Writer {
            buffers: self.buffers,
            chain: 0,
            offset: 0,
        };
        // SAFETY: header and head are ours.
        unsafe {
            writer.write(header.as_ptr(), header_len_bytes);
            writer.write(head.as_ptr(), head.len());
        }
        match body {
            // SAFETY: bytes of ours.
            Body::Own(bytes) => unsafe { writer.write(bytes.as_ptr(), bytes.len()) },
            Body::Chain { chain, skip_bytes } => {
                for segment in chain.readable_range(skip_bytes, usize::MAX) {
                    // SAFETY: mapped memory of the sender, whose batch holds the mapping.
                    unsafe { writer.write(segment.as_ptr(), segment.len()) };
                }
            }
        }
        let mut left_bytes = total_bytes;
        for _ in 0..count {
            let chain_bytes = self.buffers.chain(0).writable_len_bytes() as usize;
            let written_bytes = left_bytes.min(chain_bytes);
            left_bytes -= written_bytes;
            self.ring.complete_next(self.buffers, written_bytes as u32);
        }
        self.packets += 1;
        self.bytes += frame_len_bytes as u64;
        Ok(())
    }
}

/// Writes to buffers one after the other, which have room for all that is written.
struct Writer<'a> {
    buffers: &'a Batch,
    chain: usize,
    /// In that chain.
    offset: usize,
}

impl Writer<'_> {
    /// # Safety
    /// `len` bytes at `from` are mapped.
    unsafe fn write(&mut self, mut from: *const u8, len: usize) {
        let mut left = len;
        while left > 0 {
            let mut copied = 0;
            let chain = self.buffers.chain(self.chain);
            for segment in chain.writable_range(self.offset, left) {
                // SAFETY: the range has no more than `left` bytes, which the caller vouches for;
                // the target is mapped guest memory, whose mapping the batch holds. Source and
                // target may be the same memory when two drivers share it: `copy` allows that.
                unsafe {
                    ptr::copy(from, segment.as_ptr(), segment.len());
                    from = from.add(segment.len());
                }
                copied += segment.len();
            }
            left -= copied;
            self.offset += copied;
            if left > 0 {
                self.chain += 1;
                self.offset = 0;
            }
        }
    }
}

/// Copies all of `body` to `target`.
///
/// # Safety
/// There is mapped memory for as many bytes as [`Body::len`] says.
#[inline]
unsafe fn copy_body(body: Body<'_>, mut target: *mut u8) {
    match body {
        Body::Chain { chain, skip_bytes } => match chain.readable() {
            [segment] => {
                let len = segment.len() - skip_bytes;
                // SAFETY: the chain has `skip_bytes` and this many more; guests may share
                // memory with one another, which either way of copying allows.
                unsafe {
                    let from = segment.as_ptr().add(skip_bytes);
                    match len {
                        SHORT_LEN_BYTES..=LONGEST_SHORT_LEN_BYTES => copy_short(from, target, len),
                        _ => ptr::copy(from, target, len),
                    }
                }
            }
            _ => {
                for segment in chain.readable_range(skip_bytes, usize::MAX) {
                    // SAFETY: as above, piece by piece.
                    unsafe {
                        ptr::copy(segment.as_ptr(), target, segment.len());
                        target = target.add(segment.len());
                    }
                }
            }
        },
        // SAFETY: bytes of ours.
        Body::Own(bytes) => unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len())
        },
    }
}

/// Copies a short body without a call: its first and its last bytes, which overlap.
///
/// # Safety
/// `len` bytes are mapped at both ends, and `len` is from [`SHORT_LEN_BYTES`] to [`LONGEST_SHORT_LEN_BYTES`].
#[inline]
unsafe fn copy_short(from: *const u8, target: *mut u8, len: usize) {
    type Piece = [u8; SHORT_LEN_BYTES];
    // SAFETY: either piece lies within `len` bytes, and both are read before one is written.
    unsafe {
        let first = from.cast::<Piece>().read_unaligned();
        let last_at = len - SHORT_LEN_BYTES;
        let last = from.add(last_at).cast::<Piece>().read_unaligned();
        target.cast::<Piece>().write_unaligned(first);
        target.add(last_at).cast::<Piece>().write_unaligned(last);
    }
}

/// Writes a header that is not there yet. Drivers use buffers again and do not write to a line that the header
/// has for itself: as long as nobody writes to it, both CPUs have it.
///
/// # Safety
/// The header's bytes at `target` are mapped.
#[inline]
unsafe fn write_changed(
    target: *mut [u8; MAX_HEADER_LEN_BYTES],
    header: [u8; MAX_HEADER_LEN_BYTES],
) {
    // SAFETY: as the caller says.
    unsafe {
        if target.read_unaligned() != header {
            target.write_unaligned(header);
        }
    }
}

#[inline]
fn header_bytes(header: Option<&Header>, num_buffers: u16) -> [u8; MAX_HEADER_LEN_BYTES] {
    match header {
        Some(header) => *header.with_num_buffers(num_buffers).as_bytes(),
        None => {
            let [low, high] = num_buffers.to_le_bytes();
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, low, high]
        }
    }
}
