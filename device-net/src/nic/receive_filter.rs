//! Which frames the driver wants to receive (Virtio 1.2 sections 5.1.6.5.1 to 5.1.6.5.3).
//!
//! Nothing is withheld from a driver whose wishes are not known: one that asked for no filter, and
//! one that a daemon's predecessor served, which does not repeat its commands. A filter is for the
//! driver's good alone; what a guest may not see is the guard's business.

use super::mac::MacAddress;

/// Addresses of each kind that are told apart; more, and all of the kind pass.
pub(super) const MAX_ADDRESSES: usize = 64;

/// VLAN identifiers, as a bitmap.
const VLAN_WORDS: usize = 4096 / 64;
const VLAN_ID_MASK: u16 = 0x0fff;

const MAC_BYTES: usize = 6;
const BROADCAST: [u8; MAC_BYTES] = [0xff; MAC_BYTES];
/// Where a tag is, and what its first two bytes then are.
const TAG_OFFSET: usize = 12;
const TAG_PROTOCOL: [u8; 2] = [0x81, 0x00];

/// Bytes of a frame that are looked at.
pub(crate) const LOOKED_AT_BYTES: usize = TAG_OFFSET + 4;

/// A mode that the driver switches on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// What the driver wants. Rings keep a copy, which they renew when it changes.
#[derive(Clone, Debug)]
pub(crate) struct ReceiveFilter {
    mac: [u8; MAC_BYTES],
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: AddressTable,
    multicast: AddressTable,
    /// None: all of them.
    vlans: Option<Box<[u64; VLAN_WORDS]>>,
}

/// Addresses besides the NIC's own.
#[derive(Clone, Debug, Default)]
pub(super) struct AddressTable {
    addresses: Vec<[u8; MAC_BYTES]>,
    /// There were too many.
    all: bool,
}

impl AddressTable {
    /// `bytes` are addresses, one after the other.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let (addresses, _) = bytes.as_chunks();
        if addresses.len() > MAX_ADDRESSES {
            return Self {
                addresses: Vec::new(),
                all: true,
            };
        }
        Self {
            addresses: addresses.to_vec(),
            all: false,
        }
    }

    fn has(&self, address: &[u8; MAC_BYTES]) -> bool {
        self.all || self.addresses.contains(address)
    }
}

impl ReceiveFilter {
    /// Everything passes.
    pub(super) fn open(mac: MacAddress) -> Self {
        Self {
            mac: mac.0,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: AddressTable::default(),
            multicast: AddressTable::default(),
            vlans: None,
        }
    }

