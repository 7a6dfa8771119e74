//! When the last request of a dead process is over.
//!
//! The kernel drops a description's locks when nothing uses it any more, requests in flight
//! included; at the same instant it tells whoever watches the file that a writer has closed it
//! (inotify, `IN_CLOSE_WRITE`). So the watch sees the fence fall, exactly and without taking any
//! lock itself that could be in a successor's way.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use vmm_sys_util::eventfd::EventFd;

/// Watches one image.
#[derive(Debug)]
pub struct Fence {
    falls: Arc<Mutex<Vec<Instant>>>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Fence {
    /// Starts to watch.
    ///
    /// # Errors
    /// There is no such file, or no watch to be had.
    pub fn watch(image: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(image, AddWatchFlags::IN_CLOSE_WRITE)?;
        let stop = EventFd::new(libc::EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let falls = Arc::<Mutex<Vec<Instant>>>::default();
        let seen = Arc::clone(&falls);
        let thread = thread::Builder::new()
            .name("fence".to_owned())
            .spawn(move || note_falls(&inotify, &stopped, &seen))?;
        Ok(Self {
            falls,
            stop,
            thread: Some(thread),
        })
    }

    /// The first fall at `since` or later.
    pub fn fall_since(&self, since: Instant) -> Option<Instant> {
        let falls = self.falls.lock().unwrap_or_else(PoisonError::into_inner);
        falls.iter().copied().find(|fall| *fall >= since)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn note_falls(inotify: &Inotify, stop: &EventFd, falls: &Mutex<Vec<Instant>>) {
    // A fall is noted when it happens, not when a CPU is free. Without the privilege, later.
    // SAFETY: setpriority takes integers; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    // SAFETY: the descriptor is open while `stop` lives, which is as long as the call.
    let stop =
        unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(stop)) };
    loop {
        let mut polls = [
            PollFd::new(stop, PollFlags::POLLIN),
            PollFd::new(inotify.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut polls, PollTimeout::NONE);
        let now = Instant::now();
        if polls[0].any() == Some(true) {
            return;
        }
        if polled.is_ok() && inotify.read_events().is_ok_and(|events| !events.is_empty()) {
            let mut falls = falls.lock().unwrap_or_else(PoisonError::into_inner);
            falls.push(now);
        }
    }
}
