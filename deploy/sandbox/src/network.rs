//! Leaving the host's network behind.

use std::io;

use crate::Achieved;

/// Moves the calling thread, and the threads it starts, into a new and empty network namespace.
///
/// Sockets and taps that are open already stay in the namespace they came from and keep working.
/// Without the permission this reports itself as missing; the seccomp sets of this crate forbid
/// `socket` for everything but Unix sockets in any case.
pub fn deny_network() -> Achieved {
    // SAFETY: unshare reads no memory; CLONE_NEWNET affects no memory or descriptor.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
        Achieved::of("network-namespace")
    } else {
        Achieved::missing("network-namespace", io::Error::last_os_error())
    }
}
