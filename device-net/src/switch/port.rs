//! A NIC's port: what its queues are served by.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vhost_user::backend::{Polling, QueueHandler, Seat, SharedRing, Wake};
use vhost_user::ring::{Ring, RingError};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::forward::TxQueue;
use super::mac_table::PortNumber;
use super::vlan::Vlans;
use super::{OFFLOADS, Switch};
use crate::nic::backend::Backend;
use crate::nic::header::{Offloads, has, header_len_bytes, mask};
use crate::nic::receive_filter::ReceiveFilter;
use crate::nic::state::NicState;
use crate::nic::stats::Direction;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) switch: Arc<Switch>,
    pub(super) number: PortNumber,
    pub(super) vlans: Arc<Vlans>,
    pub(super) num_pairs: u16,
    pub(super) seat: Seat,
    pub(super) polling: Polling,
}

/// A receive ring, as those who put frames into it know it.
#[derive(Debug)]
pub(super) struct RingReceiver {
    pub(super) ring: Arc<SharedRing>,
    pub(super) nic: Arc<NicState>,
    pub(super) number: PortNumber,
    pub(super) pair: u16,
    pub(super) header_len_bytes: usize,
    pub(super) offloads: Offloads,
    pub(super) is_mergeable: bool,
    filter: Mutex<KnownFilter>,
}

/// The driver's receive filter as it was last looked at.
#[derive(Debug)]
struct KnownFilter {
    filter: Arc<ReceiveFilter>,
    version: u64,
}

impl RingReceiver {
    fn new(ring: &Arc<SharedRing>, nic: &Arc<NicState>, number: PortNumber, pair: u16) -> Self {
        let features = ring.features();
        let (filter, version) = nic.receive_filter();
        Self {
            ring: Arc::clone(ring),
            nic: Arc::clone(nic),
            number,
            pair,
            header_len_bytes: header_len_bytes(features),
            offloads: Offloads::to_driver(features),
            is_mergeable: has(features, VIRTIO_NET_F_MRG_RXBUF),
            filter: Mutex::new(KnownFilter { filter, version }),
        }
    }

    /// Which frames the driver wants; None for all. For who has locked the ring.
    #[inline]
    pub(super) fn filter(&self) -> Option<Arc<ReceiveFilter>> {
        let mut known = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        if known.version != self.nic.filter_version() {
            (known.filter, known.version) = self.nic.receive_filter();
        }
        (!known.filter.is_open()).then(|| Arc::clone(&known.filter))
    }

    pub(super) fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].rx.0
    }
}

impl Backend for Port {
    fn kind(&self) -> &'static str {
        "switch"
    }

    fn num_pairs(&self) -> u16 {
        self.num_pairs
    }

    fn offload_features(&self) -> u64 {
        mask(OFFLOADS)
    }

    fn receive_queue(
        &self,
        _nic: &Arc<NicState>,
        pair: u16,
        _features: u64,
    ) -> io::Result<Box<dyn QueueHandler>> {
        Err(io::Error::other(format!(
            "receive ring {pair} of a switch port is not shared"
        )))
    }

    fn shared_receive_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        ring: &Arc<SharedRing>,
    ) -> io::Result<Box<dyn QueueHandler>> {
        let receiver = RingReceiver::new(ring, nic, self.number, pair);
        self.switch
            .set_receiver(self.number, pair, Some(Arc::new(receiver)));
        Ok(Box::new(RxQueue {
            switch: Arc::clone(&self.switch),
            number: self.number,
            pair,
        }))
    }

    fn transmit_queue(
        &self,
        nic: &Arc<NicState>,
        pair: u16,
        features: u64,
    ) -> io::Result<Box<dyn QueueHandler>> {
        Ok(Box::new(TxQueue::new(self, nic, pair, features)))
    }

    fn seat(&self) -> Option<Seat> {
        Some(self.seat.clone())
    }

    fn set_active_pairs(&self, pairs: u16) {
        self.switch.set_active_pairs(self.number, pairs);
    }

    fn reset(&self) {
        self.switch.set_active_pairs(self.number, self.num_pairs);
    }

    fn detach(&self) {
        self.switch.remove(self.number);
    }
}

/// A receive ring on its own thread: others fill it, so that nothing is left to do here.
struct RxQueue {
    switch: Arc<Switch>,
    number: PortNumber,
    pair: u16,
}

impl QueueHandler for RxQueue {
    fn takes_kicks(&self) -> bool {
        false
    }

    fn process(&mut self, _ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        Ok(())
    }
}

impl Drop for RxQueue {
    fn drop(&mut self) {
        self.switch.set_receiver(self.number, self.pair, None);
    }
}
