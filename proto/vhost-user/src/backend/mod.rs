//! The device's end of vhost-user.
//!
//! A daemon implements [`Device`] (what the device is) and [`QueueHandler`] (what one of its
//! queues does); [`Server`] owns the listening socket and serves sessions one after another.

mod channel;
mod connection;
mod group;
mod lone;
mod misbehaviour;
mod poller;
mod server;
mod serving;
mod session;
mod shared;
mod socket;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use faults::DeviceFaults;

use crate::ring::{Ring, RingError};
pub use group::{Seat, WorkerGroup};
pub use poller::Polling;
pub use server::{QueueHealth, Server, Status, StopError};
pub use shared::{SharedRing, SharedRingGuard};
pub use socket::{BindError, bind, listener_from_fd};

#[cfg(test)]
mod tests;

/// One virtio device, served to one frontend at a time. Outlives sessions.
pub trait Device: Send + Sync + 'static {
    /// Device-type feature bits. The session adds `VIRTIO_F_VERSION_1`,
    /// `VIRTIO_RING_F_EVENT_IDX`, `VIRTIO_RING_F_INDIRECT_DESC` and
    /// `VHOST_USER_F_PROTOCOL_FEATURES` by itself.
    fn features(&self) -> u64;
    /// Queues the device has at most.
    fn num_queues(&self) -> u16;
    /// What GET_QUEUE_NUM answers; differs from `num_queues` for network devices.
    fn advertised_queue_num(&self) -> u64 {
        u64::from(self.num_queues())
    }
    /// Ring size limit, a power of two.
    fn max_queue_size(&self) -> u16 {
        1024
    }
    /// The whole device configuration space (Virtio 1.2 section 5.x.4) as it is now.
    fn config(&self) -> Vec<u8>;
    /// The driver wrote `data` at `offset`.
    ///
    /// # Errors
    /// Any error is answered to the frontend as a refusal; the session goes on.
    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        let _ = (offset, data);
        Err(io::Error::from(io::ErrorKind::PermissionDenied))
    }
    /// A ring becomes active: build what serves it. Called on the ring's own thread.
    /// `features` are the acknowledged feature bits.
    ///
    /// # Errors
    /// A failure is logged and leaves the ring stopped.
    fn start_queue(&self, index: u16, features: u64) -> io::Result<Box<dyn QueueHandler>>;
    /// Where the device's rings are served; None for a thread for each of them.
    fn group(&self) -> Option<Seat> {
        None
    }
    /// Whether rings of other devices put something into ring `index`. Then it is started by
    /// [`Device::start_shared_queue`].
    fn shares_ring(&self, index: u16, features: u64) -> bool {
        let _ = (index, features);
        false
    }
    /// As [`Device::start_queue`], for a ring that is shared.
    ///
    /// # Errors
    /// As there.
    fn start_shared_queue(&self, ring: &Arc<SharedRing>) -> io::Result<Box<dyn QueueHandler>> {
        self.start_queue(ring.index(), ring.features())
    }
    /// What is to go wrong with this device on purpose; None where that is not allowed.
    fn faults(&self) -> Option<Arc<DeviceFaults>> {
        None
    }
    /// The frontend reset the device or a session ended: forget driver-set state.
    fn reset(&self) {}
}

/// Why [`QueueHandler::process`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The driver kicked, or the ring was just started.
    Kick,
    /// One of [`QueueHandler::event_fds`] is readable; its position there.
    Event(usize),
}

/// What serves one ring; owned by the thread that serves it, so nothing in it is locked. On a
/// thread of a [`WorkerGroup`], whatever takes long holds up other devices.
pub trait QueueHandler {
    /// Descriptors other than the kick that make `process` run when readable
    /// (an io_uring's eventfd, a tap). At most 8; asked again after each `process`
    /// only through `wants_event`.
    fn event_fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// Whether event `index` is to be polled now; lets a handler stop listening to a
    /// level-triggered descriptor (a tap) while its ring has no buffers.
    fn wants_event(&self, index: usize) -> bool {
        let _ = index;
        true
    }
    /// Whether the driver is to kick, and the worker to look, when buffers are added; asked when
    /// the ring starts. Not for a ring that others put something into.
    fn takes_kicks(&self) -> bool {
        true
    }
    /// Makes all the progress possible without blocking: pops chains, submits, completes. The
    /// worker publishes and signals afterwards.
    ///
    /// # Errors
    /// A ring error means the driver broke the ring: the worker stops it and signals the
    /// error eventfd. The daemon and its other rings go on.
    fn process(&mut self, ring: &mut Ring, wake: Wake) -> Result<(), RingError>;
    /// Whether the worker looks for work by itself before it sleeps; asked each time. While it
    /// finds some, event descriptors are not looked at: `process` then runs for `Wake::Kick`.
    fn polling(&self) -> Polling {
        Polling::Never
    }
    /// Whether `process` has something to do that the ring does not show. Asked in a tight loop
    /// while the worker looks for work: it makes no system call.
    fn has_events(&mut self) -> bool {
        false
    }
    /// The worker is about to sleep: whatever happens from now on must make an event descriptor
    /// readable. True when something happened already; then `process` runs instead.
    fn prepare_sleep(&mut self) -> bool {
        false
    }
    /// Completes what is in flight before the ring stops, until `deadline` at most. The ring
    /// yields no new chains. Returns how many requests are still in flight.
    ///
    /// The handler is dropped afterwards. Whatever the kernel still does with guest memory must
    /// be over when `drop` returns, or hold a [`MemoryPin`](crate::ring::MemoryPin).
    fn drain(&mut self, ring: &mut Ring, deadline: Instant) -> usize {
        let _ = (ring, deadline);
        0
    }
}
