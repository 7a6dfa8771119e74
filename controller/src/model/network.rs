//! Networks and security groups: how they are stored, what a host is told of them, and what users
//! are told of what it answers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use api::controller as pb;
use api::names::Name;
use api::node;
use api::validate::protocol_number;
use ipnet::{Ipv4Net, Ipv6Net};
use prost::Message;

use super::convert::port_forward;
use super::{VmRecord, fnv1a};
use crate::plan::{Desired, Layout};

/// A network as stored.
#[derive(Clone, PartialEq, Message)]
pub struct NetworkRecord {
    /// What users see; `status` holds what was last recorded.
    #[prost(message, required, tag = "1")]
    pub network: pb::Network,
    /// Its id on hosts.
    #[prost(string, tag = "2")]
    pub node_id: String,
    /// Ids of the hosts that may have it, in order.
    #[prost(string, repeated, tag = "3")]
    pub hosts: Vec<String>,
}

/// A security group as stored.
#[derive(Clone, PartialEq, Message)]
pub struct SecurityGroupRecord {
    /// What users see, without members.
    #[prost(message, required, tag = "1")]
    pub group: pb::SecurityGroup,
}

/// Keys that claim something for one owner: whoever is first. The value is who that is.
pub mod claim {
    use super::*;

    /// Changes with every network that comes: subnets and VNIs are compared with those of all others.
    pub const LAYOUT: &str = "network-layout";

    /// A MAC address, anywhere.
    pub fn mac(mac: &str) -> String {
        format!("claims/mac/{}", mac.to_ascii_lowercase())
    }

    /// All IPv4 addresses of a network.
    pub fn ipv4_prefix(network: &Name) -> String {
        format!("claims/ipv4/{}/{}/", network.project, network.id)
    }

    /// An IPv4 address in a network; in order of the addresses.
    pub fn ipv4(network: &Name, address: Ipv4Addr) -> String {
        format!("{}{:08x}", ipv4_prefix(network), u32::from(address))
    }

    /// The address of such a key.
    pub fn ipv4_of(key: &str) -> Option<Ipv4Addr> {
        let (_, digits) = key.rsplit_once('/')?;
        u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from)
    }

    /// An IPv6 address in a network.
    pub fn ipv6(network: &Name, address: Ipv6Addr) -> String {
        format!("claims/ipv6/{}/{}/{address}", network.project, network.id)
    }

    /// A port of the host.
    pub fn port(forward: &pb::PortForward) -> String {
        format!("claims/port/{}/{}", forward.protocol, forward.host_port)
    }

    /// All claims of a NIC whose addresses were chosen.
    pub fn all_of(nic: &pb::Nic) -> Vec<String> {
        let mut keys: Vec<String> = nic.port_forwards.iter().map(port).collect();
        let Ok(network) = Name::parse_network(&nic.network) else {
            return keys;
        };
        keys.push(mac(&nic.mac));
        if let Ok(address) = nic.ipv4_address.parse() {
            keys.push(ipv4(&network, address));
        }
        if let Ok(address) = nic.ipv6_address.parse() {
            keys.push(ipv6(&network, address));
        }
        keys
    }
}

/// The subnet of a network that has one.
pub fn ipv4_subnet(spec: &pb::NetworkSpec) -> Option<Ipv4Net> {
    spec.ipv4_cidr.parse().ok()
}

/// The addresses that NICs get, both included.
pub fn ipv4_pool(spec: &pb::NetworkSpec) -> Option<(u32, u32)> {
    let subnet = ipv4_subnet(spec)?;
    let bound = |text: &str, default: u32| text.parse::<Ipv4Addr>().map_or(default, u32::from);
    let first = bound(&spec.ipv4_pool_first, u32::from(subnet.network()) + 1);
    let last = bound(&spec.ipv4_pool_last, u32::from(subnet.broadcast()) - 1);
    Some((first, last))
}

/// An address in a /64 made of a MAC (RFC 4291 appendix A).
pub fn eui64(prefix: Ipv6Net, mac: &str) -> Option<Ipv6Addr> {
    let octets: Vec<u8> = mac
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).ok())
        .collect::<Option<_>>()?;
    let [a, b, c, d, e, f] = octets[..] else {
        return None;
    };
    let interface = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    let network = u128::from(prefix.network());
    Some(Ipv6Addr::from(network | u128::from(interface)))
}

