//! The control queue (Virtio 1.2 section 5.1.6.5).
//!
//! Not offered: receive-side scaling and hash reports, since the kernel spreads flows over a tap's
//! queues by itself and a switch port does so in one pass with forwarding, while hashing each frame
//! once more here would cost what it saves the guest; switching offloads at run time, since a
//! daemon's successor would not hear of it, and would hand over frames that the driver cannot take.

use std::sync::Arc;

use vhost_user::backend::{QueueHandler, Wake};
use vhost_user::ring::{DescChain, Ring, RingError};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_CTRL_RX_NOMULTI,
    VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::backend::Backend;
use super::header::has;
use super::mac::MacAddress;
use super::receive_filter::{AddressTable, Mode};
use super::state::NicState;

/// Class and command, then two tables of addresses, each as long as Linux makes them at most; one
/// that is longer is answered with an error.
const MAX_COMMAND_LEN_BYTES: usize = 2 + 2 * (4 + 512 * MAC_BYTES);
const MAC_BYTES: usize = 6;

/// First VLAN identifier that does not exist.
const NUM_VLANS: u16 = 4096;

/// The bits of a ring's position that are its index, in either format.
const INDEX_MASK: u16 = 0x7fff;

/// The control ring.
pub(super) struct CtrlQueue {
    nic: Arc<NicState>,
    backend: Arc<dyn Backend>,
    features: u64,
    has_begun: bool,
    /// Kept for its storage.
    bytes: Vec<u8>,
}

impl CtrlQueue {
    pub(super) fn new(nic: Arc<NicState>, backend: Arc<dyn Backend>, features: u64) -> Self {
        nic.set_can_announce(has(features, VIRTIO_NET_F_GUEST_ANNOUNCE));
        Self {
            nic,
            backend,
            features,
            has_begun: false,
            bytes: Vec::new(),
        }
    }

    /// A driver that has just begun names the VLANs it wants. One that gave commands to a
    /// predecessor does not name them again.
    fn begin(&mut self, ring: &Ring) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let is_new = ring.state().used_idx & INDEX_MASK == 0;
        if is_new && has(self.features, VIRTIO_NET_F_CTRL_VLAN) {
            self.nic.change_filter(|filter| filter.filter_vlans());
        }
    }

    fn answer(&mut self, chain: &DescChain) -> u32 {
        let len_bytes = chain.readable_len_bytes() as usize;
        if len_bytes > MAX_COMMAND_LEN_BYTES {
            return VIRTIO_NET_ERR;
        }
        self.bytes.resize(len_bytes, 0);
        chain.read_at(0, &mut self.bytes);
        match Command::parse(&self.bytes, self.features, self.backend.num_pairs()) {
            Some(command) => {
                self.carry_out(command);
                VIRTIO_NET_OK
            }
            None => VIRTIO_NET_ERR,
        }
    }

    fn carry_out(&self, command: Command<'_>) {
        let nic = &self.nic;
        match command {
            Command::SetMode(mode, on) => nic.change_filter(|filter| filter.set_mode(mode, on)),
            Command::SetTables { unicast, multicast } => nic.change_filter(|filter| {
                filter.set_tables(AddressTable::new(unicast), AddressTable::new(multicast));
            }),
            Command::SetMac(mac) => nic.set_mac(mac),
            Command::SetVlan(vlan, passes) => {
                nic.change_filter(|filter| filter.set_vlan(vlan, passes));
            }
            Command::Announced => nic.announced(),
            Command::SetPairs(pairs) => self.backend.set_active_pairs(pairs),
        }
    }
}

impl QueueHandler for CtrlQueue {
    fn process(&mut self, ring: &mut Ring, _: Wake) -> Result<(), RingError> {
        self.begin(ring);
        // A ring's worth of commands at a time; a driver waits for each answer anyway.
        for _ in 0..ring.size() {
            let Some(chain) = ring.pop()? else { break };
            let ack = self.answer(&chain);
            let written_bytes = chain.write_at(0, &[ack as u8]);
            ring.complete(chain, written_bytes as u32);
        }
        Ok(())
    }
}

/// What the driver may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command<'a> {
    SetMode(Mode, bool),
    /// Addresses, one after the other.
    SetTables {
        unicast: &'a [u8],
        multicast: &'a [u8],
    },
    SetMac(MacAddress),
    SetVlan(u16, bool),
    Announced,
    SetPairs(u16),
}

