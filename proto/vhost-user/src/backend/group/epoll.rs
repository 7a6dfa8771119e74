//! The descriptors that a group's thread waits for.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// What may happen to a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Happening {
    /// Newcomers or commands.
    News,
    /// The driver of this member kicked.
    Kick(usize),
    /// An event of this member's handler, and which.
    Event(usize, usize),
}

/// When a descriptor that is readable is told of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trigger {
    /// As long as it is.
    Level,
    /// When something is written to it: so nobody has to read it.
    Edge,
}

/// Told of at once; more are told of by the next wait.
const MAX_AT_ONCE: usize = 64;

/// Kick is 0, events follow.
const POSITION_SHIFT: u32 = 8;

impl Happening {
    fn of(data: u64) -> Happening {
        let position = (data >> POSITION_SHIFT) as usize;
        match (data & 0xff) as usize {
            _ if data == u64::MAX => Happening::News,
            0 => Happening::Kick(position),
            index => Happening::Event(position, index - 1),
        }
    }

    fn data(self) -> u64 {
        match self {
            Happening::News => u64::MAX,
            Happening::Kick(position) => (position as u64) << POSITION_SHIFT,
            Happening::Event(position, index) => {
                (position as u64) << POSITION_SHIFT | (index as u64 + 1)
            }
        }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Epoll(OwnedFd);

impl Epoll {
    pub(super) fn new() -> io::Result<Epoll> {
        // SAFETY: epoll_create1 takes no pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
        Ok(Epoll(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Tells of `fd` from now on.
    pub(super) fn add(&self, fd: RawFd, happening: Happening, trigger: Trigger) -> io::Result<()> {
        let edge = match trigger {
            Trigger::Level => 0,
            Trigger::Edge => libc::EPOLLET as u32,
        };
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32 | edge,
            u64: happening.data(),
        };
        // SAFETY: `event` is a live epoll_event.
        let answer =
            unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// No longer; one that was not added is no mistake.
    pub(super) fn remove(&self, fd: RawFd) {
        // SAFETY: EPOLL_CTL_DEL takes no event.
        unsafe {
            libc::epoll_ctl(
                self.0.as_raw_fd(),
                libc::EPOLL_CTL_DEL,
                fd,
                std::ptr::null_mut(),
            )
        };
    }

    /// Waits until something happens, unless it is to be told at once. There is no time limit:
    /// commands, and the end of the last seat, are news.
    pub(super) fn wait(&self, at_once: bool, mut tell: impl FnMut(&Epoll, Happening)) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; MAX_AT_ONCE];
        let timeout_ms = if at_once { 0 } else { -1 };
        // SAFETY: a valid array of that many events.
        let count = unsafe {
            libc::epoll_wait(
                self.0.as_raw_fd(),
                events.as_mut_ptr(),
                MAX_AT_ONCE as libc::c_int,
                timeout_ms,
            )
        };
        // Negative after a signal: then nothing happened.
        for event in &events[..usize::try_from(count).unwrap_or(0)] {
            tell(self, Happening::of(event.u64));
        }
    }
}
