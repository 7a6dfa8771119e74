//! A frame as the sender's driver offered it: what the switch needs to know of it, copied once.
//!
//! The bytes that decisions are made by (addresses, tag, ethertype, the virtio-net header) are never
//! read again: receivers get the copy, and the rest from the sender's memory.

use vhost_user::ring::BatchChain;

use super::mac_table::PortNumber;
use super::vlan::{Egress, TAG_LEN_BYTES, TPID, Vlans};
use crate::nic::header::{Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads};
use crate::nic::stats::DropReason;

/// Two addresses and an ethertype.
pub(super) const ETHERNET_LEN_BYTES: usize = 14;

/// Two addresses, a tag and an ethertype.
pub(super) const MAX_HEAD_LEN_BYTES: usize = ETHERNET_LEN_BYTES + TAG_LEN_BYTES;

/// Both headers, and what makes the copy a plain one.
const START_LEN_BYTES: usize = 32;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    Port(PortNumber),
    /// Every other port of its VLAN.
    Flood,
    Nowhere,
}

/// See the module's description.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// As it came, with the tag.
    head: [u8; MAX_HEAD_LEN_BYTES],
    /// None for one that leaves nothing to be finished, the usual case.
    pub(super) header: Option<Header>,
    /// Tag that told its VLAN, and is not part of the frame inside the switch.
    tag: Option<u16>,
    /// Of the whole frame as it came.
    pub(super) len_bytes: u32,
    pub(super) vlan: u16,
    pub(super) destination: Destination,
}

impl Frame {
    /// Looks at a chain of a transmit ring.
    ///
    /// # Errors
    /// What is wrong with it.
    #[inline]
    pub(super) fn of(
        chain: BatchChain<'_>,
        header_len_bytes: usize,
        offloads: Offloads,
        vlans: &Vlans,
    ) -> Result<Self, DropReason> {
        let len_bytes = (chain.readable_len_bytes() as usize)
            .checked_sub(header_len_bytes)
            .filter(|frame| (ETHERNET_LEN_BYTES..=MAX_FRAME_LEN_BYTES).contains(frame))
            .ok_or(DropReason::Malformed)?;
        let start = chain.first_bytes().unwrap_or_else(|| {
            let mut start = [0; START_LEN_BYTES];
            chain.read_up_to(0, &mut start);
            start
        });
        let header = match start[..2] {
            [0, 0] => None,
            _ => {
                let mut bytes = [0; MAX_HEADER_LEN_BYTES];
                bytes[..header_len_bytes].copy_from_slice(&start[..header_len_bytes]);
                let header = Header::checked(&bytes, len_bytes, offloads);
                Some(header.map_err(|_| DropReason::Malformed)?)
            }
        };
        let mut head = [0; MAX_HEAD_LEN_BYTES];
        head.copy_from_slice(&start[header_len_bytes..header_len_bytes + MAX_HEAD_LEN_BYTES]);
        Self::with_head(head, header, len_bytes, vlans)
    }

    /// A frame of `len_bytes` that begins with `head`.
    ///
    /// # Errors
    /// It may not come by a port with these VLANs.
    #[inline]
    pub(super) fn with_head(
        head: [u8; MAX_HEAD_LEN_BYTES],
        header: Option<Header>,
        len_bytes: usize,
        vlans: &Vlans,
    ) -> Result<Self, DropReason> {
        let tag = match (vlans.reads_tags(), ethertype_at(&head, 12)) {
            (true, TPID) if len_bytes < MAX_HEAD_LEN_BYTES => return Err(DropReason::Malformed),
            (true, TPID) => Some(ethertype_at(&head, 14)),
            _ => None,
        };
        let frame = Self {
            head,
            header: header.filter(|header| *header.as_bytes() != [0; MAX_HEADER_LEN_BYTES]),
            tag,
            len_bytes: len_bytes as u32,
            vlan: vlans.ingress(tag).ok_or(DropReason::Vlan)?,
            destination: Destination::Nowhere,
        };
        match frame.source()[0] & 1 {
            0 => Ok(frame),
            _ => Err(DropReason::Malformed),
        }
    }

    /// Lays what was looked at over `start`, a later copy of the frame's first bytes as it came.
    pub(super) fn overlay(&self, start: &mut [u8]) {
        let len = start.len().min(MAX_HEAD_LEN_BYTES);
        start[..len].copy_from_slice(&self.head[..len]);
    }

    #[inline]
    pub(super) fn destination_mac(&self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.head;
        [a, b, c, d, e, f]
    }

    #[inline]
    pub(super) fn source(&self) -> [u8; 6] {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = self.head;
        [a, b, c, d, e, f]
    }

    /// Whether the frame without its VLAN's tag begins with a tag.
    #[inline]
    pub(super) fn looks_tagged(&self) -> bool {
        ethertype_at(&self.head, self.head_len_bytes() - 2) == TPID
    }

    /// Bytes of the frame as it came that [`Frame::head_for`] stands for.
    #[inline]
    pub(super) fn head_len_bytes(&self) -> usize {
        match self.tag {
            None => ETHERNET_LEN_BYTES,
            Some(_) => MAX_HEAD_LEN_BYTES,
        }
    }

    /// What the frame begins with where it leaves, and how long that is.
    #[inline]
    pub(super) fn head_for(&self, egress: Egress) -> ([u8; MAX_HEAD_LEN_BYTES], usize) {
        let ethertype_at = self.head_len_bytes() - 2;
        let ethertype = [self.head[ethertype_at], self.head[ethertype_at + 1]];
        let mut head = self.head;
        match egress {
            Egress::Untagged => {
                head[12..14].copy_from_slice(&ethertype);
                (head, ETHERNET_LEN_BYTES)
            }
            Egress::Tagged => {
                // The priority stays.
                let tag = self.tag.unwrap_or(0) & 0xf000 | self.vlan;
                head[12..14].copy_from_slice(&TPID.to_be_bytes());
                head[14..16].copy_from_slice(&tag.to_be_bytes());
                head[16..18].copy_from_slice(&ethertype);
                (head, MAX_HEAD_LEN_BYTES)
            }
        }
    }
}

#[inline]
fn ethertype_at(head: &[u8; MAX_HEAD_LEN_BYTES], at: usize) -> u16 {
    u16::from_be_bytes([head[at], head[at + 1]])
}
