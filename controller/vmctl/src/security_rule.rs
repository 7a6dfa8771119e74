//! Rules of security groups as they are typed: `ingress,tcp:22,from=10.0.0.0/8`.

use std::str::FromStr;

use api::controller as pb;
use api::names::Name;
use api::validate::protocol_number;

/// `--rule`
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RuleArg {
    rule: pb::SecurityRule,
    /// Short name of the group at the other end.
    group: Option<String>,
}

impl RuleArg {
    /// The API's rule; groups are of this project.
    pub(crate) fn into_api(self, project: &str) -> pb::SecurityRule {
        pb::SecurityRule {
            security_group: self
                .group
                .map(|id| Name::security_group(project, &id).to_string())
                .unwrap_or_default(),
            ..self.rule
        }
    }
}

impl FromStr for RuleArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || {
            format!(
                "{text:?} is no rule; write ingress or egress, then any of PROTOCOL[:PORT[-PORT]], from=PREFIX|GROUP, to=PREFIX|GROUP, ipv4, ipv6, icmp-type=N and icmp-code=N, such as ingress,tcp:80-81,from=10.0.0.0/8"
            )
        };
        let mut words = text.split(',');
        let direction = match words.next() {
            Some("ingress") => pb::TrafficDirection::Ingress,
            Some("egress") => pb::TrafficDirection::Egress,
            _ => return Err(error()),
        };
        let mut rule = pb::SecurityRule {
            direction: direction as i32,
            ..Default::default()
        };
        let mut group = None;
        for word in words {
            match word.split_once('=') {
                Some(("from", other)) if direction == pb::TrafficDirection::Ingress => {
                    remote(other, &mut rule, &mut group);
                }
                Some(("to", other)) if direction == pb::TrafficDirection::Egress => {
                    remote(other, &mut rule, &mut group);
                }
                Some(("icmp-type", number)) => {
                    rule.icmp_type = Some(number.parse().map_err(|_| error())?);
                }
                Some(("icmp-code", number)) => {
                    rule.icmp_code = Some(number.parse().map_err(|_| error())?);
                }
                None if word == "ipv4" => rule.ip_version = 4,
                None if word == "ipv6" => rule.ip_version = 6,
                None => protocol(word, &mut rule).ok_or_else(error)?,
                _ => return Err(error()),
            }
        }
        Ok(Self { rule, group })
    }
}

/// Prefixes have dots or colons, names have none.
fn remote(other: &str, rule: &mut pb::SecurityRule, group: &mut Option<String>) {
    if other.contains(['.', ':']) {
        rule.cidr = other.to_owned();
    } else {
        *group = Some(other.to_owned());
    }
}

fn protocol(word: &str, rule: &mut pb::SecurityRule) -> Option<()> {
    let (name, ports) = match word.split_once(':') {
        Some((name, ports)) => (name, Some(ports)),
        None => (word, None),
    };
    let name = if name == "any" { "" } else { name };
    protocol_number(name)?;
    rule.protocol = name.to_owned();
    if let Some(ports) = ports {
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        rule.first_port = first.parse().ok()?;
        rule.last_port = last.parse().ok()?;
    }
    Some(())
}

/// As it is typed.
pub(crate) fn shown(rule: &pb::SecurityRule) -> String {
    let is_ingress = rule.direction() == pb::TrafficDirection::Ingress;
    let mut text = if is_ingress { "ingress" } else { "egress" }.to_owned();
    match rule.protocol.as_str() {
        "" => {}
        protocol => text.push_str(&format!(",{protocol}")),
    }
    match (rule.first_port, rule.last_port) {
        (0, 0) => {}
        (first, 0) => text.push_str(&format!(":{first}")),
        (first, last) if first == last => text.push_str(&format!(":{first}")),
        (first, last) => text.push_str(&format!(":{first}-{last}")),
    }
    let other = match rule.security_group.rsplit('/').next() {
        Some(group) if !group.is_empty() => group,
        _ => &rule.cidr,
    };
    if !other.is_empty() {
        let word = if is_ingress { "from" } else { "to" };
        text.push_str(&format!(",{word}={other}"));
    }
    if rule.ip_version != 0 {
        text.push_str(&format!(",ipv{}", rule.ip_version));
    }
    for (name, value) in [("icmp-type", rule.icmp_type), ("icmp-code", rule.icmp_code)] {
        if let Some(value) = value {
            text.push_str(&format!(",{name}={value}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_as_they_are_shown() {
        for text in [
            "ingress",
            "ingress,tcp:22,from=10.0.0.0/8",
            "ingress,tcp:80-81,from=admins",
            "egress,udp:53,to=2001:db8::/32,ipv6",
            "ingress,icmp,icmp-type=8,icmp-code=0",
        ] {
            let rule: RuleArg = text.parse().unwrap();
            assert_eq!(shown(&rule.into_api("default")), text);
        }
    }

    #[test]
    fn wrong_words_are_refused_with_what_there_is() {
        for text in [
            "",
            "tcp:22",
            "ingress,to=10.0.0.0/8",
            "ingress,tcp:x",
            "egress,foo",
        ] {
            let error = text.parse::<RuleArg>().unwrap_err();
            assert!(error.contains("PROTOCOL"), "{error}");
        }
    }
}
