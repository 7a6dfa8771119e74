//! Packets whose first fragment passed: the others have no ports to be judged by.
//!
//! A fragment that comes before the first one is dropped; senders keep the order.

use crate::flow::{Key, KeyHasher};
use crate::verdict::Direction;

/// Sets of as many packets as there are ways; a flood of first fragments replaces the oldest.
const NUM_SETS: usize = 128;
const NUM_WAYS: usize = 8;

/// For how long fragments may follow: what receivers wait (RFC 8200 section 4.5 says 60 s, Linux
/// waits 30 s).
const TIMEOUT_NS: u64 = 30_000_000_000;

/// Empty until the first fragment passes.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    entries: Vec<Option<Entry>>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: Key,
    direction: Direction,
    seen_ns: u64,
}

impl Fragments {
    /// The first fragment of a packet passed.
    pub(crate) fn insert(
        &mut self,
        hasher: &KeyHasher,
        key: Key,
        direction: Direction,
        now_ns: u64,
    ) {
        if self.entries.is_empty() {
            self.entries = vec![None; NUM_SETS * NUM_WAYS];
        }
        let entry = Entry {
            key,
            direction,
            seen_ns: now_ns,
        };
        let set = &mut self.entries[first_way(hasher, &key)..][..NUM_WAYS];
        let same = set
            .iter()
            .position(|way| way.is_some_and(|way| way.is_of(&key, direction)));
        let oldest = || (0..NUM_WAYS).min_by_key(|&way| set[way].map(|entry| entry.seen_ns));
        if let Some(way) = same.or_else(oldest) {
            set[way] = Some(entry);
        }
    }

    /// Whether the first fragment of this packet passed.
    pub(crate) fn contains(
        &self,
        hasher: &KeyHasher,
        key: &Key,
        direction: Direction,
        now_ns: u64,
    ) -> bool {
        let set = self
            .entries
            .get(first_way(hasher, key)..)
            .unwrap_or_default();
        set.iter().take(NUM_WAYS).flatten().any(|entry| {
            entry.is_of(key, direction) && now_ns.saturating_sub(entry.seen_ns) <= TIMEOUT_NS
        })
    }
}

impl Entry {
    fn is_of(&self, key: &Key, direction: Direction) -> bool {
        self.key == *key && self.direction == direction
    }
}

fn first_way(hasher: &KeyHasher, key: &Key) -> usize {
    (hasher.hash(key) as usize % NUM_SETS) * NUM_WAYS
}
