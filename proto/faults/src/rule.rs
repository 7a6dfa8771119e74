//! One rule: what was asked for, and what became of it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::action::{Action, Point};
use crate::event::{Event, Op, Selector};
use crate::trigger::{Trigger, scramble};

/// Hits that a rule remembers one by one.
pub const LAST_HITS: usize = 256;

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Of the rule among those it is armed with.
    pub name: String,
    /// Which events.
    pub selector: Selector,
    /// Which of them.
    pub trigger: Trigger,
    /// After it was armed.
    pub start_after: Duration,
    /// From then on; `None` for as long as it is armed.
    pub duration: Option<Duration>,
    /// What is done.
    pub action: Action,
}

/// One event that was hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Counted from 1.
    pub number: u64,
    /// `CLOCK_MONOTONIC`
    pub at_ns: u64,
    /// Id of the device.
    pub device: String,
    /// Of the event, as far as it is known.
    pub queue: Option<u16>,
    /// Likewise.
    pub op: Option<Op>,
    /// First sector.
    pub sector: Option<u64>,
    /// Name of a vhost-user request.
    pub message: Option<String>,
}

/// What became of a rule so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleStatus {
    /// As in [`Rule`].
    pub name: String,
    /// Events that the selector matched while the rule was active.
    pub seen: u64,
    /// Of these, hit.
    pub hits: u64,
    /// The last [`LAST_HITS`], oldest first.
    pub last_hits: Vec<Hit>,
}

/// A rule at work.
#[derive(Debug)]
pub(crate) struct ArmedRule {
    pub(crate) rule: Rule,
    pub(crate) point: Point,
    seed: u64,
    armed_ns: u64,
    /// Of all rules that were armed together; 0 once they are disarmed.
    pub(crate) expires_ns: Arc<AtomicU64>,
    seen: AtomicU64,
    hits: AtomicU64,
    last_hits: Mutex<VecDeque<Hit>>,
}

impl ArmedRule {
    pub(crate) fn new(rule: Rule, seed: u64, armed_ns: u64, expires_ns: Arc<AtomicU64>) -> Self {
        Self {
            point: rule.action.point(&rule.selector),
            rule,
            seed,
            armed_ns,
            expires_ns,
            seen: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            last_hits: Mutex::default(),
        }
    }

    /// Asks the rule about an event of `device`: when it is hit, a random number for the details.
    pub(crate) fn strike(&self, device: &str, event: &Event<'_>, now_ns: u64) -> Option<u64> {
        if self.point != event.point
            || !self.is_active(now_ns)
            || !self.rule.selector.matches(event, &self.rule.action)
        {
            return None;
        }
        let number = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        if !self.rule.trigger.is_due(number, self.seed) {
            return None;
        }
        let hit_number = self.count_hit()?;
        self.remember(Hit {
            number: hit_number,
            at_ns: now_ns,
            device: device.to_owned(),
            queue: event.queue,
            op: event.op,
            sector: event.sectors.map(|(first, _)| first),
            message: event.message.map(str::to_owned),
        });
        // Of another sequence than the trigger's: what is hit says nothing of how.
        Some(scramble(!self.seed, number))
    }

    /// The number of the hit; None when there were enough.
    fn count_hit(&self) -> Option<u64> {
        let max_hits = self.rule.trigger.max_hits.unwrap_or(u64::MAX);
        self.hits
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |hits| {
                (hits < max_hits).then_some(hits + 1)
            })
            .ok()
            .map(|before| before + 1)
    }

    fn remember(&self, hit: Hit) {
        let mut last_hits = self.last_hits();
        if last_hits.len() == LAST_HITS {
            last_hits.pop_front();
        }
        last_hits.push_back(hit);
    }

    fn is_active(&self, now_ns: u64) -> bool {
        let begins_ns = self.begins_ns();
        (begins_ns..self.ends_ns()).contains(&now_ns)
    }

    fn begins_ns(&self) -> u64 {
        self.armed_ns.saturating_add(as_ns(self.rule.start_after))
    }

    /// What it did is to be over then.
    pub(crate) fn ends_ns(&self) -> u64 {
        let by_itself = match self.rule.duration {
            Some(duration) => self.begins_ns().saturating_add(as_ns(duration)),
            None => u64::MAX,
        };
        by_itself.min(self.expires_ns.load(Ordering::Relaxed))
    }

    /// When something about it changes by itself next, after `now_ns`.
    pub(crate) fn next_change_ns(&self, now_ns: u64) -> Option<u64> {
        [self.begins_ns(), self.ends_ns()]
            .into_iter()
            .find(|&at_ns| at_ns > now_ns && at_ns <= self.ends_ns())
    }

    pub(crate) fn status(&self) -> RuleStatus {
        RuleStatus {
            name: self.rule.name.clone(),
            seen: self.seen.load(Ordering::Relaxed),
            hits: self.hits.load(Ordering::Relaxed),
            last_hits: self.last_hits().iter().cloned().collect(),
        }
    }

    fn last_hits(&self) -> MutexGuard<'_, VecDeque<Hit>> {
        self.last_hits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn as_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
