//! The three areas of a split ring in memory: descriptor table, available ring, used ring.
//!
//! All accesses are volatile or atomic, since the driver writes the same memory concurrently, and
//! little-endian (VIRTIO_F_VERSION_1).

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::memory::MemoryTable;
use crate::ring::batch::prefetch_read;
use crate::ring::chain::Segment;
use crate::ring::walk::{Buffer, DESC_BYTES, Desc, Walk};
use crate::ring::{ChainFault, MAX_RING_SIZE, RingAddresses, RingError};

/// Virtio 1.2 section 2.7.5.
#[derive(Clone, Copy)]
#[repr(C)]
struct SplitDesc {
    gpa: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

impl SplitDesc {
    fn next(&self) -> Option<u16> {
        self.has(VRING_DESC_F_NEXT)
            .then_some(u16::from_le(self.next))
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(u16::from_le(self.flags)) & flag != 0
    }
}

impl Desc for SplitDesc {
    fn of_bytes(bytes: [u8; DESC_BYTES as usize]) -> SplitDesc {
        // SAFETY: SplitDesc is plain old data of this size.
        unsafe { std::mem::transmute::<[u8; 16], SplitDesc>(bytes) }
    }

    fn buffer(&self) -> Buffer {
        Buffer {
            gpa: u64::from_le(self.gpa),
            len_bytes: u32::from_le(self.len_bytes),
            is_writable: self.has(VRING_DESC_F_WRITE),
        }
    }

    fn is_indirect(&self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }

    fn following(&self, _index: u32, _count: u32) -> Option<u32> {
        self.next().map(u32::from)
    }
}

/// Resolved pointers to the areas. Whoever holds this keeps the memory table they point into.
#[derive(Debug)]
pub(super) struct SplitAreas {
    desc: NonNull<SplitDesc>,
    /// flags, idx, ring[size], used_event
    avail: NonNull<u16>,
    /// flags, idx (u16 each), ring[size] of {id, len} (u32 each), avail_event
    used: NonNull<u8>,
    size: u16,
}

// SAFETY: the pointers lead into mapped guest memory that the owner keeps mapped.
unsafe impl Send for SplitAreas {}

const USED_RING_OFFSET_BYTES: usize = 4;
const USED_ELEM_BYTES: usize = 8;

impl SplitAreas {
    pub(super) fn resolve(
        memory: &MemoryTable,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<SplitAreas, RingError> {
        if !size.is_power_of_two() || size > MAX_RING_SIZE {
            return Err(RingError::BadSize {
                size: u32::from(size),
            });
        }
        let area = |area: &'static str, user_addr: u64, len_bytes: u64, align_bytes: usize| {
            memory
                .translate_user(user_addr, len_bytes)
                .filter(|host| (host.as_ptr() as usize).is_multiple_of(align_bytes))
                .ok_or(RingError::BadArea { area, user_addr })
        };
        let entries = u64::from(size);
        Ok(SplitAreas {
            desc: area("descriptor table", addresses.desc, entries * 16, 16)?.cast(),
            avail: area("available ring", addresses.avail, entries * 2 + 6, 2)?.cast(),
            used: area("used ring", addresses.used, entries * 8 + 6, 4)?,
            size,
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// `index` must be below the size.
    #[inline]
    fn desc(&self, index: u16) -> SplitDesc {
        assert!(index < self.size);
        // SAFETY: in bounds by the check above; aligned and mapped since `resolve`.
        unsafe { self.desc.add(usize::from(index)).read_volatile() }
    }

    /// Asks for the cache line of a descriptor; an index that is none asks for nothing of use.
    #[inline]
    pub(super) fn prefetch_desc(&self, index: u16) {
        prefetch_read(self.desc.as_ptr().wrapping_add(usize::from(index)).cast());
    }

    /// The only buffer of the chain at `head`, and whether it is writable. None for any other kind
    /// of chain, sound or not. `head` must be below the size.
    #[inline]
    pub(super) fn single(
        &self,
        head: u16,
        table: &MemoryTable,
        region_hint: &mut usize,
    ) -> Option<(Segment, bool)> {
        let desc = self.desc(head);
        if desc.has(VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT) {
            return None;
        }
        let Buffer {
            gpa,
            len_bytes,
            is_writable,
        } = desc.buffer();
        let (host, following_bytes) = table.translate(gpa, region_hint)?;
        let fits = len_bytes > 0 && u64::from(len_bytes) <= following_bytes;
        fits.then(|| (Segment::new(host, len_bytes as usize), is_writable))
    }

    /// Follows the chain at `head`, which must be below the size.
    #[inline]
    pub(super) fn walk(&self, head: u16, indirect_desc: bool, walk: &mut Walk<'_>) {
        let mut index = head;
        for _ in 0..self.size {
            let desc = self.desc(index);
            if desc.is_indirect() {
                let reason = match (indirect_desc, desc.next()) {
                    (true, None) => return walk.indirect::<SplitDesc>(desc.buffer()),
                    (true, Some(_)) => "descriptor is both indirect and chained",
                    (false, _) => "indirect descriptor, but the feature was not negotiated",
                };
                return walk.cut(ChainFault::BadIndirect { reason });
            }
            walk.add(desc.buffer());
            let Some(next) = desc.next() else {
                return;
            };
            if next >= self.size {
                return walk.cut(ChainFault::BadNext { next });
            }
            index = next;
        }
        walk.cut(ChainFault::Loop);
    }

    #[inline]
    pub(super) fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail_field(0).load(Ordering::Relaxed))
    }

    /// Entries before this index may be read afterwards.
    #[inline]
    pub(super) fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail_field(1).load(Ordering::Acquire))
    }

