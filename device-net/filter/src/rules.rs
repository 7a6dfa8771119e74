//! Security rules, compiled: which flows may be opened.

use std::collections::HashMap;
use std::sync::Arc;

use crate::address::{Address, AddressSet, Cidr};
use crate::packet::{
    DCCP, Fragment, ICMP, ICMPV6, IcmpBody, Ip, SCTP, TCP, Transport, UDP, UDP_LITE,
};
use crate::policy::{Family, Protocol, Remote, Security};
use crate::verdict::Direction;

/// All rules of a NIC.
#[derive(Debug)]
pub(crate) struct RuleSet {
    ingress: Vec<Compiled>,
    egress: Vec<Compiled>,
    ethertypes: Vec<u16>,
}

#[derive(Debug)]
struct Compiled {
    family: Option<Family>,
    protocol: Protocol,
    /// None for anybody.
    remote: Option<Arc<AddressSet>>,
    is_stateless: bool,
}

/// What rules look at in the first frame of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    pub(crate) remote: Address,
    pub(crate) protocol: u8,
    /// None for protocols without ports.
    pub(crate) destination_port: Option<u16>,
    /// Type and code.
    pub(crate) icmp: Option<(u8, u8)>,
}

/// A rule permits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Permit {
    /// And replies.
    Stateful,
    Stateless,
}

impl RuleSet {
    pub(crate) fn compile(security: &Security) -> Self {
        // Groups are large, and several rules share one.
        let mut sets: HashMap<*const Cidr, Arc<AddressSet>> = HashMap::new();
        let (mut ingress, mut egress) = (Vec::new(), Vec::new());
        for rule in &security.rules {
            let remote = match &rule.remote {
                Remote::Any => None,
                Remote::In(cidrs) => {
                    let set = sets.entry(cidrs.as_ptr());
                    Some(set.or_insert_with(|| Arc::new(cidrs.iter().copied().collect())))
                }
            };
            let compiled = Compiled {
                family: rule.family,
                protocol: rule.protocol,
                remote: remote.cloned(),
                is_stateless: rule.is_stateless,
            };
            match rule.direction {
                Direction::Ingress => ingress.push(compiled),
                Direction::Egress => egress.push(compiled),
            }
        }
        Self {
            ingress,
            egress,
            ethertypes: security.ethertypes.clone(),
        }
    }

    pub(crate) fn permits_ethertype(&self, ethertype: u16) -> bool {
        self.ethertypes.contains(&ethertype)
    }

    /// The strongest permission that any rule gives.
    pub(crate) fn permits(&self, direction: Direction, opening: &Opening) -> Option<Permit> {
        let rules = match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        };
        let mut permit = None;
        for rule in rules.iter().filter(|rule| rule.matches(opening)) {
            if !rule.is_stateless {
                return Some(Permit::Stateful);
            }
            permit = Some(Permit::Stateless);
        }
        permit
    }
}

impl Compiled {
    fn matches(&self, opening: &Opening) -> bool {
        let family = Family::of(opening.remote);
        self.family.is_none_or(|wanted| wanted == family)
            && matches_protocol(self.protocol, family, opening)
            && self
                .remote
                .as_ref()
                .is_none_or(|set| set.contains(opening.remote))
    }
}

fn matches_protocol(protocol: Protocol, family: Family, opening: &Opening) -> bool {
    match protocol {
        Protocol::Any => true,
        Protocol::Number(number) => number == opening.protocol,
        Protocol::Ports(number, first, last) => {
            number == opening.protocol
                && opening
                    .destination_port
                    .is_some_and(|port| (first..=last).contains(&port))
        }
        Protocol::Icmp(wanted) => {
            let number = match family {
                Family::Ipv4 => ICMP,
                Family::Ipv6 => ICMPV6,
            };
            number == opening.protocol
                && wanted.is_none_or(|(kind, code)| {
                    opening.icmp.is_some_and(|(has_kind, has_code)| {
                        has_kind == kind && code.is_none_or(|code| code == has_code)
                    })
                })
        }
    }
}

impl Opening {
    /// Of a frame that belongs to no flow.
    pub(crate) fn of(ip: &Ip, direction: Direction) -> Self {
        let remote = match direction {
            Direction::Ingress => ip.source,
            Direction::Egress => ip.destination,
        };
        let (destination_port, icmp) = match ip.transport {
            Transport::Tcp { ports, .. } | Transport::Ports(ports) => {
                (Some(ports.destination), None)
            }
            Transport::Icmp(icmp) => (None, Some((icmp.kind, icmp.code))),
            Transport::Other | Transport::Malformed => (None, None),
        };
        Self {
            remote,
            protocol: ip.protocol,
            destination_port,
            icmp,
        }
    }
}

/// Whether the protocol has ports that rules can name.
pub(crate) fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | UDP_LITE | SCTP | DCCP)
}

/// What hosts cannot do without, whatever the rules are. Whether the guest may send it is
/// anti-spoofing's business.
pub(crate) fn is_essential(ip: &Ip, direction: Direction) -> bool {
    /// (from, to) of what DHCP and DHCPv6 clients send.
    const DHCP: [(u16, u16); 2] = [(68, 67), (546, 547)];
    match ip.transport {
        Transport::Icmp(icmp) => match icmp.body {
            IcmpBody::Neighbour(_) => ip.hop_limit == 255,
            // Advertisements; a redirect is nothing to be relied on.
            IcmpBody::FromRouter => ip.hop_limit == 255 && icmp.kind == 134,
            IcmpBody::MulticastListener => {
                ip.source.is_link_local_v6() || ip.source == Address::UNSPECIFIED_V6
            }
            _ => false,
        },
        Transport::Ports(ports) if ip.protocol == UDP && ip.fragment == Fragment::Whole => {
            let wanted = DHCP[usize::from(!ip.is_ipv4())];
            match direction {
                Direction::Egress => (ports.source, ports.destination) == wanted,
                Direction::Ingress => (ports.destination, ports.source) == wanted,
            }
        }
        Transport::Other => ip.protocol == crate::packet::IGMP && ip.fragment == Fragment::Whole,
        _ => false,
    }
}
