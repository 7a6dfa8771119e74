//! What a worker thread does for an image, and the memory it does it with.

use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::ptr;

/// Work that may block: see [`Image::perform`](super::Image::perform).
#[derive(Debug)]
pub(crate) enum Task<'a> {
    /// Fill `buffers` with what is stored from `offset_bytes` on.
    Read {
        offset_bytes: u64,
        buffers: Buffers<'a>,
    },
    /// Store `buffers` from `offset_bytes` on.
    Write {
        offset_bytes: u64,
        buffers: Buffers<'a>,
    },
    /// Reads zeroes from now on; `unmap` allows blocks to be given back.
    WriteZeroes {
        offset_bytes: u64,
        len_bytes: u64,
        unmap: bool,
    },
    /// The content no longer matters.
    Discard { offset_bytes: u64, len_bytes: u64 },
    /// What was completed before is on stable storage afterwards.
    Flush,
}

/// A task that outlives the call that hands it over; its memory stays valid until it is complete.
pub(crate) trait PendingTask: Send {
    fn task(&self) -> Task<'_>;

    /// Nobody waits for it any more, which stays so: the sooner it ends, the better.
    fn is_abandoned(&self) -> bool;

    /// Whoever took it calls this, on whatever thread; the error is a number. One that is dropped
    /// instead has failed.
    fn complete(self: Box<Self>, result: Result<(), i32>);
}

/// Works on tasks with threads of its own: see [`Image::executor`](super::Image::executor).
pub(crate) trait Executor {
    /// Takes a task over. Does not block.
    fn begin(&self, pending: Box<dyn PendingTask>);

    /// Completes tasks that [are abandoned](PendingTask::is_abandoned), as far as it is certain
    /// that they are not carried out later. Does not block.
    fn release_abandoned(&self);
}

/// Memory of a task: a guest's, which it may change at any time, or a buffer of ours. Never a
/// `&[u8]`.
///
/// Aligned as [`Image::direct`](super::Image::direct) demands. Several vectors, of any number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers<'a> {
    iovecs: *const libc::iovec,
    num_iovecs: usize,
    _memory: PhantomData<&'a [libc::iovec]>,
}

impl<'a> Buffers<'a> {
    /// # Safety
    /// What the vectors name is readable and writable memory for `'a`, and not referenced as Rust
    /// values meanwhile.
    pub(crate) unsafe fn new(iovecs: &'a [libc::iovec]) -> Self {
        Self {
            iovecs: iovecs.as_ptr(),
            num_iovecs: iovecs.len(),
            _memory: PhantomData,
        }
    }

    /// A buffer of ours.
    pub(crate) fn of_iovec(iovec: &'a mut OwnIovec<'_>) -> Self {
        // SAFETY: `OwnIovec` borrows its bytes mutably for longer than `'a`.
        unsafe { Self::new(std::slice::from_ref(&iovec.iovec)) }
    }

