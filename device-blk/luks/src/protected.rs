//! Memory for secrets: pages of their own that no core file contains, that are not swapped out
//! as far as the memory lock limit allows, and that are overwritten before they are given back.

use std::io;
use std::ops::Deref;
use std::ptr::NonNull;

use zeroize::Zeroize;

/// Zeroed pages.
pub(crate) struct Pages {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the pages belong to this value alone and are plain memory.
unsafe impl Send for Pages {}
// SAFETY: shared references only read.
unsafe impl Sync for Pages {}

impl Pages {
    /// # Errors
    /// There is no memory.
    pub(crate) fn new(len_bytes: usize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping where the kernel likes it replaces nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let start = match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => start,
            _ => return Err(io::Error::last_os_error()),
        };
        let pages = Self { start, len_bytes };
        // SAFETY: exactly the mapping that was just made.
        if unsafe { libc::madvise(start.as_ptr().cast(), len_bytes, libc::MADV_DONTDUMP) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: exactly the mapping that was just made. Locking fails where the limit is low;
        // the secret is then as safe as the swap is.
        let _ = unsafe { libc::mlock2(start.as_ptr().cast(), len_bytes, libc::MLOCK_ONFAULT) };
        Ok(pages)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped and initialised by the kernel for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len_bytes) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len_bytes) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping of `new`, of which no reference is left. The kernel clears
        // pages before anybody gets them again.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// A value that lives in such pages.
pub(crate) struct Protected<T> {
    pages: Pages,
    value: NonNull<T>,
}

// SAFETY: it owns its value, as a box does.
unsafe impl<T: Send> Send for Protected<T> {}
// SAFETY: shared references to it give shared references to the value and nothing else.
unsafe impl<T: Sync> Sync for Protected<T> {}

impl<T> Protected<T> {
    /// # Errors
    /// There is no memory.
    pub(crate) fn new(value: T) -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 4096) };
        let pages = Pages::new(size_of::<T>().max(1))?;
        let place = pages.start.cast::<T>();
        // SAFETY: the pages are long enough, page-aligned and not in use.
        unsafe { place.write(value) };
        Ok(Self {
            pages,
            value: place,
        })
    }
}

impl<T> Deref for Protected<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: written by `new` and dropped by `drop` alone.
        unsafe { self.value.as_ref() }
    }
}

impl<T> Drop for Protected<T> {
    fn drop(&mut self) {
        // SAFETY: written by `new`, and nobody can use it after this.
        unsafe { self.value.drop_in_place() };
        self.pages.as_mut_slice().zeroize();
    }
}

/// Overwrites the stack below the caller, where functions that it called left copies of secrets:
/// moved values, and the buffers of hash functions.
#[inline(never)]
pub(crate) fn wipe_stack() {
    // More than key derivation and key expansion use.
    let mut below = [0_u8; 32 << 10];
    std::hint::black_box(&mut below).zeroize();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_left_out_of_core_files() {
        let secret = Protected::new([7_u8; 64]).unwrap();
        assert_eq!(*secret, [7; 64]);
        let start = format!("{:x}-", secret.pages.start.as_ptr() as usize);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines
            .find(|line| line.starts_with("VmFlags:"))
            .expect("the mapping is listed");
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
    }

    #[test]
    fn values_are_dropped_once() {
        let counted = std::rc::Rc::new(());
        drop(Protected::new(std::rc::Rc::clone(&counted)).unwrap());
        assert_eq!(std::rc::Rc::strong_count(&counted), 1);
    }
}
