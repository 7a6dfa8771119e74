//! Work on its way to a connection's thread: requests to send, or answers to give.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Filled by anybody, emptied by one thread, which sleeps on an eventfd in between.
///
/// Its length is bounded by who fills it: requests hold an entry of a guest's ring each, answers
/// belong to the requests that a connection has under way.
pub(crate) struct Inbox<T> {
    items: Mutex<VecDeque<T>>,
    wake: EventFd,
    /// The thread is, or is about to be, asleep: only then does filling take a system call.
    is_asleep: AtomicBool,
}

impl<T> Inbox<T> {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            items: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            is_asleep: AtomicBool::new(false),
        })
    }

    pub(crate) fn push(&self, item: T) {
        self.lock().push_back(item);
        self.wake();
    }

    /// Puts what was under way in front of what was not, in its order.
    pub(crate) fn put_back(&self, items: Vec<T>) {
        let mut queue = self.lock();
        for item in items.into_iter().rev() {
            queue.push_front(item);
        }
    }

    pub(crate) fn pop(&self) -> Option<T> {
        self.lock().pop_front()
    }

    pub(crate) fn take_all(&self) -> Vec<T> {
        self.lock().drain(..).collect()
    }

    /// Takes out what `is_wanted`; the rest stays in its order.
    pub(crate) fn take_where(&self, is_wanted: impl Fn(&T) -> bool) -> Vec<T> {
        let mut items = self.lock();
        let (taken, left): (VecDeque<T>, VecDeque<T>) = items.drain(..).partition(is_wanted);
        *items = left;
        taken.into()
    }

    /// Makes the thread look around if it sleeps.
    pub(crate) fn wake(&self) {
        if self.is_asleep.swap(false, Ordering::SeqCst) {
            // Can only fail by overflow, and then it is readable anyway.
            let _ = self.wake.write(1);
        }
    }

    /// Announces sleep. False when there is something to do after all: items, if they are
    /// wanted, or whatever `flag` stands for (set it before [`Self::wake`]).
    pub(crate) fn fall_asleep(&self, are_items_wanted: bool, flag: &AtomicBool) -> bool {
        self.is_asleep.store(true, Ordering::SeqCst);
        let is_needed = flag.load(Ordering::SeqCst) || are_items_wanted && !self.lock().is_empty();
        if is_needed {
            self.is_asleep.store(false, Ordering::SeqCst);
        }
        !is_needed
    }

    pub(crate) fn woke_up(&self) {
        self.is_asleep.store(false, Ordering::SeqCst);
        // Empty when it was not the eventfd that ended the sleep.
        let _ = self.wake.read();
    }

    /// Sleeps until something is put in, for a thread that waits for nothing else.
    pub(crate) fn sleep(&self) {
        if self.fall_asleep(true, &AtomicBool::new(false)) {
            let mut fds = [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            // An interruption is a reason to look, too.
            let _ = poll(&mut fds, PollTimeout::NONE);
            self.woke_up();
        }
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
