//! Operations of workers and of other hosts that outlive their queue.
//!
//! The next queue of the disk may begin only when they have ended: a late write would overwrite a
//! newer one. They are looked after when somebody wants to begin one.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::Slot;
use super::workers::Results;

/// What a queue left behind.
pub(super) struct Ghosts {
    results: Arc<Results>,
    left: usize,
    /// Jobs, whose buffers the operations use.
    slots: ManuallyDrop<Vec<Slot>>,
}

// SAFETY: nothing is done with the slots but to drop them, when nobody uses their buffers any more;
// the guest's memory that they name is pinned by them.
unsafe impl Send for Ghosts {}

impl Ghosts {
    /// `left` operations will come to `results`.
    pub(super) fn new(results: Arc<Results>, left: usize, slots: Vec<Slot>) -> Self {
        Self {
            results,
            left,
            slots: ManuallyDrop::new(slots),
        }
    }

    /// Whether all have ended.
    pub(super) fn have_ended(&mut self) -> bool {
        while self.left > 0 && self.results.take().is_some() {
            self.left -= 1;
        }
        self.left == 0
    }
}

impl Drop for Ghosts {
    fn drop(&mut self) {
        if self.have_ended() {
            // SAFETY: this is the end of their owner.
            unsafe { ManuallyDrop::drop(&mut self.slots) };
        }
        // Else their buffers must outlive them, whenever they end.
    }
}
