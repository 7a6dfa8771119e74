//! The end of a queue: nothing of it may run afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::BlkQueue;
use super::ghosts::Ghosts;

/// How long a queue that ends waits for others to let go of guest memory, without a word.
const TEARDOWN_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

impl Drop for BlkQueue {
    /// Requests that `drain` left behind will be submitted again by the next session. They
    /// must have ended before: a late write would overwrite a newer one, and a late read would
    /// land in memory that belongs to something else by then.
    fn drop(&mut self) {
        self.stats.forget((self.in_flight() + self.held()) as u64);
        self.end_operations();
        self.backend.gate.leave(self.gate_id);
    }
}

impl BlkQueue {
    fn running(&self) -> usize {
        self.uring.unanswered() + self.with_workers
    }

    /// Waits until nothing of the queue runs. What other hosts have is waited for only so long:
    /// then no queue of this disk begins until it has ended. The kernel tells only this thread when
    /// it is through, so that is waited for; whoever waits for this thread has a deadline.
    fn end_operations(&mut self) {
        if self.running() == 0 {
            return;
        }
        self.results.abandon();
        if let Some(executor) = self.served.image.executor() {
            executor.release_abandoned();
        }
        self.uring.cancel_all();
        let mut deadline = Instant::now() + TEARDOWN_PATIENCE;
        loop {
            while self.uring.next_completion().is_some() {}
            while self.results.take().is_some() {
                self.with_workers -= 1;
            }
            if self.running() == 0 {
                return self.note_unanswered();
            }
            if Instant::now() >= deadline {
                tracing::error!(
                    image = self.served.image.name(),
                    "{} requests still run; this disk stays stopped until they have ended",
                    self.running()
                );
                if self.uring.unanswered() == 0 {
                    break;
                }
                deadline = Instant::now() + TEARDOWN_PATIENCE;
            }
            self.uring.wait(deadline);
        }
        self.note_unanswered();
        self.backend.keep(Ghosts::new(
            Arc::clone(&self.results),
            self.with_workers,
            std::mem::take(&mut self.slots),
        ));
    }

    /// What requests have changed that are not answered here.
    fn note_unanswered(&self) {
        let observer = &self.backend.options.observer;
        for job in self.slots.iter().filter_map(|slot| slot.job.as_ref()) {
            job.each_change(|offset_bytes, len_bytes| observer.mark(offset_bytes, len_bytes));
        }
    }
}
