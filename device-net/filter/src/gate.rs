//! Judges the frames of one NIC by its policy.
//!
//! Flows are spread over shards by their hash, each behind a mutex, so that the threads of several
//! queues rarely meet; a frame takes one of them, for the time of one look-up. Each shard holds the
//! policy as well, which is how a new one takes effect between two frames.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::flow::table::{FlowId, FlowTable, Opened};
use crate::flow::{Event, FlowInfo, Key, KeyHasher, Relation, State};
use crate::fragments::Fragments;
use crate::packet::{Fragment, Ip, Network, Packet, Transport};
use crate::policy::Policy;
use crate::rules::{Opening, Permit, RuleSet, is_essential};
use crate::spoof::Identity;
use crate::verdict::{Direction, DropReason, Verdict};

/// Flows of one NIC at most; about 10 MiB.
pub const MAX_FLOWS: usize = 65536;

const NUM_SHARDS: usize = 8;

/// Judges frames. Until a policy is set, all pass.
#[derive(Debug)]
pub struct Gate {
    hasher: KeyHasher,
    shards: [Shard; NUM_SHARDS],
    fragments: Mutex<Fragments>,
    /// Of the policy; held while one is put in place.
    generation: Mutex<u32>,
}

/// On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(Mutex<Judge>);

#[derive(Debug)]
struct Judge {
    policy: Arc<Compiled>,
    flows: FlowTable,
}

#[derive(Debug, Default)]
struct Compiled {
    generation: u32,
    identity: Option<Identity>,
    rules: Option<RuleSet>,
    tracks_flows: bool,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new(MAX_FLOWS)
    }
}

impl Gate {
    /// One that knows `max_flows` at most.
    pub fn new(max_flows: usize) -> Self {
        let policy = Arc::new(Compiled::default());
        let shard = |_| {
            Shard(Mutex::new(Judge {
                policy: policy.clone(),
                flows: FlowTable::new(max_flows.div_ceil(NUM_SHARDS)),
            }))
        };
        Self {
            hasher: KeyHasher::new(),
            shards: std::array::from_fn(shard),
            fragments: Mutex::default(),
            generation: Mutex::new(0),
        }
    }

    /// Replaces the policy. Flows that the new one permits go on.
    pub fn set_policy(&self, policy: &Policy) {
        let mut generation = lock(&self.generation);
        *generation = generation.wrapping_add(1);
        let compiled = Arc::new(Compiled {
            generation: *generation,
            identity: policy.anti_spoofing.as_ref().map(Identity::compile),
            rules: policy.security.as_ref().map(RuleSet::compile),
            tracks_flows: policy.track_flows || policy.security.is_some(),
        });
        for shard in &self.shards {
            let mut judge = lock(&shard.0);
            judge.policy = compiled.clone();
            if !compiled.tracks_flows {
                judge.flows.clear();
            }
        }
    }

    /// Judges one frame. `now_ns` is of any clock that does not go backwards.
    #[inline]
    pub fn check(&self, packet: &Packet, direction: Direction, now_ns: u64) -> Verdict {
        let relation = match &packet.network {
            Network::Ip(ip) => Relation::of(packet, ip, direction),
            _ => Relation::None,
        };
        let hash = relation.key().map_or(0, |key| self.hasher.hash(key));
        let frame = Frame {
            packet,
            direction,
            relation,
            hash,
            now_ns,
        };
        let mut judge = lock(&self.shards[(hash >> 61) as usize].0);
        match judge.check(&frame, self) {
            Ok(()) => Verdict::Pass,
            Err(reason) => Verdict::Drop(reason),
        }
    }

    /// Flows that are known.
    pub fn num_flows(&self) -> usize {
        let len = |shard: &Shard| lock(&shard.0).flows.len();
        self.shards.iter().map(len).sum()
    }

    /// Flows that had to make room for others before their time.
    pub fn num_evicted(&self) -> u64 {
        let evicted = |shard: &Shard| lock(&shard.0).flows.evicted();
        self.shards.iter().map(evicted).sum()
    }

