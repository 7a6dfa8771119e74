//! A NIC as the vhost-user session sees it: features, configuration space, queues.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use api::device::NetStats;
use vhost_user::backend::{Device, QueueHandler};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::ctrl::CtrlQueue;
use super::header::{Offloads, has, header_len_bytes};
use super::mac::MacAddress;
use super::rx::RxQueue;
use super::stats::{self, PairStats};
use super::steering::Steering;
use super::tap::Tap;
use super::tx::TxQueue;

/// As many as request validation allows: half of a descriptor message.
pub(crate) const MAX_QUEUE_PAIRS: u16 = api::validate::MAX_QUEUE_PAIRS as u16;

const FEATURES: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
];
const USO_FEATURES: &[u32] = &[
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];

/// One NIC. Outlives sessions.
#[derive(Debug)]
pub(super) struct NicDevice {
    shared: Arc<Shared>,
    mtu: Option<u16>,
}

/// What the device and its rings share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tap: Tap,
    pub(super) steering: Steering,
    pub(super) stats: Vec<PairStats>,
    first_mac: MacAddress,
    mac: Mutex<MacAddress>,
}

impl Shared {
    pub(super) fn mac(&self) -> MacAddress {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_mac(&self, mac: MacAddress) {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }

    pub(super) fn num_pairs(&self) -> u16 {
        self.tap.num_queues()
    }
}

impl NicDevice {
    /// A NIC behind `tap`, with a queue pair for each of its queues.
    ///
    /// # Errors
    /// No descriptors to be had.
    pub(super) fn new(tap: Tap, mac: MacAddress, mtu: Option<u16>) -> io::Result<Self> {
        let shared = Shared {
            steering: Steering::new(&tap)?,
            stats: (0..tap.num_queues())
                .map(|_| PairStats::default())
                .collect(),
            tap,
            first_mac: mac,
            mac: Mutex::new(mac),
        };
        Ok(Self {
            shared: Arc::new(shared),
            mtu,
        })
    }

    pub(super) fn stats(&self) -> NetStats {
        NetStats {
            mac: self.shared.mac().to_string(),
            ..stats::sum(self.shared.stats.iter())
        }
    }
}

impl Device for NicDevice {
    fn features(&self) -> u64 {
        let mut features = mask(FEATURES);
        if self.shared.tap.has_uso() {
            features |= mask(USO_FEATURES);
        }
        if self.shared.num_pairs() > 1 {
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
        2 * self.shared.num_pairs() + 1
    }

    /// `struct virtio_net_config` (Virtio 1.2 section 5.1.4).
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(24);
        config.extend(self.shared.mac().0);
        config.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config.extend(self.shared.num_pairs().to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        // Speed and duplex unknown, no receive-side scaling.
        config.extend(u32::MAX.to_le_bytes());
        config.push(0xff);
        config.resize(24, 0);
        config
    }

    fn start_queue(&self, index: u16, features: u64) -> io::Result<Box<dyn QueueHandler>> {
        let shared = self.shared.clone();
        match Role::of(index, features, shared.num_pairs()) {
            Some(Role::Receive(pair)) => {
                shared.tap.set_header_len(header_len_bytes(features))?;
                shared.tap.set_offloads(Offloads::to_driver(features))?;
                Ok(Box::new(RxQueue::new(shared, pair, features)))
            }
            Some(Role::Transmit(pair)) => {
                shared.tap.set_header_len(header_len_bytes(features))?;
                Ok(Box::new(TxQueue::new(shared, pair, features)?))
            }
            Some(Role::Control) => Ok(Box::new(CtrlQueue::new(shared, features))),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("queue {index} does not exist with the negotiated features"),
            )),
        }
    }

    fn reset(&self) {
        let Shared {
            tap,
            steering,
            first_mac,
            ..
        } = &*self.shared;
        steering.set_active_pairs(tap, self.shared.num_pairs());
        // Frames that queue up from now on must suit any driver that comes next.
        if let Err(error) = tap.set_offloads(Offloads::default()) {
            tracing::warn!(%error, "cannot take back the tap's offloads");
        }
        self.shared.set_mac(*first_mac);
    }
}

fn mask(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |mask, bit| mask | 1 << bit)
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
