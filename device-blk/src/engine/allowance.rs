//! Until when a disk may do I/O: for VMs that are started elsewhere when their host is lost.
//!
//! Queues ask by their own clock, right where they would begin a request or its next step; so do
//! workers, and jobs before each block. So it does not matter who
//! is frozen, and for how long: a queue that wakes late finds that its time is over. The clock goes
//! on while the host sleeps.

use std::sync::atomic::{AtomicU64, Ordering};

use api::boottime;

/// No time is so late.
const ALWAYS: u64 = u64::MAX;

/// Of one disk.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// `CLOCK_BOOTTIME`, or [`ALWAYS`].
    until_ns: AtomicU64,
}

impl Allowance {
    /// Without an end.
    pub(crate) const fn always() -> Self {
        Self {
            until_ns: AtomicU64::new(ALWAYS),
        }
    }

    /// Until then at first.
    pub(crate) fn leased(until_ns: u64) -> Self {
        Self {
            until_ns: AtomicU64::new(until_ns.min(ALWAYS - 1)),
        }
    }

    /// Whether it ever ends.
    pub(crate) fn is_leased(&self) -> bool {
        self.until_ns.load(Ordering::Relaxed) != ALWAYS
    }

    /// Extends it. True when it was over before: whoever waits is to look again.
    pub(crate) fn extend(&self, until_ns: u64) -> bool {
        // Later than any clock will be, but an end.
        let until_ns = until_ns.min(ALWAYS - 1);
        let before = self.until_ns.fetch_max(until_ns, Ordering::AcqRel);
        before < until_ns && before <= boottime::now_ns()
    }

    /// As if its time had come.
    #[cfg(test)]
    pub(crate) fn end(&self) {
        self.until_ns.store(0, Ordering::Release);
    }

    /// Nothing may begin. Reads the clock only where there is an end.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        let until_ns = self.until_ns.load(Ordering::Acquire);
        until_ns != ALWAYS && boottime::now_ns() >= until_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_extended_and_never_cut() {
        assert!(!Allowance::always().is_over());
        assert!(!Allowance::always().is_leased());
        let allowance = Allowance::leased(0);
        assert!(allowance.is_leased() && allowance.is_over());
        let hour = 3_600_000_000_000;
        let later = boottime::now_ns() + hour;
        assert!(allowance.extend(later));
        assert!(!allowance.is_over());
        assert!(!allowance.extend(later - hour / 2));
        assert!(!allowance.extend(later + hour));
        assert!(!allowance.is_over());
    }

    #[test]
    fn time_that_has_passed_allows_nothing() {
        let allowance = Allowance::leased(0);
        allowance.extend(boottime::now_ns());
        assert!(allowance.is_over());
        assert!(allowance.extend(u64::MAX));
        assert!(allowance.is_leased() && !allowance.is_over());
    }
}
