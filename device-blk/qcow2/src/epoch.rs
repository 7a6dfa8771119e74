//! Who still uses a host cluster that the map no longer names.
//!
//! A queue looks a cluster up and then reads or writes it for a while. If a discard frees the
//! cluster meanwhile and another write takes it, that I/O would hit somebody else's data. So each
//! user holds a [`Ticket`] from before it looks up until its I/O is over, and who freed clusters
//! waits until all tickets of that time are back.
//!
//! ```text
//! user:   count += 1 ─► look up ─► I/O ─► count -= 1
//! freer:  change the map ─► begin a new period ─► count of the old one is 0? ─► reuse
//! ```
//!
//! Counting and looking up are sequentially consistent, so either the freer sees the count or
//! the user sees the changed map. Counts are spread over stripes, one for each of a few threads,
//! because a counter that all queues share would travel between their caches.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// More than a disk has busy queues; threads beyond that share.
const STRIPES: usize = 16;

/// Must be given back to the [`Epochs`] that issued it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "clusters are never reused while a ticket is out"]
pub struct Ticket(u32);

impl Ticket {
    /// For keeping it elsewhere as a plain number.
    pub fn into_key(self) -> u64 {
        u64::from(self.0)
    }

    /// From [`into_key`](Self::into_key).
    pub fn from_key(key: u64) -> Self {
        Self(key as u32)
    }
}

/// Users in the current period and in the one before.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    period: AtomicU64,
    stripes: [Stripe; STRIPES],
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe {
    users: [AtomicU64; 2],
}

impl Epochs {
    pub(crate) fn enter(&self) -> Ticket {
        let stripe = stripe_of_thread();
        loop {
            let period = self.period.load(Ordering::SeqCst);
            let parity = (period & 1) as usize;
            let users = &self.stripes[stripe].users[parity];
            users.fetch_add(1, Ordering::SeqCst);
            if self.period.load(Ordering::SeqCst) == period {
                return Ticket((stripe << 1 | parity) as u32);
            }
            users.fetch_sub(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn leave(&self, ticket: Ticket) {
        let (stripe, parity) = (ticket.0 as usize >> 1, ticket.0 as usize & 1);
        let before = self.stripes[stripe].users[parity].fetch_sub(1, Ordering::SeqCst);
        debug_assert_ne!(before, 0, "a ticket is given back once");
    }

    /// Begins a new period and returns the one that ended. The period before that one must be
    /// [over](Self::is_over).
    pub(crate) fn advance(&self) -> u64 {
        self.period.fetch_add(1, Ordering::SeqCst)
    }

    /// Whether nobody is left from an ended period.
    pub(crate) fn is_over(&self, period: u64) -> bool {
        let parity = (period & 1) as usize;
        self.stripes
            .iter()
            .all(|stripe| stripe.users[parity].load(Ordering::SeqCst) == 0)
    }
}

fn stripe_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static STRIPE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    STRIPE.with(|stripe| {
        if stripe.get() == usize::MAX {
            stripe.set(NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
        }
        stripe.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn period_is_over_when_its_last_ticket_is_back() {
        let epochs = Epochs::default();
        let early = epochs.enter();
        let ended = epochs.advance();
        let late = epochs.enter();
        assert!(!epochs.is_over(ended));
        epochs.leave(early);
        assert!(epochs.is_over(ended));
        let ended = epochs.advance();
        assert!(!epochs.is_over(ended));
        epochs.leave(late);
        assert!(epochs.is_over(ended));
    }

    #[test]
    fn tickets_of_many_threads_are_all_counted() {
        let epochs = Epochs::default();
        let keys: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2 * STRIPES)
                .map(|_| scope.spawn(|| epochs.enter().into_key()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let ended = epochs.advance();
        for key in keys {
            assert!(!epochs.is_over(ended));
            epochs.leave(Ticket::from_key(key));
        }
        assert!(epochs.is_over(ended));
    }
}
