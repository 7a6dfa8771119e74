//! What a NIC lets pass, as it is configured. [`crate::gate`] works with what is compiled from it.

use std::sync::Arc;

use crate::address::{Address, Cidr, Mac};
use crate::verdict::Direction;

/// Rules in one policy at most: each new flow is compared with all of a direction.
pub const MAX_RULES: usize = 1024;

/// Addresses of all groups of one policy at most.
pub const MAX_GROUP_ADDRESSES: usize = 65536;

/// All of it; the default lets everything pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Whom the guest may pose as; `None` for anybody.
    pub anti_spoofing: Option<AntiSpoofing>,
    /// What may pass; `None` for everything.
    pub security: Option<Security>,
    /// Know the flows also without `security`.
    pub track_flows: bool,
}

/// Applies to what the guest sends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AntiSpoofing {
    /// Its source MACs.
    pub macs: Vec<Mac>,
    /// Its addresses; `None` for any.
    pub addresses: Option<Vec<Cidr>>,
    /// Any link-local IPv6 address, not only those made of the MACs.
    pub any_link_local: bool,
    /// It may answer DHCP clients.
    pub dhcp_server: bool,
    /// It may send router advertisements and redirects.
    pub router: bool,
}

/// What no rule permits is dropped, except what hosts cannot do without: ARP, neighbour discovery,
/// multicast reports, DHCP clients' exchanges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// In no particular order.
    pub rules: Vec<Rule>,
    /// Ethertypes besides IP and ARP that pass.
    pub ethertypes: Vec<u16>,
}

/// One permission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Of the frame that opens a flow.
    pub direction: Direction,
    /// `None` for both.
    pub family: Option<Family>,
    /// What is carried.
    pub protocol: Protocol,
    /// The other end.
    pub remote: Remote,
    /// Replies need a rule of their own.
    pub is_stateless: bool,
}

/// A version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Version 4.
    Ipv4,
    /// Version 6.
    Ipv6,
}

impl Family {
    pub(crate) fn of(address: Address) -> Self {
        if address.is_ipv4() {
            Self::Ipv4
        } else {
            Self::Ipv6
        }
    }
}

/// What a rule permits to be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Everything.
    Any,
    /// By the number of the protocol.
    Number(u8),
    /// A protocol with ports, to destination ports from the first to the last.
    Ports(u8, u16, u16),
    /// ICMP for IPv4, ICMPv6 for IPv6; optionally of one type, and of one code within it.
    Icmp(Option<(u8, Option<u8>)>),
}

/// Whom a rule lets the guest talk to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    /// Anybody.
    Any,
    /// Anybody in these prefixes: one, or the members of a group, which rules share.
    In(Arc<[Cidr]>),
}
