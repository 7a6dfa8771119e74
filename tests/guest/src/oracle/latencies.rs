//! How long requests took, in buckets of a sixteenth of a power of two.

use serde::{Deserialize, Serialize};

const SUB_BITS: u32 = 4;
const BUCKETS: usize = 64 << SUB_BITS;

/// A histogram of microseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    max_us: u64,
}

/// What of it matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    /// Requests.
    pub count: u64,
    /// Half of them took at most this.
    pub p50_us: u64,
    /// 99 of 100 did.
    pub p99_us: u64,
    /// All did.
    pub max_us: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            buckets: vec![0; BUCKETS],
            count: 0,
            max_us: 0,
        }
    }
}

impl Latencies {
    /// One more request.
    pub fn note(&mut self, us: u64) {
        self.buckets[bucket(us)] += 1;
        self.count += 1;
        self.max_us = self.max_us.max(us);
    }

    /// Those of `other` too.
    pub fn add(&mut self, other: &Self) {
        for (ours, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *ours += theirs;
        }
        self.count += other.count;
        self.max_us = self.max_us.max(other.max_us);
    }

    /// Percentiles, each at most a sixteenth too high.
    #[must_use]
    pub fn spread(&self) -> Spread {
        Spread {
            count: self.count,
            p50_us: self.percentile(50),
            p99_us: self.percentile(99),
            max_us: self.max_us,
        }
    }

    fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank && seen > 0 {
                return highest_of(index).min(self.max_us);
            }
        }
        0
    }
}

fn bucket(us: u64) -> usize {
    let exponent = us.checked_ilog2().unwrap_or(0).max(SUB_BITS) - SUB_BITS;
    ((u64::from(exponent) << SUB_BITS) + (us >> exponent)) as usize
}

fn highest_of(bucket: usize) -> u64 {
    let sub = 1 << SUB_BITS;
    let exponent = (bucket / sub).saturating_sub(1);
    let lead = bucket - exponent * sub;
    ((lead as u64 + 1) << exponent) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_lies_in_its_bucket() {
        for us in (0..5000).chain([1 << 20, 60_000_000, u64::MAX >> 1]) {
            let highest = highest_of(bucket(us));
            assert!(us <= highest && highest - us <= us / 16, "{us} {highest}");
        }
    }

    #[test]
    fn percentiles_are_those_of_the_values() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.spread(), Spread::default());
        (1..=1000).for_each(|us| latencies.note(us));
        let spread = latencies.spread();
        assert_eq!((spread.count, spread.max_us), (1000, 1000));
        assert!((500..532).contains(&spread.p50_us), "{spread:?}");
        assert!((990..1001).contains(&spread.p99_us), "{spread:?}");
    }
}
