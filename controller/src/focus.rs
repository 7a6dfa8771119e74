//! What the reconciler looks at next: what changed, what could not be told when it was tried, and, little
//! by little, everything else, so that nothing depends on having noticed a change.
//!
//! ```text
//! record changed, host says something else --> due
//! all calls are taken                      --> calls --a call ended--> due
//! somebody else was faster                 --> again --a moment later-> due
//! everything, once a round                 --> sweep
//! ```

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::plan::{Desired, Fleet, Index, Observed, Part};

/// VMs and volumes that one look is about at most, beside those of a sweep.
const MAX_DUE: usize = 2_000;
/// VMs or volumes of one step of a sweep. Where there are no more, each look is at everything.
const SWEEP: usize = 1_000;
/// Between two steps of a sweep at least: a fleet in which nothing happens costs next to nothing.
const SWEEP_PAUSE: Duration = Duration::from_millis(250);
/// Of those without a host, when a host may have room.
const MAX_UNPLACED: usize = 1_000;
/// Before what somebody else was faster with is looked at again.
const AGAIN_AFTER: Duration = Duration::from_millis(20);

/// See the module.
pub struct Focus {
    due: Queue,
    hosts: BTreeSet<String>,
    /// Would be told to a host if a call was free.
    calls: Queue,
    again: BTreeSet<String>,
    again_at: Option<Instant>,
    /// As of the last look.
    seen: Arc<Fleet>,
    lost: BTreeSet<String>,
    sweep: Sweep,
    /// How long a sweep over everything takes, unless there is very much.
    round: Duration,
}

/// Each once, first come first served.
#[derive(Default)]
struct Queue {
    order: VecDeque<String>,
    members: HashSet<String>,
}

impl Queue {
    fn push(&mut self, name: &str) {
        if !self.members.contains(name) {
            self.members.insert(name.to_owned());
            self.order.push_back(name.to_owned());
        }
    }

