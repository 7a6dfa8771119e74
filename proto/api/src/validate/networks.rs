//! Networks and NICs in them, in requests of the controller and of the node agent.

use std::collections::HashSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::security_groups::prefix;
use super::*;
use crate::{controller as pb, node};

/// Security groups of one NIC.
pub const MAX_NIC_GROUPS: usize = 16;
/// Port forwards of one NIC.
pub const MAX_PORT_FORWARDS: usize = 64;
/// Other hosts of an overlay, and NICs on one of them.
const MAX_PEERS: usize = 1024;
const MAX_PEER_MACS: usize = 4096;
/// More than resolvers ask.
const MAX_DNS_SERVERS: usize = 8;
const MAX_VNI: u32 = (1 << 24) - 1;
/// RFC 8200 section 5.
const MIN_IPV6_MTU: u32 = 1280;
/// What SLAAC makes addresses in (RFC 4862 with RFC 2464).
const SLAAC_PREFIX_LEN: u8 = 64;
/// RFC 1035 section 2.3.4, without the final dot.
const MAX_DOMAIN_BYTES: usize = 253;

/// What a NIC in a network says, in the controller's words.
pub(super) fn nic_network(found: &mut Violations, at: &str, nic: &pb::Nic) {
    if nic.network.is_empty() {
        let network_only = [
            (!nic.ipv4_address.is_empty(), "ipv4_address"),
            (!nic.ipv6_address.is_empty(), "ipv6_address"),
            (nic.allow_spoofing, "allow_spoofing"),
            (!nic.security_groups.is_empty(), "security_groups"),
            (nic.vlan != 0, "vlan"),
            (!nic.trunk_vlans.is_empty(), "trunk_vlans"),
        ];
        for (given, field) in network_only {
            found.require(!given, &format!("{at}.{field}"), || {
                "is for a NIC in a network; name one".into()
            });
        }
    } else {
        if let Err(error) = names::Name::parse_network(&nic.network) {
            found.add(format!("{at}.network"), error.to_string());
        }
        let other = !nic.tap.is_empty() || !nic.host_cidr.is_empty() || !nic.bridge.is_empty();
        found.require(!other, at, || {
            "a NIC in a network has no tap, host_cidr or bridge of its own; leave these out or the network".into()
        });
    }
    address(
        found,
        &format!("{at}.ipv4_address"),
        &nic.ipv4_address,
        |address| address.is_ipv4(),
    );
    address(
        found,
        &format!("{at}.ipv6_address"),
        &nic.ipv6_address,
        |address| address.is_ipv6(),
    );
    super::net::vlans(found, at, nic.vlan, &nic.trunk_vlans);
    port_forwards(found, at, &nic.port_forwards);
    let groups = nic.security_groups.len();
    found.require(
        groups <= MAX_NIC_GROUPS,
        &format!("{at}.security_groups"),
        || format!("has {groups} groups, {MAX_NIC_GROUPS} at most"),
    );
    let mut seen = HashSet::new();
    for (index, group) in nic.security_groups.iter().enumerate() {
        let field = format!("{at}.security_groups[{index}]");
        match names::Name::parse_security_group(group) {
            Err(error) => found.add(field, error.to_string()),
            Ok(_) => found.require(seen.insert(group), &field, || "is named twice".into()),
        }
    }
}

/// As [`nic_network`], in the node agent's words.
pub(super) fn node_nic_network(found: &mut Violations, at: &str, nic: &node::NicSpec) {
    super::net::vlans(found, at, nic.vlan, &nic.trunk_vlans);
    if nic.network.is_empty() {
        let has_vlans = nic.vlan != 0 || !nic.trunk_vlans.is_empty();
        found.require(!has_vlans, &format!("{at}.vlan"), || {
            "is for a NIC in a network; name one".into()
        });
        return;
    }
    id(found, &format!("{at}.network"), &nic.network);
    let other = !nic.tap.is_empty() || !nic.host_cidr.is_empty() || !nic.bridge.is_empty();
    found.require(!other, at, || {
        "a NIC in a network has no tap, host_cidr or bridge of its own".into()
    });
}

