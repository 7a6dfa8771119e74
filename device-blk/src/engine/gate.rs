//! Stopping all queues of a disk at one instant.
//!
//! Whoever closes the gate rings every queue. A queue that finds it closed begins nothing new,
//! completes what is in flight and parks; when all are parked, the closer is alone with the
//! image. Only the queue itself says that it is parked, on the thread that would otherwise begin
//! a request, so there is no instant at which both could be wrong:
//!
//! ```text
//!   closer: close, ring all ──► wait until all parked ──► alone ──► open, ring all
//!   queue:        at work ──► in flight = 0: parked ─────────────────► at work, image read anew
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost_user::eventfd::EventFd;

/// Why a disk did not come to rest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GateError {
    /// Slow storage, or a task that waits for another host.
    #[error(
        "requests of {queues} queue(s) did not complete within {patience_ms} ms; nothing was \
         changed, try again when the storage answers"
    )]
    Busy {
        /// Queues with requests in flight.
        queues: usize,
        /// How long they had.
        patience_ms: u128,
    },
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// How often it was closed or opened: odd while it is closed.
    turns: AtomicU64,
    members: Mutex<Members>,
    parked: Condvar,
    /// One closer at a time.
    closer: Mutex<()>,
}

#[derive(Debug, Default)]
struct Members {
    queues: Vec<Member>,
    next_id: u64,
}

#[derive(Debug)]
struct Member {
    id: u64,
    waker: Arc<EventFd>,
    is_parked: bool,
}

impl Gate {
    /// Adds a queue, which will be woken by `waker`. A closed gate does not wait for it: it will
    /// find it closed before its first request.
    pub(super) fn join(&self, waker: Arc<EventFd>) -> u64 {
        let mut members = self.members();
        let id = members.next_id;
        members.next_id += 1;
        let is_parked = self.is_closed();
        members.queues.push(Member {
            id,
            waker,
            is_parked,
        });
        id
    }

    pub(super) fn leave(&self, id: u64) {
        self.members().queues.retain(|queue| queue.id != id);
        self.parked.notify_all();
    }

    /// Changes when the gate is closed, when it is opened and when queues are woken. A queue that
    /// finds it changed and open reads anew what it serves.
    #[inline]
    pub(super) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Acquire)
    }

    pub(super) fn is_closed(&self) -> bool {
        is_closed(self.turns())
    }

    /// The queue has nothing in flight, and begins nothing while the gate is closed.
    pub(super) fn park(&self, id: u64) {
        let mut members = self.members();
        if !self.is_closed() {
            return;
        }
        for queue in &mut members.queues {
            queue.is_parked |= queue.id == id;
        }
        self.parked.notify_all();
    }

    /// Makes all queues look anew at what they serve and how.
    pub(super) fn wake_all(&self) {
        // Closed and opened, as it were: whoever looks for work without sleeping sees it too.
        self.turns.fetch_add(2, Ordering::AcqRel);
        for queue in &self.members().queues {
            queue.waker.ring();
        }
    }

    /// Runs `alone` while all queues are parked.
    pub(super) fn closed<T>(
        &self,
        patience: Duration,
        alone: impl FnOnce() -> T,
    ) -> Result<T, GateError> {
        let _closer = self.closer.lock().unwrap_or_else(PoisonError::into_inner);
        let opener = self.close();
        let deadline = Instant::now() + patience;
        let mut members = self.members();
        loop {
            let queues = members.queues.iter().filter(|q| !q.is_parked).count();
            if queues == 0 {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let patience_ms = patience.as_millis();
                drop(members);
                return Err(GateError::Busy {
                    queues,
                    patience_ms,
                });
            }
            members = self
                .parked
                .wait_timeout(members, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(members);
        let result = alone();
        drop(opener);
        Ok(result)
    }

    fn close(&self) -> Opener<'_> {
        let mut members = self.members();
        self.turns.fetch_add(1, Ordering::AcqRel);
        for queue in &mut members.queues {
            queue.is_parked = false;
            queue.waker.ring();
        }
        Opener(self)
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the gate was closed when it had turned so often.
#[inline]
pub(super) fn is_closed(turns: u64) -> bool {
    !turns.is_multiple_of(2)
}

/// Opens the gate again, whatever happened meanwhile.
struct Opener<'a>(&'a Gate);

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        let members = self.0.members();
        self.0.turns.fetch_add(1, Ordering::AcqRel);
        for queue in &members.queues {
            queue.waker.ring();
        }
    }
}
