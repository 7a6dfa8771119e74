//! The clock that leases are counted by: it is the same for all processes of a host, is never set, and goes
//! on while the host sleeps.

use std::time::Duration;

/// Timers stand still while the host sleeps, and leases do not: who waits for a moment of this clock looks
/// at it as often as this.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// `CLOCK_BOOTTIME` in nanoseconds.
#[inline]
pub fn now_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid buffer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// How long until `at_ns`; nothing once that has come.
pub fn left_until(at_ns: u64) -> Duration {
    Duration::from_nanos(at_ns.saturating_sub(now_ns()))
}
