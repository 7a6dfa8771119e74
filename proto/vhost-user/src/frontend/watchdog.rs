//! One thread for the whole process that ends requests which take too long.
//!
//! A reply is awaited inside the `vhost` crate, whose receive loop retries when a socket time-out
//! strikes; shutting the socket down is the only thing that ends it. A thread for each request
//! was rejected: a request would then cost a thread, and a hundred devices a hundred threads.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

/// Shuts `stream` down unless the returned [`Watch`] is finished by `deadline`.
pub(super) fn watch(stream: &Arc<UnixStream>, deadline: Instant) -> io::Result<Watch> {
    let fired = Arc::new(AtomicBool::new(false));
    let mut watched = WATCHDOG.lock();
    if !watched.started {
        thread::Builder::new()
            .name("vu-watchdog".to_owned())
            .spawn(|| WATCHDOG.run())?;
        watched.started = true;
    }
    watched.next_id += 1;
    let id = watched.next_id;
    let entry = Entry {
        deadline,
        stream: Arc::clone(stream),
        fired: Arc::clone(&fired),
    };
    watched
        .entries
        .get_or_insert_with(HashMap::new)
        .insert(id, entry);
    WATCHDOG.changed.notify_one();
    Ok(Watch { id, fired })
}

/// A request under watch; dropping it ends the watch.
pub(super) struct Watch {
    id: u64,
    fired: Arc<AtomicBool>,
}

impl Watch {
    /// Ends the watch; whether the deadline had passed and the stream is shut down.
    pub(super) fn finish(self) -> bool {
        WATCHDOG.forget(self.id);
        self.fired.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHDOG.forget(self.id);
    }
}

static WATCHDOG: Watchdog = Watchdog {
    watched: Mutex::new(Watched {
        started: false,
        next_id: 0,
        entries: None,
    }),
    changed: Condvar::new(),
};

struct Watchdog {
    watched: Mutex<Watched>,
    changed: Condvar,
}

struct Watched {
    started: bool,
    next_id: u64,
    /// `None` until the first watch: a map cannot be made in a constant.
    entries: Option<HashMap<u64, Entry>>,
}

struct Entry {
    deadline: Instant,
    stream: Arc<UnixStream>,
    fired: Arc<AtomicBool>,
}

impl Watchdog {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().expect("the lock is never poisoned")
    }

    fn forget(&self, id: u64) {
        if let Some(entries) = &mut self.lock().entries {
            entries.remove(&id);
        }
    }

    fn run(&self) {
        let mut watched = self.lock();
        loop {
            let now = Instant::now();
            watched.fire_expired(now);
            watched = match watched.next_deadline() {
                Some(deadline) => {
                    self.changed
                        .wait_timeout(watched, deadline - now)
                        .expect("the lock is never poisoned")
                        .0
                }
                None => self
                    .changed
                    .wait(watched)
                    .expect("the lock is never poisoned"),
            };
        }
    }
}

impl Watched {
    fn fire_expired(&mut self, now: Instant) {
        for entry in self
            .entries
            .iter()
            .flat_map(HashMap::values)
            .filter(|entry| entry.deadline <= now)
        {
            entry.fired.store(true, Ordering::Release);
            // A stream that is closed already has nothing left to end.
            let _ = entry.stream.shutdown(Shutdown::Both);
        }
        if let Some(entries) = &mut self.entries {
            entries.retain(|_, entry| entry.deadline > now);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.entries
            .iter()
            .flat_map(HashMap::values)
            .map(|entry| entry.deadline)
            .min()
    }
}
