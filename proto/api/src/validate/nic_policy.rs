//! What a NIC lets pass, and what is asked of one that is served.

use ipnet::IpNet;
use std::net::IpAddr;

use super::*;
use crate::device::security_rule::Remote;
use crate::device::{
    AddressFamily, CaptureRequest, CapturedFrames, Direction, ListFlowsRequest, NetLimit,
    NetLimits, Policy, PortRange, Security, SecurityRule, SetNetLimitsRequest, SetPolicyRequest,
};

/// Rules of one policy.
pub const MAX_SECURITY_RULES: usize = 1024;
/// Addresses of all groups of one policy.
pub const MAX_GROUP_ADDRESSES: usize = 65536;
/// Flows that one answer lists.
pub const MAX_LISTED_FLOWS: u32 = 65536;

const MAX_MACS: usize = 64;
const MAX_ADDRESSES: usize = 1024;
const MAX_ETHERTYPES: usize = 16;
const MAX_GROUP_NAME_BYTES: usize = 128;
const MAX_FILTER_BYTES: usize = 4096;
/// Below are lengths of frames without a type.
const MIN_ETHERTYPE: u32 = 0x600;

const ICMP: u32 = 1;
const ICMPV6: u32 = 58;
/// TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u32; 5] = [6, 17, 33, 132, 136];

/// Checks a NIC's new policy.
///
/// # Errors
/// As [`attach_request`].
pub fn set_policy_request(request: &SetPolicyRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    if let Some(new) = &request.policy {
        policy(&mut found, "policy", new);
    }
    found.into_result()
}

/// Checks a NIC's new limits.
///
/// # Errors
/// As [`attach_request`].
pub fn set_net_limits_request(request: &SetNetLimitsRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    match &request.limits {
        Some(limits) => net_limits(&mut found, "limits", limits),
        None => found.add("limits", "is missing; limits of 0 lift all"),
    }
    found.into_result()
}

/// Checks which NIC is asked about: GetNic, SetLink.
///
/// # Errors
/// As [`attach_request`].
pub fn nic_request(value: &str) -> Result<(), Status> {
    one_id("id", value)
}

/// Checks which flows are asked for; the filter is looked at by the daemon.
///
/// # Errors
/// As [`attach_request`].
pub fn list_flows_request(request: &ListFlowsRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    filter(&mut found, &request.filter);
    at_most(&mut found, "max_flows", request.max_flows, MAX_LISTED_FLOWS);
    found.into_result()
}

/// Checks what is to be captured; the filter is looked at by the daemon.
///
/// # Errors
/// As [`attach_request`].
pub fn capture_request(request: &CaptureRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    filter(&mut found, &request.filter);
    known::<Direction>(&mut found, "direction", request.direction);
    known::<CapturedFrames>(&mut found, "frames", request.frames);
    found.into_result()
}

/// Checks a policy, wherever it is found.
pub(super) fn policy(found: &mut Violations, at: &str, policy: &Policy) {
    if let Some(anti_spoofing) = &policy.anti_spoofing {
        let at = format!("{at}.anti_spoofing");
        let macs = format!("{at}.macs");
        no_more_than(found, &macs, anti_spoofing.macs.len(), MAX_MACS);
        for (index, text) in anti_spoofing.macs.iter().enumerate().take(MAX_MACS) {
            let at = format!("{macs}[{index}]");
            found.require(!text.is_empty(), &at, || "is missing".into());
            mac(found, &at, text);
        }
        cidrs(
            found,
            &format!("{at}.addresses"),
            &anti_spoofing.addresses,
            MAX_ADDRESSES,
        );
        found.require(
            !anti_spoofing.any_address || anti_spoofing.addresses.is_empty(),
            &format!("{at}.any_address"),
            || "excludes addresses".into(),
        );
    }
    if let Some(rules) = &policy.security {
        security(found, &format!("{at}.security"), rules);
    }
}

