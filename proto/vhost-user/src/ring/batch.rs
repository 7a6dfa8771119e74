//! Many requests taken from a ring at once.
//!
//! A [`Batch`] is storage that its owner keeps: chains of one buffer, which is what packets are,
//! cost neither an allocation nor a count of references each. [`Ring::pop_batch`](super::Ring::pop_batch)
//! fills it, and its chains are completed in the order in which they were taken.

use std::ptr;
use std::sync::Arc;

use super::chain::{DescChain, PinnedMemory, Segment, SegmentRange};

/// Chains taken and not yet completed, oldest first.
///
/// Dropping a batch that is not [empty](Batch::is_empty) leaves its chains in flight: the driver
/// waits for them.
#[derive(Debug, Default)]
pub struct Batch {
    pub(super) chains: Vec<Taken>,
    pub(super) segments: Vec<Segment>,
    /// Chains before this one were completed.
    pub(super) next: usize,
    /// Keeps the segments mapped.
    pub(super) memory: Option<Arc<PinnedMemory>>,
}

/// One chain: its segments are a range of the batch's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) head: u16,
    pub(super) is_broken: bool,
    pub(super) first_segment: u32,
    pub(super) first_writable: u32,
    pub(super) end_segment: u32,
    pub(super) readable_len_bytes: u32,
    pub(super) writable_len_bytes: u32,
    pub(super) written_limit_bytes: u32,
}

/// A chain of a [`Batch`].
#[derive(Clone, Copy, Debug)]
pub struct BatchChain<'a> {
    readable: &'a [Segment],
    writable: &'a [Segment],
    readable_len_bytes: u32,
    writable_len_bytes: u32,
    is_broken: bool,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Chains that were taken and not completed.
    #[inline]
    pub fn len(&self) -> usize {
        self.chains.len() - self.next
    }

    /// Whether all were completed.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.next == self.chains.len()
    }

    /// The chain at `index`, counted from the first one that is not completed.
    ///
    /// # Panics
    /// When there is none.
    #[inline]
    pub fn chain(&self, index: usize) -> BatchChain<'_> {
        let taken = &self.chains[self.next + index];
        let (from, writable, end) = (
            taken.first_segment as usize,
            taken.first_writable as usize,
            taken.end_segment as usize,
        );
        BatchChain {
            readable: &self.segments[from..writable],
            writable: &self.segments[writable..end],
            readable_len_bytes: taken.readable_len_bytes,
            writable_len_bytes: taken.writable_len_bytes,
            is_broken: taken.is_broken,
        }
    }

    /// Takes over a chain that was popped by itself.
    pub(super) fn push(&mut self, chain: &DescChain) {
        let first_segment = self.segments.len() as u32;
        self.segments.extend_from_slice(&chain.segments);
        self.chains.push(Taken {
            head: chain.head,
            is_broken: chain.fault.is_some(),
            first_segment,
            first_writable: first_segment + chain.writable_from,
            end_segment: self.segments.len() as u32,
            readable_len_bytes: chain.readable_len_bytes,
            writable_len_bytes: chain.writable_len_bytes,
            written_limit_bytes: chain.written_limit_bytes,
        });
    }

    /// A chain of one buffer.
    #[inline]
    pub(super) fn push_single(&mut self, head: u16, segment: Segment, is_writable: bool) {
        let first_segment = self.segments.len() as u32;
        let len_bytes = segment.len() as u32;
        self.segments.push(segment);
        let (readable_len_bytes, writable_len_bytes, first_writable) = if is_writable {
            (0, len_bytes, first_segment)
        } else {
            (len_bytes, 0, first_segment + 1)
        };
        self.chains.push(Taken {
            head,
            is_broken: false,
            first_segment,
            first_writable,
            end_segment: first_segment + 1,
            readable_len_bytes,
            writable_len_bytes,
            written_limit_bytes: writable_len_bytes,
        });
    }

    /// Room for `max` more chains of one buffer, and the memory that they will be in. False while
    /// chains of another memory table are left.
    #[inline]
    pub(super) fn admits(&mut self, memory: &Arc<PinnedMemory>, max: usize) -> bool {
        if self.is_empty() {
            self.clear();
        }
        match &self.memory {
            Some(held) if !Arc::ptr_eq(held, memory) => return false,
            Some(_) => {}
            None => self.memory = Some(Arc::clone(memory)),
        }
        self.chains.reserve(max);
        self.segments.reserve(max);
        true
    }

    /// All chains were completed: their memory may go.
    #[inline]
    pub(super) fn clear(&mut self) {
        self.chains.clear();
        self.segments.clear();
        self.next = 0;
        self.memory = None;
    }
}

