//! The control queue (Virtio 1.2 section 5.1.6.5).

use std::sync::Arc;

use vhost_user::backend::{QueueHandler, Wake};
use vhost_user::ring::{Ring, RingError};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::backend::Backend;
use super::header::has;
use super::mac::MacAddress;
use super::state::NicState;

/// Class, command and the longest argument that is looked at.
const MAX_COMMAND_LEN_BYTES: usize = 2 + 6;

/// The control ring.
pub(super) struct CtrlQueue {
    nic: Arc<NicState>,
    backend: Arc<dyn Backend>,
    features: u64,
}

impl CtrlQueue {
    pub(super) fn new(nic: Arc<NicState>, backend: Arc<dyn Backend>, features: u64) -> Self {
        Self {
            nic,
            backend,
            features,
        }
    }

    fn carry_out(&self, command: Command) {
        match command {
            // A tap delivers what the host sends to it; filtering is the host's business.
            Command::ReceiveFilter => {}
            Command::SetMac(mac) => self.nic.set_mac(mac),
            Command::SetPairs(pairs) => self.backend.set_active_pairs(pairs),
        }
    }
}

impl QueueHandler for CtrlQueue {
    fn process(&mut self, ring: &mut Ring, _: Wake) -> Result<(), RingError> {
        // A ring's worth of commands at a time; a driver waits for each answer anyway.
        for _ in 0..ring.size() {
            let Some(chain) = ring.pop()? else { break };
            let mut bytes = [0; MAX_COMMAND_LEN_BYTES];
            let len = chain.read_at(0, &mut bytes);
            let command = Command::parse(&bytes[..len], self.features, self.backend.num_pairs());
            let ack = if command.is_some() {
                VIRTIO_NET_OK
            } else {
                VIRTIO_NET_ERR
            };
            if let Some(command) = command {
                self.carry_out(command);
            }
            let written_bytes = chain.write_at(0, &[ack as u8]);
            ring.complete(chain, written_bytes as u32);
        }
        Ok(())
    }
}

/// What the driver may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    ReceiveFilter,
    SetMac(MacAddress),
    SetPairs(u16),
}

impl Command {
    /// None for what is malformed, unknown or was not negotiated.
    fn parse(bytes: &[u8], features: u64, max_pairs: u16) -> Option<Self> {
        let (&[class, command], argument) = bytes.split_first_chunk()?;
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC..=VIRTIO_NET_CTRL_RX_ALLMULTI)
                if has(features, VIRTIO_NET_F_CTRL_RX) && !argument.is_empty() =>
            {
                Some(Self::ReceiveFilter)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET)
                if has(features, VIRTIO_NET_F_CTRL_RX) =>
            {
                Some(Self::ReceiveFilter)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET)
                if has(features, VIRTIO_NET_F_CTRL_MAC_ADDR) =>
            {
                let octets = argument.first_chunk()?;
                MacAddress::unicast(*octets).map(Self::SetMac)
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)
                if has(features, VIRTIO_NET_F_MQ) =>
            {
                let pairs = u16::from_le_bytes(*argument.first_chunk()?);
                (1..=max_pairs)
                    .contains(&pairs)
                    .then_some(Self::SetPairs(pairs))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 =
        1 << VIRTIO_NET_F_CTRL_RX | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR | 1 << VIRTIO_NET_F_MQ;

    #[test]
    fn known_commands_are_understood() {
        for (bytes, command) in [
            (&[0, 0, 1][..], Command::ReceiveFilter),
            (&[0, 1, 0], Command::ReceiveFilter),
            (&[1, 0, 0, 0, 0, 0, 0, 0], Command::ReceiveFilter),
            (
                &[1, 1, 0x52, 0x54, 0, 1, 2, 3],
                Command::SetMac(MacAddress([0x52, 0x54, 0, 1, 2, 3])),
            ),
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
            &[0, 2, 1],
            &[4, 0],
            &[4, 0, 1],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 1, 1, 0],
            &[1, 1, 0x52, 0x54, 0, 1, 2],
            &[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[2, 0, 1, 0],
            &[99, 0, 0, 0],
        ] {
            assert_eq!(Command::parse(bytes, ALL, 4), None, "{bytes:?}");
        }
    }
}