fn port_forwards(found: &mut Violations, at: &str, forwards: &[pb::PortForward]) {
    let count = forwards.len();
    found.require(
        count <= MAX_PORT_FORWARDS,
        &format!("{at}.port_forwards"),
        || format!("has {count} port forwards, {MAX_PORT_FORWARDS} at most"),
    );
    let mut seen = HashSet::new();
    for (index, forward) in forwards.iter().enumerate() {
        let at = format!("{at}.port_forwards[{index}]");
        let known = matches!(forward.protocol.as_str(), "tcp" | "udp");
        found.require(known, &format!("{at}.protocol"), || {
            format!("{:?} must be tcp or udp", forward.protocol)
        });
        port(found, &format!("{at}.host_port"), forward.host_port);
        if forward.guest_port != 0 {
            port(found, &format!("{at}.guest_port"), forward.guest_port);
        }
        address(
            found,
            &format!("{at}.host_address"),
            &forward.host_address,
            |_| true,
        );
        let key = (&forward.protocol, &forward.host_address, forward.host_port);
        found.require(seen.insert(key), &at, || "is there twice".into());
    }
}

fn port(found: &mut Violations, field: &str, value: u32) {
    let fits = u16::try_from(value).is_ok_and(|port| NonZeroU16::new(port).is_some());
    found.require(fits, field, || format!("must be 1 to 65535, not {value}"));
}

/// Empty is fine.
fn address(found: &mut Violations, field: &str, text: &str, fits: impl Fn(IpAddr) -> bool) {
    let good = text.is_empty() || text.parse::<IpAddr>().is_ok_and(fits);
    found.require(good, field, || {
        format!("{text:?} is no IP address of the right family")
    });
}

/// Checks a network that is to be created.
///
/// # Errors
/// As [`attach_request`].
pub fn create_network_request(request: &pb::CreateNetworkRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "network_id", &request.network_id);
    request_id(&mut found, &request.request_id);
    match request
        .network
        .as_ref()
        .and_then(|network| network.spec.as_ref())
    {
        Some(spec) => network_spec(&mut found, "network.spec", spec),
        None => found.add("network.spec", "is missing"),
    }
    found.into_result()
}

/// The fields of a network that may change.
pub const NETWORK_MASK: [&str; 5] = [
    "spec.dhcp",
    "spec.dns",
    "spec.dns_servers",
    "spec.mtu",
    "spec.overlay.peers",
];

