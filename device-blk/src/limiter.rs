//! Rate limits of a disk: requests and bytes a second, for reads and for writes.
//!
//! All queues share the disk's [`Limiter`]. A request that comes too early waits in its queue,
//! in order, reads apart from writes, and is asked for again when its time has come. Only the
//! first one that waits in each queue and direction has reserved its turn, so queues get turns
//! alternately, however many requests each has.
//!
//! A discard or write-zeroes counts as one write of no bytes; flushes are free.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::device::{RateLimit, RateLimits};
use api::rate::TokenBucket;

use crate::engine::alarm::monotonic_ns;
use crate::engine::backend::Admission;
use crate::image::Access;

/// The limits of one disk.
#[derive(Debug)]
pub(crate) struct Limiter {
    /// By [`Access`].
    is_limited: [AtomicBool; 2],
    throttled: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limits: RateLimits,
    /// By [`Access`].
    lanes: [Lane; 2],
}

/// One direction.
#[derive(Debug)]
struct Lane {
    ios: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
    /// When the first request that waits may go, by queue.
    turns: Vec<Option<u64>>,
}

impl Limiter {
    pub(crate) fn new(limits: RateLimits) -> Arc<Self> {
        let lanes = lanes(&limits, TokenBucket::full);
        Arc::new(Self {
            is_limited: lanes
                .each_ref()
                .map(|lane| AtomicBool::new(lane.is_limited())),
            throttled: AtomicU64::new(0),
            state: Mutex::new(State { limits, lanes }),
        })
    }

    /// Replaces the limits at once, also for what waits: the queues are to be woken afterwards.
    /// The same limits again change nothing.
    pub(crate) fn set(&self, limits: RateLimits) {
        self.set_at(limits, monotonic_ns());
    }

    fn set_at(&self, limits: RateLimits, now_ns: u64) {
        let mut state = self.state();
        if state.limits == limits {
            return;
        }
        // From here on there is no burst to be had: whoever changes limits often would give away
        // one each time.
        state.lanes = lanes(&limits, |rate, burst| {
            TokenBucket::empty(rate, burst, now_ns)
        });
        state.limits = limits;
        for (is_limited, lane) in self.is_limited.iter().zip(&state.lanes) {
            is_limited.store(lane.is_limited(), Ordering::Relaxed);
        }
    }

    pub(crate) fn limits(&self) -> RateLimits {
        self.state().limits
    }

