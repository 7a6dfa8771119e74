//! A NIC as the vhost-user session sees it: features, configuration space, queues.

use std::io;
use std::sync::Arc;

use api::device::NetStats;
use faults::DeviceFaults;
use filter::Direction;
use vhost_user::backend::{Device, QueueHandler, Seat, SharedRing};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::backend::Backend;
use super::ctrl::CtrlQueue;
use super::header::{has, mask};
use super::state::NicState;
use super::stats;

/// As many as request validation allows: half of a descriptor message.
pub(crate) const MAX_QUEUE_PAIRS: u16 = api::validate::MAX_QUEUE_PAIRS as u16;

/// What the device offers whatever is behind it.
const FEATURES: &[u32] = &[
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// One NIC. Outlives sessions.
#[derive(Debug)]
pub(super) struct NicDevice {
    nic: Arc<NicState>,
    backend: Arc<dyn Backend>,
    mtu: Option<u16>,
}

impl NicDevice {
    /// A NIC whose other end is `backend`, with as many queue pairs.
    pub(super) fn new(nic: NicState, backend: Arc<dyn Backend>, mtu: Option<u16>) -> Self {
        Self {
            nic: Arc::new(nic),
            backend,
            mtu,
        }
    }

    pub(super) fn nic(&self) -> &NicState {
        &self.nic
    }

    pub(super) fn stats(&self) -> NetStats {
        let mut stats = NetStats {
            mac: self.nic.mac().to_string(),
            backend: self.backend.kind().to_owned(),
            link_up: self.nic.is_link_up(),
            ..stats::sum(&self.nic.stats)
        };
        let guard = &self.nic.guard;
        for (by_reason, direction) in [
            (&mut stats.rx_drops_by_reason, Direction::Ingress),
            (&mut stats.tx_drops_by_reason, Direction::Egress),
        ] {
            for (reason, count) in guard.drops(direction) {
                *by_reason.entry(reason.to_owned()).or_default() += count;
            }
        }
        stats
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    fn num_pairs(&self) -> u16 {
        self.backend.num_pairs()
    }

    fn status(&self) -> u16 {
        let bit = |is_set, bit| if is_set { bit as u16 } else { 0 };
        bit(self.nic.is_link_up(), VIRTIO_NET_S_LINK_UP)
            | bit(self.nic.wants_announcement(), VIRTIO_NET_S_ANNOUNCE)
    }
}

impl Device for NicDevice {
    fn features(&self) -> u64 {
        let mut features = mask(FEATURES) | self.backend.offload_features();
        if self.num_pairs() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        if self.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        features
    }

    /// The pairs and the control queue. GET_QUEUE_NUM answers this as well: a frontend that asks
    /// for pairs (QEMU, DPDK) and one that asks for queues (Cloud Hypervisor) both find enough.
    fn num_queues(&self) -> u16 {
        2 * self.num_pairs() + 1
    }

    /// `struct virtio_net_config` (Virtio 1.2 section 5.1.4).
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(24);
        config.extend(self.nic.mac().0);
        config.extend(self.status().to_le_bytes());
        config.extend(self.num_pairs().to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        // Speed and duplex unknown, no receive-side scaling.
        config.extend(u32::MAX.to_le_bytes());
        config.push(0xff);
        config.resize(24, 0);
        config
    }

    fn start_queue(&self, index: u16, features: u64) -> io::Result<Box<dyn QueueHandler>> {
        let nic = &self.nic;
        match Role::of(index, features, self.num_pairs()) {
            Some(Role::Receive(pair)) => self.backend.receive_queue(nic, pair, features),
            Some(Role::Transmit(pair)) => self.backend.transmit_queue(nic, pair, features),
            Some(Role::Control) => {
                let queue = CtrlQueue::new(nic.clone(), self.backend.clone(), features);
                Ok(Box::new(queue))
            }
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("queue {index} does not exist with the negotiated features"),
            )),
        }
    }

    fn group(&self) -> Option<Seat> {
        self.backend.seat()
    }

    fn shares_ring(&self, index: u16, features: u64) -> bool {
        let is_receive = matches!(
            Role::of(index, features, self.num_pairs()),
            Some(Role::Receive(_))
        );
        is_receive && self.backend.seat().is_some()
    }

    fn start_shared_queue(&self, ring: &Arc<SharedRing>) -> io::Result<Box<dyn QueueHandler>> {
        // Receive rings alone are shared: pair n has ring 2n.
        self.backend
            .shared_receive_queue(&self.nic, ring.index() / 2, ring)
    }

    fn faults(&self) -> Option<Arc<DeviceFaults>> {
        Some(Arc::clone(&self.nic.faults)).filter(|faults| faults.is_possible())
    }

    fn reset(&self) {
        self.backend.reset();
        self.nic.reset();
    }
}

/// What a queue is for (Virtio 1.2 section 5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

impl Role {
    /// The control queue follows the pairs that the driver may use: all with MQ, else one.
    fn of(index: u16, features: u64, max_pairs: u16) -> Option<Self> {
        let pairs = if has(features, VIRTIO_NET_F_MQ) {
            max_pairs
        } else {
            1
        };
        match index {
            _ if index == 2 * pairs && has(features, VIRTIO_NET_F_CTRL_VQ) => Some(Self::Control),
            _ if index >= 2 * pairs => None,
            _ if index.is_multiple_of(2) => Some(Self::Receive(index / 2)),
            _ => Some(Self::Transmit(index / 2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CTRL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
    const MQ: u64 = 1 << VIRTIO_NET_F_MQ;

    #[test]
    fn control_queue_follows_all_pairs_with_mq_and_one_without() {
        let roles = |features| (0..6).map(|i| Role::of(i, features, 2)).collect::<Vec<_>>();
        let (rx, tx) = (|p| Some(Role::Receive(p)), |p| Some(Role::Transmit(p)));
        let ctrl = Some(Role::Control);
        assert_eq!(roles(MQ | CTRL), [rx(0), tx(0), rx(1), tx(1), ctrl, None]);
        assert_eq!(roles(CTRL), [rx(0), tx(0), ctrl, None, None, None]);
        assert_eq!(roles(MQ), [rx(0), tx(0), rx(1), tx(1), None, None]);
        assert_eq!(roles(0), [rx(0), tx(0), None, None, None, None]);
    }
}