/// What a host is told about a network: all of it, with every NIC of its VMs that is in it. Of an overlay
/// that other hosts have as well, those are its peers.
pub fn node_network_spec(
    record: &NetworkRecord,
    host: &str,
    desired: &Desired,
    layout: &Layout,
) -> node::NetworkSpec {
    let name = &record.network.name;
    let spec = record.network.spec.clone().unwrap_or_default();
    let mut groups = BTreeMap::new();
    let mut endpoints = Vec::new();
    let here = layout.vms(name).iter().filter(|vm| vm.host == host);
    for vm in here {
        endpoints.extend(endpoints_of(vm, name, (desired, layout), &mut groups));
    }
    let with_bits = |address: &str, bits: Option<u8>| match bits {
        Some(bits) if !address.is_empty() => format!("{address}/{bits}"),
        _ => String::new(),
    };
    let has_host = has_host(spec.kind());
    let prefix: Option<Ipv6Net> = spec.ipv6_prefix.parse().ok();
    let ipv6_gateway = prefix.filter(|_| has_host).map(|prefix| {
        let address = Ipv6Addr::from(u128::from(prefix.network()) | 1);
        format!("{address}/{}", prefix.prefix_len())
    });
    let mut wanted = node::NetworkSpec {
        id: record.node_id.clone(),
        revision: String::new(),
        kind: match spec.kind() {
            pb::NetworkKind::Unspecified => node::NetworkKind::Unspecified,
            pb::NetworkKind::Nat => node::NetworkKind::Nat,
            pb::NetworkKind::Bridged => node::NetworkKind::Bridged,
            pb::NetworkKind::HostOnly => node::NetworkKind::HostOnly,
            pb::NetworkKind::Isolated => node::NetworkKind::Isolated,
        } as i32,
        ipv4_gateway: with_bits(
            &spec.ipv4_gateway,
            ipv4_subnet(&spec).map(|subnet| subnet.prefix_len()),
        ),
        ipv6_gateway: ipv6_gateway.unwrap_or_default(),
        dhcp: spec.dhcp(),
        dns: spec.dns(),
        dns_servers: spec.dns_servers.clone(),
        dns_domain: spec.dns_domain.clone(),
        mtu: spec.mtu,
        bridge: spec.bridge.clone(),
        uplink: spec.uplink.clone(),
        overlay: spec.overlay.as_ref().map(|overlay| node::Overlay {
            vni: overlay.vni,
            underlay_address: overlay.underlay_address.clone(),
            port: overlay.port,
            peers: peers(overlay, name, host, desired, layout),
        }),
        datapath: match spec.datapath() {
            pb::Datapath::Switch => node::Datapath::Switch,
            pb::Datapath::Kernel | pb::Datapath::Unspecified => node::Datapath::Kernel,
        } as i32,
        endpoints,
        groups: groups
            .into_iter()
            .map(|(name, addresses)| node::AddressGroup { name, addresses })
            .collect(),
        vlan_aware: spec.vlan_aware,
    };
    // The same wish has the same revision, whoever asks: nothing has to be remembered.
    let digest = fnv1a(&wanted.encode_to_vec());
    wanted.revision = format!("{digest:016x}");
    wanted
}

/// The host has an address in networks of this kind.
pub fn has_host(kind: pb::NetworkKind) -> bool {
    matches!(kind, pb::NetworkKind::Nat | pb::NetworkKind::HostOnly)
}

/// Those that the spec names, which are none of ours, and our other hosts that have the network.
fn peers(
    overlay: &pb::Overlay,
    network: &str,
    host: &str,
    desired: &Desired,
    layout: &Layout,
) -> Vec<node::OverlayPeer> {
    let named = overlay.peers.iter().map(|peer| node::OverlayPeer {
        underlay_address: peer.underlay_address.clone(),
        macs: peer.macs.clone(),
    });
    let mut peers: Vec<node::OverlayPeer> = named.collect();
    for other in layout.hosts(network) {
        let stored = desired.hosts.get(other).filter(|_| other != host);
        let inventory = stored.and_then(|stored| stored.record.inventory.as_ref());
        let address = inventory.map_or("", |inventory| &inventory.underlay_address);
        if address.is_empty() || peers.iter().any(|peer| peer.underlay_address == address) {
            continue;
        }
        let vms = layout.vms(network).iter().filter(|vm| vm.host == other);
        let nics = vms.flat_map(|vm| vm.vm.spec.iter().flat_map(|spec| &spec.nics));
        let nics = nics.filter(|nic| nic.network == network && !nic.mac.is_empty());
        peers.push(node::OverlayPeer {
            underlay_address: address.to_owned(),
            macs: nics.map(|nic| nic.mac.clone()).collect(),
        });
    }
    peers
}

