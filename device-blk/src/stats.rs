//! What a disk has done, counted by its queues and read by anybody.
//!
//! Each queue's thread is the only writer of its [`QueueStats`], which fill cache lines of
//! their own; readers add the queues up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use api::latency::{Distribution, Histogram};

use crate::latency::{SlowLog, SlowRequest, SlowThreshold};
use request::OpKind;

/// Counters of one queue; they outlive sessions.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct QueueStats {
    ops: [OpCounters; OpKind::ALL.len()],
    inflight: AtomicU64,
    slow_log: SlowLog,
}

#[derive(Debug, Default)]
struct OpCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    /// Most kinds never occur on most queues.
    latency: OnceLock<Box<Histogram>>,
}

impl QueueStats {
    pub(crate) fn new(queue: u16, slow: Arc<SlowThreshold>) -> Self {
        Self {
            ops: Default::default(),
            inflight: AtomicU64::new(0),
            slow_log: SlowLog::new(slow, queue),
        }
    }

    /// Its number.
    pub(crate) fn queue(&self) -> u16 {
        self.slow_log.queue()
    }

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

    /// A request that was answered took this long, from the ring to the ring.
    #[inline]
    pub(crate) fn took(&self, request: &SlowRequest<'_>, elapsed_ns: u64) {
        self.ops[request.op as usize]
            .latency
            .get_or_init(Box::default)
            .record(elapsed_ns);
        if self.slow_log.is_slow(elapsed_ns) {
            self.slow_log.note(request, elapsed_ns);
        }
    }

    /// Requests went back unanswered: the next session gets them again.
    pub(crate) fn forget(&self, requests: u64) {
        let inflight = self.inflight.load(Ordering::Relaxed);
        self.inflight
            .store(inflight.saturating_sub(requests), Ordering::Relaxed);
    }

    /// How long requests of this kind took; `None` when there was none.
    pub(crate) fn latency(&self, kind: OpKind) -> Option<&Histogram> {
        self.ops[kind as usize]
            .latency
            .get()
            .map(|latency| &**latency)
    }
}

impl Default for QueueStats {
    fn default() -> Self {
        Self::new(0, SlowThreshold::new(0))
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
    pub(crate) slow_requests: u64,
    pub(crate) latency: Distribution,
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
    pub(crate) fn of<'a>(queues: impl IntoIterator<Item = &'a QueueStats> + Clone) -> Self {
        let latencies = queues
            .clone()
            .into_iter()
            .flat_map(|queue| OpKind::ALL.iter().filter_map(|&kind| queue.latency(kind)));
        let mut total = Self {
            latency: Distribution::of(latencies),
            ..Self::default()
        };
        for queue in queues {
            total.slow_requests += queue.slow_log.count();
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

    /// Kinds that had errors, by their names.
    pub(crate) fn errors_by_op(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        OpKind::ALL
            .iter()
            .map(|&kind| (kind.name(), self.op(kind).errors))
            .filter(|(_, errors)| *errors > 0)
    }

    pub(crate) fn errors(&self) -> u64 {
        self.ops.iter().map(|op| op.errors).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_added_up_by_kind() {
        let slow = SlowThreshold::new(10);
        let queues = [QueueStats::new(0, slow.clone()), QueueStats::new(1, slow)];
        for queue in &queues {
            queue.start();
            queue.start();
            queue.finish(OpKind::Read, 4096, true);
            queue.finish(OpKind::Write, 512, false);
            let request = SlowRequest {
                image: "x",
                op: OpKind::Read,
                sector: 8,
                len_bytes: 4096,
            };
            queue.took(&request, 11_000_000);
        }
        let total = Snapshot::of(&queues);
        assert_eq!(total.op(OpKind::Read).bytes, 8192);
        assert_eq!(total.errors_by_op().collect::<Vec<_>>(), [("write", 2)]);
        assert_eq!((total.slow_requests, total.inflight), (2, 0));
        assert_eq!(total.latency.count(), 2);
        assert!(queues[0].latency(OpKind::Flush).is_none());
    }
}
