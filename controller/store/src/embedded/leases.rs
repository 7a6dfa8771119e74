//! When which lease ends. Kept in memory: keeping a thousand hosts' leases alive must not cost a
//! write each time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::writer::Task;
use super::{Inner, LeaseId, StoreError};

/// A lease whose end could not be stored is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// How long the task sleeps when there is nothing to wait for; it is woken when there is.
const IDLE: Duration = Duration::from_secs(3600);

struct Running {
    ttl: Duration,
    ends: Instant,
}

/// See the module.
pub(super) struct LeaseClock {
    running: Mutex<BTreeMap<LeaseId, Running>>,
    /// A task sees to their ends.
    tended: AtomicBool,
    changed: Notify,
}

impl LeaseClock {
    /// With leases of an earlier run, which have their full time again.
    pub(super) fn new(leases: Vec<(LeaseId, u64)>) -> Self {
        let now = (!leases.is_empty()).then(Instant::now);
        let running = leases.into_iter().filter_map(|(lease, ttl_ms)| {
            let ttl = Duration::from_millis(ttl_ms);
            let ends = now? + ttl;
            Some((lease, Running { ttl, ends }))
        });
        Self {
            running: Mutex::new(running.collect()),
            tended: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    /// True once: whoever hears it starts [`end_in_time`].
    pub(super) fn must_be_tended(&self) -> bool {
        !self.tended.load(Ordering::Relaxed)
            && !self.lock().is_empty()
            && !self.tended.swap(true, Ordering::Relaxed)
    }

    pub(super) fn begin(&self, lease: LeaseId, ttl: Duration) {
        let ends = Instant::now() + ttl;
        self.lock().insert(lease, Running { ttl, ends });
        self.changed.notify_one();
    }

    pub(super) fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let now = Instant::now();
        let mut running = self.lock();
        let found = running.get_mut(&lease).filter(|found| found.ends > now);
        let found = found.ok_or(StoreError::LeaseGone { lease })?;
        found.ends = now + found.ttl;
        Ok(found.ttl)
    }

    pub(super) fn end(&self, lease: LeaseId) {
        self.lock().remove(&lease);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those whose time is over, and when to look again.
    fn due(&self) -> (Vec<LeaseId>, Instant) {
        let now = Instant::now();
        let running = self.lock();
        let due = running.iter().filter(|(_, lease)| lease.ends <= now);
        let due = due.map(|(id, _)| *id).collect();
        let next = running.values().map(|lease| lease.ends);
        let next = next.filter(|ends| *ends > now).min();
        (due, next.unwrap_or(now + IDLE))
    }
}

/// Ends leases until the store is gone.
pub(super) async fn end_in_time(clock: Arc<LeaseClock>, store: Weak<Inner>) {
    loop {
        let (due, mut next) = clock.due();
        for lease in due {
            let Some(store) = store.upgrade() else { return };
            match store.writer.run(Task::EndLease(lease)).await {
                Ok(_) => clock.end(lease),
                Err(error) => {
                    tracing::error!(
                        %lease,
                        error = %error.with_causes(),
                        "a lease is over and its keys cannot be removed"
                    );
                    next = next.min(Instant::now() + RETRY);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = clock.changed.notified() => {}
        }
        if store.strong_count() == 0 {
            return;
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.leases.changed.notify_one();
    }
}
