//! Memory that a frontend and its backends share: one sealed memfd, mapped.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostUserMemoryRegionInfo;

/// The memory of a guest. Its addresses here serve as the guest's own, as `virtio-driver` has it.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    len_bytes: usize,
    file: File,
}

// SAFETY: only a pointer to a shared mapping, which is used by raw pointers and atomics alone.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len_bytes` of zeroes, all of it there: what counts is what a backend touches.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub fn new(len_bytes: usize) -> io::Result<Self> {
        let len = NonZeroUsize::new(len_bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"guest-memory", flags)?);
        file.set_len(len_bytes as u64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces none.
        let start = unsafe { mmap(None, len, access, flags, &file, 0)? }.cast();
        Ok(Self {
            start,
            len_bytes,
            file,
        })
    }

    /// Bytes in all.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The file behind it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// As SET_MEM_TABLE describes it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.start.as_ptr() as u64,
            memory_size: self.len_bytes as u64,
            userspace_addr: self.start.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The byte at `offset`.
    ///
    /// # Panics
    /// When `len` bytes from there are not inside.
    pub fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.len_bytes),
            "{len} bytes at {offset} are outside of the guest's memory"
        );
        self.start.as_ptr().wrapping_add(offset)
    }

    /// Copies `data` there; for a place that no request in flight uses.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let place = self.at(offset, data.len());
        // SAFETY: `at` checked the range, and `data` is a slice of ordinary memory elsewhere.
        unsafe { place.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    }

    /// Copies what is there into `data`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let place = self.at(offset, data.len());
        // SAFETY: `at` checked the range, and `data` is a slice of ordinary memory elsewhere.
        unsafe { place.copy_to_nonoverlapping(data.as_mut_ptr(), data.len()) };
    }

    /// Reads a field of a ring at an address inside.
    ///
    /// # Panics
    /// When it is not inside or odd.
    pub fn load_u16(&self, address: usize) -> u16 {
        let offset = address.wrapping_sub(self.start.as_ptr() as usize);
        let place = self.at(offset, 2).cast::<u16>();
        assert!(place.is_aligned(), "a ring's fields are aligned");
        // SAFETY: two mapped bytes at an even address; everybody uses them as atomics.
        unsafe { AtomicU16::from_ptr(place) }.load(Ordering::Acquire)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; only raw pointers were given out.
        let unmapped = unsafe { munmap(self.start.cast(), self.len_bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
