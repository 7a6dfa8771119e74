//! What this process may still do once it serves guests.
//!
//! The process gives up the file system, the network and all capabilities before its first
//! thread starts; from then on images and sockets reach it only as descriptors. Setting up
//! io_urings is left to one thread ([`crate::engine::ring_maker`]). A queue's thread gives up
//! more, once its ring is enabled: it talks to no socket, and its ring is restricted to disk
//! operations (see [`crate::engine::uring`]). A thread that works on an image for the queues reads
//! and writes what is open.

use sandbox::seccomp::{Arg, Profile, SeccompError, Syscalls, sets};
use sandbox::{Achieved, Confinement, ConfinementError};

/// Confines the process; must be called while it has a single thread.
///
/// # Errors
/// A step failed that every supported kernel can take.
pub(crate) fn enter() -> Result<Achieved, ConfinementError> {
    Confinement::new(Profile::new("device-blk", process_syscalls())).enter()
}

/// Confines the calling thread, and those it starts, to what serving takes: what [`enter`] left,
/// without setting up rings.
///
/// # Errors
/// The kernel refused the filter.
pub(crate) fn forbid_new_rings() -> Result<(), SeccompError> {
    Profile::new("device-blk-serving", serving_syscalls())
        .apply_to_this_thread()
        .map(drop)
}

/// Confines the calling thread to setting up rings.
///
/// # Errors
/// The kernel refused the filter.
pub(crate) fn confine_ring_maker() -> Result<(), SeccompError> {
    Profile::new("device-blk-rings", sets::base().with(sets::io_uring()))
        .apply_to_this_thread()
        .map(drop)
}

/// Confines the calling thread to what a queue needs.
///
/// # Errors
/// The kernel refused the filter.
pub(crate) fn confine_queue_thread() -> Result<(), SeccompError> {
    Profile::new("device-blk-queue", queue_syscalls())
        .apply_to_this_thread()
        .map(drop)
}

/// Confines the calling thread to what work on an image needs: see
/// [`crate::image::Image::perform`].
///
/// # Errors
/// The kernel refused the filter.
pub(crate) fn confine_worker_thread() -> Result<(), SeccompError> {
    Profile::new("device-blk-io", worker_syscalls())
        .apply_to_this_thread()
        .map(drop)
}

/// Serving, and setting up rings for it.
fn process_syscalls() -> Syscalls {
    serving_syscalls().with(sets::io_uring())
}

/// The control socket's runtime, descriptor inbox, vhost-user sessions, opening of passed
/// images, and starting of queue threads.
fn serving_syscalls() -> Syscalls {
    sets::base()
        .with(sets::tokio())
        .with(sets::shared_memory())
        .with(sets::file_io())
        // A queue's thread enables its ring.
        .allow(&[libc::SYS_io_uring_register, libc::SYS_io_uring_enter])
        // Whether a file is in memory; images are passed while guests are served.
        .allow(&[libc::SYS_fstatfs])
        // A mark on the image that a disk was switched over to.
        .allow(&[libc::SYS_fsetxattr])
        // Queues' threads choose their CPUs, and see who else needs them.
        .allow(&[libc::SYS_getrusage])
        .allow_if(libc::SYS_sched_setaffinity, &[Arg::Int(0, 0)])
        // They confine themselves further; a filter can only take away.
        .allow(&[libc::SYS_seccomp])
        .allow_if(
            libc::SYS_prctl,
            &[Arg::Int(0, libc::PR_SET_NO_NEW_PRIVS as u32)],
        )
}

/// Waiting for kicks and completions, entering the ring that exists, reading and writing what is
/// in memory.
fn queue_syscalls() -> Syscalls {
    sets::base().allow(&[
        libc::SYS_io_uring_enter,
        // Whether looking for work keeps others from theirs.
        libc::SYS_getrusage,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_pwritev2,
    ])
}

/// Files and open sockets, starting another worker, which is as confined as its starter.
fn worker_syscalls() -> Syscalls {
    sets::base()
        .with(sets::file_io())
        .with(sets::open_sockets())
}
