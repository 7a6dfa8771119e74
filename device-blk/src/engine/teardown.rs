//! The end of a queue: nothing of it may run afterwards.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::BlkQueue;

/// How long a queue that ends waits for the kernel to let go of guest memory.
const TEARDOWN_PATIENCE: Duration = Duration::from_secs(30);

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

    fn end_operations(&mut self) {
        if self.running() == 0 {
            return;
        }
        let deadline = Instant::now() + TEARDOWN_PATIENCE;
        self.uring.cancel_all();
        loop {
            while self.uring.next_completion().is_some() {}
            while self.results.take().is_some() {
                self.with_workers -= 1;
            }
            if self.running() == 0 {
                return self.note_unanswered();
            }
            if Instant::now() >= deadline {
                break;
            }
            self.uring.wait(deadline);
        }
        tracing::error!(
            image = self.served.image.name(),
            "{} requests still run; this disk stays stopped until the daemon is restarted",
            self.running()
        );
        self.backend.has_ghosts.store(true, Ordering::Release);
        self.note_unanswered();
        // Their memory must outlive them, whenever they end.
        std::mem::forget(std::mem::take(&mut self.slots));
    }

    /// What requests have changed that are not answered here.
    fn note_unanswered(&self) {
        let observer = &self.backend.options.observer;
        for job in self.slots.iter().filter_map(|slot| slot.job.as_ref()) {
            job.each_change(|offset_bytes, len_bytes| observer.mark(offset_bytes, len_bytes));
        }
    }
}
