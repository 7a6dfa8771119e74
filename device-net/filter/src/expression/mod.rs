//! Filters in a subset of tcpdump's language (pcap-filter(7)).
//!
//! ```text
//! expression = unary { ("and" | "&&" | "or" | "||") unary }      from left to right, as tcpdump does
//! unary      = ("not" | "!") unary | "(" expression ")" | term
//! term       = [ether|ip|ip6|arp|rarp|tcp|udp|sctp] [src|dst|src or dst|src and dst]
//!                  [host|net|port|portrange|proto] VALUE
//!            | ip | ip6 | arp | rarp | tcp | udp | sctp | icmp | icmp6 | igmp | esp | ah | gre
//!            | vlan [ID] | less BYTES | greater BYTES | [ether|ip|ip6] (broadcast | multicast)
//! ```
//!
//! A value without words before it takes those of the term before: `host a or b`. Two things differ
//! from tcpdump. `vlan` does not change what follows it: `ip` also matches behind VLAN tags. And
//! values are numbers, since nothing here can look up names.

mod parser;

use crate::address::{Address, Cidr, Mac};
use crate::flow::FlowInfo;
use crate::packet::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_RARP, Network, Packet, Ports,
    Transport,
};
use crate::packet::{SCTP, TCP, UDP};
use crate::policy::Family;
use crate::verdict::Direction;

pub use parser::ParseError;

