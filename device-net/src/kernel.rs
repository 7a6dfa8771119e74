//! NICs onto interfaces of the host: each queue pair has a descriptor that takes and gives one
//! frame, behind a virtio-net header, with each call.
//!
//! - [`interface`]: the descriptors; [`tap`]: a tap's; [`packet`]: packet sockets
//! - [`steering`]: which of a tap's queues take part
//! - [`rx`], [`tx`]: what serves the rings; [`window`]: buffers that wait for frames, [`inbox`]: frames
//!   that wait for buffers
//! - [`alarm`]: when frames that had to wait go on
//! - [`batch`], [`uring`], [`slots`]: many frames with one system call

mod alarm;
mod batch;
mod inbox;
mod interface;
mod packet;
mod rx;
mod slots;
mod steering;
mod tap;
mod tx;
pub(crate) mod uring;
mod window;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_user::backend::{Polling, QueueHandler};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use crate::nic::backend::Backend;
use crate::nic::header::{Offloads, mask};
use crate::nic::state::NicState;
pub(crate) use interface::Interface;
pub(crate) use packet::{PacketError, PacketSockets, TAG_ROOM_BYTES};
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

/// An interface behind a NIC.
#[derive(Debug)]
pub(crate) struct KernelBackend(Arc<Shared>);

/// What its rings share.
#[derive(Debug)]
struct Shared {
    interface: Interface,
    steering: Steering,
    /// Of transmit rings; what comes from the kernel cannot be looked for without a system call.
    polling: Polling,
}

impl KernelBackend {
    /// Takes descriptors of one tap, one for each queue pair.
    ///
    /// # Errors
    /// [`TapError`] when they are something else.
    pub(crate) fn tap(fds: Vec<OwnedFd>, polling: Polling) -> Result<Self, TapError> {
        let tap = Tap::from_fds(fds)?;
        Self::new(Interface::Tap(tap), polling).map_err(TapError::Event)
    }

    /// Takes packet sockets on one interface, one for each queue pair.
    ///
    /// # Errors
    /// [`PacketError`] when they are something else.
    pub(crate) fn packet(fds: Vec<OwnedFd>, polling: Polling) -> Result<Self, PacketError> {
        let sockets = PacketSockets::from_fds(fds)?;
        Self::new(Interface::Packet(sockets), polling).map_err(PacketError::Event)
    }

    fn new(interface: Interface, polling: Polling) -> io::Result<Self> {
        let steering = Steering::new(&interface)?;
        Ok(Self(Arc::new(Shared {
            interface,
            steering,
            polling,
        })))
    }
}

impl Backend for KernelBackend {
    fn kind(&self) -> &'static str {
        match self.0.interface {
            Interface::Tap(_) => "tap",
            Interface::Packet(_) => "packet",
        }
    }

    fn num_pairs(&self) -> u16 {
        self.0.interface.num_queues()
    }

    fn offload_features(&self) -> u64 {
        let uso = if self.0.interface.has_uso() {
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
        self.0
            .interface
            .set_offloads(Offloads::to_driver(features))?;
        let queue = rx::RxQueue::new(self.0.clone(), nic.clone(), pair, features)?;
        Ok(Box::new(queue))
    }

    fn transmit_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Box<dyn QueueHandler>> {
        let queue = tx::TxQueue::new(self.0.clone(), nic.clone(), pair, features)?;
        Ok(Box::new(queue))
    }

    fn set_active_pairs(&self, pairs: u16) {
        let Shared {
            interface,
            steering,
            ..
        } = &*self.0;
        steering.set_active_pairs(interface, pairs);
    }

    fn set_link(&self, is_up: bool) {
        if let Err(error) = self.0.interface.set_carrier(is_up) {
            tracing::debug!(%error, is_up, "the host does not see that the link changed");
        }
    }

    fn reset(&self) {
        self.set_active_pairs(self.num_pairs());
        // Frames that queue up from now on must suit any driver that comes next.
        if let Err(error) = self.0.interface.set_offloads(Offloads::default()) {
            tracing::warn!(%error, "cannot take back the tap's offloads");
        }
    }
}
