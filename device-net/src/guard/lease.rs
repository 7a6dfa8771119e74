//! Until when a NIC may pass frames: for VMs that are started elsewhere when their host is lost.
//!
//! Frames ask no clock: [`crate::leases::Clock`] looks at it for them, and sets a bit that they look at
//! anyway. So a process that was frozen passes frames until that thread runs, which is as soon as any.

use std::sync::atomic::Ordering;
use std::time::Duration;

use api::boottime;
use filter::{Direction, DropReason};

use super::{Guard, LEASE, lock};

impl Guard {
    /// Lets frames pass until then, by `CLOCK_BOOTTIME`, and no more until that is extended.
    pub(crate) fn lease(&self, until_ns: u64) {
        *lock(&self.lease) = Some(until_ns);
        self.heed_lease();
    }

    /// Whether frames need leave to pass.
    pub(crate) fn is_leased(&self) -> bool {
        lock(&self.lease).is_some()
    }

    /// Lets frames of a leased NIC pass until then; never shortens it.
    pub(crate) fn extend_lease(&self, until_ns: u64) {
        if let Some(until) = &mut *lock(&self.lease) {
            *until = until_ns.max(*until);
        }
        self.heed_lease();
    }

    /// Has frames dropped from the lease's end on. How long it lasts, if there is one.
    pub(crate) fn heed_lease(&self) -> Option<Duration> {
        let until_ns = lock(&self.lease);
        let left = boottime::left_until((*until_ns)?);
        self.watch(LEASE, left.is_zero());
        Some(left)
    }

    /// Whether frames are dropped because the lease is over.
    pub(crate) fn is_over(&self) -> bool {
        self.watches.load(Ordering::Relaxed) & LEASE != 0
    }

    /// Whether a frame that was looked at before is too late, and counted as such.
    pub(crate) fn is_too_late(&self, direction: Direction) -> bool {
        let is_over = self.is_over();
        if is_over {
            self.count_drop(direction, DropReason::LeaseEnded);
        }
        is_over
    }
}
