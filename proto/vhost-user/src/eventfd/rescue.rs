//! Frees threads that a peer holds up in a write to its call or error descriptor.
//!
//! Linux has no write to an eventfd that ignores the descriptor's mode, and the mode is the peer's as well as
//! ours: it can make the descriptor blocking and its counter full at any instant. A thread of a group that
//! then waits there would hold up other devices. So each doorbell notes when a write begins and when it has
//! ended, and one thread of the process looks while doorbells are rung. Whoever is found in the same write
//! twice while the counter is full is let go by emptying it, and the doorbell is not rung any more.
//!
//! The thread sleeps when nothing was rung between two looks: an idle process has no wake-ups from it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::{is_ready, take};

/// Between two looks. A write takes microseconds, and a thread may lose its CPU meanwhile.
const INTERVAL: Duration = Duration::from_millis(100);

/// A descriptor that is rung, and by whom at the moment.
#[derive(Debug)]
pub(super) struct Bell {
    pub(super) file: File,
    /// Writes that were begun, and of these the last that has ended.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Its peer held a writer up.
    is_silent: AtomicBool,
}

impl Bell {
    /// A bell that is looked after.
    pub(super) fn new(file: File) -> Arc<Bell> {
        let bell = Arc::new(Bell {
            file,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            is_silent: AtomicBool::new(false),
        });
        let mut watched = RESCUER.lock();
        watched.bells.retain(|known| known.bell.strong_count() > 0);
        watched.bells.push(Known {
            bell: Arc::downgrade(&bell),
            stuck_in: None,
        });
        if !watched.has_thread {
            let thread = thread::Builder::new().name("vu-rescuer".to_owned());
            watched.has_thread = thread.spawn(|| RESCUER.run()).is_ok();
        }
        bell
    }

    /// Runs `write`; not for a peer that held a writer up before.
    #[inline]
    pub(super) fn write(&self, write: impl FnOnce(&File)) {
        if self.is_silent.load(Ordering::Relaxed) {
            return;
        }
        let number = self.begun.load(Ordering::Relaxed) + 1;
        self.begun.store(number, Ordering::Relaxed);
        RESCUER.expect_a_write();
        write(&self.file);
        self.ended.store(number, Ordering::Release);
    }

    /// The write that somebody is in.
    fn write_under_way(&self) -> Option<u64> {
        let ended = self.ended.load(Ordering::Acquire);
        let begun = self.begun.load(Ordering::Relaxed);
        (begun != ended).then_some(begun)
    }
}

struct Rescuer {
    watched: Mutex<Watched>,
    wanted: Condvar,
    /// Something was rung since the last look.
    was_rung: AtomicBool,
    is_asleep: AtomicBool,
}

struct Watched {
    has_thread: bool,
    bells: Vec<Known>,
}

struct Known {
    bell: Weak<Bell>,
    /// The write that was under way at the last look.
    stuck_in: Option<u64>,
}

static RESCUER: Rescuer = Rescuer {
    watched: Mutex::new(Watched {
        has_thread: false,
        bells: Vec::new(),
    }),
    wanted: Condvar::new(),
    was_rung: AtomicBool::new(false),
    is_asleep: AtomicBool::new(false),
};

impl Rescuer {
    #[inline]
    fn expect_a_write(&self) {
        if self.was_rung.load(Ordering::Relaxed) {
            return;
        }
        self.was_rung.store(true, Ordering::Relaxed);
        // It says that it sleeps and then looks at `was_rung`; here it is the other way round.
        fence(Ordering::SeqCst);
        if self.is_asleep.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        let watched = self.lock();
        self.is_asleep.store(false, Ordering::Relaxed);
        drop(watched);
        self.wanted.notify_one();
    }

    fn run(&self) {
        let mut watched = self.lock();
        loop {
            self.is_asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.was_rung.load(Ordering::Relaxed) {
                self.is_asleep.store(false, Ordering::Relaxed);
            }
            while self.is_asleep.load(Ordering::Relaxed) {
                watched = self
                    .wanted
                    .wait(watched)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let mut is_anybody_in_a_write = false;
            while self.was_rung.swap(false, Ordering::Relaxed) || is_anybody_in_a_write {
                drop(watched);
                thread::sleep(INTERVAL);
                watched = self.lock();
                is_anybody_in_a_write = watched.look();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    /// Whether anybody is in a write.
    fn look(&mut self) -> bool {
        let mut is_anybody = false;
        for known in &mut self.bells {
            let Some(bell) = known.bell.upgrade() else {
                continue;
            };
            let under_way = bell.write_under_way();
            is_anybody |= under_way.is_some();
            // Without a full counter the writer only has to wait for a CPU.
            let is_stuck = under_way.is_some() && under_way == known.stuck_in;
            if is_stuck && !is_ready(bell.file.as_fd(), libc::POLLOUT) {
                bell.is_silent.store(true, Ordering::Relaxed);
                let _ = take(&bell.file);
            }
            known.stuck_in = under_way;
        }
        is_anybody
    }
}