fn security(found: &mut Violations, at: &str, security: &Security) {
    let rules = format!("{at}.rules");
    no_more_than(found, &rules, security.rules.len(), MAX_SECURITY_RULES);
    for (index, rule) in security.rules.iter().enumerate().take(MAX_SECURITY_RULES) {
        self::rule(found, &format!("{rules}[{index}]"), rule, security);
    }
    let groups = format!("{at}.groups");
    // One for each rule.
    no_more_than(found, &groups, security.groups.len(), MAX_SECURITY_RULES);
    let mut left = MAX_GROUP_ADDRESSES;
    for (index, group) in security.groups.iter().enumerate().take(MAX_SECURITY_RULES) {
        let at = format!("{groups}[{index}]");
        let fits = (1..=MAX_GROUP_NAME_BYTES).contains(&group.name.len());
        found.require(fits, &format!("{at}.name"), || {
            format!("must have 1 to {MAX_GROUP_NAME_BYTES} bytes")
        });
        no_control_characters(found, &format!("{at}.name"), &group.name);
        let is_new = security.groups[..index]
            .iter()
            .all(|before| before.name != group.name);
        found.require(is_new, &format!("{at}.name"), || {
            format!("{:?} is named twice", group.name)
        });
        cidrs(found, &format!("{at}.cidrs"), &group.cidrs, left);
        left = left.saturating_sub(group.cidrs.len());
    }
    let ethertypes = format!("{at}.ethertypes");
    no_more_than(
        found,
        &ethertypes,
        security.ethertypes.len(),
        MAX_ETHERTYPES,
    );
    for (index, &ethertype) in security.ethertypes.iter().enumerate().take(MAX_ETHERTYPES) {
        let fits = (MIN_ETHERTYPE..=0xffff).contains(&ethertype);
        found.require(fits, &format!("{ethertypes}[{index}]"), || {
            format!("{ethertype:#x} must be 0x600 to 0xffff")
        });
    }
}

fn rule(found: &mut Violations, at: &str, rule: &SecurityRule, security: &Security) {
    let direction = format!("{at}.direction");
    match Direction::try_from(rule.direction) {
        Ok(Direction::Unspecified) => {
            found.add(
                direction,
                "is missing: DIRECTION_INGRESS or DIRECTION_EGRESS",
            );
        }
        Ok(_) => {}
        Err(_) => found.add(direction, format!("unknown value {}", rule.direction)),
    }
    known::<AddressFamily>(found, &format!("{at}.family"), rule.family);
    at_most(found, &format!("{at}.protocol"), rule.protocol, 255);
    if let Some(range) = &rule.ports {
        ports(found, &format!("{at}.ports"), range, rule.protocol);
    }
    let is_icmp = matches!(rule.protocol, ICMP | ICMPV6);
    for (name, value) in [("icmp_type", rule.icmp_type), ("icmp_code", rule.icmp_code)] {
        let Some(value) = value else { continue };
        let at = format!("{at}.{name}");
        found.require(is_icmp, &at, || "goes with protocol 1 or 58".into());
        at_most(found, &at, value, 255);
    }
    found.require(
        rule.icmp_type.is_some() || rule.icmp_code.is_none(),
        &format!("{at}.icmp_code"),
        || "means nothing without icmp_type".into(),
    );
    match &rule.remote {
        Some(Remote::Cidr(text)) => {
            let at = format!("{at}.cidr");
            let Some(cidr) = cidr(found, &at, text) else {
                return;
            };
            let family = if cidr.addr().is_ipv4() {
                AddressFamily::Ipv4
            } else {
                AddressFamily::Ipv6
            };
            let fits = rule.family() == AddressFamily::Unspecified || rule.family() == family;
            found.require(fits, &at, || format!("{text} is not of the rule's family"));
        }
        Some(Remote::Group(name)) => {
            let is_known = security.groups.iter().any(|group| group.name == *name);
            found.require(is_known, &format!("{at}.group"), || {
                format!("{name:?} is none of the policy's groups")
            });
        }
        None => {}
    }
}