/// Checks a change of a network, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn update_network_request(request: &pb::UpdateNetworkRequest) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let network = request.network.clone().unwrap_or_default();
    let paths = request.update_mask.clone().unwrap_or_default().paths;
    found.require(!paths.is_empty(), "update_mask", || {
        format!("is missing; give any of {}", NETWORK_MASK.join(", "))
    });
    for path in &paths {
        found.require(NETWORK_MASK.contains(&path.as_str()), "update_mask", || {
            format!(
                "{path:?} cannot be changed; {} can",
                NETWORK_MASK.join(", ")
            )
        });
    }
    found.require(network.spec.is_some(), "network.spec", || {
        "is missing".into()
    });
    match names::Name::parse_network(&network.name) {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add("network.name", error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

/// Checks the fields that requests about a network share, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn network_request(name: &str, request: &str) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, request);
    resource(found, names::Name::parse_network(name))
}

/// Checks a whole network, also one that was changed; fields are named relative to `at`.
pub fn network_spec(found: &mut Violations, at: &str, spec: &pb::NetworkSpec) {
    use pb::NetworkKind::{Bridged, HostOnly, Nat};
    let field = |name: &str| format!("{at}.{name}");
    let kind = match pb::NetworkKind::try_from(spec.kind) {
        Ok(pb::NetworkKind::Unspecified) | Err(_) => {
            found.add(
                field("kind"),
                "must be NETWORK_KIND_NAT, _BRIDGED, _HOST_ONLY or _ISOLATED",
            );
            return;
        }
        Ok(kind) => kind,
    };
    let has_host = matches!(kind, Nat | HostOnly);
    ipv4_fields(found, at, spec);
    if !spec.ipv6_prefix.is_empty() {
        let fits = spec
            .ipv6_prefix
            .parse::<Ipv6Net>()
            .is_ok_and(|net| net.prefix_len() == SLAAC_PREFIX_LEN && net == net.trunc());
        found.require(fits, &field("ipv6_prefix"), || {
            format!(
                "{:?} must be a prefix of 64 bits such as fd00:20::/64",
                spec.ipv6_prefix
            )
        });
    }
    found.require(
        spec.ipv4_gateway.is_empty() || has_host,
        &field("ipv4_gateway"),
        || "is the host's address, and of NAT and host-only networks".into(),
    );
    for (name, given) in [("dhcp", spec.dhcp), ("dns", spec.dns)] {
        found.require(given != Some(true) || has_host, &field(name), || {
            "is served at the host's address, which NAT and host-only networks have alone; give addresses by cloud-init or leave it out".into()
        });
    }
    let servers = spec.dns_servers.len();
    found.require(servers <= MAX_DNS_SERVERS, &field("dns_servers"), || {
        format!("has {servers} servers, {MAX_DNS_SERVERS} at most")
    });
    for (index, server) in spec.dns_servers.iter().enumerate() {
        let field = field(&format!("dns_servers[{index}]"));
        found.require(server.parse::<IpAddr>().is_ok(), &field, || {
            format!("{server:?} is no IP address")
        });
    }
    domain(found, &field("dns_domain"), &spec.dns_domain);
    mtu(found, &field("mtu"), spec.mtu);
    let small = spec.mtu != 0 && spec.mtu < MIN_IPV6_MTU && !spec.ipv6_prefix.is_empty();
    found.require(!small, &field("mtu"), || {
        format!("must be {MIN_IPV6_MTU} at least with an ipv6_prefix")
    });
    interface(found, &field("bridge"), &spec.bridge);
    interface(found, &field("uplink"), &spec.uplink);
    way_out(
        found,
        at,
        (kind == Bridged, kind == Nat),
        spec.datapath() == pb::Datapath::Switch,
        (&spec.bridge, &spec.uplink),
    );
    if pb::Datapath::try_from(spec.datapath).is_err() {
        found.add(field("datapath"), "is of an unknown kind");
    }
    vlan_aware(
        found,
        at,
        spec.vlan_aware,
        has_host,
        spec.datapath() == pb::Datapath::Switch,
    );
    if let Some(overlay) = &spec.overlay {
        found.require(kind != Bridged, &field("overlay"), || {
            "is for networks with a bridge of their own".into()
        });
        let peers = overlay
            .peers
            .iter()
            .map(|peer| (peer.underlay_address.as_str(), peer.macs.as_slice()));
        overlay_fields(
            found,
            &field("overlay"),
            overlay.vni,
            &overlay.underlay_address,
            overlay.port,
            peers.collect(),
        );
    }
}

/// The bridge or the interface that leads out of a network.
fn way_out(
    found: &mut Violations,
    at: &str,
    (is_bridged, is_nat): (bool, bool),
    is_switched: bool,
    (bridge, uplink): (&str, &str),
) {
    if !is_bridged {
        found.require(bridge.is_empty(), &format!("{at}.bridge"), || {
            "is for bridged networks; others get a bridge of their own".into()
        });
        found.require(uplink.is_empty() || is_nat, &format!("{at}.uplink"), || {
            "is for NAT networks, and for bridged ones with DATAPATH_SWITCH".into()
        });
        return;
    }
    if !is_switched {
        found.require(uplink.is_empty(), &format!("{at}.uplink"), || {
            "of a bridged network needs DATAPATH_SWITCH; or put the interface into a bridge and name that".into()
        });
    }
    let both = !bridge.is_empty() && !uplink.is_empty();
    found.require(!(is_switched && both), &format!("{at}.uplink"), || {
        "is given beside bridge; a bridged network has one of them".into()
    });
    let missing = bridge.is_empty() && (uplink.is_empty() || !is_switched);
    found.require(!missing, &format!("{at}.bridge"), || {
        "is missing; name a bridge of the host (ip link add br0 type bridge)".into()
    });
}

/// Whether a network can have VLANs.
fn vlan_aware(found: &mut Violations, at: &str, is_aware: bool, has_host: bool, is_switched: bool) {
    let field = format!("{at}.vlan_aware");
    found.require(!is_aware || is_switched, &field, || {
        "needs DATAPATH_SWITCH: the bridge of a network keeps no VLANs apart".into()
    });
    found.require(!is_aware || !has_host, &field, || {
        "is for isolated and bridged networks: the host serves NAT and host-only ones without tags".into()
    });
}

fn ipv4_fields(found: &mut Violations, at: &str, spec: &pb::NetworkSpec) {
    let field = |name: &str| format!("{at}.{name}");
    let text = &spec.ipv4_cidr;
    let subnet = text.parse::<Ipv4Net>().ok().filter(|net| {
        *net == net.trunc() && (8..=30).contains(&net.prefix_len()) && !net.addr().is_multicast()
    });
    found.require(
        text.is_empty() || subnet.is_some(),
        &field("ipv4_cidr"),
        || {
            format!(
                "{text:?} must be a subnet from /8 to /30 such as 10.20.0.0/24, its last bits 0"
            )
        },
    );
    let inside = [
        ("ipv4_gateway", &spec.ipv4_gateway),
        ("ipv4_pool_first", &spec.ipv4_pool_first),
        ("ipv4_pool_last", &spec.ipv4_pool_last),
    ];
    for (name, text) in inside {
        if text.is_empty() {
            continue;
        }
        let Ok(address) = text.parse::<std::net::Ipv4Addr>() else {
            found.add(field(name), format!("{text:?} is no IPv4 address"));
            continue;
        };
        let fits = subnet.is_some_and(|net| {
            net.contains(&address) && address != net.network() && address != net.broadcast()
        });
        found.require(fits, &field(name), || match spec.ipv4_cidr.as_str() {
            "" => "needs ipv4_cidr, which it is in".into(),
            cidr => format!("{text} is no address of a host in {cidr}"),
        });
    }
    let first = spec.ipv4_pool_first.parse::<std::net::Ipv4Addr>();
    let last = spec.ipv4_pool_last.parse::<std::net::Ipv4Addr>();
    if let (Ok(first), Ok(last)) = (first, last) {
        found.require(first <= last, &field("ipv4_pool_last"), || {
            "is before ipv4_pool_first".into()
        });
    }
}

fn domain(found: &mut Violations, field: &str, name: &str) {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let fits = name.is_empty() || (name.len() <= MAX_DOMAIN_BYTES && name.split('.').all(label));
    found.require(fits, field, || {
        format!(
            "{name:?} is no domain; write labels of letters, digits and hyphens with dots between"
        )
    });
}

fn overlay_fields(
    found: &mut Violations,
    at: &str,
    vni: u32,
    underlay_address: &str,
    port: u32,
    peers: Vec<(&str, &[String])>,
) {
    found.require((1..=MAX_VNI).contains(&vni), &format!("{at}.vni"), || {
        format!("must be 1 to {MAX_VNI}, not {vni}")
    });
    let own = format!("{at}.underlay_address");
    address(found, &own, underlay_address, |_| true);
    found.require(port <= u32::from(u16::MAX), &format!("{at}.port"), || {
        format!("must be 1 to 65535, or 0 for 4789, not {port}")
    });
    let count = peers.len();
    found.require(count <= MAX_PEERS, &format!("{at}.peers"), || {
        format!("has {count} peers, {MAX_PEERS} at most")
    });
    for (index, (address, macs)) in peers.into_iter().enumerate() {
        let at = format!("{at}.peers[{index}]");
        found.require(
            address.parse::<IpAddr>().is_ok(),
            &format!("{at}.underlay_address"),
            || format!("{address:?} is no IP address"),
        );
        let count = macs.len();
        found.require(count <= MAX_PEER_MACS, &format!("{at}.macs"), || {
            format!("has {count} addresses, {MAX_PEER_MACS} at most")
        });
        for (index, text) in macs.iter().enumerate() {
            let field = format!("{at}.macs[{index}]");
            found.require(!text.is_empty(), &field, || "is empty".into());
            mac(found, &field, text);
        }
    }
}

/// Checks the network that a host is asked to make.
///
/// # Errors
/// As [`attach_request`]; paths begin with `spec.`
pub fn apply_network_request(request: &node::ApplyNetworkRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    let Some(spec) = &request.spec else {
        found.add("spec", "is missing");
        return found.into_result();
    };
    id(&mut found, "spec.id", &spec.id);
    no_control_characters(&mut found, "spec.revision", &spec.revision);
    let kind = node::NetworkKind::try_from(spec.kind).unwrap_or_default();
    found.require(kind != node::NetworkKind::Unspecified, "spec.kind", || {
        "is missing or unknown".into()
    });
    let gateways = [
        ("spec.ipv4_gateway", &spec.ipv4_gateway, true),
        ("spec.ipv6_gateway", &spec.ipv6_gateway, false),
    ];
    for (field, text, is_ipv4) in gateways {
        let fits = text.is_empty()
            || text
                .parse::<IpNet>()
                .is_ok_and(|net| matches!(net, IpNet::V4(_)) == is_ipv4);
        found.require(fits, field, || {
            format!("{text:?} must be an address and a prefix length")
        });
    }
    let has_host = matches!(kind, node::NetworkKind::Nat | node::NetworkKind::HostOnly);
    let has_address = !spec.ipv4_gateway.is_empty() || !spec.ipv6_gateway.is_empty();
    found.require(has_host == has_address, "spec.ipv4_gateway", || {
        "NAT and host-only networks have a gateway, others none".into()
    });
    found.require(has_host || !(spec.dhcp || spec.dns), "spec.dhcp", || {
        "needs a gateway".into()
    });
    for (index, server) in spec.dns_servers.iter().enumerate() {
        let field = format!("spec.dns_servers[{index}]");
        found.require(server.parse::<IpAddr>().is_ok(), &field, || {
            format!("{server:?} is no IP address")
        });
    }
    domain(&mut found, "spec.dns_domain", &spec.dns_domain);
    mtu(&mut found, "spec.mtu", spec.mtu);
    interface(&mut found, "spec.bridge", &spec.bridge);
    interface(&mut found, "spec.uplink", &spec.uplink);
    let is = |wanted| kind == wanted;
    way_out(
        &mut found,
        "spec",
        (is(node::NetworkKind::Bridged), is(node::NetworkKind::Nat)),
        spec.datapath() == node::Datapath::Switch,
        (&spec.bridge, &spec.uplink),
    );
    vlan_aware(
        &mut found,
        "spec",
        spec.vlan_aware,
        has_host,
        spec.datapath() == node::Datapath::Switch,
    );
    if let Some(overlay) = &spec.overlay {
        let peers = overlay
            .peers
            .iter()
            .map(|peer| (peer.underlay_address.as_str(), peer.macs.as_slice()));
        overlay_fields(
            &mut found,
            "spec.overlay",
            overlay.vni,
            &overlay.underlay_address,
            overlay.port,
            peers.collect(),
        );
    }
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        node_endpoint(&mut found, &format!("spec.endpoints[{index}]"), endpoint);
    }
    for (index, group) in spec.groups.iter().enumerate() {
        for address in &group.addresses {
            found.require(
                prefix(address).is_some(),
                &format!("spec.groups[{index}].addresses"),
                || format!("{address:?} is no address"),
            );
        }
    }
    found.into_result()
}

