//! Limits that the kernel sets a process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More than any server of ours uses; a disk with 64 queues takes some 400.
const OPEN_FILES: u64 = 1 << 16;

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