    #[inline]
    pub(super) fn avail_entry(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.size - 1));
        u16::from_le(self.avail_field(2 + slot).load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn used_event(&self) -> u16 {
        u16::from_le(
            self.avail_field(2 + usize::from(self.size))
                .load(Ordering::Relaxed),
        )
    }

    #[inline]
    pub(super) fn used_flags(&self) -> u16 {
        u16::from_le(self.used_field(0).load(Ordering::Relaxed))
    }

    pub(super) fn set_used_flags(&self, flags: u16) {
        self.used_field(0).store(flags.to_le(), Ordering::Relaxed);
    }

    pub(super) fn used_idx(&self) -> u16 {
        u16::from_le(self.used_field(2).load(Ordering::Acquire))
    }

    /// Used elements written before become the driver's.
    #[inline]
    pub(super) fn set_used_idx(&self, used_idx: u16) {
        self.used_field(2)
            .store(used_idx.to_le(), Ordering::Release);
    }

    #[inline]
    pub(super) fn set_avail_event(&self, avail_event: u16) {
        let offset = USED_RING_OFFSET_BYTES + usize::from(self.size) * USED_ELEM_BYTES;
        self.used_field(offset)
            .store(avail_event.to_le(), Ordering::Relaxed);
    }

    /// Writes what is not there yet: drivers use descriptors in the same order again and again, and a cache line
    /// that nobody writes to does not travel.
    #[inline]
    pub(super) fn write_used(&self, index: u16, head: u16, len_bytes: u32) {
        let slot = usize::from(index & (self.size - 1));
        // SAFETY: `slot` is below the size, so the element is in the area that `resolve` checked;
        // the area is 4-byte aligned.
        unsafe {
            let elem = self
                .used
                .add(USED_RING_OFFSET_BYTES + slot * USED_ELEM_BYTES)
                .cast::<u32>();
            let [id, len] = [u32::from(head), len_bytes].map(u32::to_le);
            if elem.read_volatile() != id {
                elem.write_volatile(id);
            }
            if elem.add(1).read_volatile() != len {
                elem.add(1).write_volatile(len);
            }
        }
    }

    #[inline]
    fn avail_field(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < usize::from(self.size) + 3);
        // SAFETY: all callers name one of the size + 3 fields that `resolve` checked.
        unsafe { self.avail.add(index).cast().as_ref() }
    }

    #[inline]
    fn used_field(&self, offset_bytes: usize) -> &AtomicU16 {
        debug_assert!(offset_bytes < usize::from(self.size) * USED_ELEM_BYTES + 6);
        // SAFETY: callers name flags, idx or avail_event, at even offsets of the area that
        // `resolve` checked, which is 4-byte aligned.
        unsafe { self.used.add(offset_bytes).cast().as_ref() }
    }
}
