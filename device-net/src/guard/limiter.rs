//! Rate limits of a NIC: bits and packets a second, each way.
//!
//! All queues share the buckets. A frame goes if everything before it is paid for, and may leave a
//! debt that those after it wait for: so frames that are larger than the burst get through, and
//! nobody needs to hold a reservation.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use api::device::{NetLimit, NetLimits};
use api::rate::TokenBucket;
use filter::Direction;

use super::lock;

/// Whoever waits asks again after this time at the latest: the limits may have changed.
const MAX_WAIT_NS: u64 = 100_000_000;

/// Part of a second that a burst covers unless it is given.
const DEFAULT_BURST_DIVISOR: u64 = 10;

#[derive(Debug, Default)]
pub(super) struct Limiter {
    limits: Mutex<NetLimits>,
    /// By [`Direction`].
    lanes: [Mutex<Lane>; 2],
    throttled: [AtomicU64; 2],
}

#[derive(Debug, Default)]
struct Lane {
    bits: Option<TokenBucket>,
    packets: Option<TokenBucket>,
}

impl Limiter {
    pub(super) fn set(&self, limits: NetLimits, now_ns: u64) {
        let mut current = lock(&self.limits);
        // A new bucket is empty: whoever sets limits often would give away a burst each time.
        if *current == limits {
            return;
        }
        for direction in Direction::ALL {
            *lock(&self.lanes[direction as usize]) = Lane::new(of(&limits, direction), now_ns);
        }
        *current = limits;
    }

    pub(super) fn limits(&self) -> NetLimits {
        *lock(&self.limits)
    }

    pub(super) fn is_limited(&self, direction: Direction) -> bool {
        let lane = lock(&self.lanes[direction as usize]);
        lane.bits.is_some() || lane.packets.is_some()
    }

    pub(super) fn throttled(&self, direction: Direction) -> u64 {
        self.throttled[direction as usize].load(Ordering::Relaxed)
    }

    pub(super) fn admit(
        &self,
        direction: Direction,
        len_bytes: usize,
        now_ns: u64,
    ) -> Result<(), u64> {
        let admitted = lock(&self.lanes[direction as usize]).admit(len_bytes, now_ns);
        if admitted.is_err() {
            self.throttled[direction as usize].fetch_add(1, Ordering::Relaxed);
        }
        admitted.map_err(|ready_ns| ready_ns.min(now_ns + MAX_WAIT_NS))
    }
}

impl Lane {
    fn new(limit: NetLimit, now_ns: u64) -> Self {
        let bucket = |rate: u64, burst: u64| {
            let burst = if burst == 0 {
                (rate / DEFAULT_BURST_DIVISOR).max(1)
            } else {
                burst
            };
            (rate > 0).then(|| TokenBucket::empty(rate, burst, now_ns))
        };
        Self {
            bits: bucket(limit.bits_per_second, limit.burst_bits),
            packets: bucket(limit.packets_per_second, limit.burst_packets),
        }
    }

    fn admit(&mut self, len_bytes: usize, now_ns: u64) -> Result<(), u64> {
        let debt = |bucket: &mut Option<TokenBucket>| {
            bucket
                .as_mut()
                .map_or(now_ns, |bucket| bucket.reserve(0, now_ns))
        };
        let ready_ns = debt(&mut self.bits).max(debt(&mut self.packets));
        if ready_ns > now_ns {
            return Err(ready_ns);
        }
        if let Some(bits) = &mut self.bits {
            bits.reserve(len_bytes as u64 * 8, now_ns);
        }
        if let Some(packets) = &mut self.packets {
            packets.reserve(1, now_ns);
        }
        Ok(())
    }
}

fn of(limits: &NetLimits, direction: Direction) -> NetLimit {
    match direction {
        Direction::Ingress => limits.ingress,
        Direction::Egress => limits.egress,
    }
    .unwrap_or_default()
}
