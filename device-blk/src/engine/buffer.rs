//! Memory aligned for `O_DIRECT` on any device.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A zeroed heap buffer at a page boundary.
#[derive(Debug)]
pub(crate) struct AlignedBuffer {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is owned memory without interior sharing.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared references give out only the address and the length.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Covers every alignment that disks ask for.
    pub(crate) const ALIGN_BYTES: usize = 4096;

    /// Allocates `len_bytes`, which must not be 0.
    pub(crate) fn new(len_bytes: usize) -> Self {
        assert_ne!(len_bytes, 0, "an empty buffer has no address");
        let layout = Layout::from_size_align(len_bytes, Self::ALIGN_BYTES)
            .expect("buffers are far below the address space");
        // SAFETY: the layout's size was just found not to be 0.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout));
        Self { ptr, layout }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the allocation is `layout.size()` initialised bytes, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}
