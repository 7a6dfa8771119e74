//! What a NIC in a network lets pass, in the words of its daemon.

use api::{
    device::{
        AddressFamily, AddressGroup, AntiSpoofing, Direction, Policy, PortRange, Security,
        SecurityRule, security_rule::Remote,
    },
    node::{self, NetworkSpec},
};

/// The policy of a VM's NIC; `None` when the network does not know it.
pub(super) fn of(spec: &NetworkSpec, vm: &str, nic: &str) -> Option<Policy> {
    let endpoint = spec
        .endpoints
        .iter()
        .find(|endpoint| endpoint.vm_id == vm && endpoint.nic == nic)?;
    let anti_spoofing = (!endpoint.allow_spoofing).then(|| {
        let addresses: Vec<String> = [&endpoint.ipv4_address, &endpoint.ipv6_address]
            .into_iter()
            .filter(|address| !address.is_empty())
            .cloned()
            .collect();
        AntiSpoofing {
            macs: vec![endpoint.mac.clone()],
            // In a network without subnets nobody knows what guests call themselves.
            any_address: addresses.is_empty(),
            addresses,
            any_link_local: true,
            dhcp_server: false,
            router: false,
        }
    });
    let security = endpoint.filtered.then(|| {
        let named = |group: &&node::AddressGroup| {
            endpoint.rules.iter().any(|rule| rule.group == group.name)
        };
        Security {
            rules: endpoint.rules.iter().map(rule).collect(),
            groups: spec
                .groups
                .iter()
                .filter(named)
                .map(|group| AddressGroup {
                    name: group.name.clone(),
                    cidrs: group.addresses.clone(),
                })
                .collect(),
            ethertypes: Vec::new(),
        }
    });
    Some(Policy {
        anti_spoofing,
        security,
        track_flows: endpoint.track_flows,
    })
}

fn rule(rule: &node::SecurityRule) -> SecurityRule {
    let direction = match rule.ingress {
        true => Direction::Ingress,
        false => Direction::Egress,
    };
    let family = match rule.ip_version {
        4 => AddressFamily::Ipv4,
        6 => AddressFamily::Ipv6,
        _ => AddressFamily::Unspecified,
    };
    let remote = match (rule.cidr.as_str(), rule.group.as_str()) {
        ("", "") => None,
        ("", group) => Some(Remote::Group(group.to_owned())),
        (cidr, _) => Some(Remote::Cidr(cidr.to_owned())),
    };
    SecurityRule {
        direction: direction as i32,
        family: family as i32,
        protocol: rule.protocol,
        ports: (rule.first_port != 0 || rule.last_port != 0).then_some(PortRange {
            first: rule.first_port,
            last: rule.last_port.max(rule.first_port),
        }),
        icmp_type: rule.icmp_type,
        icmp_code: rule.icmp_code,
        stateless: false,
        remote,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nic_may_pose_as_itself_only_and_rules_come_with_their_groups() {
        let mut spec = NetworkSpec {
            endpoints: vec![node::Endpoint {
                vm_id: "web".into(),
                nic: "nic0".into(),
                mac: "52:54:00:00:00:05".into(),
                ipv4_address: "10.20.0.5".into(),
                filtered: true,
                rules: vec![node::SecurityRule {
                    ingress: true,
                    protocol: 6,
                    first_port: 22,
                    group: "admins".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }],
            groups: ["admins", "others"]
                .map(|name| node::AddressGroup {
                    name: name.into(),
                    addresses: vec!["10.20.0.9".into()],
                })
                .into(),
            ..Default::default()
        };
        assert_eq!(of(&spec, "web", "nic1"), None);
        let policy = of(&spec, "web", "nic0").unwrap();
        let own = policy.anti_spoofing.unwrap();
        assert_eq!(
            (own.macs.len(), own.addresses.as_slice()),
            (1, &["10.20.0.5".to_owned()][..])
        );
        assert!(!own.any_address);
        let security = policy.security.unwrap();
        assert_eq!(
            security.groups.len(),
            1,
            "others are no business of this NIC"
        );
        assert_eq!(
            security.rules[0].ports,
            Some(PortRange {
                first: 22,
                last: 22
            })
        );
        spec.endpoints[0].allow_spoofing = true;
        spec.endpoints[0].filtered = false;
        let policy = of(&spec, "web", "nic0").unwrap();
        assert_eq!((policy.anti_spoofing, policy.security), (None, None));
    }
}