fn endpoints_of(
    record: &VmRecord,
    network: &str,
    (desired, layout): (&Desired, &Layout),
    groups: &mut BTreeMap<String, Vec<String>>,
) -> Vec<node::Endpoint> {
    let spec = record.vm.spec.clone().unwrap_or_default();
    let mut hostname = Name::parse_vm(&record.vm.name).map(|name| name.id).ok();
    let mut endpoints = Vec::new();
    for nic in spec.nics.into_iter().filter(|nic| nic.network == network) {
        let rules = nic
            .security_groups
            .iter()
            .filter_map(|group| desired.security_groups.get(group))
            .flat_map(|stored| &stored.record.group.rules)
            .map(|rule| node_rule(rule, layout, groups))
            .collect();
        endpoints.push(node::Endpoint {
            vm_id: record.node_id.clone(),
            nic: nic.name,
            mac: nic.mac,
            ipv4_address: nic.ipv4_address,
            ipv6_address: nic.ipv6_address,
            // A second NIC in the same network would have the same name.
            hostname: hostname.take().unwrap_or_default(),
            port_forwards: nic.port_forwards.into_iter().map(port_forward).collect(),
            allow_spoofing: nic.allow_spoofing,
            filtered: !nic.security_groups.is_empty(),
            track_flows: nic.track_flows,
            rules,
        });
    }
    endpoints
}

fn node_rule(
    rule: &pb::SecurityRule,
    layout: &Layout,
    groups: &mut BTreeMap<String, Vec<String>>,
) -> node::SecurityRule {
    let group = Name::parse_security_group(&rule.security_group)
        .map(|name| name.id)
        .unwrap_or_default();
    if !group.is_empty() && !groups.contains_key(&group) {
        groups.insert(group.clone(), layout.members(&rule.security_group).to_vec());
    }
    node::SecurityRule {
        ingress: rule.direction() == pb::TrafficDirection::Ingress,
        ip_version: rule.ip_version,
        protocol: protocol_number(&rule.protocol).unwrap_or(0),
        first_port: rule.first_port,
        last_port: rule.last_port.max(rule.first_port),
        icmp_type: rule.icmp_type,
        icmp_code: rule.icmp_code,
        cidr: rule.cidr.clone(),
        group,
    }
}

/// What users are told about a network that a host reports; figures that need the store are added
/// by whoever has it.
pub fn network_status(seen: &node::NetworkStatus, wanted: &str, host: &str) -> pb::NetworkStatus {
    let phase = match (seen.observed_revision == wanted, seen.error.is_empty()) {
        (_, false) => pb::NetworkPhase::Failed,
        (true, true) if seen.ready => pb::NetworkPhase::Ready,
        _ => pb::NetworkPhase::Pending,
    };
    pb::NetworkStatus {
        phase: phase as i32,
        host: host.to_owned(),
        bridge: seen.bridge.clone(),
        error: (!seen.error.is_empty()).then(|| pb::OperationError {
            code: seen.error_code,
            message: seen.error.clone(),
            reason: "NETWORK_FAILED".to_owned(),
        }),
        leases: seen
            .leases
            .iter()
            .map(|lease| pb::DhcpLease {
                mac: lease.mac.clone(),
                address: lease.address.clone(),
                hostname: lease.hostname.clone(),
                expire_time: (lease.expires_at != 0).then(|| prost_types::Timestamp {
                    seconds: i64::try_from(lease.expires_at).unwrap_or(i64::MAX),
                    nanos: 0,
                }),
            })
            .collect(),
        processes: seen.processes.iter().map(process).collect(),
        ..Default::default()
    }
}

fn process(seen: &node::NetworkProcess) -> pb::NetworkProcess {
    pb::NetworkProcess {
        name: seen.name.clone(),
        pid: seen.pid,
        restarts: seen.restarts,
        sandbox: seen.sandbox.clone(),
        last_error: seen.last_error.clone(),
        log: seen.log.clone(),
        nics: seen.nics.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_identifiers_are_made_as_guests_make_them() {
        let prefix = "fd00:20::/64".parse().unwrap();
        let address = eui64(prefix, "52:54:00:12:34:05").unwrap();
        assert_eq!(address.to_string(), "fd00:20::5054:ff:fe12:3405");
    }

    #[test]
    fn pool_is_the_subnet_without_its_ends_unless_it_is_named() {
        let mut spec = pb::NetworkSpec {
            ipv4_cidr: "10.20.0.0/24".into(),
            ..Default::default()
        };
        let bounds = |spec: &pb::NetworkSpec| {
            ipv4_pool(spec).map(|(first, last)| (Ipv4Addr::from(first), Ipv4Addr::from(last)))
        };
        let whole = (Ipv4Addr::new(10, 20, 0, 1), Ipv4Addr::new(10, 20, 0, 254));
        assert_eq!(bounds(&spec), Some(whole));
        spec.ipv4_pool_first = "10.20.0.100".into();
        assert_eq!(bounds(&spec).unwrap().0, Ipv4Addr::new(10, 20, 0, 100));
    }

    #[test]
    fn claimed_addresses_read_back() {
        let network = Name::network("p", "front");
        let address = Ipv4Addr::new(10, 20, 0, 5);
        let key = claim::ipv4(&network, address);
        assert_eq!(claim::ipv4_of(&key), Some(address));
    }
}
