//! What is known of a NIC beyond its queues: what the driver set over the control queue, what the
//! manager set, and the counters. Rings look at it for each frame, so that looking is cheap.

use std::sync::{Mutex, PoisonError};

use super::mac::MacAddress;
use super::stats::PairStats;

/// Shared by the device and its rings.
#[derive(Debug)]
pub(crate) struct NicState {
    pub(crate) stats: Vec<PairStats>,
    first_mac: MacAddress,
    mac: Mutex<MacAddress>,
}

impl NicState {
    pub(crate) fn new(mac: MacAddress, num_pairs: u16) -> Self {
        Self {
            stats: (0..num_pairs).map(|_| PairStats::default()).collect(),
            first_mac: mac,
            mac: Mutex::new(mac),
        }
    }

    /// The NIC's address: the manager's, until the driver sets another.
    pub(crate) fn mac(&self) -> MacAddress {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_mac(&self, mac: MacAddress) {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }

    /// Forgets what the driver set.
    pub(super) fn reset(&self) {
        self.set_mac(self.first_mac);
    }
}
