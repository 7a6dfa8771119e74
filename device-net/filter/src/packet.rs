//! Reads the headers of one frame.
//!
//! What is read is a copy of the frame's beginning, at most [`HEAD_LEN_BYTES`]: a driver may change
//! its memory at any time, so the headers that were looked at must be the ones that are sent on.
//! Headers that reach beyond the copy are [`Network::Malformed`]; nothing is reassembled.
//!
//! ```text
//! Ethernet [VLAN tags, 2 at most]  IPv4 [options]            TCP, UDP, SCTP, ICMP [the packet that
//!                                  IPv6 [extension headers]                        an error is about]
//!                                  ARP
//! ```

mod ip;
#[cfg(test)]
mod tests;

use crate::address::{Address, Mac};

/// How much of a frame is looked at: link layer, an IPv6 header with extensions or IPv4 with all
/// options, and an ICMP error with the headers it quotes.
pub const HEAD_LEN_BYTES: usize = 256;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_RARP: u16 = 0x8035;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q, 802.1ad, and the one that was used before 802.1ad.
const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

const ETHERNET_LEN_BYTES: usize = 14;
const VLAN_TAG_LEN_BYTES: usize = 4;
const MAX_VLAN_TAGS: usize = 2;

pub(crate) const ICMP: u8 = 1;
pub(crate) const IGMP: u8 = 2;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const DCCP: u8 = 33;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;
pub(crate) const UDP_LITE: u8 = 136;

/// A frame's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Of the whole frame.
    pub(crate) len_bytes: usize,
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    pub(crate) vlans: Vlans,
    /// Behind the tags; a length below 0x600.
    pub(crate) ethertype: u16,
    pub(crate) network: Network,
}

/// Identifiers of the VLAN tags, outermost first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vlans {
    ids: [u16; MAX_VLAN_TAGS],
    count: u8,
}

impl Vlans {
    pub(crate) fn as_slice(&self) -> &[u16] {
        &self.ids[..usize::from(self.count)]
    }

    /// One number for all of them; 0 for none (and for priority tags, which name no VLAN).
    pub(crate) fn id(self) -> u32 {
        u32::from(self.ids[0]) << 12 | u32::from(self.ids[1])
    }

    fn push(&mut self, id: u16) -> Option<()> {
        *self.ids.get_mut(usize::from(self.count))? = id;
        self.count += 1;
        Some(())
    }
}

/// What an Ethernet frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Arp(Arp),
    Ip(Ip),
    Other,
    /// ARP or IP that cannot be, too many VLAN tags, or not all of it in the copy.
    Malformed,
}

/// ARP or RARP, for IPv4 over Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arp {
    pub(crate) operation: u16,
    pub(crate) sender_mac: Mac,
    pub(crate) sender: Address,
    pub(crate) target: Address,
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) source: Address,
    pub(crate) destination: Address,
    pub(crate) hop_limit: u8,
    /// Behind extension headers.
    pub(crate) protocol: u8,
    pub(crate) fragment: Fragment,
    /// Where `transport` begins, from the beginning of the IP header on.
    pub(crate) transport_at: usize,
    pub(crate) transport: Transport,
}

impl Ip {
    pub(crate) fn is_ipv4(&self) -> bool {
        self.source.is_ipv4()
    }
}

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment {
    Whole,
    First {
        id: u32,
    },
    /// Begins at this byte, behind the headers.
    Later {
        id: u32,
        offset_bytes: u16,
    },
}

/// What an IP packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp {
        ports: Ports,
        flags: TcpFlags,
    },
    /// UDP and everything else with ports.
    Ports(Ports),
    Icmp(Icmp),
    /// Without ports, or a later fragment.
    Other,
    Malformed,
}

/// As in the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) source: u16,
    pub(crate) destination: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcpFlags(pub(crate) u8);

impl TcpFlags {
    pub(crate) fn fin(self) -> bool {
        self.0 & 0x01 != 0
    }
    pub(crate) fn syn(self) -> bool {
        self.0 & 0x02 != 0
    }
    pub(crate) fn rst(self) -> bool {
        self.0 & 0x04 != 0
    }
    pub(crate) fn ack(self) -> bool {
        self.0 & 0x10 != 0
    }
    /// The first segment of a connection.
    pub(crate) fn opens(self) -> bool {
        self.syn() && !self.ack()
    }
}

/// ICMP or ICMPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Icmp {
    pub(crate) kind: u8,
    pub(crate) code: u8,
    pub(crate) body: IcmpBody,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IcmpBody {
    /// Echo or timestamp.
    Echo(Echo, u16),
    /// What it says about which packet.
    Error(Quoted),
    /// An error about something that cannot be read.
    UnreadableError,
    Neighbour(Neighbour),
    /// Router advertisement, redirect.
    FromRouter,
    MulticastListener,
    Other,
}

