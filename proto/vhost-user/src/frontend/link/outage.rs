//! The losses of a backend, and how each went on: a bounded log.
//!
//! ```text
//!   serving ── lost ──▶ out ── connected ──▶ replaying ── replayed ──▶ serving, a completion is due
//!                        ▲                       │                          │ a used index moved,
//!                        └───────── lost ────────┘                          ▼ or nothing is due
//!                                                                        serving
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

/// Outages that are remembered. A day of one every five minutes.
const LOG_LIMIT: usize = 256;

/// One loss of the backend. Times are counted from its begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// From 1, without gaps.
    pub number: u64,
    /// When the connection was lost.
    pub began: SystemTime,
    /// Why it was given up.
    pub cause: String,
    /// Requests in flight then.
    pub in_flight: u32,
    /// A backend answered the handshake: the last one before the replay succeeded.
    pub connected_after: Option<Duration>,
    /// All rings run again, or would if the driver used them.
    pub replayed_after: Option<Duration>,
    /// A used index moved, or all that was in flight turned out to be completed. Stays `None` where nothing
    /// was to be completed, and when the backend was lost again before.
    pub first_completion_after: Option<Duration>,
    /// The connection that ended it.
    pub incarnation: u64,
}

impl Outage {
    /// How long requests were not served; `None` until the replay is over.
    #[must_use]
    pub fn recovery(&self) -> Option<Duration> {
        self.first_completion_after.or(self.replayed_after)
    }
}

/// The last outages of a link.
#[derive(Debug, Default)]
pub(super) struct OutageLog {
    outages: VecDeque<Outage>,
    total: u64,
    /// Of the newest one.
    began: Option<Instant>,
}

impl OutageLog {
    pub(super) fn begin(&mut self, cause: &str, in_flight: u32) {
        if self.outages.len() == LOG_LIMIT {
            self.outages.pop_front();
        }
        self.total += 1;
        self.began = Some(Instant::now());
        self.outages.push_back(Outage {
            number: self.total,
            began: SystemTime::now(),
            cause: cause.to_owned(),
            in_flight,
            connected_after: None,
            replayed_after: None,
            first_completion_after: None,
            incarnation: 0,
        });
    }

    /// Each connection is noted until one serves.
    pub(super) fn connected(&mut self) {
        if let Some((outage, after)) = self.open() {
            outage.connected_after = Some(after);
        }
    }

    pub(super) fn replayed(&mut self, incarnation: u64) {
        if let Some((outage, after)) = self.open() {
            outage.replayed_after = Some(after);
            outage.incarnation = incarnation;
        }
    }

    /// To be called once after a replay.
    pub(super) fn completed(&mut self) {
        let after = self.began.map(|began| began.elapsed());
        if let Some(outage) = self.outages.back_mut() {
            outage.first_completion_after = after;
        }
    }

    /// Requests in flight when the newest one began.
    pub(super) fn newest_in_flight(&self) -> u32 {
        self.outages.back().map_or(0, |outage| outage.in_flight)
    }

    /// Since when nobody serves.
    pub(super) fn stalled_since(&self) -> Option<SystemTime> {
        let newest = self.outages.back()?;
        newest.replayed_after.is_none().then_some(newest.began)
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    pub(super) fn last_recovery(&self) -> Option<Duration> {
        self.outages.iter().rev().find_map(Outage::recovery)
    }

    /// The newest `count`, oldest first.
    pub(super) fn newest(&self, count: usize) -> Vec<Outage> {
        let skipped = self.outages.len().saturating_sub(count);
        self.outages.iter().skip(skipped).cloned().collect()
    }

    /// The newest one and its age, if it is not over.
    fn open(&mut self) -> Option<(&mut Outage, Duration)> {
        let after = self.began?.elapsed();
        let newest = self.outages.back_mut()?;
        newest.replayed_after.is_none().then_some((newest, after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_keeps_the_newest_and_counts_all() {
        let mut log = OutageLog::default();
        for _ in 0..LOG_LIMIT + 3 {
            log.begin("hung up", 1);
            log.connected();
            log.replayed(2);
        }
        assert_eq!(log.total(), LOG_LIMIT as u64 + 3);
        let kept = log.newest(usize::MAX);
        assert_eq!((kept.len(), kept[0].number), (LOG_LIMIT, 4));
        assert_eq!(log.newest(2)[0].number, LOG_LIMIT as u64 + 2);
    }

    #[test]
    fn outage_lasts_until_the_replay_whoever_connects_meanwhile() {
        let mut log = OutageLog::default();
        assert_eq!(log.stalled_since(), None);
        log.begin("hung up", 3);
        log.connected();
        assert_eq!(log.stalled_since(), Some(log.newest(1)[0].began));
        log.connected();
        assert_eq!((log.total(), log.last_recovery()), (1, None));
        log.replayed(4);
        assert_eq!(log.stalled_since(), None);
        let replayed = log.last_recovery().unwrap();
        log.completed();
        assert!(log.last_recovery().unwrap() >= replayed);
        // The next one's parts are its own.
        log.begin("hung up", 0);
        assert_eq!(log.newest(1)[0].connected_after, None);
        assert!(log.last_recovery().is_some(), "of the one before");
    }
}
