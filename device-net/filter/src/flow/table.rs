//! A bounded table of flows.
//!
//! Flows lie in a slab and hang in two kinds of chains: of the hash table's buckets, and one for
//! each [`State`], in the order of use. All flows of a state have the same time-out, so the head of
//! its chain is what expires first and what makes room first. Slab and buckets grow by doubling,
//! up to the bound.

use super::state::State;
use super::{Event, FlowInfo, Key, Volume};
use crate::packet::TCP;
use crate::verdict::Direction;

/// End of a chain.
const NIL: u32 = u32::MAX;

const MIN_BUCKETS: usize = 64;

/// A flow is moved to the end of its chain at most once in this time: neighbours in the chain are
/// cold cache lines.
const USE_GRAIN_NS: u64 = 1_000_000_000;

/// Flows that expired which are looked for when a new one comes.
const EXPIRIES_PER_INSERT: usize = 2;

#[derive(Debug)]
pub(crate) struct FlowTable {
    max_flows: usize,
    slots: Vec<Slot>,
    /// First free slot; those chain by `bucket_next`.
    free: u32,
    len: usize,
    /// First slot of each; a power of two, or none before the first flow.
    buckets: Vec<u32>,
    by_use: [Chain; State::ALL.len()],
    evicted: u64,
}

/// Where a flow is in its table until something is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlowId(u32);

#[derive(Clone, Copy, Debug)]
struct Chain {
    head: u32,
    tail: u32,
}

#[derive(Debug)]
struct Slot {
    flow: Flow,
    hash: u64,
    bucket_next: u32,
    use_prev: u32,
    use_next: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub(crate) key: Key,
    pub(crate) origin: Direction,
    pub(crate) state: State,
    /// Replies pass.
    pub(crate) is_stateful: bool,
    /// Of the policy that it was judged by.
    pub(crate) generation: u32,
    /// Type and code of the frame that opened it.
    pub(crate) icmp: Option<(u8, u8)>,
    finished: [bool; 2],
    volumes: [Volume; 2],
    began_ns: u64,
    used_ns: u64,
    /// When it was put to the end of its chain.
    moved_ns: u64,
}

/// What a new flow begins with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    pub(crate) key: Key,
    pub(crate) origin: Direction,
    pub(crate) event: Event,
    pub(crate) icmp: Option<(u8, u8)>,
    pub(crate) is_stateful: bool,
    pub(crate) generation: u32,
}

