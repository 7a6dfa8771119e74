//! The clock that rules go by, and what stops a process or one of its threads.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::device::Strike;

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid buffer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Dies like a process that somebody kills.
pub fn crash() -> ! {
    // SAFETY: the call takes integers. A process confined by seccomp may send signals to itself in
    // this way alone.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            libc::getpid(),
            libc::gettid(),
            libc::SIGKILL,
        )
    };
    std::process::abort()
}

/// Holds the thread up for `duration`, or until the rule that struck is over.
pub fn hang(strike: &Strike, duration: Duration) {
    /// Between two looks whether the rule is over.
    const LOOK_INTERVAL: Duration = Duration::from_millis(5);
    let until_ns = monotonic_ns().saturating_add(crate::rule::as_ns(duration));
    loop {
        let left_ns = until_ns
            .min(strike.ends_ns())
            .saturating_sub(monotonic_ns());
        if left_ns == 0 {
            return;
        }
        std::thread::sleep(Duration::from_nanos(left_ns).min(LOOK_INTERVAL));
    }
}

/// As [`hang`], and no longer than until `stop` is readable or hung up.
pub fn wait(strike: &Strike, duration: Duration, stop: BorrowedFd<'_>) {
    /// Between two looks whether the rule is over.
    const LOOK_INTERVAL_MS: u64 = 5;
    let until_ns = monotonic_ns().saturating_add(crate::rule::as_ns(duration));
    loop {
        let left_ns = until_ns
            .min(strike.ends_ns())
            .saturating_sub(monotonic_ns());
        if left_ns == 0 {
            return;
        }
        let timeout_ms = left_ns.div_ceil(1_000_000).min(LOOK_INTERVAL_MS);
        let mut poll = libc::pollfd {
            fd: stop.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, whose descriptor is open throughout.
        if unsafe { libc::poll(&mut poll, 1, timeout_ms as libc::c_int) } > 0 {
            return;
        }
    }
}
