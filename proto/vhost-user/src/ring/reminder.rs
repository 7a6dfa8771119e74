//! A second signal for drivers that seem to have missed the first.
//!
//! A signal can be lost outside of this process, and a driver that waits for one may never give cause for the
//! next: Linux's TCP sends nothing while frames of its own wait to be taken back, not even again. Virtio
//! allows signals without cause, so that one too many does no harm.

use faults::Point;

use super::{Queue, Ring};

/// Where a ring stood when it was last looked at.
#[derive(Debug, Default)]
pub(super) struct Reminder {
    used_idx: Option<u16>,
    is_done: bool,
}

impl Ring {
    /// Signals the driver once more if it still waits for what it was signalled already. To be called now and
    /// then: the driver has the time from one call to the next, and is reminded once of the same completions.
    pub fn remind(&mut self) {
        let (used_idx, still_waits) = match &self.queue {
            Queue::Split(queue) => (queue.position().1, queue.driver_waits_for_published()),
            Queue::Packed(queue) => (queue.position().1, queue.driver_waits_for_published()),
        };
        if self.reminder.used_idx.replace(used_idx) != Some(used_idx) {
            self.reminder.is_done = false;
            return;
        }
        let loses_calls = self.armed & Point::Call.bit() != 0;
        if self.reminder.is_done || self.completed_total == 0 || !still_waits || loses_calls {
            return;
        }
        self.reminder.is_done = true;
        if let Some(call) = &self.call {
            call.ring();
        }
    }
}
