//! Closing what was inherited by accident.

use std::io;
use std::os::fd::RawFd;

use crate::Achieved;

/// Closes every descriptor of this process except 0, 1, 2 and `keep`.
///
/// Call it first thing in `main`, with the descriptors that the command line names: an owned
/// descriptor that is closed here would be closed again by its owner.
///
/// # Errors
/// `close_range` failed (Linux before 5.9).
pub fn close_other_fds(keep: &[RawFd]) -> Result<Achieved, DescriptorError> {
    let mut kept: Vec<u32> = keep
        .iter()
        .filter_map(|&fd| u32::try_from(fd).ok())
        .filter(|&fd| fd > 2)
        .collect();
    kept.sort_unstable();
    kept.dedup();

    let mut first = 3;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)?;
    Ok(Achieved::of("close_other_fds"))
}

fn close_range(first: u32, last: u32) -> Result<(), DescriptorError> {
    // SAFETY: close_range reads no memory; the caller vouches that nothing owns these
    // descriptors, as `close_other_fds` documents.
    let answer = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if answer < 0 {
        return Err(DescriptorError::CloseRange {
            first,
            last,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// Descriptors could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// The kernel refused.
    #[error(
        "cannot close the inherited descriptors {first} to {last}; Linux 5.9 or newer is needed"
    )]
    CloseRange {
        /// First descriptor of the range.
        first: u32,
        /// Last descriptor of the range.
        last: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
