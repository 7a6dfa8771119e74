//! What a run must have met, or it has shown nothing: each is counted where it bites, not where a fault
//! begins.

use std::collections::BTreeMap;
use std::sync::Mutex;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hit {
    /// The disk's server refused a write of a stale side.
    StaleWrite,
    /// All of a host stood still until its lease was over, and a VM was still taken for running.
    HostOverslept,
    /// Its agent alone did: the devices stopped by themselves.
    AgentOverslept,
    /// A command was admitted by an agent, which then stood still before it did it.
    CommandOverslept,
    /// An agent ended between its admission of a command and doing it.
    CommandLost,
    /// A leader stood still until another one led.
    LeaderOverslept,
    /// A leader's transaction came when somebody else led, and was refused.
    DeposedWrite,
    /// The store had no space for a transaction.
    StoreFull,
    StoreUnreachable,
    /// Nobody said whether a transaction happened.
    StoreInDoubt,
    /// The store forgot what a watch was to deliver next.
    CompactedUnderWatch,
}

impl Hit {
    pub(crate) const ALL: [Self; 11] = [
        Self::StaleWrite,
        Self::HostOverslept,
        Self::AgentOverslept,
        Self::CommandOverslept,
        Self::CommandLost,
        Self::LeaderOverslept,
        Self::DeposedWrite,
        Self::StoreFull,
        Self::StoreUnreachable,
        Self::StoreInDoubt,
        Self::CompactedUnderWatch,
    ];
}

/// How often each was met.
#[derive(Default)]
pub(crate) struct Hits(Mutex<BTreeMap<Hit, u64>>);

impl Hits {
    pub(crate) fn count(&self, hit: Hit) {
        self.add(hit, 1);
    }

    pub(crate) fn add(&self, hit: Hit, count: u64) {
        *self.0.lock().unwrap().entry(hit).or_default() += count;
    }

    pub(crate) fn of(&self, hit: Hit) -> u64 {
        self.0.lock().unwrap().get(&hit).copied().unwrap_or(0)
    }

    /// Those of another schedule are these, too.
    pub(crate) fn take_in(&self, other: &Self) {
        for hit in Hit::ALL {
            self.add(hit, other.of(hit));
        }
    }
}
