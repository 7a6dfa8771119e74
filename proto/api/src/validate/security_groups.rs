//! Security groups and their rules, in requests of the controller.

use std::net::IpAddr;

use ipnet::IpNet;

use super::*;
use crate::controller as pb;

/// Rules of one security group.
pub const MAX_GROUP_RULES: usize = 256;

/// Checks a security group that is to be created.
///
/// # Errors
/// As [`attach_request`].
pub fn create_security_group_request(
    request: &pb::CreateSecurityGroupRequest,
) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "security_group_id", &request.security_group_id);
    match &request.security_group {
        Some(group) => security_group(&mut found, group),
        None => found.add("security_group", "is missing"),
    }
    found.into_result()
}

/// Checks the new rules of a security group, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn update_security_group_request(
    request: &pb::UpdateSecurityGroupRequest,
) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    let group = request.security_group.clone().unwrap_or_default();
    security_group(&mut found, &group);
    match names::Name::parse_security_group(&group.name) {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add("security_group.name", error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

fn security_group(found: &mut Violations, group: &pb::SecurityGroup) {
    let count = group.rules.len();
    found.require(count <= MAX_GROUP_RULES, "security_group.rules", || {
        format!("has {count} rules, {MAX_GROUP_RULES} at most")
    });
    let text = &group.description;
    no_control_characters(found, "security_group.description", text);
    found.require(text.len() <= 1024, "security_group.description", || {
        "is longer than 1024 bytes".into()
    });
    for (index, rule) in group.rules.iter().enumerate() {
        let at = format!("security_group.rules[{index}]");
        security_rule(found, &at, rule);
    }
}

fn security_rule(found: &mut Violations, at: &str, rule: &pb::SecurityRule) {
    let field = |name: &str| format!("{at}.{name}");
    let known = matches!(
        pb::TrafficDirection::try_from(rule.direction),
        Ok(pb::TrafficDirection::Ingress | pb::TrafficDirection::Egress)
    );
    found.require(known, &field("direction"), || {
        "must be TRAFFIC_DIRECTION_INGRESS or TRAFFIC_DIRECTION_EGRESS".into()
    });
    found.require(
        matches!(rule.ip_version, 0 | 4 | 6),
        &field("ip_version"),
        || format!("must be 4, 6 or 0 for both, not {}", rule.ip_version),
    );
    let protocol = protocol_number(&rule.protocol);
    found.require(protocol.is_some(), &field("protocol"), || {
        format!(
            "{:?} must be tcp, udp, icmp, sctp or a number to 255; empty for any",
            rule.protocol
        )
    });
    let has_ports = rule.first_port != 0 || rule.last_port != 0;
    found.require(
        !has_ports || matches!(protocol, Some(6 | 17 | 132)),
        &field("first_port"),
        || "is for tcp, udp and sctp".into(),
    );
    found.require(
        rule.first_port <= 65535 && rule.last_port <= 65535,
        &field("first_port"),
        || "ports are 1 to 65535".into(),
    );
    found.require(
        rule.last_port == 0 || rule.first_port <= rule.last_port,
        &field("last_port"),
        || "is before first_port".into(),
    );
    let has_type = rule.icmp_type.is_some() || rule.icmp_code.is_some();
    found.require(
        !has_type || matches!(protocol, Some(1 | 58)),
        &field("icmp_type"),
        || "is for icmp".into(),
    );
    for (name, value) in [("icmp_type", rule.icmp_type), ("icmp_code", rule.icmp_code)] {
        at_most(found, &field(name), value.unwrap_or(0), 255);
    }
    found.require(
        rule.icmp_code.is_none() || rule.icmp_type.is_some(),
        &field("icmp_code"),
        || "needs icmp_type".into(),
    );
    let both = !rule.cidr.is_empty() && !rule.security_group.is_empty();
    found.require(!both, at, || "give cidr or security_group, not both".into());
    if !rule.cidr.is_empty() {
        let parsed = prefix(&rule.cidr);
        found.require(parsed.is_some(), &field("cidr"), || {
            format!(
                "{:?} must be a prefix such as 10.0.0.0/8 or 2001:db8::/32",
                rule.cidr
            )
        });
        let matches = parsed.is_none_or(|net| match rule.ip_version {
            4 => matches!(net, IpNet::V4(_)),
            6 => matches!(net, IpNet::V6(_)),
            _ => true,
        });
        found.require(matches, &field("cidr"), || "is not of ip_version".into());
    }
    if !rule.security_group.is_empty()
        && let Err(error) = names::Name::parse_security_group(&rule.security_group)
    {
        found.add(field("security_group"), error.to_string());
    }
}

/// An address or a prefix.
pub(super) fn prefix(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// The number of an IP protocol that is named as in a [`pb::SecurityRule`]; 0 for any.
pub fn protocol_number(name: &str) -> Option<u32> {
    match name {
        "" => Some(0),
        "tcp" => Some(6),
        "udp" => Some(17),
        "icmp" => Some(1),
        "icmpv6" => Some(58),
        "sctp" => Some(132),
        number => number.parse().ok().filter(|number| *number <= 255),
    }
}

/// Checks a security group's name.
///
/// # Errors
/// As [`attach_request`].
pub fn security_group_request(name: &str) -> Result<names::Name, Status> {
    resource(Violations::new(), names::Name::parse_security_group(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_checked_one_by_one() {
        let rule = pb::SecurityRule {
            direction: pb::TrafficDirection::Ingress as i32,
            protocol: "tcp".into(),
            first_port: 22,
            cidr: "10.0.0.0/8".into(),
            ..Default::default()
        };
        let refusal = |rule: pb::SecurityRule| {
            let request = pb::CreateSecurityGroupRequest {
                parent: "projects/default".into(),
                security_group_id: "ssh".into(),
                security_group: Some(pb::SecurityGroup {
                    rules: vec![rule],
                    ..Default::default()
                }),
            };
            match create_security_group_request(&request) {
                Ok(()) => String::new(),
                Err(status) => crate::errors::explain(&status),
            }
        };
        assert_eq!(refusal(rule.clone()), "");
        type Change = fn(&mut pb::SecurityRule);
        let mistakes: [(&str, Change); 6] = [
            ("direction", |rule| rule.direction = 0),
            ("protocol", |rule| rule.protocol = "gre2".into()),
            ("first_port", |rule| rule.protocol = "icmp".into()),
            ("last_port", |rule| rule.last_port = 21),
            ("cidr", |rule| rule.ip_version = 6),
            ("icmp_type", |rule| rule.icmp_type = Some(8)),
        ];
        for (field, change) in mistakes {
            let mut rule = rule.clone();
            change(&mut rule);
            let text = refusal(rule);
            let start = format!("security_group.rules[0].{field}: ");
            assert!(text.starts_with(&start), "{field}: {text}");
        }
    }
}
