//! Memory for frames on their way, in slots of equal size. The kernel writes to a slot, or reads
//! it, only within a call that borrows all of them.

use std::io;
use std::ptr::{self, NonNull};

/// See the module's description. Pages are taken from the system when they are first touched.
#[derive(Debug)]
pub(super) struct Slots {
    base: NonNull<u8>,
    slot_bytes: usize,
    /// From one slot to the next.
    stride_bytes: usize,
    count: usize,
}

/// Between two slots, so that their beginnings, which are used most, do not all contend for the same
/// few places of the CPU's caches. An odd number of cache lines.
const GAP_BYTES: usize = 3 * 64;

// SAFETY: the mapping is private to its owner, and any thread may use it.
unsafe impl Send for Slots {}

impl Slots {
    /// # Errors
    /// No memory.
    pub(super) fn new(count: usize, slot_bytes: usize) -> io::Result<Self> {
        let stride_bytes = slot_bytes + GAP_BYTES;
        let len_bytes = count * stride_bytes;
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("the kernel maps nothing at zero");
        Ok(Self {
            base,
            slot_bytes,
            stride_bytes,
            count,
        })
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Of each.
    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// All of it, for the kernel.
    pub(super) fn as_iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.base.as_ptr().cast(),
            iov_len: self.count * self.stride_bytes,
        }
    }

    /// Where slot `index` begins, for the kernel.
    pub(super) fn as_ptr(&self, index: usize) -> *mut u8 {
        assert!(index < self.count);
        // SAFETY: the slot is inside the mapping.
        unsafe { self.base.as_ptr().add(index * self.stride_bytes) }
    }

    pub(super) fn slot(&self, index: usize) -> &[u8] {
        // SAFETY: the slot is inside the mapping, which begins as zeroes; it is borrowed with us.
        unsafe { std::slice::from_raw_parts(self.as_ptr(index), self.slot_bytes) }
    }

    pub(super) fn slot_mut(&mut self, index: usize) -> &mut [u8] {
        // SAFETY: as above, and we are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(index), self.slot_bytes) }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and nobody borrows it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.count * self.stride_bytes) };
    }
}