fn node_endpoint(found: &mut Violations, at: &str, endpoint: &node::Endpoint) {
    let field = |name: &str| format!("{at}.{name}");
    id(found, &field("vm_id"), &endpoint.vm_id);
    id(found, &field("nic"), &endpoint.nic);
    found.require(!endpoint.mac.is_empty(), &field("mac"), || {
        "is missing".into()
    });
    mac(found, &field("mac"), &endpoint.mac);
    address(
        found,
        &field("ipv4_address"),
        &endpoint.ipv4_address,
        |address| address.is_ipv4(),
    );
    address(
        found,
        &field("ipv6_address"),
        &endpoint.ipv6_address,
        |address| address.is_ipv6(),
    );
    if !endpoint.hostname.is_empty() {
        id(found, &field("hostname"), &endpoint.hostname);
    }
    for (index, forward) in endpoint.port_forwards.iter().enumerate() {
        let at = field(&format!("port_forwards[{index}]"));
        let known = matches!(forward.protocol.as_str(), "tcp" | "udp");
        found.require(known, &format!("{at}.protocol"), || {
            "must be tcp or udp".into()
        });
        port(found, &format!("{at}.host_port"), forward.host_port);
        port(found, &format!("{at}.guest_port"), forward.guest_port);
        address(
            found,
            &format!("{at}.host_address"),
            &forward.host_address,
            |_| true,
        );
    }
    for (index, rule) in endpoint.rules.iter().enumerate() {
        let at = field(&format!("rules[{index}]"));
        found.require(
            rule.cidr.is_empty() || prefix(&rule.cidr).is_some(),
            &format!("{at}.cidr"),
            || format!("{:?} is no prefix", rule.cidr),
        );
        at_most(found, &format!("{at}.protocol"), rule.protocol, 255);
        at_most(found, &format!("{at}.first_port"), rule.first_port, 65535);
        at_most(found, &format!("{at}.last_port"), rule.last_port, 65535);
    }
}

#[cfg(test)]
mod tests;