/// The beginning of the packet that an ICMP error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quoted {
    pub(crate) source: Address,
    pub(crate) destination: Address,
    pub(crate) protocol: u8,
    /// ICMP's identifier in both.
    pub(crate) ports: Ports,
    /// An ICMP request or reply.
    pub(crate) echo: Option<Echo>,
}

/// Two halves of an exchange that have an identifier in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Echo {
    Request,
    Reply,
}

/// Neighbour discovery (RFC 4861).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) message: NeighbourMessage,
    /// From the source or target link-layer address option.
    pub(crate) link_layer: Option<Mac>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NeighbourMessage {
    RouterSolicitation,
    Solicitation { target: Address },
    Advertisement { target: Address },
}

impl Packet {
    /// Reads the headers of a frame of `len_bytes`, the first of which are `head`: all of them, or
    /// [`HEAD_LEN_BYTES`] at least. None without an Ethernet header.
    #[inline]
    pub fn parse(head: &[u8], len_bytes: usize) -> Option<Self> {
        let (destination, rest) = head.split_first_chunk()?;
        let (source, rest) = rest.split_first_chunk()?;
        let (ethertype, rest) = rest.split_first_chunk()?;
        let mut packet = Self {
            len_bytes,
            destination: Mac(*destination),
            source: Mac(*source),
            vlans: Vlans::default(),
            ethertype: u16::from_be_bytes(*ethertype),
            network: Network::Malformed,
        };
        if let Some(payload) = packet.take_tags(rest) {
            let tags = usize::from(packet.vlans.count);
            let before = ETHERNET_LEN_BYTES + tags * VLAN_TAG_LEN_BYTES;
            packet.network = packet.parse_network(payload, len_bytes.saturating_sub(before));
        }
        Some(packet)
    }

    /// The same frame if whoever sends it on is to put the transport's checksum at this place: any
    /// other place would be one that was looked at already, or is nobody's business. Such a frame
    /// is malformed.
    #[must_use]
    pub fn with_checksum_at(self, offset: usize) -> Self {
        if self.checksum_at() == Some(offset) {
            return self;
        }
        Self {
            network: Network::Malformed,
            ..self
        }
    }

    /// Where the transport's checksum is.
    fn checksum_at(&self) -> Option<usize> {
        let Network::Ip(ip) = &self.network else {
            return None;
        };
        let in_transport = match (ip.fragment, ip.protocol) {
            (Fragment::Later { .. }, _) => return None,
            (_, TCP) => 16,
            (_, UDP | UDP_LITE | DCCP) => 6,
            (_, ICMP | ICMPV6) => 2,
            _ => return None,
        };
        let tags = usize::from(self.vlans.count);
        let ip_at = ETHERNET_LEN_BYTES + tags * VLAN_TAG_LEN_BYTES;
        Some(ip_at + ip.transport_at + in_transport)
    }

    /// None when there are too many.
    fn take_tags<'a>(&mut self, mut rest: &'a [u8]) -> Option<&'a [u8]> {
        while ETHERTYPES_VLAN.contains(&self.ethertype) {
            let (tag, behind) = rest.split_first_chunk::<VLAN_TAG_LEN_BYTES>()?;
            self.vlans.push(u16_at(tag, 0)? & 0xfff)?;
            self.ethertype = u16_at(tag, 2)?;
            rest = behind;
        }
        Some(rest)
    }

    fn parse_network(&self, payload: &[u8], payload_len_bytes: usize) -> Network {
        let parsed = match self.ethertype {
            ETHERTYPE_IPV4 => Ip::parse_v4(payload, payload_len_bytes).map(Network::Ip),
            ETHERTYPE_IPV6 => Ip::parse_v6(payload, payload_len_bytes).map(Network::Ip),
            ETHERTYPE_ARP | ETHERTYPE_RARP => Arp::parse(payload).map(Network::Arp),
            _ => Some(Network::Other),
        };
        parsed.unwrap_or(Network::Malformed)
    }
}

impl Arp {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 28] = bytes.first_chunk()?;
        // Hardware type Ethernet, protocol IPv4, and their addresses' lengths.
        if bytes[..6] != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        Some(Self {
            operation: u16_at(bytes, 6)?,
            sender_mac: Mac(array_at(bytes, 8)?),
            sender: Address::v4(array_at(bytes, 14)?),
            target: Address::v4(array_at(bytes, 24)?),
        })
    }
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_be_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_be_bytes)
}
