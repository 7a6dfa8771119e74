//! What the server answered and what of it is certainly on stable storage.
//!
//! A write that was answered lives in the server's page cache at least, which outlives the
//! server's process but not its host. A server of ours tells when its host has started anew
//! ([`crate::wire::BootId`]): if answered writes were not flushed by then they are gone, and
//! no flush may succeed any more, since the guest would take them for safe.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Writes answered so far.
    acknowledged: AtomicU64,
    /// How many of those a flush has covered.
    flushed: AtomicU64,
    has_lost_writes: AtomicBool,
}

impl Ledger {
    /// A write was answered.
    pub(super) fn acknowledged(&self) {
        self.acknowledged.fetch_add(1, Ordering::AcqRel);
    }

    /// What a flush that is sent now covers.
    pub(super) fn mark(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// A flush that was sent at `mark` was answered.
    pub(super) fn flushed(&self, mark: u64) -> Result<(), i32> {
        self.flushed.fetch_max(mark, Ordering::AcqRel);
        self.may_flush()
    }

    /// Whether a flush can tell the truth.
    pub(super) fn may_flush(&self) -> Result<(), i32> {
        if self.has_lost_writes.load(Ordering::Acquire) {
            Err(libc::EIO)
        } else {
            Ok(())
        }
    }

    /// The server's host has started anew; true when that lost writes.
    pub(super) fn host_restarted(&self) -> bool {
        let is_dirty =
            self.acknowledged.load(Ordering::Acquire) > self.flushed.load(Ordering::Acquire);
        if is_dirty {
            self.has_lost_writes.store(true, Ordering::Release);
        }
        is_dirty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_of_the_host_loses_what_no_flush_covered() {
        let ledger = Ledger::default();
        ledger.acknowledged();
        let mark = ledger.mark();
        assert_eq!(ledger.flushed(mark), Ok(()));
        assert!(!ledger.host_restarted());
        let mark = ledger.mark();
        // Answered after the flush was sent.
        ledger.acknowledged();
        assert_eq!(ledger.flushed(mark), Ok(()));
        assert!(ledger.host_restarted());
        assert_eq!(ledger.may_flush(), Err(libc::EIO));
        assert_eq!(ledger.flushed(ledger.mark()), Err(libc::EIO));
    }
}
