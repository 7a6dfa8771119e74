//! What the process may still do once it serves guests.

use sandbox::seccomp::{Arg, Profile, SeccompError, Syscalls, sets};
use sandbox::{Achieved, Confinement, ConfinementError};

/// Confines the process: no files, no network, no capabilities. Taps and sockets that are open
/// keep working, more come as descriptors. Must be called while it has a single thread.
///
/// # Errors
/// A step failed that every supported kernel can take.
pub(crate) fn enter() -> Result<Achieved, ConfinementError> {
    let syscalls = serving_syscalls().with(sets::io_uring());
    Confinement::new(Profile::new("device-net", syscalls)).enter()
}

/// Confines the calling thread, and those it starts, to what serving takes: what [`enter`] left,
/// without setting up rings.
///
/// # Errors
/// The kernel refused the filter.
pub(crate) fn forbid_new_rings() -> Result<(), SeccompError> {
    Profile::new("device-net-serving", serving_syscalls())
        .apply_to_this_thread()
        .map(drop)
}

/// Confines the calling thread to setting up rings.
///
/// # Errors
/// The kernel refused the filter.
pub(crate) fn confine_ring_maker() -> Result<(), SeccompError> {
    Profile::new("device-net-rings", sets::base().with(sets::io_uring()))
        .apply_to_this_thread()
        .map(drop)
}

fn serving_syscalls() -> Syscalls {
    sets::base()
        .with(sets::tokio())
        // The in-flight region, and the size of the frontend's memory files.
        .with(sets::shared_memory())
        .allow_ioctls(&[
            libc::TUNGETIFF,
            libc::TUNSETVNETHDRSZ,
            libc::TUNSETOFFLOAD,
            libc::TUNSETQUEUE,
            libc::TUNSETCARRIER,
        ])
        // Frames of packet sockets come many at once, with what the kernel took off them.
        .allow(&[libc::SYS_recvmmsg])
        // A queue's thread enables its ring.
        .allow(&[libc::SYS_io_uring_register, libc::SYS_io_uring_enter])
        // The threads of switches take naps.
        .allow_if(
            libc::SYS_prctl,
            &[Arg::Int(0, libc::PR_SET_TIMERSLACK as u32)],
        )
        // Whether looking for work keeps others from theirs.
        .allow(&[libc::SYS_getrusage])
        // The serving threads confine themselves further; a filter can only take away.
        .allow(&[libc::SYS_seccomp])
        .allow_if(
            libc::SYS_prctl,
            &[Arg::Int(0, libc::PR_SET_NO_NEW_PRIVS as u32)],
        )
}
