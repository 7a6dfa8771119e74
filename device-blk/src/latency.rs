//! The log of requests that took too long; how long all of them take is in [`api::latency`]'s histograms.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use request::OpKind;

/// From when on a request is slow. Shared by a disk's queues.
#[derive(Debug)]
pub(crate) struct SlowThreshold(AtomicU32);

impl SlowThreshold {
    /// `ms` as in `BlkConfig`: 0 for the default, `u32::MAX` for never.
    pub(crate) fn new(ms: u32) -> Arc<Self> {
        const DEFAULT_MS: u32 = 1000;
        let ms = if ms == 0 { DEFAULT_MS } else { ms };
        Arc::new(Self(AtomicU32::new(ms)))
    }

    fn as_ns(&self) -> u64 {
        match self.0.load(Ordering::Relaxed) {
            u32::MAX => u64::MAX,
            ms => u64::from(ms) * 1_000_000,
        }
    }
}

/// A queue's log of slow requests: one line a second at most.
#[derive(Debug)]
pub(crate) struct SlowLog {
    threshold: Arc<SlowThreshold>,
    queue: u16,
    began: Instant,
    count: AtomicU64,
    /// When the last line was written, in milliseconds since `began`, and the count then.
    logged_at_ms: AtomicU64,
    logged_count: AtomicU64,
}

/// A request, as it is logged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlowRequest<'a> {
    pub(crate) image: &'a str,
    pub(crate) op: OpKind,
    pub(crate) sector: u64,
    pub(crate) len_bytes: u64,
}

impl SlowLog {
    pub(crate) fn new(threshold: Arc<SlowThreshold>, queue: u16) -> Self {
        Self {
            threshold,
            queue,
            began: Instant::now(),
            count: AtomicU64::new(0),
            logged_at_ms: AtomicU64::new(0),
            logged_count: AtomicU64::new(0),
        }
    }

    pub(crate) fn queue(&self) -> u16 {
        self.queue
    }

    #[inline]
    pub(crate) fn is_slow(&self, elapsed_ns: u64) -> bool {
        elapsed_ns >= self.threshold.as_ns()
    }

    /// Slow requests so far.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Only to be called by the one thread that writes.
    #[cold]
    pub(crate) fn note(&self, request: &SlowRequest<'_>, elapsed_ns: u64) {
        const INTERVAL_MS: u64 = 1000;
        let count = self.count() + 1;
        self.count.store(count, Ordering::Relaxed);
        // From 1 on: 0 is for never.
        let now_ms = 1 + self.began.elapsed().as_millis() as u64;
        let last_ms = self.logged_at_ms.load(Ordering::Relaxed);
        if last_ms != 0 && now_ms - last_ms < INTERVAL_MS {
            return;
        }
        self.logged_at_ms.store(now_ms, Ordering::Relaxed);
        let withheld = count - self.logged_count.swap(count, Ordering::Relaxed) - 1;
        tracing::warn!(
            image = request.image,
            queue = self.queue,
            op = request.op.name(),
            sector = request.sector,
            len_bytes = request.len_bytes,
            ms = elapsed_ns / 1_000_000,
            withheld,
            "slow request"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_is_what_reaches_the_threshold() {
        let log = |ms| SlowLog::new(SlowThreshold::new(ms), 0);
        assert!(log(0).is_slow(1_000_000_000) && !log(0).is_slow(999_999_999));
        assert!(log(5).is_slow(5_000_000));
        assert!(!log(u32::MAX).is_slow(u64::MAX - 1));
    }
}
