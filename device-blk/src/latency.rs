//! How long requests take: a [`Histogram`] for each queue and kind of request, and a log of those
//! that took too long.
//!
//! A histogram has eight buckets for each power of two of nanoseconds, so a percentile is at most
//! an eighth too high. It is written by its queue's thread alone and read by anybody; a reader may
//! see a request in one counter and not yet in another.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use api::device::LatencySummary;

use crate::request::OpKind;

/// Times below 2^8 ns share the first bucket.
const MIN_EXPONENT: u32 = 8;
/// Times from 2^37 ns (137 s) on share the last one.
const MAX_EXPONENT: u32 = 36;
/// log2 of the buckets for a power of two.
const SUB_BITS: u32 = 3;
const NUM_BUCKETS: usize = 1 + (((MAX_EXPONENT - MIN_EXPONENT + 1) << SUB_BITS) as usize);
/// Powers of two in nanoseconds that bound the buckets of the metrics: 1 us to 17 s.
const METRIC_EXPONENTS: std::ops::RangeInclusive<u32> = 10..=34;
/// Each second of them is enough for a graph.
const METRIC_STEP: usize = 2;

/// How often a time was seen; 1.9 KiB.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; NUM_BUCKETS],
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; NUM_BUCKETS],
            sum_ns: AtomicU64::new(0),
            max_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Only to be called by the one thread that writes.
    #[inline]
    pub(crate) fn record(&self, elapsed_ns: u64) {
        let bucket = &self.buckets[bucket_of(elapsed_ns)];
        bucket.store(bucket.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let sum_ns = self.sum_ns.load(Ordering::Relaxed).wrapping_add(elapsed_ns);
        self.sum_ns.store(sum_ns, Ordering::Relaxed);
        if elapsed_ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.store(elapsed_ns, Ordering::Relaxed);
        }
    }
}

fn bucket_of(elapsed_ns: u64) -> usize {
    let exponent = 63 - (elapsed_ns | 1).leading_zeros();
    if exponent < MIN_EXPONENT {
        return 0;
    }
    if exponent > MAX_EXPONENT {
        return NUM_BUCKETS - 1;
    }
    let sub = (elapsed_ns >> (exponent - SUB_BITS)) & ((1 << SUB_BITS) - 1);
    1 + (((exponent - MIN_EXPONENT) << SUB_BITS) as usize) + sub as usize
}

/// The first time that is above everything in the bucket.
fn upper_bound_ns(bucket: usize) -> u64 {
    if bucket == 0 {
        return 1 << MIN_EXPONENT;
    }
    let exponent = MIN_EXPONENT + ((bucket - 1) >> SUB_BITS) as u32;
    let sub = ((bucket - 1) & ((1 << SUB_BITS) - 1)) as u64;
    (1 << exponent) + ((sub + 1) << (exponent - SUB_BITS))
}

/// Histograms added up, at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Distribution {
    buckets: [u64; NUM_BUCKETS],
    sum_ns: u64,
    max_ns: u64,
}

impl Default for Distribution {
    fn default() -> Self {
        Self {
            buckets: [0; NUM_BUCKETS],
            sum_ns: 0,
            max_ns: 0,
        }
    }
}

impl Distribution {
    pub(crate) fn of<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> Self {
        let mut sum = Self::default();
        for histogram in histograms {
            for (total, bucket) in sum.buckets.iter_mut().zip(&histogram.buckets) {
                *total += bucket.load(Ordering::Relaxed);
            }
            let sum_ns = histogram.sum_ns.load(Ordering::Relaxed);
            sum.sum_ns = sum.sum_ns.wrapping_add(sum_ns);
            sum.max_ns = sum.max_ns.max(histogram.max_ns.load(Ordering::Relaxed));
        }
        sum
    }

    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub(crate) fn summary(&self) -> LatencySummary {
        let us = |ns: u64| ns as f64 / 1000.0;
        LatencySummary {
            count: self.count(),
            p50_us: us(self.quantile_ns(500)),
            p99_us: us(self.quantile_ns(990)),
            p999_us: us(self.quantile_ns(999)),
            max_us: us(self.max_ns),
        }
    }

    /// A time that `per_mille` of the requests did not exceed.
    fn quantile_ns(&self, per_mille: u64) -> u64 {
        let rank = (self.count() * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank && seen > 0 {
                return upper_bound_ns(bucket).min(self.max_ns);
            }
        }
        0
    }

    /// Buckets for Prometheus: upper bounds in seconds.
    pub(crate) fn metric_buckets(&self) -> Vec<(f64, u64)> {
        let mut buckets = Vec::new();
        let mut next = 0;
        for exponent in METRIC_EXPONENTS.step_by(METRIC_STEP) {
            let bound_ns = 1u64 << exponent;
            let from = next;
            while next < NUM_BUCKETS && upper_bound_ns(next) <= bound_ns {
                next += 1;
            }
            let count = self.buckets[from..next].iter().sum();
            buckets.push((bound_ns as f64 / 1e9, count));
        }
        buckets.push((f64::INFINITY, self.buckets[next..].iter().sum()));
        buckets
    }

    pub(crate) fn sum_seconds(&self) -> f64 {
        self.sum_ns as f64 / 1e9
    }
}

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
    fn every_time_lies_below_its_buckets_bound_and_above_the_one_before() {
        for shift in 0..64 {
            for offset in [0, 1, 2, 3] {
                let ns = (1u64 << shift).wrapping_sub(1).saturating_add(offset);
                let bucket = bucket_of(ns);
                if bucket < NUM_BUCKETS - 1 {
                    assert!(ns < upper_bound_ns(bucket), "{ns}");
                }
                if bucket > 0 {
                    assert!(ns >= upper_bound_ns(bucket - 1), "{ns}");
                }
            }
        }
    }

    #[test]
    fn percentiles_are_at_most_an_eighth_too_high() {
        let histogram = Histogram::default();
        for us in 1..=10_000 {
            histogram.record(us * 1000);
        }
        let summary = Distribution::of([&histogram]).summary();
        assert_eq!(summary.count, 10_000);
        for (found, exact) in [
            (summary.p50_us, 5000.0),
            (summary.p99_us, 9900.0),
            (summary.p999_us, 9990.0),
        ] {
            assert!(
                found >= exact && found <= exact * 1.125,
                "{found} for {exact}"
            );
        }
        assert!((summary.max_us - 10_000.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_measured_is_zero() {
        let summary = Distribution::default().summary();
        assert_eq!(summary, LatencySummary::default());
    }

    #[test]
    fn metric_buckets_have_every_request_once() {
        let (a, b) = (Histogram::default(), Histogram::default());
        for ns in [0, 500, 1024, 1_000_000, u64::MAX] {
            a.record(ns);
            b.record(ns / 3);
        }
        let buckets = Distribution::of([&a, &b]).metric_buckets();
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 10);
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0));
        let below_1_us = buckets[0];
        assert!((below_1_us.0 - 1.024e-6).abs() < 1e-12);
        assert_eq!(below_1_us.1, 5, "0, 500 and the thirds of 0, 500, 1024");
        assert_eq!(buckets.last().unwrap().1, 2, "the giants");
    }

    #[test]
    fn slow_is_what_reaches_the_threshold() {
        let log = |ms| SlowLog::new(SlowThreshold::new(ms), 0);
        assert!(log(0).is_slow(1_000_000_000) && !log(0).is_slow(999_999_999));
        assert!(log(5).is_slow(5_000_000));
        assert!(!log(u32::MAX).is_slow(u64::MAX - 1));
    }
}
