//! When a thread that has caught up leaves its drivers alone for a moment.
//!
//! Drivers that send many packets in a row send more soon. Looking for each few of them keeps a CPU busy
//! however few they are; a nap as long as it takes until a good batch has gathered costs a wake-up for each
//! batch instead, as interrupt coalescing does in hardware. It pays only when
//!
//! - packets come in numbers: a driver that waits for an answer to one is not to wait for the nap as well;
//! - they come so slowly that the nap is longer than what a wake-up takes;
//! - the timer wakes the thread in time: how late it comes is measured, and forgotten bit by bit while it is
//!   not used, so that a bad moment of the machine does not end the naps for good.

use std::time::{Duration, Instant};

/// Packets that are to gather: half of a small ring.
const BATCH: u64 = 128;
/// From as many packets between two idle moments on, drivers send in numbers.
const MANY: u64 = 16;
/// A shorter nap saves nothing.
const MIN_NAP_NS: u64 = 9_000;
/// Nobody minds to wait as long; what network cards wait by default.
const MAX_NAP_NS: u64 = 50_000;
/// How late a timer comes until it was measured.
const USUAL_DELAY_NS: u64 = 5_000;
/// Of what it came later than that, one part in so many is forgotten at an idle moment without a nap.
const FORGET_PARTS: u64 = 512;

/// One thread's experience.
#[derive(Debug)]
pub(super) struct Pace {
    /// Packets since the last idle moment, and when that was.
    packets: u64,
    idle_at: Instant,
    /// Smoothed: packets between idle moments, and the time between them.
    usual_packets: u64,
    usual_ns: u64,
    /// Smoothed: how much longer naps take than they should.
    delay_ns: u64,
    /// The last idle moment was followed by a nap.
    napped: bool,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Pace {
        Pace {
            packets: 0,
            idle_at: now,
            usual_packets: 0,
            usual_ns: 0,
            delay_ns: USUAL_DELAY_NS,
            napped: false,
        }
    }

    /// So many packets were served.
    #[inline]
    pub(super) fn served(&mut self, packets: u64) {
        self.packets += packets;
    }

    /// There is nothing to do: how long to nap, if that pays.
    pub(super) fn nap(&mut self, now: Instant) -> Option<Duration> {
        let packets = std::mem::take(&mut self.packets);
        let elapsed_ns = nanos(now.saturating_duration_since(self.idle_at));
        self.idle_at = now;
        let has_napped = std::mem::take(&mut self.napped);
        if packets == 0 && !has_napped {
            // As long as nothing comes nothing is learnt.
            return None;
        }
        self.usual_packets = (self.usual_packets * 3).div_ceil(4) + packets / 4;
        self.usual_ns = self.usual_ns * 3 / 4 + elapsed_ns / 4;
        if packets < MANY || self.usual_packets < MANY {
            return None;
        }
        let gather_ns = BATCH * self.usual_ns / self.usual_packets;
        let nap_ns = gather_ns.min(MAX_NAP_NS).saturating_sub(self.delay_ns);
        self.napped = nap_ns >= MIN_NAP_NS;
        if !self.napped {
            self.delay_ns -= self.delay_ns.saturating_sub(USUAL_DELAY_NS) / FORGET_PARTS;
        }
        self.napped.then(|| Duration::from_nanos(nap_ns))
    }

    /// A nap took so long.
    pub(super) fn woke(&mut self, wanted: Duration, took: Duration) {
        let delay_ns = nanos(took.saturating_sub(wanted)).min(MAX_NAP_NS);
        self.delay_ns = (self.delay_ns * 7 + delay_ns) / 8;
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A load of `packets` each `us` microseconds, for a while.
    fn after(packets: u64, us: u64) -> Option<Duration> {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut nap = None;
        for _ in 0..50 {
            now += Duration::from_micros(us);
            pace.served(packets);
            nap = pace.nap(now);
        }
        nap
    }

    #[test]
    fn drivers_that_send_in_numbers_are_left_alone_until_a_batch_has_gathered() {
        let nap = after(64, 16).unwrap();
        assert!(nap > Duration::from_micros(20) && nap < Duration::from_micros(32));
        let slow = after(32, 100).unwrap();
        assert!(slow <= Duration::from_nanos(MAX_NAP_NS), "{slow:?}");
    }

    #[test]
    fn single_packets_and_more_than_can_be_served_allow_no_nap() {
        assert_eq!(after(1, 10), None);
        assert_eq!(after(400, 40), None);
    }

    #[test]
    fn timer_that_comes_late_ends_the_naps() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut naps = 0;
        for _ in 0..100 {
            now += Duration::from_micros(30);
            pace.served(100);
            if let Some(nap) = pace.nap(now) {
                naps += 1;
                pace.woke(nap, nap + Duration::from_micros(60));
            }
        }
        assert!((1..20).contains(&naps), "{naps}");
    }

    #[test]
    fn naps_come_back_when_the_timer_is_in_time_again() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut naps = [0; 2];
        for round in 0..4_000 {
            let is_late = round < 2_000;
            now += Duration::from_micros(30);
            pace.served(100);
            if let Some(nap) = pace.nap(now) {
                naps[usize::from(!is_late)] += 1;
                let delay_us = if is_late { 60 } else { 5 };
                pace.woke(nap, nap + Duration::from_micros(delay_us));
            }
        }
        let [late, in_time] = naps;
        assert!(late < 100, "{late} naps although the timer is late");
        assert!(in_time > 1_000, "{in_time} naps when it no longer is");
    }

    #[test]
    fn nothing_after_a_nap_leads_to_sleep() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..50 {
            now += Duration::from_micros(16);
            pace.served(64);
            pace.nap(now);
        }
        now += Duration::from_micros(40);
        assert_eq!(pace.nap(now), None);
    }
}
