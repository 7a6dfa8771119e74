//! What is known of a NIC beyond its queues: what the driver set over the control queue, what the
//! manager set, and the counters. Rings look at it for each batch of frames, so that looking is
//! cheap.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use faults::{DeviceFaults, Wake};

use super::mac::MacAddress;
use super::receive_filter::ReceiveFilter;
use super::stats::PairStats;
use crate::guard::Guard;

/// Shared by the device and its rings.
#[derive(Debug)]
pub(crate) struct NicState {
    pub(crate) stats: Vec<PairStats>,
    /// What rings ask about each frame.
    pub(crate) guard: Arc<Guard>,
    /// What goes wrong on purpose.
    pub(crate) faults: Arc<DeviceFaults>,
    first_mac: MacAddress,
    driver: Mutex<DriverSet>,
    /// Counts changes of the receive filter.
    filter_version: AtomicU64,
    is_link_up: AtomicBool,
    /// The driver is asked to announce itself, and has not answered.
    wants_announcement: AtomicBool,
}

/// What the driver set; gone with it.
#[derive(Debug)]
struct DriverSet {
    mac: MacAddress,
    filter: Arc<ReceiveFilter>,
    /// It has a control queue and knows how to announce itself.
    can_announce: bool,
}

impl DriverSet {
    fn nothing(mac: MacAddress) -> Self {
        Self {
            mac,
            filter: Arc::new(ReceiveFilter::open(mac)),
            can_announce: false,
        }
    }
}

impl NicState {
    pub(crate) fn new(
        mac: MacAddress,
        num_pairs: u16,
        is_link_up: bool,
        faults: Arc<DeviceFaults>,
    ) -> Self {
        let guard = Arc::new(Guard::faulty(mac, Arc::clone(&faults)));
        let waker: Arc<dyn Wake> = guard.clone();
        faults.add_waker(&waker);
        // What was armed before.
        waker.wake();
        Self {
            stats: (0..num_pairs).map(|_| PairStats::default()).collect(),
            guard,
            faults,
            first_mac: mac,
            driver: Mutex::new(DriverSet::nothing(mac)),
            filter_version: AtomicU64::new(0),
            is_link_up: AtomicBool::new(is_link_up),
            wants_announcement: AtomicBool::new(false),
        }
    }

    /// The NIC's address: the manager's, until the driver sets another.
    pub(crate) fn mac(&self) -> MacAddress {
        self.driver().mac
    }

    /// Whether the cable is in. While it is out, rings drop what they get.
    #[inline]
    pub(crate) fn is_link_up(&self) -> bool {
        self.is_link_up.load(Ordering::Relaxed)
    }

    /// Plugs the cable in or out; the configuration space is to be told of as changed. A driver
    /// whose link comes up is asked to announce itself, because switches may have forgotten it.
    pub(super) fn set_link(&self, is_up: bool) {
        let was_up = self.is_link_up.swap(is_up, Ordering::Relaxed);
        if is_up && !was_up {
            self.ask_for_announcement();
        }
    }

    /// Asks the driver to announce itself, if it can; the configuration space has changed then.
    pub(super) fn ask_for_announcement(&self) {
        let can_announce = self.driver().can_announce;
        self.wants_announcement
            .store(can_announce, Ordering::Relaxed);
    }

    /// Whether the driver is asked to announce itself.
    pub(super) fn wants_announcement(&self) -> bool {
        self.wants_announcement.load(Ordering::Relaxed)
    }

    pub(super) fn announced(&self) {
        self.wants_announcement.store(false, Ordering::Relaxed);
    }

    /// The filter, and its version.
    pub(crate) fn receive_filter(&self) -> (Arc<ReceiveFilter>, u64) {
        let driver = self.driver();
        let version = self.filter_version.load(Ordering::Relaxed);
        (driver.filter.clone(), version)
    }

    /// Which version of [`NicState::receive_filter`] holds now.
    #[inline]
    pub(crate) fn filter_version(&self) -> u64 {
        self.filter_version.load(Ordering::Acquire)
    }

    pub(super) fn change_filter(&self, change: impl FnOnce(&mut ReceiveFilter)) {
        let mut driver = self.driver();
        change(Arc::make_mut(&mut driver.filter));
        self.filter_version.fetch_add(1, Ordering::Release);
    }

    pub(super) fn set_mac(&self, mac: MacAddress) {
        self.driver().mac = mac;
        self.change_filter(|filter| filter.set_mac(mac));
    }

    pub(super) fn set_can_announce(&self, can_announce: bool) {
        self.driver().can_announce = can_announce;
    }

    /// Forgets what the driver set.
    pub(super) fn reset(&self) {
        *self.driver() = DriverSet::nothing(self.first_mac);
        self.filter_version.fetch_add(1, Ordering::Release);
        self.announced();
    }

    fn driver(&self) -> MutexGuard<'_, DriverSet> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

    #[test]
    fn only_a_driver_that_can_is_asked_to_announce_itself() {
        let nic = NicState::new(MAC, 1, true, DeviceFaults::none());
        nic.set_link(false);
        nic.set_link(true);
        assert!(!nic.wants_announcement());
        nic.set_can_announce(true);
        nic.set_link(true);
        assert!(!nic.wants_announcement(), "the link was up");
        nic.set_link(false);
        nic.set_link(true);
        assert!(nic.wants_announcement());
        nic.announced();
        assert!(!nic.wants_announcement());
    }

    #[test]
    fn reset_forgets_what_the_driver_set() {
        let nic = NicState::new(MAC, 1, true, DeviceFaults::none());
        let version = nic.filter_version();
        nic.set_mac(MacAddress([2, 0, 0, 0, 0, 1]));
        nic.change_filter(|filter| {
            filter.set_mode(super::super::receive_filter::Mode::Promiscuous, false);
        });
        assert!(!nic.receive_filter().0.is_open());
        assert_ne!(nic.filter_version(), version);
        nic.reset();
        assert!(nic.receive_filter().0.is_open());
        assert_eq!(nic.mac(), MAC);
    }
}
