//! A timer that wakes a queue's thread, and the clock it goes by.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

/// `CLOCK_MONOTONIC` in nanoseconds.
#[inline]
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid buffer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A timerfd. Rings once for each time it is set.
#[derive(Debug)]
pub(super) struct Alarm {
    fd: OwnedFd,
    /// When it will ring; 0 when it is not set.
    set_for_ns: u64,
}

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: timerfd_create takes integers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            set_for_ns: 0,
        })
    }

    /// Becomes readable when the alarm rings.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Rings at `at_ns`, at once when that has passed; earlier settings are forgotten.
    pub(super) fn set(&mut self, at_ns: u64) {
        // 0 would switch it off.
        let at_ns = at_ns.max(1);
        if at_ns == self.set_for_ns {
            return;
        }
        let when = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: (at_ns / 1_000_000_000) as libc::time_t,
                tv_nsec: (at_ns % 1_000_000_000) as libc::c_long,
            },
        };
        // SAFETY: `when` is a valid value that lives across the call; no old value is asked for.
        let result = unsafe {
            libc::timerfd_settime(
                self.fd.as_raw_fd(),
                libc::TFD_TIMER_ABSTIME,
                &when,
                ptr::null_mut(),
            )
        };
        debug_assert_eq!(result, 0, "the descriptor is a timer's");
        self.set_for_ns = at_ns;
    }

    /// Whether it rang, or should.
    pub(super) fn is_due(&self) -> bool {
        self.set_for_ns != 0 && monotonic_ns() >= self.set_for_ns
    }

    /// It rang: makes it unreadable again.
    pub(super) fn take(&mut self) {
        self.set_for_ns = 0;
        let mut times = [0u8; 8];
        // SAFETY: the buffer is ours and of the length given. It fails only when the alarm was
        // set anew meanwhile.
        unsafe { libc::read(self.fd.as_raw_fd(), times.as_mut_ptr().cast(), times.len()) };
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn alarm_rings_when_its_time_has_come() {
        let mut alarm = Alarm::new().unwrap();
        let is_ringing = |alarm: &Alarm, timeout: PollTimeout| {
            let mut polls = [PollFd::new(alarm.event(), PollFlags::POLLIN)];
            poll(&mut polls, timeout).unwrap() == 1
        };
        assert!(!is_ringing(&alarm, PollTimeout::ZERO));
        let at_ns = monotonic_ns() + 1_000_000;
        alarm.set(at_ns);
        assert!(is_ringing(&alarm, PollTimeout::from(20_000u16)));
        assert!(monotonic_ns() >= at_ns);
        alarm.take();
        assert!(!is_ringing(&alarm, PollTimeout::ZERO));
    }
}
