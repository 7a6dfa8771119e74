//! Anti-spoofing: a guest sends as itself alone.

use crate::address::{Address, AddressSet, Mac};
use crate::packet::{
    Arp, ETHERTYPE_RARP, Fragment, ICMPV6, IGMP, IcmpBody, Ip, Neighbour, NeighbourMessage,
    Network, Packet, Transport, UDP,
};
use crate::policy::AntiSpoofing;
use crate::verdict::DropReason;

const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;
const DHCPV6_SERVER_PORT: u16 = 547;

const ARP_REQUEST: u16 = 1;

/// Whom a guest may pose as.
#[derive(Debug)]
pub(crate) struct Identity {
    macs: Vec<Mac>,
    /// None for any.
    addresses: Option<AddressSet>,
    any_link_local: bool,
    dhcp_server: bool,
    router: bool,
}

impl Identity {
    pub(crate) fn compile(policy: &AntiSpoofing) -> Self {
        let link_local = policy.macs.iter().map(|mac| mac.link_local().into());
        Self {
            macs: policy.macs.clone(),
            addresses: policy
                .addresses
                .as_ref()
                .map(|addresses| addresses.iter().copied().chain(link_local).collect()),
            any_link_local: policy.any_link_local,
            dhcp_server: policy.dhcp_server,
            router: policy.router,
        }
    }

    /// Judges a frame that the guest sends, which is not malformed.
    ///
    /// # Errors
    /// Why it must be dropped.
    pub(crate) fn check(&self, packet: &Packet) -> Result<(), DropReason> {
        if !self.owns_mac(packet.source) {
            return Err(DropReason::MacSpoofed);
        }
        if packet.destination.is_link_control() {
            return Err(DropReason::LinkControl);
        }
        match &packet.network {
            Network::Arp(arp) => self.check_arp(packet.ethertype, arp),
            Network::Ip(ip) => self.check_ip(ip),
            Network::Other | Network::Malformed => Ok(()),
        }
    }

    fn check_arp(&self, ethertype: u16, arp: &Arp) -> Result<(), DropReason> {
        let owns_sender = if arp.sender == Address::UNSPECIFIED_V4 {
            // A probe (RFC 5227); RARP has no addresses yet.
            arp.operation == ARP_REQUEST || ethertype == ETHERTYPE_RARP
        } else {
            self.owns(arp.sender)
        };
        if owns_sender && self.owns_mac(arp.sender_mac) {
            Ok(())
        } else {
            Err(DropReason::ArpSpoofed)
        }
    }

    fn check_ip(&self, ip: &Ip) -> Result<(), DropReason> {
        if !self.owns(ip.source) && !sends_without_address(ip) {
            return Err(DropReason::AddressSpoofed);
        }
        match ip.transport {
            Transport::Ports(ports) if ip.protocol == UDP && !self.dhcp_server => {
                let server_port = if ip.is_ipv4() {
                    DHCP_SERVER_PORT
                } else {
                    DHCPV6_SERVER_PORT
                };
                if ports.source == server_port {
                    return Err(DropReason::DhcpServer);
                }
                Ok(())
            }
            Transport::Icmp(icmp) => match icmp.body {
                IcmpBody::FromRouter if !self.router => Err(DropReason::Router),
                IcmpBody::Neighbour(neighbour) => self.check_neighbour(ip.source, &neighbour),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn check_neighbour(&self, source: Address, neighbour: &Neighbour) -> Result<(), DropReason> {
        let owns_target = match neighbour.message {
            NeighbourMessage::RouterSolicitation => true,
            // Duplicate address detection asks for what it is about to claim.
            NeighbourMessage::Solicitation { target } => {
                source != Address::UNSPECIFIED_V6 || self.owns(target)
            }
            NeighbourMessage::Advertisement { target } => self.owns(target),
        };
        let owns_link_layer = neighbour.link_layer.is_none_or(|mac| self.owns_mac(mac));
        if owns_target && owns_link_layer {
            Ok(())
        } else {
            Err(DropReason::NeighbourSpoofed)
        }
    }

    fn owns_mac(&self, mac: Mac) -> bool {
        self.macs.contains(&mac)
    }

    fn owns(&self, address: Address) -> bool {
        match &self.addresses {
            None => true,
            Some(_) if self.any_link_local && address.is_link_local_v6() => true,
            Some(addresses) => addresses.contains(address),
        }
    }
}

/// Hosts that have no address yet send from the unspecified one, and for these purposes alone.
fn sends_without_address(ip: &Ip) -> bool {
    match ip.source {
        Address::UNSPECIFIED_V4 => match ip.transport {
            Transport::Ports(ports) => {
                ip.protocol == UDP
                    && (ports.source, ports.destination) == (DHCP_CLIENT_PORT, DHCP_SERVER_PORT)
            }
            Transport::Other => ip.protocol == IGMP && ip.fragment == Fragment::Whole,
            _ => false,
        },
        Address::UNSPECIFIED_V6 => {
            ip.protocol == ICMPV6
                && matches!(
                    ip.transport,
                    Transport::Icmp(icmp)
                        if matches!(icmp.body, IcmpBody::Neighbour(_) | IcmpBody::MulticastListener)
                )
        }
        _ => false,
    }
}
