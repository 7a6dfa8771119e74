//! The other end of a NIC: what its queues are connected to.

use std::fmt;
use std::io;
use std::sync::Arc;

use vhost_user::backend::{QueueHandler, Seat, SharedRing};

use super::state::NicState;

/// A tap, packet sockets, or a port of a switch. Outlives sessions, as the NIC does.
///
/// What serves a ring looks at [`NicState`] for what the driver and the manager set, and counts
/// there.
pub(crate) trait Backend: fmt::Debug + Send + Sync {
    /// Name of the kind, for people and metrics.
    fn kind(&self) -> &'static str;
    /// Queue pairs that it has.
    fn num_pairs(&self) -> u16;
    /// Feature bits of the offloads that it can do, or leave to the driver.
    fn offload_features(&self) -> u64;
    /// What carries frames to the driver. Called on the ring's own thread; `features` are those
    /// that were negotiated.
    ///
    /// # Errors
    /// The ring stays stopped.
    fn receive_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Box<dyn QueueHandler>>;
    /// What carries frames from the driver, likewise.
    ///
    /// # Errors
    /// The ring stays stopped.
    fn transmit_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Box<dyn QueueHandler>>;
    /// Where all rings of the NIC are served, if not by a thread each. Receive rings are then shared.
    fn seat(&self) -> Option<Seat> {
        None
    }
    /// As [`Backend::receive_queue`], for a ring that is shared.
    ///
    /// # Errors
    /// The ring stays stopped.
    fn shared_receive_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        ring: &Arc<SharedRing>,
    ) -> io::Result<Box<dyn QueueHandler>> {
        self.receive_queue(nic, pair, ring.features())
    }
    /// The driver uses only the first `pairs` queue pairs from now on.
    fn set_active_pairs(&self, pairs: u16);
    /// The driver is gone: the next one begins with nothing negotiated.
    fn reset(&self);
    /// The cable was plugged in or out.
    fn set_link(&self, is_up: bool) {
        let _ = is_up;
    }
    /// The NIC has ended; no more frames for it.
    fn detach(&self) {}
}
