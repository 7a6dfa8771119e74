//! Memory for requests' data that a daemon can map too.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A mapped memfd, cut into one slot a request in flight.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    len_bytes: usize,
    slot_bytes: usize,
    fd: OwnedFd,
}

impl Buffer {
    /// `slots` slots of `slot_bytes` each, filled with what neither compresses nor is zero.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub fn new(slots: usize, slot_bytes: usize) -> io::Result<Self> {
        let len_bytes = slots
            .checked_mul(slot_bytes)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let fd = memfd_create(c"bench-data", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&fd, i64::try_from(len_bytes.get()).unwrap_or(i64::MAX))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces none.
        let start = unsafe { mmap(None, len_bytes, access, flags, &fd, 0)? }.cast::<u8>();
        let len_bytes = len_bytes.get();
        let buffer = Self {
            start,
            len_bytes,
            slot_bytes,
            fd,
        };
        buffer.fill();
        Ok(buffer)
    }

    /// Where slot `index` starts.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn slot(&self, index: usize) -> *mut u8 {
        let at = index * self.slot_bytes;
        assert!(at < self.len_bytes, "no slot {index}");
        self.start.as_ptr().wrapping_add(at)
    }

    /// Bytes in a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// The first slot's address.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Bytes in all slots.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The memfd.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn fill(&self) {
        for (index, at) in (0..self.len_bytes & !7).step_by(8).enumerate() {
            let word = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let place = self.start.as_ptr().wrapping_add(at).cast::<u64>();
            // SAFETY: eight bytes at a multiple of eight inside the mapping, which is page
            // aligned and which nobody else has yet.
            unsafe { place.write(word) };
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and `self` gave out raw pointers only.
        let unmapped = unsafe { munmap(self.start.cast(), self.len_bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_lie_side_by_side_and_hold_data() {
        let buffer = Buffer::new(4, 4096).unwrap();
        assert_eq!(buffer.slot(3) as usize, buffer.address() + 3 * 4096);
        // SAFETY: inside the mapping, and nobody writes it.
        let last = unsafe { buffer.slot(3).add(4088).cast::<u64>().read() };
        assert_ne!(last, 0);
    }
}
