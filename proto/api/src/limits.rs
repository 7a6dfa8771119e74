//! Limits that the kernel sets a process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More than any server of ours uses; a disk with 64 queues takes some 400.
const OPEN_FILES: u64 = 1 << 16;

/// Linux counts the memory of io_uring rings against the limit on locked memory, of all processes of
/// a user together, and a queue takes some 100 KiB. Usual are 8 MiB: not a hundred disks.
const LOCKED_MEMORY_BYTES: u64 = 4 << 30;

/// Raises the limit on locked memory: the hard one too where the process may, else the soft one as
/// far as the hard one lets. Call it before the process is confined.
pub fn raise_locked_memory() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else {
        return;
    };
    let set = |soft, hard| setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard);
    if soft >= LOCKED_MEMORY_BYTES
        || set(LOCKED_MEMORY_BYTES, hard.max(LOCKED_MEMORY_BYTES)).is_ok()
    {
        return;
    }
    if soft < hard
        && let Err(errno) = set(hard, hard)
    {
        tracing::warn!(%errno, "the limit on locked memory stays at {soft}");
    }
}

/// Raises the soft limit on open files, usually 1024, as far as the hard one lets. Call it before
/// the process is confined.
pub fn raise_open_files() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    let wanted = OPEN_FILES.min(hard);
    if soft < wanted
        && let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)
    {
        tracing::warn!(%errno, "the limit on open files stays at {soft}");
    }
}
