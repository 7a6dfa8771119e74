//! What a disk has done, counted by its queues and read by anybody.
//!
//! Each queue's thread is the only writer of its [`QueueStats`], which fill cache lines of
//! their own; readers add the queues up.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::request::OpKind;

/// Counters of one queue; they outlive sessions.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct QueueStats {
    ops: [OpCounters; OpKind::ALL.len()],
    inflight: AtomicU64,
}

#[derive(Debug, Default)]
struct OpCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl QueueStats {
    /// A request was taken off the ring.
    pub(crate) fn start(&self) {
        add(&self.inflight, 1);
    }

    /// A request was answered.
    pub(crate) fn finish(&self, kind: OpKind, bytes: u64, ok: bool) {
        let counters = &self.ops[kind as usize];
        add(&counters.requests, 1);
        if ok {
            add(&counters.bytes, bytes);
        } else {
            add(&counters.errors, 1);
        }
        self.forget(1);
    }

    /// Requests went back unanswered: the next session gets them again.
    pub(crate) fn forget(&self, requests: u64) {
        let inflight = self.inflight.load(Ordering::Relaxed);
        self.inflight
            .store(inflight.saturating_sub(requests), Ordering::Relaxed);
    }
}

/// One writer, so no read-modify-write instruction is needed.
fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}

/// Counters of a whole disk at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    ops: [OpTotals; OpKind::ALL.len()],
    pub(crate) inflight: u64,
}

/// Totals of one kind of request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OpTotals {
    /// Answered, with any status.
    pub(crate) requests: u64,
    /// Moved, discarded or zeroed with success.
    pub(crate) bytes: u64,
    /// Answered with another status than OK.
    pub(crate) errors: u64,
}

impl Snapshot {
    pub(crate) fn of<'a>(queues: impl IntoIterator<Item = &'a QueueStats>) -> Self {
        let mut total = Self::default();
        for queue in queues {
            for (sum, counters) in total.ops.iter_mut().zip(&queue.ops) {
                sum.requests += counters.requests.load(Ordering::Relaxed);
                sum.bytes += counters.bytes.load(Ordering::Relaxed);
                sum.errors += counters.errors.load(Ordering::Relaxed);
            }
            total.inflight += queue.inflight.load(Ordering::Relaxed);
        }
        total
    }

    pub(crate) fn op(&self, kind: OpKind) -> OpTotals {
        self.ops[kind as usize]
    }

    pub(crate) fn errors(&self) -> u64 {
        self.ops.iter().map(|op| op.errors).sum()
    }
}