fn ports(found: &mut Violations, at: &str, range: &PortRange, protocol: u32) {
    found.require(WITH_PORTS.contains(&protocol), at, || {
        format!("protocol {protocol} has no ports; they go with 6 (TCP), 17 (UDP), 33, 132 and 136")
    });
    at_most(found, &format!("{at}.last"), range.last, 65535);
    found.require(range.first <= range.last, &format!("{at}.first"), || {
        format!("{} is above the last port, {}", range.first, range.last)
    });
}

/// Checks limits, wherever they are found.
pub(super) fn net_limits(found: &mut Violations, at: &str, limits: &NetLimits) {
    for (direction, limit) in [("ingress", &limits.ingress), ("egress", &limits.egress)] {
        if let Some(limit) = limit {
            net_limit(found, &format!("{at}.{direction}"), limit);
        }
    }
}

fn net_limit(found: &mut Violations, at: &str, limit: &NetLimit) {
    let rates = [
        (
            "burst_bits",
            limit.burst_bits,
            "bits_per_second",
            limit.bits_per_second,
        ),
        (
            "burst_packets",
            limit.burst_packets,
            "packets_per_second",
            limit.packets_per_second,
        ),
    ];
    for (burst_name, burst, rate_name, rate) in rates {
        found.require(
            burst == 0 || rate > 0,
            &format!("{at}.{burst_name}"),
            || format!("means nothing without {rate_name}"),
        );
    }
}

fn cidrs(found: &mut Violations, at: &str, list: &[String], max: usize) {
    no_more_than(found, at, list.len(), max);
    for (index, text) in list.iter().enumerate().take(max) {
        cidr(found, &format!("{at}[{index}]"), text);
    }
}

/// An address or a prefix.
fn cidr(found: &mut Violations, at: &str, text: &str) -> Option<IpNet> {
    let address = text.parse::<IpAddr>().map(IpNet::from);
    let Ok(cidr) = address.or_else(|_| text.parse::<IpNet>()) else {
        found.add(
            at,
            format!("{text:?} must be an address or a prefix such as 192.0.2.0/24"),
        );
        return None;
    };
    let is_mapped = match cidr.addr() {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.to_ipv4_mapped().is_some(),
    };
    found.require(!is_mapped, at, || {
        format!("write {text} as an address of IPv4")
    });
    found.require(cidr.addr() == cidr.network(), at, || {
        format!(
            "{text} has bits set behind its prefix; did you mean {}?",
            cidr.trunc()
        )
    });
    Some(cidr)
}

pub(super) fn filter(found: &mut Violations, text: &str) {
    found.require(text.len() <= MAX_FILTER_BYTES, "filter", || {
        format!("is longer than {MAX_FILTER_BYTES} bytes")
    });
}

fn no_more_than(found: &mut Violations, at: &str, count: usize, max: usize) {
    found.require(count <= max, at, || {
        format!("has {count} entries; {max} at most")
    });
}

