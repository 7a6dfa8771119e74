//! What the process may still do once it serves guests.

use sandbox::seccomp::{Profile, sets};
use sandbox::{Achieved, Confinement, ConfinementError};

/// Confines the process: no files, no network, no capabilities. Taps and sockets that are open
/// keep working, more come as descriptors.
pub(crate) fn enter() -> Result<Achieved, ConfinementError> {
    let syscalls = sets::base()
        .with(sets::tokio())
        // The in-flight region, and the size of the frontend's memory files.
        .with(sets::shared_memory())
        .allow_ioctls(&[
            libc::TUNGETIFF,
            libc::TUNSETVNETHDRSZ,
            libc::TUNSETOFFLOAD,
            libc::TUNSETQUEUE,
        ]);
    Confinement::new(Profile::new("device-net", syscalls)).enter()
}