    /// Whether every frame passes, so that none need be looked at.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.promiscuous
    }

    /// Whether a frame that begins with `head` passes; [`LOOKED_AT_BYTES`] of it suffice.
    pub(crate) fn accepts(&self, head: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(destination) = head.first_chunk::<MAC_BYTES>() else {
            return false;
        };
        if !self.accepts_vlan(head) {
            return false;
        }
        if *destination == BROADCAST {
            !self.no_broadcast
        } else if destination[0] & 1 != 0 {
            !self.no_multicast && (self.all_multicast || self.multicast.has(destination))
        } else {
            let is_own = *destination == self.mac;
            !self.no_unicast && (is_own || self.all_unicast || self.unicast.has(destination))
        }
    }

    fn accepts_vlan(&self, head: &[u8]) -> bool {
        let Some(vlans) = &self.vlans else {
            return true;
        };
        match head.get(TAG_OFFSET..LOOKED_AT_BYTES) {
            Some(&[a, b, c, d]) if [a, b] == TAG_PROTOCOL => {
                let vlan = u16::from_be_bytes([c, d]) & VLAN_ID_MASK;
                // A tag without a VLAN is a priority.
                vlan == 0 || vlans[usize::from(vlan / 64)] & 1 << (vlan % 64) != 0
            }
            _ => true,
        }
    }

    pub(super) fn set_mac(&mut self, mac: MacAddress) {
        self.mac = mac.0;
    }

    pub(super) fn set_mode(&mut self, mode: Mode, on: bool) {
        *match mode {
            Mode::Promiscuous => &mut self.promiscuous,
            Mode::AllMulticast => &mut self.all_multicast,
            Mode::AllUnicast => &mut self.all_unicast,
            Mode::NoMulticast => &mut self.no_multicast,
            Mode::NoUnicast => &mut self.no_unicast,
            Mode::NoBroadcast => &mut self.no_broadcast,
        } = on;
    }

    pub(super) fn set_tables(&mut self, unicast: AddressTable, multicast: AddressTable) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// From now on only VLANs that the driver names pass.
    pub(super) fn filter_vlans(&mut self) {
        self.vlans = Some(Box::new([0; VLAN_WORDS]));
    }

    pub(super) fn set_vlan(&mut self, vlan: u16, passes: bool) {
        if let Some(vlans) = &mut self.vlans {
            let word = &mut vlans[usize::from((vlan & VLAN_ID_MASK) / 64)];
            let bit = 1 << (vlan % 64);
            *word = if passes { *word | bit } else { *word & !bit };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
    const GROUP: [u8; 6] = [0x01, 0, 0x5e, 0, 0, 1];

    fn frame(to: [u8; 6]) -> Vec<u8> {
        [&to[..], &OTHER, &[0x08, 0, 0, 0]].concat()
    }

    fn tagged(to: [u8; 6], tag: u16) -> Vec<u8> {
        [&to[..], &OTHER, &TAG_PROTOCOL, &tag.to_be_bytes()].concat()
    }

    fn closed() -> ReceiveFilter {
        let mut filter = ReceiveFilter::open(MacAddress(OWN));
        filter.set_mode(Mode::Promiscuous, false);
        filter
    }

    #[test]
    fn everything_passes_until_the_driver_says_otherwise() {
        let filter = ReceiveFilter::open(MacAddress(OWN));
        for to in [OWN, OTHER, GROUP, BROADCAST] {
            assert!(filter.accepts(&frame(to)));
        }
    }

    #[test]
    fn own_address_broadcasts_and_tables_pass() {
        let mut filter = closed();
        let passes = |filter: &ReceiveFilter| {
            [OWN, OTHER, GROUP, BROADCAST].map(|to| filter.accepts(&frame(to)))
        };
        assert_eq!(passes(&filter), [true, false, false, true]);
        filter.set_tables(AddressTable::new(&OTHER), AddressTable::new(&GROUP));
        assert_eq!(passes(&filter), [true; 4]);
        filter.set_tables(AddressTable::default(), AddressTable::default());
        filter.set_mode(Mode::AllMulticast, true);
        assert_eq!(passes(&filter), [true, false, true, true]);
        filter.set_mode(Mode::AllUnicast, true);
        assert_eq!(passes(&filter), [true; 4]);
        filter.set_mode(Mode::NoBroadcast, true);
        filter.set_mode(Mode::NoMulticast, true);
        filter.set_mode(Mode::NoUnicast, true);
        assert_eq!(passes(&filter), [false; 4]);
    }

    #[test]
    fn table_that_is_too_long_lets_all_pass() {
        let mut filter = closed();
        let many: Vec<u8> = (0..=MAX_ADDRESSES as u8)
            .flat_map(|n| [2, 0, 0, 0, 0, n])
            .collect();
        filter.set_tables(AddressTable::new(&many), AddressTable::default());
        assert!(filter.accepts(&frame(OTHER)));
        assert!(!filter.accepts(&frame(GROUP)));
    }

    #[test]
    fn only_named_vlans_and_untagged_frames_pass() {
        let mut filter = closed();
        assert!(filter.accepts(&tagged(OWN, 7)), "no VLAN filter");
        filter.filter_vlans();
        filter.set_vlan(7, true);
        filter.set_vlan(4094, true);
        // The upper four bits are the priority.
        let passes = [0, 7, 0xe007, 8, 4094].map(|tag| filter.accepts(&tagged(OWN, tag)));
        assert_eq!(passes, [true, true, true, false, true]);
        assert!(filter.accepts(&frame(OWN)));
        filter.set_vlan(7, false);
        assert!(!filter.accepts(&tagged(OWN, 7)));
    }

    #[test]
    fn frame_without_a_destination_does_not_pass() {
        assert!(!closed().accepts(&OWN[..5]));
    }
}
