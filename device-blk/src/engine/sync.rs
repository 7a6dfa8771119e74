//! I/O without a ring, where it does not wait.
//!
//! In memory a system call that copies is faster than a request through io_uring, by half. On a
//! medium it is slower by far, as the thread waits. So: files in memory always; files in the page
//! cache as long as it has what is read; direct I/O never.

use std::os::fd::RawFd;

use super::job::Backing;
use crate::image::Access;

/// Reads that the page cache answers in a row until it is trusted fully.
const MAX_TRUST: u32 = 16;
/// A cache that has nothing is asked again after so many reads.
const DISTRUSTED_READS: u32 = 64;

/// Whether the page cache has what is read, by experience.
#[derive(Debug)]
pub(super) struct Nowait {
    trust: u32,
    /// Reads to let pass before the next trial.
    let_pass: u32,
    is_supported: bool,
}

impl Default for Nowait {
    fn default() -> Self {
        Self {
            trust: 1,
            let_pass: 0,
            is_supported: true,
        }
    }
}

impl Nowait {
    fn is_worth_it(&mut self) -> bool {
        if !self.is_supported {
            return false;
        }
        if self.trust > 0 {
            return true;
        }
        match self.let_pass {
            0 => true,
            _ => {
                self.let_pass -= 1;
                false
            }
        }
    }

    fn note(&mut self, hit: bool) {
        if hit {
            self.trust = (self.trust + 1).min(MAX_TRUST);
        } else {
            // Two misses weigh as much as all the trust there can be.
            self.trust = self.trust.saturating_sub(MAX_TRUST / 2);
            self.let_pass = DISTRUSTED_READS;
        }
    }
}

/// The result of the transfer as io_uring has it, or `None` when it is io_uring's.
#[inline]
pub(super) fn try_now(
    access: Access,
    fd: RawFd,
    offset_bytes: u64,
    iovecs: &[libc::iovec],
    backing: &mut Backing<'_>,
) -> Option<i32> {
    if backing.served.is_in_memory {
        return Some(transfer(access, fd, offset_bytes, iovecs, 0));
    }
    let may_hit = access == Access::Read && backing.served.direct.is_none();
    if !may_hit || !backing.nowait.is_worth_it() {
        return None;
    }
    let result = transfer(access, fd, offset_bytes, iovecs, libc::RWF_NOWAIT);
    backing.nowait.note(result > 0);
    backing.nowait.is_supported = result != -libc::EOPNOTSUPP;
    // Nothing at all may be the end of the file, which io_uring will say too.
    (result > 0).then_some(result)
}

fn transfer(
    access: Access,
    fd: RawFd,
    offset_bytes: u64,
    iovecs: &[libc::iovec],
    flags: i32,
) -> i32 {
    let Ok(offset) = libc::off_t::try_from(offset_bytes) else {
        return -libc::EFBIG;
    };
    let (first, count) = (iovecs.as_ptr(), iovecs.len() as libc::c_int);
    // SAFETY: the vectors name guest memory that the job's chain keeps mapped.
    let moved = unsafe {
        match (access, iovecs) {
            (Access::Read, [one]) if flags == 0 => {
                libc::pread(fd, one.iov_base, one.iov_len, offset)
            }
            (Access::Write, [one]) if flags == 0 => {
                libc::pwrite(fd, one.iov_base, one.iov_len, offset)
            }
            (Access::Read, _) => libc::preadv2(fd, first, count, offset, flags),
            (Access::Write, _) => libc::pwritev2(fd, first, count, offset, flags),
        }
    };
    match moved {
        // At most MAX_RW_COUNT, which is less than 2 GiB.
        0.. => moved as i32,
        _ => -std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_that_misses_is_asked_rarely_and_trusted_again_when_it_hits() {
        let mut nowait = Nowait::default();
        assert!(nowait.is_worth_it());
        nowait.note(false);
        let asked = (0..DISTRUSTED_READS).filter(|_| nowait.is_worth_it());
        assert_eq!(asked.count(), 0);
        assert!(nowait.is_worth_it(), "a trial");
        nowait.note(true);
        assert!(nowait.is_worth_it());
        assert!(nowait.is_worth_it());
    }
}
