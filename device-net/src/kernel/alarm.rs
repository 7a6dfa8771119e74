//! A timer that wakes a ring's thread when frames that had to wait may go on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

const SECOND_NS: u64 = 1_000_000_000;

/// A timerfd. Rings once for each time it is set.
#[derive(Debug)]
pub(super) struct Alarm(OwnedFd);

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: timerfd_create takes integers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Becomes readable when the alarm rings.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Rings at `at_ns` of CLOCK_MONOTONIC, at once when that has passed. Setting it makes it
    /// unreadable until then.
    pub(super) fn set(&self, at_ns: u64) {
        // 0 would switch it off.
        let at_ns = at_ns.max(1);
        let never = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let when = libc::itimerspec {
            it_interval: never,
            it_value: libc::timespec {
                tv_sec: (at_ns / SECOND_NS) as libc::time_t,
                tv_nsec: (at_ns % SECOND_NS) as libc::c_long,
            },
        };
        let flags = libc::TFD_TIMER_ABSTIME;
        // SAFETY: `when` is live; there is no old value wanted. It cannot fail with a timer of ours.
        unsafe { libc::timerfd_settime(self.0.as_raw_fd(), flags, &when, ptr::null_mut()) };
    }

    /// Makes it unreadable again.
    pub(super) fn take(&self) {
        let mut count = 0_u64;
        // SAFETY: eight bytes of a live integer. It fails only when there is nothing to take.
        unsafe {
            libc::read(
                self.0.as_raw_fd(),
                (&raw mut count).cast(),
                size_of::<u64>(),
            )
        };
    }
}
