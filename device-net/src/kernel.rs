//! NICs onto interfaces of the host: each queue pair has a descriptor that takes and gives one
//! frame, behind a virtio-net header, with each call.
//!
//! - [`tap`]: a tap's queues; [`steering`]: which of them take part
//! - [`rx`], [`tx`]: what serves the rings

mod rx;
mod steering;
mod tap;
mod tx;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_user::backend::QueueHandler;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use crate::nic::backend::Backend;
use crate::nic::header::{Offloads, header_len_bytes, mask};
use crate::nic::state::NicState;
use steering::Steering;
pub(crate) use tap::{Tap, TapError};

const OFFLOADS: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
];
const USO_OFFLOADS: &[u32] = &[
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];

/// A NIC's tap.
#[derive(Debug)]
pub(crate) struct TapBackend(Arc<Shared>);

/// What a tap's rings share.
#[derive(Debug)]
struct Shared {
    tap: Tap,
    steering: Steering,
}

impl TapBackend {
    /// Takes descriptors of one tap, one for each queue pair.
    ///
    /// # Errors
    /// [`TapError`] when they are something else.
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let tap = Tap::from_fds(fds)?;
        let steering = Steering::new(&tap).map_err(TapError::Event)?;
        Ok(Self(Arc::new(Shared { tap, steering })))
    }
}

impl Backend for TapBackend {
    fn kind(&self) -> &'static str {
        "tap"
    }

    fn num_pairs(&self) -> u16 {
        self.0.tap.num_queues()
    }

    fn offload_features(&self) -> u64 {
        let uso = if self.0.tap.has_uso() {
            USO_OFFLOADS
        } else {
            &[]
        };
        mask(OFFLOADS) | mask(uso)
    }

    fn receive_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Box<dyn QueueHandler>> {
        let Shared { tap, .. } = &*self.0;
        tap.set_header_len(header_len_bytes(features))?;
        tap.set_offloads(Offloads::to_driver(features))?;
        let queue = rx::RxQueue::new(self.0.clone(), nic.clone(), pair, features);
        Ok(Box::new(queue))
    }

    fn transmit_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Box<dyn QueueHandler>> {
        self.0.tap.set_header_len(header_len_bytes(features))?;
        let queue = tx::TxQueue::new(self.0.clone(), nic.clone(), pair, features)?;
        Ok(Box::new(queue))
    }

    fn set_active_pairs(&self, pairs: u16) {
        self.0.steering.set_active_pairs(&self.0.tap, pairs);
    }

    fn reset(&self) {
        let Shared { tap, .. } = &*self.0;
        self.set_active_pairs(tap.num_queues());
        // Frames that queue up from now on must suit any driver that comes next.
        if let Err(error) = tap.set_offloads(Offloads::default()) {
            tracing::warn!(%error, "cannot take back the tap's offloads");
        }
    }
}