impl<'a> BatchChain<'a> {
    /// What the driver wrote for the device.
    #[inline]
    pub fn readable(&self) -> &'a [Segment] {
        self.readable
    }

    /// Where the device writes for the driver.
    #[inline]
    pub fn writable(&self) -> &'a [Segment] {
        self.writable
    }

    /// Total of [`BatchChain::readable`].
    #[inline]
    pub fn readable_len_bytes(&self) -> u32 {
        self.readable_len_bytes
    }

    /// Total of [`BatchChain::writable`].
    #[inline]
    pub fn writable_len_bytes(&self) -> u32 {
        self.writable_len_bytes
    }

    /// The driver broke it: see [`DescChain::fault`].
    pub fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// The readable bytes from `offset` on, at most `len` of them, as segments.
    pub fn readable_range(&self, offset: usize, len: usize) -> SegmentRange<'a> {
        SegmentRange::new(self.readable, offset, len)
    }

    /// The writable bytes from `offset` on, at most `len` of them, as segments.
    pub fn writable_range(&self, offset: usize, len: usize) -> SegmentRange<'a> {
        SegmentRange::new(self.writable, offset, len)
    }

    /// Copies readable bytes from `offset` on into `buf`; returns how many there were.
    #[inline]
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> usize {
        if let [segment] = self.readable
            && segment.len() >= offset + buf.len()
        {
            // SAFETY: the segment is mapped guest memory (the batch holds the mapping) and has
            // these bytes; `buf` is ours.
            unsafe {
                ptr::copy_nonoverlapping(segment.as_ptr().add(offset), buf.as_mut_ptr(), buf.len());
            }
            return buf.len();
        }
        let mut copied = 0;
        for segment in self.readable_range(offset, buf.len()) {
            // SAFETY: as above; `readable_range` yields no more bytes than `buf` has.
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

    /// The first bytes, in one piece and without a call; None when they are not all in the first buffer.
    #[inline]
    pub fn first_bytes<const N: usize>(&self) -> Option<[u8; N]> {
        let first = self.readable.first().filter(|first| first.len() >= N)?;
        // SAFETY: the segment is mapped guest memory (the batch holds the mapping) and has as many bytes.
        Some(unsafe { first.as_ptr().cast::<[u8; N]>().read_unaligned() })
    }

    /// As [`BatchChain::read_at`], of however many bytes there are.
    pub fn read_up_to(&self, offset: usize, buf: &mut [u8]) -> usize {
        let left = (self.readable_len_bytes as usize).saturating_sub(offset);
        let len = buf.len().min(left);
        self.read_at(offset, &mut buf[..len])
    }

    /// Copies `data` to the writable bytes from `offset` on; returns how many fitted.
    #[inline]
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut copied = 0;
        for segment in self.writable_range(offset, data.len()) {
            // SAFETY: the segment is mapped guest memory (the batch holds the mapping);
            // `writable_range` yields no more bytes than `data` has.
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
}

/// Asks the CPU for the cache line at `address`, to read.
#[inline]
pub(super) fn prefetch_read(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint, valid for any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks the CPU for the cache line at `address`, to write.
#[inline]
pub(super) fn prefetch_write(address: *const u8) {
    // The intrinsic asks for the line to be read where the compiler is not told that the CPU has the instruction:
    // the write then has to ask for the line again. CPUs that lack it do nothing.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint, valid for any address.
    unsafe {
        std::arch::asm!(
            "prefetchw [{address}]",
            address = in(reg) address,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