impl<'a> Command<'a> {
    /// None for what is malformed, unknown or was not negotiated.
    fn parse(bytes: &'a [u8], features: u64, max_pairs: u16) -> Option<Self> {
        let (&[class, command], argument) = bytes.split_first_chunk()?;
        let command = u32::from(command);
        let is_negotiated = |feature| has(features, feature).then_some(());
        match u32::from(class) {
            VIRTIO_NET_CTRL_RX => {
                let (mode, feature) = mode(command)?;
                is_negotiated(feature)?;
                Some(Self::SetMode(mode, *argument.first()? != 0))
            }
            VIRTIO_NET_CTRL_MAC => match command {
                VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                    is_negotiated(VIRTIO_NET_F_CTRL_RX)?;
                    let (unicast, rest) = address_table(argument)?;
                    let (multicast, _) = address_table(rest)?;
                    Some(Self::SetTables { unicast, multicast })
                }
                VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                    is_negotiated(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                    MacAddress::unicast(*argument.first_chunk()?).map(Self::SetMac)
                }
                _ => None,
            },
            VIRTIO_NET_CTRL_VLAN => {
                is_negotiated(VIRTIO_NET_F_CTRL_VLAN)?;
                let passes = match command {
                    VIRTIO_NET_CTRL_VLAN_ADD => true,
                    VIRTIO_NET_CTRL_VLAN_DEL => false,
                    _ => return None,
                };
                let vlan = u16::from_le_bytes(*argument.first_chunk()?);
                (vlan < NUM_VLANS).then_some(Self::SetVlan(vlan, passes))
            }
            VIRTIO_NET_CTRL_ANNOUNCE if command == VIRTIO_NET_CTRL_ANNOUNCE_ACK => {
                is_negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                Some(Self::Announced)
            }
            VIRTIO_NET_CTRL_MQ if command == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                is_negotiated(VIRTIO_NET_F_MQ)?;
                let pairs = u16::from_le_bytes(*argument.first_chunk()?);
                (1..=max_pairs)
                    .contains(&pairs)
                    .then_some(Self::SetPairs(pairs))
            }
            _ => None,
        }
    }
}

/// The mode that a command is about, and the feature that it belongs to.
fn mode(command: u32) -> Option<(Mode, u32)> {
    Some(match command {
        VIRTIO_NET_CTRL_RX_PROMISC => (Mode::Promiscuous, VIRTIO_NET_F_CTRL_RX),
        VIRTIO_NET_CTRL_RX_ALLMULTI => (Mode::AllMulticast, VIRTIO_NET_F_CTRL_RX),
        VIRTIO_NET_CTRL_RX_ALLUNI => (Mode::AllUnicast, VIRTIO_NET_F_CTRL_RX_EXTRA),
        VIRTIO_NET_CTRL_RX_NOMULTI => (Mode::NoMulticast, VIRTIO_NET_F_CTRL_RX_EXTRA),
        VIRTIO_NET_CTRL_RX_NOUNI => (Mode::NoUnicast, VIRTIO_NET_F_CTRL_RX_EXTRA),
        VIRTIO_NET_CTRL_RX_NOBCAST => (Mode::NoBroadcast, VIRTIO_NET_F_CTRL_RX_EXTRA),
        _ => return None,
    })
}

/// `struct virtio_net_ctrl_mac`: a count and addresses; and what follows.
fn address_table(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (count, rest) = bytes.split_first_chunk()?;
    let len_bytes = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(MAC_BYTES)?;
    rest.split_at_checked(len_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        | 1 << VIRTIO_NET_F_CTRL_VLAN
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
        | 1 << VIRTIO_NET_F_MQ;

    #[test]
    fn known_commands_are_understood() {
        let tables = Command::SetTables {
            unicast: &[],
            multicast: &[1, 2, 3, 4, 5, 6],
        };
        for (bytes, command) in [
            (&[0, 0, 1][..], Command::SetMode(Mode::Promiscuous, true)),
            (&[0, 1, 0], Command::SetMode(Mode::AllMulticast, false)),
            (&[0, 2, 1], Command::SetMode(Mode::AllUnicast, true)),
            (&[0, 3, 1], Command::SetMode(Mode::NoMulticast, true)),
            (&[0, 4, 1], Command::SetMode(Mode::NoUnicast, true)),
            (&[0, 5, 1], Command::SetMode(Mode::NoBroadcast, true)),
            (&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6], tables),
            (
                &[1, 1, 0x52, 0x54, 0, 1, 2, 3],
                Command::SetMac(MacAddress([0x52, 0x54, 0, 1, 2, 3])),
            ),
            (&[2, 0, 0xfe, 0x0f], Command::SetVlan(4094, true)),
            (&[2, 1, 1, 0], Command::SetVlan(1, false)),
            (&[3, 0], Command::Announced),
            (&[4, 0, 4, 0], Command::SetPairs(4)),
        ] {
            assert_eq!(Command::parse(bytes, ALL, 4), Some(command), "{bytes:?}");
            assert_eq!(
                Command::parse(bytes, 0, 4),
                None,
                "{bytes:?} not negotiated"
            );
        }
    }

    #[test]
    fn malformed_unknown_and_excessive_commands_are_refused() {
        for bytes in [
            &[][..],
            &[4],
            &[0, 0],
            &[0, 6, 1],
            &[4, 0],
            &[4, 0, 1],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 1, 1, 0],
            &[1, 0, 0, 0, 0, 0],
            &[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5],
            &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            &[1, 1, 0x52, 0x54, 0, 1, 2],
            &[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[2, 0, 0, 0x10],
            &[2, 2, 1, 0],
            &[3, 1],
            &[99, 0, 0, 0],
        ] {
            assert_eq!(Command::parse(bytes, ALL, 4), None, "{bytes:?}");
        }
    }
}
