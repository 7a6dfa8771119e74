//! How many frames for everybody a port may send.
//!
//! Each is copied to every port of its VLAN, so that a guest could keep the whole switch busy with
//! a few.

use std::time::Instant;

/// What makes a frame one for everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storm {
    Broadcast,
    Multicast,
    /// For an address that nobody is known to have.
    UnknownUnicast,
}

/// Frames in a second: some ten times what ARP, DHCP and neighbour discovery of a busy guest make.
const BROADCASTS: f64 = 5_000.0;
/// Streams are multicast.
const MULTICASTS: f64 = 50_000.0;
/// Only until the first answer.
const UNKNOWN_UNICASTS: f64 = 10_000.0;

/// Seconds' worth that may come at once.
const BURST_SECONDS: f64 = 0.2;

/// One transmit ring's share.
#[derive(Debug)]
pub(super) struct StormLimits([Bucket; 3]);

#[derive(Debug)]
struct Bucket {
    per_second: f64,
    left: f64,
    filled_at: Instant,
}

impl StormLimits {
    pub(super) fn new(now: Instant) -> Self {
        Self(
            [BROADCASTS, MULTICASTS, UNKNOWN_UNICASTS].map(|per_second| Bucket {
                per_second,
                left: per_second * BURST_SECONDS,
                filled_at: now,
            }),
        )
    }

    /// Whether one more may be sent.
    pub(super) fn admit(&mut self, storm: Storm, now: Instant) -> bool {
        let bucket = &mut self.0[match storm {
            Storm::Broadcast => 0,
            Storm::Multicast => 1,
            Storm::UnknownUnicast => 2,
        }];
        let passed = now
            .saturating_duration_since(bucket.filled_at)
            .as_secs_f64();
        bucket.filled_at = now;
        bucket.left =
            (bucket.left + passed * bucket.per_second).min(bucket.per_second * BURST_SECONDS);
        let admitted = bucket.left >= 1.0;
        if admitted {
            bucket.left -= 1.0;
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn flood_gets_its_burst_and_its_rate_and_leaves_others_theirs() {
        let start = Instant::now();
        let mut limits = StormLimits::new(start);
        let mut admitted = 0;
        for ms in 0..1000 {
            let now = start + Duration::from_millis(ms);
            admitted += (0..100)
                .filter(|_| limits.admit(Storm::Broadcast, now))
                .count();
        }
        let expected = BROADCASTS * (1.0 + BURST_SECONDS);
        assert!((admitted as f64 - expected).abs() < 20.0, "{admitted}");
        assert!(limits.admit(Storm::Multicast, start + Duration::from_secs(1)));
    }
}
