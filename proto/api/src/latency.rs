//! How long things take in a daemon: a [`Histogram`] for whatever is measured, and [`Distribution`]s
//! that are read from them.
//!
//! A histogram has eight buckets for each power of two of nanoseconds, so a percentile is at most
//! an eighth too high. A reader may see a value in one counter and not yet in another.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::{LatencyBucket, LatencySummary};

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
pub struct Histogram {
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
    /// Something took so long. Only one thread at a time may record.
    #[inline]
    pub fn record(&self, elapsed_ns: u64) {
        self.record_many(elapsed_ns, 1);
    }

    /// `count` things took so long each, as [`Histogram::record`] has it.
    #[inline]
    pub fn record_many(&self, elapsed_ns: u64, count: u64) {
        let bucket = &self.buckets[bucket_of(elapsed_ns)];
        bucket.store(bucket.load(Ordering::Relaxed) + count, Ordering::Relaxed);
        let added_ns = elapsed_ns.wrapping_mul(count);
        let sum_ns = self.sum_ns.load(Ordering::Relaxed).wrapping_add(added_ns);
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
pub struct Distribution {
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
    /// The sum of these.
    pub fn of<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> Self {
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

    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// As messages have it.
    pub fn summary(&self) -> LatencySummary {
        let us = |ns: u64| ns as f64 / 1000.0;
        LatencySummary {
            count: self.count(),
            p50_us: us(self.quantile_ns(500)),
            p99_us: us(self.quantile_ns(990)),
            p999_us: us(self.quantile_ns(999)),
            max_us: us(self.max_ns),
        }
    }

    /// The buckets that are not empty.
    pub fn buckets(&self) -> Vec<LatencyBucket> {
        let buckets = self.buckets.iter().enumerate();
        buckets
            .filter(|(_, count)| **count > 0)
            .map(|(bucket, count)| LatencyBucket {
                up_to_ns: upper_bound_ns(bucket),
                count: *count,
            })
            .collect()
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
    pub fn metric_buckets(&self) -> Vec<(f64, u64)> {
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

    /// Sum of all values in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_ns as f64 / 1e9
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
    fn buckets_have_every_request_once() {
        let histogram = Histogram::default();
        for elapsed_ns in [1, 300, 300, 1 << 20, u64::MAX] {
            histogram.record(elapsed_ns);
        }
        let buckets = Distribution::of([&histogram]).buckets();
        let counts: Vec<u64> = buckets.iter().map(|bucket| bucket.count).collect();
        assert_eq!(counts, [1, 2, 1, 1]);
        assert!(buckets.is_sorted_by_key(|bucket| bucket.up_to_ns));
    }

    #[test]
    fn many_at_once_count_as_often_one_by_one() {
        let (one_by_one, at_once) = (Histogram::default(), Histogram::default());
        for elapsed_ns in [7, 900, 1 << 30] {
            (0..5).for_each(|_| one_by_one.record(elapsed_ns));
            at_once.record_many(elapsed_ns, 5);
        }
        let [one_by_one, at_once] = [&one_by_one, &at_once].map(|one| Distribution::of([one]));
        assert_eq!(at_once.summary(), one_by_one.summary());
        assert_eq!(at_once.sum_seconds(), one_by_one.sum_seconds());
        assert_eq!(at_once.metric_buckets(), one_by_one.metric_buckets());
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
}
