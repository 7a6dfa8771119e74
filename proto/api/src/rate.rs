//! A token bucket that is exact: what it lets pass in any time `t` is at most the burst and
//! `rate * t`, and no less than that while somebody waits.
//!
//! It reserves instead of refusing: each request is told from when on it may go, in the order of
//! the requests, so that whoever shares a bucket gets turns. The data paths of all daemons use it;
//! time is the caller's, in nanoseconds of any clock that does not go backwards.

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Part of a second that a burst covers at least: waiters wake up late, by less than this, and
/// must be able to catch up.
const MIN_BURST_DIVISOR: u64 = 100;

/// So many tokens a second, and so many at once after a pause.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    rate: u64,
    burst: u64,
    /// When everything reserved so far is paid for, in nanoseconds times `rate`: whole tokens are
    /// whole numbers in this unit, so that nothing is ever rounded away.
    paid_until: u128,
}

impl TokenBucket {
    /// A full bucket of `rate` tokens a second, which is not 0. A `burst` of 0 is one second's
    /// worth; one below a hundredth of a second is raised to that.
    pub fn full(rate: u64, burst: u64) -> Self {
        assert!(rate > 0, "a rate of 0 would mean for ever");
        let burst = if burst == 0 { rate } else { burst };
        Self {
            rate,
            burst: burst.max(rate / MIN_BURST_DIVISOR).max(1),
            paid_until: 0,
        }
    }

    /// As [`full`](Self::full), without anything to begin with.
    pub fn empty(rate: u64, burst: u64, now_ns: u64) -> Self {
        let full = Self::full(rate, burst);
        Self {
            paid_until: full.units(now_ns) + u128::from(full.burst) * NANOS_PER_SECOND,
            ..full
        }
    }

    /// Takes `tokens`; returns from when on they may be used: `now_ns` or later. More than the
    /// burst holds only takes longer.
    pub fn reserve(&mut self, tokens: u64, now_ns: u64) -> u64 {
        let now = self.units(now_ns);
        let price = u128::from(tokens) * NANOS_PER_SECOND;
        self.paid_until = self.paid_until.max(now).saturating_add(price);
        let credit = u128::from(self.burst) * NANOS_PER_SECOND;
        let ready = self.paid_until.saturating_sub(credit);
        if ready <= now {
            return now_ns;
        }
        u64::try_from(ready.div_ceil(u128::from(self.rate))).unwrap_or(u64::MAX)
    }

    fn units(&self, time_ns: u64) -> u128 {
        u128::from(time_ns) * u128::from(self.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Requests of `tokens` each, one after the other, until `until_ns`: how many went.
    fn run(bucket: &mut TokenBucket, tokens: u64, from_ns: u64, until_ns: u64) -> u64 {
        let (mut now, mut went) = (from_ns, 0);
        loop {
            now = bucket.reserve(tokens, now);
            if now >= until_ns {
                return went;
            }
            went += 1;
        }
    }

    #[test]
    fn burst_goes_at_once_and_then_the_rate_holds_exactly() {
        for (rate, burst, tokens) in [(100, 10, 1), (7, 3, 1), (1_000_003, 65_536, 512)] {
            let mut bucket = TokenBucket::full(rate, burst);
            let seconds = 1000;
            let start = 5 * SECOND;
            let went = run(&mut bucket, tokens, start, start + seconds * SECOND) * tokens;
            let allowed = rate * seconds + burst.max(rate / MIN_BURST_DIVISOR);
            assert!(
                went <= allowed && allowed - went <= 2 * tokens,
                "{went} of {allowed} at {rate}"
            );
        }
    }

    #[test]
    fn fast_rates_are_not_rounded_to_nanoseconds() {
        let rate = 3_333_333_333;
        let mut bucket = TokenBucket::full(rate, 1);
        let went = run(&mut bucket, 4096, SECOND, 2 * SECOND) * 4096;
        let allowed = rate + rate / MIN_BURST_DIVISOR;
        assert!(went.abs_diff(allowed) <= 2 * 4096, "{went} of {allowed}");
    }

    #[test]
    fn unused_time_gives_one_burst_and_not_more() {
        let mut bucket = TokenBucket::full(100, 10);
        run(&mut bucket, 1, SECOND, 2 * SECOND);
        let after_a_day = 86_400 * SECOND;
        assert_eq!(run(&mut bucket, 1, after_a_day, after_a_day + 1), 10);
    }

    #[test]
    fn request_larger_than_the_burst_waits_and_passes() {
        let mut bucket = TokenBucket::full(1000, 100);
        let ready = bucket.reserve(1100, 50 * SECOND);
        assert_eq!(ready, 51 * SECOND);
        assert_eq!(bucket.reserve(1000, ready), 52 * SECOND);
    }

    #[test]
    fn empty_bucket_begins_at_the_rate() {
        let mut bucket = TokenBucket::empty(10, 5, SECOND);
        assert_eq!(bucket.reserve(1, SECOND), SECOND + SECOND / 10);
        assert_eq!(bucket.reserve(1, SECOND), SECOND + SECOND / 5);
    }

    #[test]
    fn late_waiters_lose_nothing() {
        let mut bucket = TokenBucket::full(1000, 1);
        let (mut now, mut went) = (SECOND, 0);
        while now < 11 * SECOND {
            now = bucket.reserve(1, now) + 3_000_000;
            went += 1;
            // What piled up goes at once.
            while bucket.clone().reserve(1, now) <= now {
                bucket.reserve(1, now);
                went += 1;
            }
        }
        assert!((9_950..=10_011).contains(&went), "{went}");
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut bucket = TokenBucket::full(u64::MAX, u64::MAX);
        bucket.reserve(u64::MAX, u64::MAX);
        let mut slow = TokenBucket::full(1, 1);
        for _ in 0..3 {
            slow.reserve(u64::MAX, 1);
        }
        assert_eq!(slow.reserve(1, u64::MAX / 2), u64::MAX);
    }
}