    fn take(&mut self, most: usize) -> impl Iterator<Item = String> {
        let count = most.min(self.order.len());
        self.order.drain(..count).inspect(|name| {
            self.members.remove(name);
        })
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

/// Where a sweep is, and when it goes on.
struct Sweep {
    vm: String,
    volume: String,
    host: String,
    at: Instant,
}

impl Focus {
    /// Nothing was looked at yet; a sweep over everything takes `round`.
    pub fn new(round: Duration) -> Self {
        Self {
            due: Queue::default(),
            hosts: BTreeSet::new(),
            calls: Queue::default(),
            again: BTreeSet::new(),
            again_at: None,
            seen: Arc::default(),
            lost: BTreeSet::new(),
            sweep: Sweep {
                vm: String::new(),
                volume: String::new(),
                host: String::new(),
                at: Instant::now(),
            },
            round,
        }
    }

    /// A VM's or volume's record changed.
    pub fn name(&mut self, name: &str) {
        self.due.push(name);
    }

    /// Nothing is known of what was done.
    pub fn everything(&mut self, desired: &Desired) {
        let names = desired.vms.keys().chain(desired.volumes.keys());
        names.for_each(|name| self.due.push(name));
        self.hosts.extend(desired.hosts.keys().cloned());
    }

    /// A host's record changed: all that is there is looked at.
    pub fn host(&mut self, host: &str, index: &Index) {
        self.hosts.insert(host.to_owned());
        self.all_of(host, index);
        self.unplaced(index);
    }

    /// What has no host may find one.
    pub fn unplaced(&mut self, index: &Index) {
        for name in index.placed("").take(MAX_UNPLACED) {
            self.due.push(name);
        }
    }

    /// A host should be told something of `name`, and all calls are taken.
    pub fn no_call(&mut self, host: &str, name: &str) {
        self.calls.push(name);
        self.again_of_host(host);
    }

    /// Somebody else changed something that an action was about.
    pub fn again(&mut self, name: &str) {
        self.again.insert(name.to_owned());
        self.again_at
            .get_or_insert_with(|| Instant::now() + AGAIN_AFTER);
    }

    /// An operation's work on a host is wanted otherwise, or no more.
    pub fn job(&mut self, host: &str) {
        self.again_of_host(host);
    }

    /// A call about `name` is over.
    pub fn told(&mut self, host: &str, name: &str) {
        self.due.push(name);
        self.again_of_host(host);
    }

    /// What hosts have that is not theirs is not in the index.
    fn again_of_host(&mut self, host: &str) {
        if !self.hosts.contains(host) {
            self.hosts.insert(host.to_owned());
        }
    }

    /// Notes what is seen otherwise than at the last look, and who is lost now.
    pub fn see(&mut self, fleet: &Arc<Fleet>, lost: &BTreeSet<String>, index: &Index) {
        let before = std::mem::replace(&mut self.seen, fleet.clone());
        if Arc::ptr_eq(&before, fleet) {
            return self.see_lost(lost, index);
        }
        // Both are in order.
        let mut earlier = before.hosts.iter().peekable();
        for (host, seen) in &fleet.hosts {
            while let Some((gone, _)) = earlier.next_if(|(id, _)| *id < host) {
                self.all_of(gone, index);
            }
            match earlier.next_if(|(id, _)| *id == host) {
                Some((_, last)) if Arc::ptr_eq(last, seen) => {}
                last => self.compare(host, last.map(|(_, last)| last.as_ref()), seen, index),
            }
        }
        earlier.for_each(|(gone, _)| self.all_of(gone, index));
        self.see_lost(lost, index);
    }

    fn see_lost(&mut self, lost: &BTreeSet<String>, index: &Index) {
        if self.lost != *lost {
            let changed: Vec<String> = self.lost.symmetric_difference(lost).cloned().collect();
            changed.iter().for_each(|host| self.all_of(host, index));
            self.lost.clone_from(lost);
        }
    }

    fn compare(&mut self, host: &str, last: Option<&Observed>, seen: &Observed, index: &Index) {
        self.hosts.insert(host.to_owned());
        let session = |seen: &Observed| seen.host.as_ref().map(|host| host.lease_session.clone());
        let Some(last) = last.filter(|last| {
            last.connected == seen.connected
                && session(last) == session(seen)
                && last.networks == seen.networks
        }) else {
            self.all_of(host, index);
            self.unplaced(index);
            return;
        };
        for node_id in differing(&last.vms, &seen.vms) {
            if let Some(name) = index.vm_of(node_id) {
                self.due.push(name);
            }
        }
        for node_id in differing(&last.volumes, &seen.volumes) {
            if let Some(name) = index.volume_of(node_id) {
                self.due.push(name);
            }
        }
    }

    fn all_of(&mut self, host: &str, index: &Index) {
        for name in index.placed(host) {
            self.due.push(name);
        }
    }

    /// What is looked at now; so many calls are free.
    pub fn next(&mut self, desired: &Desired, index: &Index, free_calls: usize) -> Part {
        let now = Instant::now();
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            for name in std::mem::take(&mut self.again) {
                self.due.push(&name);
            }
        }
        let mut part = Part {
            names: self.due.take(MAX_DUE).collect(),
            hosts: std::mem::take(&mut self.hosts),
            ..Part::default()
        };
        part.names.extend(self.calls.take(free_calls));
        self.sweep(desired, &mut part, now);
        part.with_operations(index)
    }

    fn sweep(&mut self, desired: &Desired, part: &mut Part, now: Instant) {
        let steps = steps(desired);
        let sweep = &mut self.sweep;
        if steps > 1 && now < sweep.at {
            return;
        }
        sweep.at = now + (self.round / steps).max(SWEEP_PAUSE);
        slice(&desired.vms, &mut sweep.vm, steps, &mut part.names);
        slice(&desired.volumes, &mut sweep.volume, steps, &mut part.names);
        slice(&desired.hosts, &mut sweep.host, steps, &mut part.hosts);
    }

    /// How long nothing needs to be looked at if nothing happens; `idle`: no call is under way.
    pub fn rest(&self, idle: bool) -> Duration {
        if !self.due.is_empty() || (idle && !self.calls.is_empty()) {
            return Duration::ZERO;
        }
        let until = self.again_at.into_iter().chain([self.sweep.at]).min();
        let rest = until.map(|until| until.saturating_duration_since(Instant::now()));
        rest.unwrap_or(self.round).min(self.round)
    }
}

/// Steps of a sweep over everything.
fn steps(desired: &Desired) -> u32 {
    let most = desired.vms.len().max(desired.volumes.len());
    u32::try_from(most.div_ceil(SWEEP).max(1)).unwrap_or(u32::MAX)
}

/// Takes one step's share of the keys after `last`, or after the first one again.
fn slice<T>(
    map: &BTreeMap<String, T>,
    last: &mut String,
    steps: u32,
    share: &mut BTreeSet<String>,
) {
    let count = map.len().div_ceil(steps as usize);
    let range = (Bound::Excluded(last.as_str()), Bound::Unbounded);
    let keys: Vec<&String> = map
        .range::<str, _>(range)
        .take(count)
        .map(|entry| entry.0)
        .collect();
    let end = map.last_key_value().map(|entry| entry.0);
    let next = keys.last().filter(|key| Some(**key) != end);
    let next = next.map_or_else(String::new, |key| (*key).clone());
    share.extend(keys.into_iter().cloned());
    *last = next;
}

/// Keys of what is not the same in both.
fn differing<'a, T: PartialEq>(
    one: &'a BTreeMap<String, T>,
    other: &'a BTreeMap<String, T>,
) -> impl Iterator<Item = &'a str> {
    let changed = other
        .iter()
        .filter(|(key, value)| one.get(*key) != Some(*value));
    let gone = one.keys().filter(|key| !other.contains_key(*key));
    changed.map(|(key, _)| key).chain(gone).map(String::as_str)
}

#[cfg(test)]
mod tests;
