//! Which queues of a multi-queue tap the kernel may put frames into.
//!
//! A frame in a queue that no driver looks at is lost to it, so a queue takes part only while its
//! receive ring runs and has had buffers, and while the driver has not set a lower number of queue
//! pairs over the control queue. The number alone would not do: a driver tells it once, and not
//! again to the successor of a daemon that died. Queue 0 always takes part, so that frames wait
//! there while no frontend is connected.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use vhost_user::eventfd::EventFd;

use super::interface::Interface;

/// Shared by all rings of one NIC.
#[derive(Debug)]
pub(super) struct Steering {
    pairs: Vec<Pair>,
    wanted: Mutex<Wanted>,
}

#[derive(Debug)]
struct Wanted {
    /// As the driver set it; all until it does.
    active_pairs: u16,
    has_buffers: Vec<bool>,
}

#[derive(Debug)]
struct Pair {
    attached: AtomicBool,
    /// Rung when `attached` changes, for the receive ring's thread.
    changed: EventFd,
}

impl Steering {
    /// Only queue 0 takes part.
    pub(super) fn new(interface: &Interface) -> io::Result<Self> {
        let num_pairs = interface.num_queues();
        let pairs = (0..num_pairs)
            .map(|pair| {
                Ok(Pair {
                    // What the kernel says of a queue that was just opened.
                    attached: AtomicBool::new(pair == 0 || attach(interface, pair, false)),
                    changed: EventFd::new()?,
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            pairs,
            wanted: Mutex::new(Wanted {
                active_pairs: num_pairs,
                has_buffers: vec![false; usize::from(num_pairs)],
            }),
        })
    }

    /// Whether the kernel may put frames into this queue.
    pub(super) fn is_attached(&self, pair: u16) -> bool {
        self.pair(pair).attached.load(Ordering::Acquire)
    }

    /// Readable when [`Steering::is_attached`] has changed.
    pub(super) fn changed(&self, pair: u16) -> &EventFd {
        &self.pair(pair).changed
    }

    /// The driver uses this many pairs from now on.
    pub(super) fn set_active_pairs(&self, interface: &Interface, active_pairs: u16) {
        self.update(interface, |wanted| wanted.active_pairs = active_pairs);
    }

    /// The receive ring of `pair` has buffers, or has ended.
    pub(super) fn set_has_buffers(&self, interface: &Interface, pair: u16, has_buffers: bool) {
        self.update(interface, |wanted| {
            wanted.has_buffers[usize::from(pair)] = has_buffers;
        });
    }

    fn update(&self, interface: &Interface, change: impl FnOnce(&mut Wanted)) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut wanted);
        for (number, pair) in (0_u16..).zip(&self.pairs).skip(1) {
            let want = number < wanted.active_pairs && wanted.has_buffers[usize::from(number)];
            if want == pair.attached.load(Ordering::Relaxed) {
                continue;
            }
            // A queue that does not take part cannot be read: its thread must know beforehand.
            pair.attached.store(false, Ordering::Release);
            let attached = attach(interface, number, want);
            pair.attached.store(attached, Ordering::Release);
            pair.changed.ring();
        }
    }

    fn pair(&self, pair: u16) -> &Pair {
        &self.pairs[usize::from(pair)]
    }
}

/// Returns whether the queue is attached afterwards.
fn attach(interface: &Interface, pair: u16, attached: bool) -> bool {
    match interface.set_queue_attached(pair, attached) {
        Ok(()) => attached,
        Err(error) => {
            tracing::warn!(%error, pair, attached, "cannot change whether a tap queue takes part");
            !attached
        }
    }
}