    pub(crate) fn iovecs(&self) -> &'a [libc::iovec] {
        // SAFETY: made from a slice that lives for `'a`.
        unsafe { std::slice::from_raw_parts(self.iovecs, self.num_iovecs) }
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.iovecs().iter().map(|iovec| iovec.iov_len).sum()
    }

    /// Copies `data` to the bytes from `at` on; returns how many fitted.
    pub(crate) fn write_at(&self, at: usize, data: &[u8]) -> usize {
        self.each(at, data.len(), |memory, done, len_bytes| {
            // SAFETY: `memory` is valid for `len_bytes` by `new`'s contract; `done + len_bytes`
            // is at most the length of `data`.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr().add(done), memory, len_bytes) };
        })
    }

    /// Copies the bytes from `at` on to `into`; returns how many there were.
    pub(crate) fn read_at(&self, at: usize, into: &mut [u8]) -> usize {
        let target = into.as_mut_ptr();
        self.each(at, into.len(), |memory, done, len_bytes| {
            // SAFETY: `memory` is valid for `len_bytes` by `new`'s contract; `done + len_bytes`
            // is at most the length of `into`.
            unsafe { ptr::copy_nonoverlapping(memory, target.add(done), len_bytes) };
        })
    }

    /// Fills at most `len_bytes` from `at` on with zeroes; returns how many there were.
    pub(crate) fn zero_at(&self, at: usize, len_bytes: usize) -> usize {
        self.each(at, len_bytes, |memory, _, len_bytes| {
            // SAFETY: `memory` is valid for `len_bytes` by `new`'s contract.
            unsafe { ptr::write_bytes(memory, 0, len_bytes) };
        })
    }

    /// The part from `at` on, of `len_bytes` at most, as vectors for `preadv` and `pwritev`.
    pub(crate) fn part(&self, at: usize, len_bytes: usize) -> Vec<libc::iovec> {
        let mut part = Vec::new();
        self.each(at, len_bytes, |memory, _, len_bytes| {
            part.push(libc::iovec {
                iov_base: memory.cast(),
                iov_len: len_bytes,
            });
        });
        part
    }

    /// Reads all of it from `fd` at `offset_bytes`, or up to the file's end: returns how much.
    ///
    /// # Errors
    /// The error number.
    pub(crate) fn read_from(&self, fd: RawFd, offset_bytes: u64) -> Result<usize, i32> {
        self.transfer(offset_bytes, |iovecs, offset| {
            // SAFETY: the vectors name valid memory by `new`'s contract, at most UIO_MAXIOV of
            // them.
            unsafe { libc::preadv(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int, offset) }
        })
    }

    /// Writes all of it to `fd` at `offset_bytes`: returns how much, which is less than all only
    /// when the file takes no more.
    ///
    /// # Errors
    /// The error number.
    pub(crate) fn write_to(&self, fd: RawFd, offset_bytes: u64) -> Result<usize, i32> {
        self.transfer(offset_bytes, |iovecs, offset| {
            // SAFETY: the vectors name valid memory by `new`'s contract, at most UIO_MAXIOV of
            // them.
            unsafe { libc::pwritev(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int, offset) }
        })
    }

    fn transfer(
        &self,
        offset_bytes: u64,
        mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
    ) -> Result<usize, i32> {
        /// `UIO_MAXIOV`.
        const MAX_IOVECS: usize = 1024;
        let len_bytes = self.len_bytes();
        let mut done = 0;
        while done < len_bytes {
            let part = self.part(done, len_bytes - done);
            let offset =
                libc::off_t::try_from(offset_bytes + done as u64).map_err(|_| libc::EFBIG)?;
            let moved = call(&part[..part.len().min(MAX_IOVECS)], offset);
            match usize::try_from(moved) {
                Ok(0) => break,
                Ok(moved) => done += moved,
                Err(_) => match std::io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => {}
                    errno => return Err(errno.unwrap_or(libc::EIO)),
                },
            }
        }
        Ok(done)
    }

    fn each(&self, at: usize, len_bytes: usize, mut f: impl FnMut(*mut u8, usize, usize)) -> usize {
        let (mut skip, mut done) = (at, 0);
        for iovec in self.iovecs() {
            if done == len_bytes {
                break;
            }
            if skip >= iovec.iov_len {
                skip -= iovec.iov_len;
                continue;
            }
            let len = (iovec.iov_len - skip).min(len_bytes - done);
            // SAFETY: `skip` is below the vector's length.
            f(unsafe { iovec.iov_base.cast::<u8>().add(skip) }, done, len);
            skip = 0;
            done += len;
        }
        done
    }
}

/// A byte slice as memory for a task.
#[derive(Debug)]
pub(crate) struct OwnIovec<'a> {
    iovec: libc::iovec,
    _bytes: PhantomData<&'a mut [u8]>,
}

impl<'a> OwnIovec<'a> {
    pub(crate) fn new(bytes: &'a mut [u8]) -> Self {
        Self {
            iovec: libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            },
            _bytes: PhantomData,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_cross_the_borders_of_vectors() {
        let (mut a, mut b) = ([1u8; 3], [2u8; 5]);
        let iovecs = [
            libc::iovec {
                iov_base: a.as_mut_ptr().cast(),
                iov_len: 3,
            },
            libc::iovec {
                iov_base: b.as_mut_ptr().cast(),
                iov_len: 5,
            },
        ];
        // SAFETY: the arrays outlive the buffers and are not touched meanwhile.
        let buffers = unsafe { Buffers::new(&iovecs) };
        assert_eq!(buffers.len_bytes(), 8);
        assert_eq!(buffers.write_at(2, &[7, 8, 9]), 3);
        assert_eq!(buffers.zero_at(6, 100), 2);
        let mut all = [0xff; 10];
        assert_eq!(buffers.read_at(0, &mut all), 8);
        assert_eq!(all, [1, 1, 7, 8, 9, 2, 0, 0, 0xff, 0xff]);
        let part = buffers.part(1, 4);
        let lens: Vec<_> = part.iter().map(|iovec| iovec.iov_len).collect();
        assert_eq!(lens, [2, 2]);
    }

    #[test]
    fn file_that_ends_early_yields_what_it_has() {
        use std::io::Write;
        use std::os::fd::AsRawFd;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[5; 700]).unwrap();
        let mut bytes = [0; 1024];
        let mut own = OwnIovec::new(&mut bytes);
        let read = Buffers::of_iovec(&mut own).read_from(file.as_raw_fd(), 200);
        assert_eq!(read, Ok(500));
        assert!(bytes[..500].iter().all(|&byte| byte == 5));
    }
}
