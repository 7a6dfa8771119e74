//! One request of the driver: the buffers of a descriptor chain, validated and resolved.
//!
//! A [`DescChain`] is made by [`Ring::pop`](super::Ring::pop) and consumed by
//! [`Ring::complete`](super::Ring::complete). Its [`Segment`]s point into guest memory, which the
//! guest may change at any time: copy out once, validate the copy, never read again.

use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use smallvec::SmallVec;

use super::fault::ChainFault;
use crate::memory::MemoryTable;

/// Chains up to this many segments need no allocation.
const INLINE_SEGMENTS: usize = 8;

pub(super) type SegmentVec = SmallVec<[Segment; INLINE_SEGMENTS]>;

/// Contiguous bytes of guest memory inside one mapped region. Never a `&[u8]`.
///
/// Layout-compatible with `struct iovec`: see [`Segment::as_iovecs`].
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; whoever dereferences it holds the chain, which
// keeps the memory mapped.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    pub(crate) fn new(host: NonNull<u8>, len_bytes: usize) -> Segment {
        Segment(libc::iovec {
            iov_base: host.as_ptr().cast(),
            iov_len: len_bytes,
        })
    }

    /// First byte. Valid as long as the chain that this segment came from.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Bytes in the segment.
    #[expect(clippy::len_without_is_empty, reason = "a segment is never empty")]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The segments as `preadv`, `pwritev` and io_uring take them.
    pub fn as_iovecs(segments: &[Segment]) -> &[libc::iovec] {
        // SAFETY: Segment is a transparent wrapper of iovec.
        unsafe { std::slice::from_raw_parts(segments.as_ptr().cast(), segments.len()) }
    }

    /// This segment without its first `skip` bytes and at most `len` long; None when empty.
    pub(super) fn slice(&self, skip: usize, len: usize) -> Option<Segment> {
        let len = len.min(self.len().checked_sub(skip)?);
        // SAFETY: `skip` is at most the segment's length, so the result stays inside it.
        let host = unsafe { NonNull::new_unchecked(self.as_ptr().add(skip)) };
        (len > 0).then(|| Segment::new(host, len))
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.as_ptr(), self.len())
    }
}

/// A descriptor chain: first the bytes the device reads, then those it writes.
///
/// A chain that the driver broke (see [`DescChain::fault`]) has nothing to read, and no more to
/// write than the last writable byte: a handler that answers requests which are too short answers
/// these as well.
///
/// Dropping a chain without completing it leaves it in flight: the driver waits for it, and the
/// next session resubmits it.
#[derive(Debug)]
#[must_use = "a chain that is not completed stays in flight"]
pub struct DescChain {
    pub(super) head: u16,
    /// Index of the first writable segment.
    pub(super) writable_from: u32,
    pub(super) readable_len_bytes: u32,
    pub(super) writable_len_bytes: u32,
    /// No more was written from the first writable byte on.
    pub(super) written_limit_bytes: u32,
    pub(super) fault: Option<Box<ChainFault>>,
    pub(super) segments: SegmentVec,
    /// Keeps the segments mapped, whatever becomes of ring and session.
    pub(super) memory: Arc<PinnedMemory>,
}

/// One ring's handle on the memory table. Each ring has its own, so that counting references per
/// request does not bounce a cache line between queues.
#[derive(Debug)]
pub(super) struct PinnedMemory {
    pub(super) table: Arc<MemoryTable>,
}

impl DescChain {
    /// What identifies the chain while it is in flight: the index of its first descriptor, or of
    /// its first entry in a packed ring's in-flight region.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What is wrong with the chain, if anything is. The ring says so in the log.
    pub fn fault(&self) -> Option<&ChainFault> {
        self.fault.as_deref()
    }

    /// What the driver wrote for the device.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.writable_from as usize]
    }

    /// Where the device writes for the driver.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.writable_from as usize..]
    }

    /// Total of [`DescChain::readable`].
    pub fn readable_len_bytes(&self) -> u32 {
        self.readable_len_bytes
    }

    /// Total of [`DescChain::writable`].
    pub fn writable_len_bytes(&self) -> u32 {
        self.writable_len_bytes
    }

    /// The readable bytes from `offset` on, at most `len` of them, as segments.
    pub fn readable_range(&self, offset: usize, len: usize) -> SegmentRange<'_> {
        SegmentRange {
            segments: self.readable(),
            skip: offset,
            left: len,
        }
    }

    /// The writable bytes from `offset` on, at most `len` of them, as segments.
    pub fn writable_range(&self, offset: usize, len: usize) -> SegmentRange<'_> {
        SegmentRange {
            segments: self.writable(),
            skip: offset,
            left: len,
        }
    }

    /// Copies readable bytes from `offset` on into `buf`; returns how many there were.
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> usize {
        let mut copied = 0;
        for segment in self.readable_range(offset, buf.len()) {
            // SAFETY: the segment is mapped guest memory of this length (the chain holds the
            // mapping); `readable_range` yields no more bytes than `buf` has.
            unsafe {
                ptr::copy_nonoverlapping(
                    segment.as_ptr(),
                    buf.as_mut_ptr().add(copied),
                    segment.len(),
                );
            }
            copied += segment.len();
        }
        copied
    }

    /// Copies `data` to the writable bytes from `offset` on; returns how many fitted.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut copied = 0;
        for segment in self.writable_range(offset, data.len()) {
            // SAFETY: the segment is mapped guest memory of this length (the chain holds the
            // mapping); `writable_range` yields no more bytes than `data` has.
            unsafe {
                ptr::copy_nonoverlapping(
                    data.as_ptr().add(copied),
                    segment.as_ptr(),
                    segment.len(),
                );
            }
            copied += segment.len();
        }
        copied
    }

    /// Fills the writable bytes from `offset` on with zeroes, at most `len` of them; returns how
    /// many there were.
    pub fn zero_at(&self, offset: usize, len: usize) -> usize {
        let mut zeroed = 0;
        for segment in self.writable_range(offset, len) {
            // SAFETY: as in `write_at`.
            unsafe { ptr::write_bytes(segment.as_ptr(), 0, segment.len()) };
            zeroed += segment.len();
        }
        zeroed
    }

    /// Keeps the segments mapped for I/O that outlives the chain (a request the kernel still
    /// works on when its ring is torn down).
    pub fn pin(&self) -> MemoryPin {
        MemoryPin(Arc::clone(&self.memory))
    }
}

/// Keeps a chain's memory mapped while it is held: see [`DescChain::pin`].
#[derive(Clone, Debug)]
pub struct MemoryPin(#[expect(dead_code, reason = "held for its drop")] Arc<PinnedMemory>);

/// Segments of part of a chain: see [`DescChain::readable_range`].
#[derive(Clone, Debug)]
pub struct SegmentRange<'a> {
    segments: &'a [Segment],
    skip: usize,
    left: usize,
}

impl<'a> SegmentRange<'a> {
    /// The bytes of `segments` from `offset` on, at most `len` of them.
    #[inline]
    pub(super) fn new(segments: &'a [Segment], offset: usize, len: usize) -> SegmentRange<'a> {
        SegmentRange {
            segments,
            skip: offset,
            left: len,
        }
    }
}

impl Iterator for SegmentRange<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        loop {
            let (first, rest) = self.segments.split_first()?;
            self.segments = rest;
            if self.skip >= first.len() {
                self.skip -= first.len();
                continue;
            }
            let part = first.slice(std::mem::take(&mut self.skip), self.left)?;
            self.left -= part.len();
            return Some(part);
        }
    }
}
