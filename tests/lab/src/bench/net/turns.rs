//! How processes that share a CPU take turns. Who has slept, and wants a short turn, gets the CPU at once from a
//! frontend that polls; otherwise it may have to wait for milliseconds: longer than any ring lasts.

use std::fs;
use std::io;

use anyhow::{Context, Result};

/// A turn: a ring of 1024 holds what comes in the others' turns.
const TURN_NS: u64 = 100_000;

/// The part of `struct sched_attr` that Linux 3.14 has.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    /// Of ordinary processes: the length of a turn (Linux 6.12; others ignore it).
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// Makes all threads of a process take short turns; the higher `nice`, the smaller their share.
pub(super) fn make_short(pid: u32, nice: i32) -> Result<()> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("there is no process {pid}"))?;
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        nice,
        runtime_ns: TURN_NS,
        ..SchedAttr::default()
    };
    for task in tasks {
        let tid: libc::pid_t = task?.file_name().to_string_lossy().parse()?;
        // SAFETY: the attributes are live and of the size that they say.
        let answer = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attr, 0) };
        if answer < 0 {
            let error = io::Error::last_os_error();
            // A thread may have ended.
            if error.raw_os_error() != Some(libc::ESRCH) {
                return Err(error).context("cannot set how threads take turns");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_turns_can_be_shortened() {
        make_short(std::process::id(), 0).unwrap();
        assert!(make_short(u32::MAX, 0).is_err(), "nobody has that number");
    }
}
