//! The three areas of a packed ring in memory: descriptor ring, driver and device event
//! suppression (Virtio 1.2 sections 2.8.13 and 2.8.14).
//!
//! All accesses are volatile or atomic, since the driver writes the same memory concurrently, and
//! little-endian (VIRTIO_F_VERSION_1).

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
};

use super::Position;
use crate::inflight::StoredDesc;
use crate::memory::MemoryTable;
use crate::ring::walk::{Buffer, DESC_BYTES, Desc};
use crate::ring::{MAX_RING_SIZE, RingAddresses, RingError};

const F_AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const F_USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// Virtio 1.2 section 2.8.13.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct PackedDesc {
    gpa: u64,
    len_bytes: u32,
    id: u16,
    flags: u16,
}

impl PackedDesc {
    pub(super) fn id(&self) -> u16 {
        u16::from_le(self.id)
    }

    pub(super) fn is_chained(&self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }

    /// As the in-flight region keeps it.
    pub(super) fn stored(&self) -> StoredDesc {
        StoredDesc {
            id: self.id(),
            flags: u16::from_le(self.flags),
            len_bytes: u32::from_le(self.len_bytes),
            gpa: u64::from_le(self.gpa),
        }
    }

    pub(super) fn of_stored(stored: &StoredDesc) -> PackedDesc {
        PackedDesc {
            gpa: stored.gpa.to_le(),
            len_bytes: stored.len_bytes.to_le(),
            id: stored.id.to_le(),
            flags: stored.flags.to_le(),
        }
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(u16::from_le(self.flags)) & flag != 0
    }
}

impl Desc for PackedDesc {
    fn of_bytes(bytes: [u8; DESC_BYTES as usize]) -> PackedDesc {
        // SAFETY: PackedDesc is plain old data of this size.
        unsafe { std::mem::transmute::<[u8; 16], PackedDesc>(bytes) }
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

    /// Virtio 1.2 section 2.8.7: the table's entries are the chain, in their order.
    fn following(&self, index: u32, count: u32) -> Option<u32> {
        Some(index + 1).filter(|next| *next < count)
    }
}

/// Event suppression: what one side wants to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Everything,
    Nothing,
    /// When the descriptor at this position becomes available, or used.
    At(Position),
}

const WANT_EVERYTHING: u16 = 0;
const WANT_NOTHING: u16 = 1;
const WANT_DESC: u16 = 2;

/// Resolved pointers to the areas. Whoever holds this keeps the memory table they point into.
#[derive(Debug)]
pub(super) struct PackedAreas {
    descs: NonNull<PackedDesc>,
    /// Position and flags (u16 each), as the driver writes them.
    driver_event: NonNull<AtomicU16>,
    /// The same, written here.
    device_event: NonNull<AtomicU16>,
    size: u16,
}

// SAFETY: the pointers lead into mapped guest memory that the owner keeps mapped.
unsafe impl Send for PackedAreas {}

impl PackedAreas {
    pub(super) fn resolve(
        memory: &MemoryTable,
        addresses: &RingAddresses,
        size: u16,
    ) -> Result<PackedAreas, RingError> {
        if size == 0 || size > MAX_RING_SIZE {
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
        let descs_bytes = u64::from(size) * u64::from(DESC_BYTES);
        Ok(PackedAreas {
            descs: area("descriptor ring", addresses.desc, descs_bytes, 16)?.cast(),
            driver_event: area("driver event suppression", addresses.avail, 4, 4)?.cast(),
            device_event: area("device event suppression", addresses.used, 4, 4)?.cast(),
            size,
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Whether the descriptor at `at` is the device's. What was written before it may be read
    /// afterwards.
    #[inline]
    pub(super) fn is_available(&self, at: Position) -> bool {
        let flags = u16::from_le(self.flags(at.index).load(Ordering::Acquire));
        (flags & F_AVAIL != 0) == at.wrap && (flags & F_USED != 0) != at.wrap
    }

    #[inline]
    pub(super) fn desc(&self, index: u16) -> PackedDesc {
        assert!(index < self.size);
        // SAFETY: in bounds by the check above; aligned and mapped since `resolve`.
        unsafe { self.descs.add(usize::from(index)).read_volatile() }
    }

    /// Writes a used descriptor, all but its flags.
    #[inline]
    pub(super) fn write_used(&self, index: u16, id: u16, len_bytes: u32) {
        assert!(index < self.size);
        // SAFETY: in bounds by the check above; aligned and mapped since `resolve`.
        unsafe {
            let desc = self.descs.add(usize::from(index)).as_ptr();
            (&raw mut (*desc).id).write_volatile(id.to_le());
            (&raw mut (*desc).len_bytes).write_volatile(len_bytes.to_le());
        }
    }

    /// Makes a used descriptor, and all that was written before, the driver's.
    #[inline]
    pub(super) fn mark_used(&self, at: Position, has_written: bool) {
        let mut flags = if at.wrap { F_AVAIL | F_USED } else { 0 };
        if has_written {
            flags |= VRING_DESC_F_WRITE as u16;
        }
        self.flags(at.index).store(flags.to_le(), Ordering::Release);
    }

    /// Takes back [`PackedAreas::mark_used`], which nobody saw.
    pub(super) fn unmark_used(&self, at: Position) {
        let flags = u16::from_le(self.flags(at.index).load(Ordering::Relaxed));
        if (flags & F_AVAIL != 0) == at.wrap && (flags & F_USED != 0) == at.wrap {
            let taken_back = (flags ^ F_USED).to_le();
            self.flags(at.index).store(taken_back, Ordering::Release);
        }
    }

    /// What the driver wants to hear of used descriptors.
    #[inline]
    pub(super) fn driver_wants(&self, event_idx: bool) -> Wanted {
        // SAFETY: both fields of the area that `resolve` checked.
        let (position, flags) = unsafe {
            (
                self.driver_event.as_ref(),
                self.driver_event.add(1).as_ref(),
            )
        };
        let flags = u16::from_le(flags.load(Ordering::Acquire));
        match flags & 3 {
            WANT_NOTHING => Wanted::Nothing,
            WANT_DESC if event_idx => {
                let raw = u16::from_le(position.load(Ordering::Relaxed));
                Wanted::At(Position::of_raw(raw))
            }
            _ => Wanted::Everything,
        }
    }

    /// What the device wants to hear of available descriptors.
    #[inline]
    pub(super) fn set_device_wants(&self, wanted: Wanted) {
        // SAFETY: both fields of the area that `resolve` checked.
        let (position, flags) = unsafe {
            (
                self.device_event.as_ref(),
                self.device_event.add(1).as_ref(),
            )
        };
        let value = match wanted {
            Wanted::Everything => WANT_EVERYTHING,
            Wanted::Nothing => WANT_NOTHING,
            Wanted::At(at) => {
                position.store(at.raw().to_le(), Ordering::Relaxed);
                WANT_DESC
            }
        };
        flags.store(value.to_le(), Ordering::Release);
    }

    #[inline]
    fn flags(&self, index: u16) -> &AtomicU16 {
        assert!(index < self.size);
        // SAFETY: in bounds by the check above, mapped since `resolve`, and 2-byte aligned.
        unsafe {
            let desc = self.descs.add(usize::from(index)).cast::<u8>();
            desc.add(offset_of!(PackedDesc, flags)).cast().as_ref()
        }
    }
}