    /// Requests that had to wait.
    pub(crate) fn throttled(&self) -> u64 {
        self.throttled.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission for Limiter {
    fn is_limited(&self) -> bool {
        self.is_limited
            .iter()
            .any(|lane| lane.load(Ordering::Relaxed))
    }

    fn admit(&self, queue: u16, access: Access, len_bytes: u64, now_ns: u64) -> Result<(), u64> {
        if !self.is_limited[access as usize].load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut state = self.state();
        let turn = state.lanes[access as usize].turn(queue, len_bytes, now_ns);
        drop(state);
        match turn {
            Turn::Now => Ok(()),
            Turn::Later(at_ns) => Err(at_ns),
            Turn::Reserved(at_ns) => {
                self.throttled.fetch_add(1, Ordering::Relaxed);
                Err(at_ns)
            }
        }
    }
}

enum Turn {
    Now,
    /// As was said before.
    Later(u64),
    /// Said for the first time.
    Reserved(u64),
}

impl Lane {
    fn is_limited(&self) -> bool {
        self.ios.is_some() || self.bytes.is_some()
    }

    fn turn(&mut self, queue: u16, len_bytes: u64, now_ns: u64) -> Turn {
        let queue = usize::from(queue);
        if self.turns.len() <= queue {
            self.turns.resize(queue + 1, None);
        }
        if let Some(at_ns) = self.turns[queue] {
            if at_ns > now_ns {
                return Turn::Later(at_ns);
            }
            self.turns[queue] = None;
            return Turn::Now;
        }
        let ios = self.ios.as_mut().map(|ios| ios.reserve(1, now_ns));
        let bytes = self
            .bytes
            .as_mut()
            .map(|bytes| bytes.reserve(len_bytes, now_ns));
        match ios.max(bytes) {
            Some(at_ns) if at_ns > now_ns => {
                self.turns[queue] = Some(at_ns);
                Turn::Reserved(at_ns)
            }
            _ => Turn::Now,
        }
    }
}

fn lanes(limits: &RateLimits, make: impl Fn(u64, u64) -> TokenBucket) -> [Lane; 2] {
    let bucket = |rate, burst| (rate > 0).then(|| make(rate, burst));
    [limits.read, limits.write].map(|limit: Option<RateLimit>| {
        let limit = limit.unwrap_or_default();
        Lane {
            ios: bucket(limit.iops, limit.burst_ios),
            bytes: bucket(limit.bytes_per_second, limit.burst_bytes),
            turns: Vec::new(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn write_iops(iops: u64, burst_ios: u64) -> RateLimits {
        RateLimits {
            read: None,
            write: Some(RateLimit {
                iops,
                burst_ios,
                ..RateLimit::default()
            }),
        }
    }

    /// Requests that queue `queue` gets through from `from_ns` to `until_ns`, asking when told to.
    fn run(limiter: &Limiter, queue: u16, len_bytes: u64, from_ns: u64, until_ns: u64) -> u64 {
        let (mut now, mut went) = (from_ns, 0);
        while now < until_ns {
            match limiter.admit(queue, Access::Write, len_bytes, now) {
                Ok(()) => went += 1,
                Err(at_ns) => now = at_ns,
            }
        }
        went
    }

    #[test]
    fn unlimited_requests_pass() {
        let limiter = Limiter::new(RateLimits::default());
        assert!(!limiter.is_limited());
        for _ in 0..1000 {
            assert_eq!(limiter.admit(3, Access::Write, 1 << 30, 0), Ok(()));
        }
    }

    #[test]
    fn writes_that_wait_do_not_hold_up_reads() {
        let limiter = Limiter::new(write_iops(1, 1));
        assert_eq!(limiter.admit(0, Access::Write, 512, SECOND), Ok(()));
        assert_eq!(
            limiter.admit(0, Access::Write, 512, SECOND),
            Err(2 * SECOND)
        );
        assert_eq!(limiter.admit(0, Access::Read, 512, SECOND), Ok(()));
        assert_eq!(
            limiter.admit(0, Access::Write, 512, SECOND + 1),
            Err(2 * SECOND),
            "asking again changes nothing"
        );
        assert_eq!(limiter.throttled(), 1);
        assert_eq!(limiter.admit(0, Access::Write, 512, 2 * SECOND), Ok(()));
    }

    #[test]
    fn stricter_of_requests_and_bytes_holds() {
        let limits = |iops, bytes_per_second| RateLimits {
            read: None,
            write: Some(RateLimit {
                iops,
                bytes_per_second,
                burst_ios: 1,
                burst_bytes: 4096,
            }),
        };
        let by_ios = Limiter::new(limits(100, 1 << 30));
        assert!((1000..=1002).contains(&run(&by_ios, 0, 4096, SECOND, 11 * SECOND)));
        let by_bytes = Limiter::new(limits(1 << 20, 409_600));
        assert!((999..=1002).contains(&run(&by_bytes, 0, 4096, SECOND, 11 * SECOND)));
    }

    #[test]
    fn queues_get_turns_however_many_requests_they_have() {
        let limiter = Limiter::new(write_iops(100, 1));
        let (mut now, mut went) = (SECOND, [0; 2]);
        while now < 11 * SECOND {
            // Queue 0 always asks first, and again and again.
            let first = limiter.admit(0, Access::Write, 512, now);
            let second = limiter.admit(1, Access::Write, 512, now);
            let next = [first, second]
                .into_iter()
                .enumerate()
                .filter_map(|(queue, result)| {
                    went[queue] += u64::from(result.is_ok());
                    result.err()
                });
            now = next.min().unwrap_or(now);
        }
        assert!(went[0].abs_diff(went[1]) <= 2, "{went:?}");
        assert!((998..=1003).contains(&(went[0] + went[1])), "{went:?}");
    }

    #[test]
    fn change_holds_at_once_for_those_who_wait() {
        let limiter = Limiter::new(write_iops(1, 1));
        assert_eq!(limiter.admit(0, Access::Write, 512, SECOND), Ok(()));
        assert!(limiter.admit(0, Access::Write, 512, SECOND).is_err());
        limiter.set_at(write_iops(1000, 0), SECOND);
        assert_eq!(
            limiter.admit(0, Access::Write, 512, SECOND),
            Err(SECOND + SECOND / 1000)
        );
        limiter.set_at(RateLimits::default(), SECOND);
        assert!(!limiter.is_limited());
        assert_eq!(limiter.admit(0, Access::Write, 512, SECOND), Ok(()));
    }

    #[test]
    fn setting_limits_again_and_again_gives_no_bursts() {
        let limiter = Limiter::new(write_iops(100, 50));
        let burst = run(&limiter, 0, 512, SECOND, SECOND + 1);
        assert_eq!(burst, 50);
        let mut went = 0;
        for step in 0..10 {
            let now = SECOND + step * SECOND / 10;
            limiter.set_at(write_iops(100 + step % 2, 50), now);
            went += run(&limiter, 0, 512, now, now + SECOND / 10);
        }
        assert!((80..=110).contains(&went), "{went}");
    }
}