/// A filter that was understood. Its default matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expression {
    /// Operands come before operators; the last one is the root.
    nodes: Vec<Node>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Term(Term),
    Not(usize),
    And(usize, usize),
    Or(usize, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Term {
    Ethertype(u16),
    Protocol(Option<Family>, u8),
    EtherHost(Side, Mac),
    /// Addresses; of frames with this ethertype, or of IP and ARP.
    Net(Side, Cidr, Option<u16>),
    /// From the first to the last; of this protocol, or of TCP, UDP and SCTP.
    Ports(Side, u16, u16, Option<u8>),
    Vlan(Option<u16>),
    AtMost(usize),
    AtLeast(usize),
    EtherBroadcast,
    EtherMulticast,
    IpMulticast(Family),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    Either,
    Both,
}

impl Side {
    fn holds<T>(self, source: T, destination: T, test: impl Fn(T) -> bool) -> bool {
        match self {
            Self::Source => test(source),
            Self::Destination => test(destination),
            Self::Either => test(source) || test(destination),
            Self::Both => test(source) && test(destination),
        }
    }
}

/// What terms look at.
#[derive(Clone, Copy, Debug, Default)]
struct Fields {
    len_bytes: Option<usize>,
    macs: Option<(Mac, Mac)>,
    ethertype: u16,
    /// 0 for none.
    vlans: [Option<u16>; 2],
    /// From and to.
    addresses: Option<(Address, Address)>,
    /// Of IP.
    protocol: Option<u8>,
    ports: Option<Ports>,
}

impl Expression {
    /// Whether it says something about this frame.
    #[must_use]
    pub fn matches(&self, packet: &Packet) -> bool {
        self.is_empty() || self.holds(self.nodes.len() - 1, &packet.into())
    }

    /// As for the flow's first frame. A flow has no MACs and no length: terms about those do not
    /// match.
    #[must_use]
    pub fn matches_flow(&self, flow: &FlowInfo) -> bool {
        self.is_empty() || self.holds(self.nodes.len() - 1, &flow.into())
    }

    /// Whether it matches everything because it says nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// As deep as the expression has nodes at most, which the parser bounds.
    fn holds(&self, node: usize, fields: &Fields) -> bool {
        match self.nodes[node] {
            Node::Term(term) => term.holds(fields),
            Node::Not(inner) => !self.holds(inner, fields),
            Node::And(left, right) => self.holds(left, fields) && self.holds(right, fields),
            Node::Or(left, right) => self.holds(left, fields) || self.holds(right, fields),
        }
    }
}

impl Term {
    fn holds(self, fields: &Fields) -> bool {
        match self {
            Self::Ethertype(ethertype) => fields.ethertype == ethertype,
            Self::Protocol(family, number) => {
                fields.protocol == Some(number)
                    && family.is_none_or(|family| {
                        fields
                            .addresses
                            .is_some_and(|(from, _)| Family::of(from) == family)
                    })
            }
            Self::EtherHost(side, mac) => fields
                .macs
                .is_some_and(|(from, to)| side.holds(from, to, |has| has == mac)),
            Self::Net(side, cidr, ethertype) => {
                ethertype.is_none_or(|wanted| wanted == fields.ethertype)
                    && fields
                        .addresses
                        .is_some_and(|(from, to)| side.holds(from, to, |has| cidr.contains(has)))
            }
            Self::Ports(side, first, last, protocol) => {
                let is_wanted = |has| match protocol {
                    Some(wanted) => has == wanted,
                    None => matches!(has, TCP | UDP | SCTP),
                };
                fields.protocol.is_some_and(is_wanted)
                    && fields.ports.is_some_and(|ports| {
                        side.holds(ports.source, ports.destination, |has| {
                            (first..=last).contains(&has)
                        })
                    })
            }
            Self::Vlan(None) => fields.vlans[0].is_some(),
            Self::Vlan(wanted) => fields.vlans.contains(&wanted),
            Self::AtMost(bytes) => fields.len_bytes.is_some_and(|len| len <= bytes),
            Self::AtLeast(bytes) => fields.len_bytes.is_some_and(|len| len >= bytes),
            Self::EtherBroadcast => fields.macs.is_some_and(|(_, to)| to == Mac::BROADCAST),
            Self::EtherMulticast => fields.macs.is_some_and(|(_, to)| to.is_multicast()),
            Self::IpMulticast(family) => {
                fields.protocol.is_some()
                    && fields.addresses.is_some_and(|(_, to)| {
                        Family::of(to) == family && std::net::IpAddr::from(to).is_multicast()
                    })
            }
        }
    }
}

impl From<&Packet> for Fields {
    fn from(packet: &Packet) -> Self {
        let tags = packet.vlans.as_slice();
        let mut fields = Self {
            len_bytes: Some(packet.len_bytes),
            macs: Some((packet.source, packet.destination)),
            ethertype: packet.ethertype,
            vlans: [tags.first().copied(), tags.get(1).copied()],
            ..Self::default()
        };
        match &packet.network {
            Network::Arp(arp) => fields.addresses = Some((arp.sender, arp.target)),
            Network::Ip(ip) => {
                fields.addresses = Some((ip.source, ip.destination));
                fields.protocol = Some(ip.protocol);
                fields.ports = match ip.transport {
                    Transport::Tcp { ports, .. } | Transport::Ports(ports) => Some(ports),
                    _ => None,
                };
            }
            Network::Other | Network::Malformed => {}
        }
        fields
    }
}

impl From<&FlowInfo> for Fields {
    fn from(flow: &FlowInfo) -> Self {
        let local = (flow.local, flow.local_port);
        let remote = (flow.remote, flow.remote_port);
        let (from, to) = match flow.origin {
            Direction::Ingress => (remote, local),
            Direction::Egress => (local, remote),
        };
        Self {
            ethertype: match Family::of(flow.local) {
                Family::Ipv4 => ETHERTYPE_IPV4,
                Family::Ipv6 => ETHERTYPE_IPV6,
            },
            vlans: flow.vlans.map(|id| Some(id).filter(|&id| id != 0)),
            addresses: Some((from.0, to.0)),
            protocol: Some(flow.protocol),
            ports: Some(Ports {
                source: from.1,
                destination: to.1,
            }),
            ..Self::default()
        }
    }
}

/// The ethertype that a word stands for.
fn ethertype_of(word: &str) -> Option<u16> {
    Some(match word {
        "ip" => ETHERTYPE_IPV4,
        "ip6" => ETHERTYPE_IPV6,
        "arp" => ETHERTYPE_ARP,
        "rarp" => ETHERTYPE_RARP,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
