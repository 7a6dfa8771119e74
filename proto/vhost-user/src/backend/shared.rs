//! A ring that other rings' threads reach.
//!
//! Its own thread starts, pauses and ends it; whoever has something for its driver locks it for a
//! batch. What goes wrong meanwhile is told to its own thread, which is who stops it.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::eventfd::EventFd;
use crate::ring::{Ring, RingError};

/// Tells a thread that there is something to look at besides rings.
#[derive(Debug)]
pub(super) struct Waker {
    /// For a thread that does not sleep.
    has_news: AtomicBool,
    pub(super) event: EventFd,
}

impl Waker {
    pub(super) fn new() -> io::Result<Waker> {
        Ok(Waker {
            has_news: AtomicBool::new(false),
            event: EventFd::new()?,
        })
    }

    pub(super) fn wake(&self) {
        self.has_news.store(true, Ordering::Release);
        self.event.ring();
    }

    /// Whether there is news; in a tight loop.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        self.has_news.load(Ordering::Relaxed)
    }

    /// Whether there was news, which is looked at now.
    pub(super) fn take_news(&self) -> bool {
        self.has_news.swap(false, Ordering::AcqRel)
    }
}

/// Commands and reports for whoever serves a ring.
#[derive(Debug)]
pub(super) struct Mail {
    is_waiting: AtomicBool,
    pub(super) waker: Arc<Waker>,
}

impl Mail {
    /// Waiting at first: a thread looks at a ring that is new to it.
    pub(super) fn new(waker: Arc<Waker>) -> Mail {
        Mail {
            is_waiting: AtomicBool::new(true),
            waker,
        }
    }

    pub(super) fn post(&self) {
        self.is_waiting.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(super) fn take(&self) -> bool {
        self.is_waiting.swap(false, Ordering::AcqRel)
    }
}

/// See the module's description.
#[derive(Debug)]
pub struct SharedRing {
    index: u16,
    features: u64,
    held: Mutex<Held>,
    /// Of the thread that the ring belongs to.
    owner: Arc<Mail>,
}

#[derive(Debug)]
struct Held {
    /// None once the ring has ended.
    ring: Option<Ring>,
    /// What another thread found, for the ring's own.
    error: Option<RingError>,
}

impl SharedRing {
    pub(super) fn new(ring: Ring, owner: Arc<Mail>) -> SharedRing {
        SharedRing {
            index: ring.index(),
            features: ring.features(),
            held: Mutex::new(Held {
                ring: Some(ring),
                error: None,
            }),
            owner,
        }
    }

    /// Queue index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Acknowledged feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The ring, for as long as a batch takes; None once it has ended or was found broken. Nobody
    /// holds two of them, so that no two threads wait for one another.
    #[inline]
    pub fn lock(&self) -> Option<SharedRingGuard<'_>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        (held.ring.is_some() && held.error.is_none()).then_some(SharedRingGuard(held))
    }

    /// The driver broke the ring, as it turned out while it was locked: its own thread stops it.
    /// Only the first report counts.
    #[cold]
    pub fn report(&self, error: RingError) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.error.get_or_insert(error);
        drop(held);
        self.owner.post();
    }

    /// For the ring's own thread, in whatever state the ring is.
    pub(super) fn own(&self) -> SharedRingGuard<'_> {
        SharedRingGuard(self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn take_error(&self) -> Option<RingError> {
        self.own().0.error.take()
    }

    /// Ends sharing.
    pub(super) fn take_ring(&self) -> Option<Ring> {
        self.own().0.ring.take()
    }
}

/// A locked ring.
pub struct SharedRingGuard<'a>(MutexGuard<'a, Held>);

impl Deref for SharedRingGuard<'_> {
    type Target = Ring;

    #[inline]
    fn deref(&self) -> &Ring {
        self.0.ring.as_ref().expect("a locked ring has not ended")
    }
}

impl DerefMut for SharedRingGuard<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Ring {
        self.0.ring.as_mut().expect("a locked ring has not ended")
    }
}

/// A ring as its own thread has it.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one for each ring, and a pointer less where nothing is shared"
)]
pub(super) enum OwnRing {
    Alone(Ring),
    Shared(Arc<SharedRing>),
}

/// An [`OwnRing`] in use.
pub(super) enum OwnRingGuard<'a> {
    Alone(&'a mut Ring),
    Shared(SharedRingGuard<'a>),
}

impl OwnRing {
    #[inline]
    pub(super) fn get(&mut self) -> OwnRingGuard<'_> {
        match self {
            OwnRing::Alone(ring) => OwnRingGuard::Alone(ring),
            OwnRing::Shared(shared) => OwnRingGuard::Shared(shared.own()),
        }
    }

    pub(super) fn into_ring(self) -> Ring {
        match self {
            OwnRing::Alone(ring) => ring,
            OwnRing::Shared(shared) => shared.take_ring().expect("a ring ends once"),
        }
    }
}

impl Deref for OwnRingGuard<'_> {
    type Target = Ring;

    #[inline]
    fn deref(&self) -> &Ring {
        match self {
            OwnRingGuard::Alone(ring) => ring,
            OwnRingGuard::Shared(guard) => guard,
        }
    }
}

impl DerefMut for OwnRingGuard<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Ring {
        match self {
            OwnRingGuard::Alone(ring) => ring,
            OwnRingGuard::Shared(guard) => guard,
        }
    }
}