    /// All flows, most recently used first.
    pub fn flows(&self, now_ns: u64) -> Vec<FlowInfo> {
        let mut flows = Vec::new();
        for shard in &self.shards {
            lock(&shard.0).flows.list(now_ns, &mut flows);
        }
        flows.sort_by_key(|flow| flow.idle_ns);
        flows
    }
}

/// What is judged.
struct Frame<'a> {
    packet: &'a Packet,
    direction: Direction,
    relation: Relation,
    hash: u64,
    now_ns: u64,
}

impl Judge {
    fn check(&mut self, frame: &Frame<'_>, gate: &Gate) -> Result<(), DropReason> {
        let policy = &*self.policy;
        let identity = policy
            .identity
            .as_ref()
            .filter(|_| frame.direction == Direction::Egress);
        if (identity.is_some() || policy.rules.is_some()) && is_malformed(frame.packet) {
            return Err(DropReason::Malformed);
        }
        if let Some(identity) = identity {
            identity.check(frame.packet)?;
        }
        match &frame.packet.network {
            Network::Ip(ip) => self.check_ip(frame, ip, gate),
            Network::Other => match &policy.rules {
                Some(rules) if !rules.permits_ethertype(frame.packet.ethertype) => {
                    Err(DropReason::Ethertype)
                }
                _ => Ok(()),
            },
            Network::Arp(_) | Network::Malformed => Ok(()),
        }
    }

    fn check_ip(&mut self, frame: &Frame<'_>, ip: &Ip, gate: &Gate) -> Result<(), DropReason> {
        if !self.policy.tracks_flows {
            return Ok(());
        }
        let key = |id| Key::of_fragments(frame.packet, ip, id, frame.direction);
        match ip.fragment {
            Fragment::Whole => self.check_flow(frame, ip),
            Fragment::First { id } => {
                self.check_flow(frame, ip)?;
                lock(&gate.fragments).insert(&gate.hasher, key(id), frame.direction, frame.now_ns);
                Ok(())
            }
            Fragment::Later { .. } if self.policy.rules.is_none() => Ok(()),
            Fragment::Later { id, .. } => {
                let fragments = lock(&gate.fragments);
                if fragments.contains(&gate.hasher, &key(id), frame.direction, frame.now_ns) {
                    Ok(())
                } else {
                    Err(DropReason::Fragment)
                }
            }
        }
    }

    fn check_flow(&mut self, frame: &Frame<'_>, ip: &Ip) -> Result<(), DropReason> {
        match frame.relation {
            Relation::Part(key, event) => match self.find(&key, frame) {
                Some(id) => self.go_on(id, frame, ip, event),
                None => self.open(&key, event, frame, ip),
            },
            Relation::Answer(key) => match self.find(&key, frame) {
                Some(id) if self.permits_replies(id) => {
                    self.count(id, frame, Event::Datagram);
                    Ok(())
                }
                _ => self
                    .permit(&Opening::of(ip, frame.direction), frame, ip)
                    .map(drop),
            },
            Relation::Error(key) => match self.find(&key, frame) {
                Some(id) if self.permits_replies(id) => Ok(()),
                _ => self
                    .permit(&Opening::of(ip, frame.direction), frame, ip)
                    .map(drop),
            },
            Relation::None => self
                .permit(&Opening::of(ip, frame.direction), frame, ip)
                .map(drop),
        }
    }

    /// The flow, after it was judged by the policy of today.
    #[inline]
    fn find(&mut self, key: &Key, frame: &Frame<'_>) -> Option<FlowId> {
        let id = self.flows.find(key, frame.hash, frame.now_ns)?;
        if self.flows.get(id).generation != self.policy.generation {
            self.judge_again(id, frame.now_ns);
        }
        Some(id)
    }