fn known<E: TryFrom<i32>>(found: &mut Violations, at: &str, value: i32) {
    found.require(E::try_from(value).is_ok(), at, || {
        format!("unknown value {value}")
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{AddressGroup, AntiSpoofing};

    fn violations(policy: Policy) -> Vec<String> {
        let request = SetPolicyRequest {
            id: "nic".into(),
            policy: Some(policy),
        };
        let Err(status) = set_policy_request(&request) else {
            return Vec::new();
        };
        let details = tonic_types::StatusExt::get_details_bad_request(&status);
        let violations = details.expect("a bad request").field_violations;
        violations
            .into_iter()
            .map(|violation| format!("{}: {}", violation.field, violation.description))
            .collect()
    }

    fn with_rule(rule: SecurityRule) -> Policy {
        Policy {
            security: Some(Security {
                rules: vec![rule],
                groups: vec![AddressGroup {
                    name: "web".into(),
                    cidrs: vec!["192.0.2.1".into(), "2001:db8::/64".into()],
                }],
                ethertypes: vec![0x88cc],
            }),
            ..Policy::default()
        }
    }

    fn ssh() -> SecurityRule {
        SecurityRule {
            direction: Direction::Ingress.into(),
            protocol: 6,
            ports: Some(PortRange {
                first: 22,
                last: 22,
            }),
            remote: Some(Remote::Group("web".into())),
            ..SecurityRule::default()
        }
    }

    #[test]
    fn sensible_policies_pass() {
        let policy = Policy {
            anti_spoofing: Some(AntiSpoofing {
                macs: vec!["52:54:00:00:00:01".into()],
                addresses: vec!["10.0.0.5".into(), "2001:db8::/64".into()],
                ..AntiSpoofing::default()
            }),
            ..with_rule(ssh())
        };
        assert_eq!(violations(policy), [""; 0]);
        assert_eq!(violations(Policy::default()), [""; 0]);
    }

    #[test]
    fn each_mistake_in_a_rule_is_named() {
        let icmp = SecurityRule {
            direction: Direction::Egress.into(),
            protocol: ICMP,
            ..SecurityRule::default()
        };
        let cidr = |text: &str| Some(Remote::Cidr(text.into()));
        let cases: [(SecurityRule, &str); 11] = [
            (
                SecurityRule {
                    direction: 0,
                    ..ssh()
                },
                "direction: is missing",
            ),
            (
                SecurityRule {
                    protocol: 1,
                    ..ssh()
                },
                "ports: protocol 1 has no ports",
            ),
            (
                SecurityRule {
                    protocol: 256,
                    ports: None,
                    ..ssh()
                },
                "protocol: must be at most 255",
            ),
            (
                SecurityRule {
                    ports: Some(PortRange { first: 9, last: 8 }),
                    ..ssh()
                },
                "ports.first: 9 is above",
            ),
            (
                SecurityRule {
                    ports: Some(PortRange {
                        first: 9,
                        last: 65536,
                    }),
                    ..ssh()
                },
                "ports.last: must be at most 65535",
            ),
            (
                SecurityRule {
                    remote: cidr("10.0.0.1/8"),
                    ..ssh()
                },
                "did you mean 10.0.0.0/8",
            ),
            (
                SecurityRule {
                    remote: cidr("10.0.0"),
                    ..ssh()
                },
                "an address or a prefix",
            ),
            (
                SecurityRule {
                    remote: cidr("::/0"),
                    family: AddressFamily::Ipv4.into(),
                    ..ssh()
                },
                "not of the rule's family",
            ),
            (
                SecurityRule {
                    remote: Some(Remote::Group("db".into())),
                    ..ssh()
                },
                "none of the policy's groups",
            ),
            (
                SecurityRule {
                    icmp_code: Some(0),
                    ..icmp.clone()
                },
                "means nothing without icmp_type",
            ),
            (
                SecurityRule {
                    icmp_type: Some(8),
                    protocol: 6,
                    ..icmp
                },
                "goes with protocol 1 or 58",
            ),
        ];
        for (rule, named) in cases {
            let found = violations(with_rule(rule));
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(
                found[0].starts_with("policy.security.rules[0]."),
                "{found:?}"
            );
            assert!(found[0].contains(named), "{found:?} for {named}");
        }
    }

    #[test]
    fn limits_need_the_rate_of_their_burst() {
        let request = SetNetLimitsRequest {
            id: "nic".into(),
            limits: Some(NetLimits {
                ingress: None,
                egress: Some(NetLimit {
                    burst_bits: 1,
                    ..NetLimit::default()
                }),
            }),
        };
        let status = set_net_limits_request(&request).unwrap_err();
        assert!(status.message().contains("limits.egress.burst_bits"));
    }
}