impl FlowTable {
    pub(crate) fn new(max_flows: usize) -> Self {
        assert!((1..NIL as usize).contains(&max_flows));
        Self {
            max_flows,
            slots: Vec::new(),
            free: NIL,
            len: 0,
            buckets: Vec::new(),
            by_use: [Chain {
                head: NIL,
                tail: NIL,
            }; State::ALL.len()],
            evicted: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Flows that had to make room before their time.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Forgets all flows and gives their memory back.
    pub(crate) fn clear(&mut self) {
        let evicted = self.evicted;
        *self = Self::new(self.max_flows);
        self.evicted = evicted;
    }

    /// The flow of `key`, unless its time is over.
    #[inline]
    pub(crate) fn find(&mut self, key: &Key, hash: u64, now_ns: u64) -> Option<FlowId> {
        let mut index = *self.buckets.get(self.bucket_of(hash))?;
        while index != NIL {
            let slot = &self.slots[index as usize];
            if slot.hash == hash && slot.flow.key == *key {
                if slot.flow.is_expired(now_ns) {
                    self.remove(FlowId(index));
                    return None;
                }
                return Some(FlowId(index));
            }
            index = slot.bucket_next;
        }
        None
    }

    pub(crate) fn get(&self, id: FlowId) -> &Flow {
        &self.slots[id.0 as usize].flow
    }

    pub(crate) fn get_mut(&mut self, id: FlowId) -> &mut Flow {
        &mut self.slots[id.0 as usize].flow
    }

    /// Adds a flow that [`find`](Self::find) did not find; another one makes room if the table is
    /// full.
    pub(crate) fn insert(&mut self, hash: u64, opened: &Opened, now_ns: u64) -> FlowId {
        self.expire(now_ns);
        if self.len == self.max_flows {
            self.evict();
        }
        let flow = Flow {
            key: opened.key,
            origin: opened.origin,
            state: State::first(opened.event),
            is_stateful: opened.is_stateful,
            generation: opened.generation,
            icmp: opened.icmp,
            finished: [false; 2],
            volumes: [Volume::default(); 2],
            began_ns: now_ns,
            used_ns: now_ns,
            moved_ns: now_ns,
        };
        if self.len >= self.buckets.len() {
            self.grow();
        }
        let state = flow.state;
        let bucket = self.bucket_of(hash);
        let slot = Slot {
            flow,
            hash,
            bucket_next: self.buckets[bucket],
            use_prev: NIL,
            use_next: NIL,
        };
        let index = if self.free == NIL {
            self.slots.push(slot);
            (self.slots.len() - 1) as u32
        } else {
            let index = self.free;
            self.free = self.slots[index as usize].bucket_next;
            self.slots[index as usize] = slot;
            index
        };
        self.buckets[bucket] = index;
        self.len += 1;
        self.append(index, state);
        FlowId(index)
    }

    /// Counts a frame of the flow, and what it does to it.
    #[inline]
    pub(crate) fn advance(
        &mut self,
        id: FlowId,
        direction: Direction,
        event: Event,
        len_bytes: usize,
        now_ns: u64,
    ) {
        let flow = &mut self.slots[id.0 as usize].flow;
        let is_answer = direction != flow.origin;
        let state = flow.state.next(event, is_answer, &mut flow.finished);
        let volume = &mut flow.volumes[direction as usize];
        volume.packets += 1;
        volume.bytes += len_bytes as u64;
        self.set_state(id, state, now_ns);
    }

    /// The flow is in this state from now on, and was used.
    #[inline]
    pub(crate) fn set_state(&mut self, id: FlowId, state: State, now_ns: u64) {
        let flow = &mut self.slots[id.0 as usize].flow;
        flow.used_ns = flow.used_ns.max(now_ns);
        let before = std::mem::replace(&mut flow.state, state);
        if state != before || now_ns.saturating_sub(flow.moved_ns) >= USE_GRAIN_NS {
            flow.moved_ns = now_ns;
            self.unlink(id.0, before);
            self.append(id.0, state);
        }
    }

    /// The flow was revoked, and is permitted again.
    pub(crate) fn restore(&mut self, id: FlowId, now_ns: u64) {
        let state = match self.get(id).key.protocol {
            TCP => State::Established,
            _ => State::Replied,
        };
        self.set_state(id, state, now_ns);
    }

    pub(crate) fn remove(&mut self, FlowId(index): FlowId) {
        let slot = &self.slots[index as usize];
        let (hash, state, next) = (slot.hash, slot.flow.state, slot.bucket_next);
        let bucket = self.bucket_of(hash);
        if self.buckets[bucket] == index {
            self.buckets[bucket] = next;
        } else {
            let mut before = self.buckets[bucket];
            while self.slots[before as usize].bucket_next != index {
                before = self.slots[before as usize].bucket_next;
            }
            self.slots[before as usize].bucket_next = next;
        }
        self.unlink(index, state);
        self.slots[index as usize].bucket_next = self.free;
        self.free = index;
        self.len -= 1;
    }

    /// Adds the flows whose time is not over to `list`.
    pub(crate) fn list(&self, now_ns: u64, list: &mut Vec<FlowInfo>) {
        for chain in &self.by_use {
            let mut index = chain.head;
            while index != NIL {
                let slot = &self.slots[index as usize];
                if !slot.flow.is_expired(now_ns) {
                    list.push(slot.flow.info(now_ns));
                }
                index = slot.use_next;
            }
        }
    }

    fn expire(&mut self, now_ns: u64) {
        let mut left = EXPIRIES_PER_INSERT;
        for state in 0..self.by_use.len() {
            while left > 0 {
                let head = self.by_use[state].head;
                if head == NIL || !self.slots[head as usize].flow.is_expired(now_ns) {
                    break;
                }
                self.remove(FlowId(head));
                left -= 1;
            }
        }
    }

    /// Removes the least recently used flow of the lowest tier.
    fn evict(&mut self) {
        let heads = State::ALL.into_iter().filter_map(|state| {
            let head = self.by_use[state as usize].head;
            let flow = &self.slots.get(head as usize)?.flow;
            Some((state.eviction_tier(), flow.moved_ns, head))
        });
        if let Some((_, _, head)) = heads.min() {
            self.remove(FlowId(head));
            self.evicted += 1;
        }
    }

    fn grow(&mut self) {
        let num_buckets = (self.buckets.len() * 2).max(MIN_BUCKETS);
        self.buckets.clear();
        self.buckets.resize(num_buckets, NIL);
        for state in 0..self.by_use.len() {
            let mut index = self.by_use[state].head;
            while index != NIL {
                let bucket = self.bucket_of(self.slots[index as usize].hash);
                let slot = &mut self.slots[index as usize];
                slot.bucket_next = std::mem::replace(&mut self.buckets[bucket], index);
                index = slot.use_next;
            }
        }
    }

    #[inline]
    fn bucket_of(&self, hash: u64) -> usize {
        // Shards are chosen by the upper bits.
        hash as usize & self.buckets.len().wrapping_sub(1)
    }

    fn append(&mut self, index: u32, state: State) {
        let chain = &mut self.by_use[state as usize];
        let before = std::mem::replace(&mut chain.tail, index);
        if before == NIL {
            chain.head = index;
        } else {
            self.slots[before as usize].use_next = index;
        }
        let slot = &mut self.slots[index as usize];
        slot.use_prev = before;
        slot.use_next = NIL;
    }

    fn unlink(&mut self, index: u32, state: State) {
        let slot = &self.slots[index as usize];
        let (prev, next) = (slot.use_prev, slot.use_next);
        match prev {
            NIL => self.by_use[state as usize].head = next,
            _ => self.slots[prev as usize].use_next = next,
        }
        match next {
            NIL => self.by_use[state as usize].tail = prev,
            _ => self.slots[next as usize].use_prev = prev,
        }
    }
}

impl Flow {
    fn is_expired(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.used_ns) > self.state.timeout_ns()
    }

    fn info(&self, now_ns: u64) -> FlowInfo {
        FlowInfo {
            protocol: self.key.protocol,
            local: self.key.local,
            local_port: self.key.local_port,
            remote: self.key.remote,
            remote_port: self.key.remote_port,
            vlans: [(self.key.vlan >> 12) as u16, (self.key.vlan & 0xfff) as u16],
            origin: self.origin,
            state: self.state,
            ingress: self.volumes[Direction::Ingress as usize],
            egress: self.volumes[Direction::Egress as usize],
            age_ns: now_ns.saturating_sub(self.began_ns),
            idle_ns: now_ns.saturating_sub(self.used_ns),
        }
    }
}

#[cfg(test)]
mod tests;