    #[cold]
    fn judge_again(&mut self, id: FlowId, now_ns: u64) {
        let Compiled {
            rules, generation, ..
        } = &*self.policy;
        let flow = self.flows.get_mut(id);
        flow.generation = *generation;
        let opening = flow.key.opening(flow.origin, flow.icmp);
        let permit = match rules {
            Some(rules) => rules.permits(flow.origin, &opening),
            None => Some(Permit::Stateless),
        };
        flow.is_stateful = permit == Some(Permit::Stateful);
        match (permit, flow.state) {
            (None, _) => self.flows.set_state(id, State::Revoked, now_ns),
            (Some(_), State::Revoked) => self.flows.restore(id, now_ns),
            _ => {}
        }
    }

    fn permits_replies(&self, id: FlowId) -> bool {
        let flow = self.flows.get(id);
        flow.state != State::Revoked && (flow.is_stateful || self.policy.rules.is_none())
    }

    /// A frame of a flow that is known.
    #[inline]
    fn go_on(
        &mut self,
        id: FlowId,
        frame: &Frame<'_>,
        ip: &Ip,
        event: Event,
    ) -> Result<(), DropReason> {
        let flow = self.flows.get(id);
        let is_opening = match event {
            // Both may open at the same time.
            Event::Tcp(flags) if flags.opens() => {
                flow.state.has_ended()
                    || (frame.direction != flow.origin && flow.state != State::SynSent)
            }
            _ => false,
        };
        let key = flow.key;
        if is_opening {
            let permit = self.permit(&key.opening(frame.direction, None), frame, ip)?;
            self.flows.remove(id);
            self.insert(&key, event, frame, ip, permit);
            return Ok(());
        }
        if flow.state == State::Revoked {
            self.flows.set_state(id, State::Revoked, frame.now_ns);
            return Err(DropReason::NotPermitted);
        }
        if !self.permits_replies(id) {
            self.permit(&Opening::of(ip, frame.direction), frame, ip)?;
        }
        self.count(id, frame, event);
        Ok(())
    }

    /// A frame of a flow that is not known.
    fn open(
        &mut self,
        key: &Key,
        event: Event,
        frame: &Frame<'_>,
        ip: &Ip,
    ) -> Result<(), DropReason> {
        let permit = self.permit(&Opening::of(ip, frame.direction), frame, ip)?;
        // A reset ends what is not known.
        let is_reset = matches!(event, Event::Tcp(flags) if flags.rst());
        if !is_reset {
            self.insert(key, event, frame, ip, permit);
        }
        Ok(())
    }

    /// Notes a flow that was permitted; replies to a stateless one need no note.
    fn insert(
        &mut self,
        key: &Key,
        event: Event,
        frame: &Frame<'_>,
        ip: &Ip,
        permit: Option<Permit>,
    ) {
        if permit.is_none() || (permit == Some(Permit::Stateless) && self.policy.rules.is_some()) {
            return;
        }
        let opened = Opened {
            key: *key,
            origin: frame.direction,
            event,
            icmp: Opening::of(ip, frame.direction).icmp,
            is_stateful: permit == Some(Permit::Stateful),
            generation: self.policy.generation,
        };
        let id = self.flows.insert(frame.hash, &opened, frame.now_ns);
        self.count(id, frame, event);
    }

    /// Whether a frame may pass by itself; `None` if no rule was needed.
    fn permit(
        &self,
        opening: &Opening,
        frame: &Frame<'_>,
        ip: &Ip,
    ) -> Result<Option<Permit>, DropReason> {
        let Some(rules) = &self.policy.rules else {
            return Ok(Some(Permit::Stateless));
        };
        match rules.permits(frame.direction, opening) {
            Some(permit) => Ok(Some(permit)),
            None if is_essential(ip, frame.direction) => Ok(None),
            None => Err(DropReason::NotPermitted),
        }
    }

    fn count(&mut self, id: FlowId, frame: &Frame<'_>, event: Event) {
        let len_bytes = frame.packet.len_bytes;
        self.flows
            .advance(id, frame.direction, event, len_bytes, frame.now_ns);
    }
}

fn is_malformed(packet: &Packet) -> bool {
    match &packet.network {
        Network::Malformed => true,
        Network::Ip(ip) => ip.transport == Transport::Malformed,
        Network::Arp(_) | Network::Other => false,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
