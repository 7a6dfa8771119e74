//! Which entries of the in-flight region belong to which chain.
//!
//! The entries are kept here and mirrored there: what the region says is read once, at the start
//! of a ring, because the frontend can write it.

use super::Position;
use super::areas::PackedDesc;
use crate::inflight::{PackedRecovered, StoredDesc};

/// A chain in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    /// First and last slot.
    pub(super) head: u16,
    pub(super) last: u16,
    /// Descriptors, and slots.
    pub(super) count: u16,
    /// The driver's name for it.
    pub(super) id: u16,
    /// Where it starts in the ring, unless a predecessor took it.
    pub(super) start: Option<Position>,
}

impl Chain {
    pub(super) fn starting_at(start: Position, head: u16) -> Chain {
        Chain {
            head,
            last: head,
            count: 0,
            id: 0,
            start: Some(start),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The next slot of the chain, or free slot; the ring's size after the last one.
    next: u16,
    /// As it was taken from the ring.
    desc: PackedDesc,
    chain: State,
}

/// What a slot is.
#[derive(Clone, Copy, Debug)]
enum State {
    /// Free, or not the first of its chain.
    Other,
    InFlight(Chain),
    /// Completed, to be published.
    Completed {
        last: u16,
        count: u16,
    },
}

/// As many slots as the ring has descriptors.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    first_free: u16,
    free: u16,
}

impl Slots {
    /// All free.
    pub(super) fn new(size: u16) -> Slots {
        let slot = |index| Slot {
            next: index + 1,
            desc: PackedDesc::default(),
            chain: State::Other,
        };
        Slots {
            slots: (0..size).map(slot).collect(),
            first_free: 0,
            free: size,
        }
    }

    /// As a predecessor left them.
    pub(super) fn recovered(
        size: u16,
        recovered: &PackedRecovered,
        stored: impl Fn(u16) -> StoredDesc,
    ) -> Slots {
        let mut slots = Slots::new(size);
        for (index, slot) in (0..).zip(&mut slots.slots) {
            slot.next = recovered.next[usize::from(index)];
            slot.desc = PackedDesc::of_stored(&stored(index));
        }
        slots.first_free = recovered.free_head;
        for chain in &recovered.chains {
            slots.free -= chain.count;
            slots.slots[usize::from(chain.head)].chain = State::InFlight(Chain {
                head: chain.head,
                last: chain.last,
                count: chain.count,
                id: chain.id,
                start: None,
            });
        }
        slots
    }

    pub(super) fn free(&self) -> u16 {
        self.free
    }

    pub(super) fn in_use(&self) -> u16 {
        self.slots.len() as u16 - self.free
    }

    pub(super) fn first_free(&self) -> u16 {
        self.first_free
    }

    /// The slot that follows `slot` in its chain or among the free ones.
    #[inline]
    pub(super) fn after(&self, slot: u16) -> u16 {
        self.slots[usize::from(slot)].next
    }

    /// `chain` takes the first free slots, up to `first_free`.
    #[inline]
    pub(super) fn take(&mut self, chain: &Chain, first_free: u16) {
        self.slots[usize::from(chain.head)].chain = State::InFlight(*chain);
        self.first_free = first_free;
        self.free -= chain.count;
    }

    /// The chain at `head`, which is in flight.
    #[inline]
    pub(super) fn in_flight(&self, head: u16) -> &Chain {
        match self.slots.get(usize::from(head)).map(|slot| &slot.chain) {
            Some(State::InFlight(chain)) => chain,
            _ => panic!("chain {head} returned to a ring it was not popped from"),
        }
    }

    /// What a slot's descriptor says.
    #[inline]
    pub(super) fn store(&mut self, slot: u16, desc: PackedDesc) {
        self.slots[usize::from(slot)].desc = desc;
    }

    /// The descriptors of the chain at `head`, in order.
    pub(super) fn descs(&self, head: u16) -> Vec<PackedDesc> {
        let count = self.in_flight(head).count;
        std::iter::successors(Some(head), |slot| Some(self.after(*slot)))
            .take(usize::from(count))
            .map(|slot| self.slots[usize::from(slot)].desc)
            .collect()
    }

    /// The chain at `head` keeps its slots until it is released, but is done.
    #[inline]
    pub(super) fn complete(&mut self, head: u16) -> Chain {
        let chain = *self.in_flight(head);
        self.slots[usize::from(head)].chain = State::Completed {
            last: chain.last,
            count: chain.count,
        };
        chain
    }

    /// The chain at `head` has lost its place in the ring.
    pub(super) fn detach(&mut self, head: u16) {
        if let State::InFlight(chain) = &mut self.slots[usize::from(head)].chain {
            chain.start = None;
        }
    }

    /// The chain's slots become free; its last one.
    #[inline]
    pub(super) fn release(&mut self, head: u16) -> u16 {
        let state = std::mem::replace(&mut self.slots[usize::from(head)].chain, State::Other);
        let (last, count) = match state {
            State::Completed { last, count } => (last, count),
            State::InFlight(Chain { last, count, .. }) => (last, count),
            State::Other => panic!("slot {head} is no chain"),
        };
        self.slots[usize::from(last)].next = self.first_free;
        self.first_free = head;
        self.free += count;
        last
    }
}
