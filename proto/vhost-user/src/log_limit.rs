//! How often something that a guest or a peer can do at will is worth a line in the log.

use std::time::{Duration, Instant};

/// Between two lines about the same thing.
const INTERVAL: Duration = Duration::from_secs(10);

/// Admits a line now and then, and counts those between.
#[derive(Debug, Default)]
pub struct LogLimit {
    last: Option<Instant>,
    withheld: u64,
}

impl LogLimit {
    /// Nothing was written yet.
    pub const fn new() -> LogLimit {
        LogLimit {
            last: None,
            withheld: 0,
        }
    }

    /// Whether to write a line now: then how many were withheld since the last one.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now - last < INTERVAL) {
            self.withheld += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_becomes_one_line_per_interval_that_counts_the_rest() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!(limit.admit_at(start), Some(0));
        assert!((1..1000).all(|ms| limit.admit_at(start + Duration::from_millis(ms)).is_none()));
        assert_eq!(limit.admit_at(start + INTERVAL), Some(999));
        assert_eq!(limit.admit_at(start + 2 * INTERVAL), Some(0));
    }
}
