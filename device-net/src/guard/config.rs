//! From the API's messages, which were validated there, to what [`filter`] works with.

use std::collections::HashMap;
use std::sync::Arc;

use api::device::security_rule::Remote as RemoteMessage;
use api::device::{self, AddressFamily};
use filter::Direction;
use filter::address::{AddressError, Cidr, Mac};
use filter::policy::{AntiSpoofing, Family, Policy, Protocol, Remote, Rule, Security};

use crate::nic::MacAddress;

const ICMP: u32 = 1;
const ICMPV6: u32 = 58;

/// A policy that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("policy: {0}")]
    Address(#[from] AddressError),
    #[error("policy: the group {0:?} of a rule is none of the policy's groups")]
    NoGroup(String),
    #[error("policy: a rule has {what} {value}, which is out of range")]
    OutOfRange { what: &'static str, value: u32 },
}

/// `mac` is the NIC's own.
pub(super) fn policy(
    policy: Option<&device::Policy>,
    mac: MacAddress,
) -> Result<Policy, ConfigError> {
    let Some(policy) = policy else {
        return Ok(Policy::default());
    };
    let anti_spoofing = policy.anti_spoofing.as_ref();
    Ok(Policy {
        anti_spoofing: anti_spoofing
            .map(|message| self::anti_spoofing(message, mac))
            .transpose()?,
        security: policy.security.as_ref().map(security).transpose()?,
        track_flows: policy.track_flows,
    })
}

fn anti_spoofing(
    message: &device::AntiSpoofing,
    mac: MacAddress,
) -> Result<AntiSpoofing, ConfigError> {
    let macs = if message.macs.is_empty() {
        vec![Mac(mac.0)]
    } else {
        let macs = message.macs.iter().map(|text| text.parse());
        macs.collect::<Result<_, _>>()?
    };
    let addresses = if message.any_address {
        None
    } else {
        Some(cidrs(&message.addresses)?)
    };
    Ok(AntiSpoofing {
        macs,
        addresses,
        any_link_local: message.any_link_local,
        dhcp_server: message.dhcp_server,
        router: message.router,
    })
}

fn security(message: &device::Security) -> Result<Security, ConfigError> {
    let groups = message
        .groups
        .iter()
        .map(|group| Ok((group.name.as_str(), cidrs(&group.cidrs)?.into())))
        .collect::<Result<HashMap<&str, Arc<[Cidr]>>, ConfigError>>()?;
    let rules = message.rules.iter().map(|message| rule(message, &groups));
    let ethertypes = message.ethertypes.iter().map(|&ethertype| {
        u16::try_from(ethertype).map_err(|_| ConfigError::OutOfRange {
            what: "ethertype",
            value: ethertype,
        })
    });
    Ok(Security {
        rules: rules.collect::<Result<_, _>>()?,
        ethertypes: ethertypes.collect::<Result<_, _>>()?,
    })
}

fn rule(
    message: &device::SecurityRule,
    groups: &HashMap<&str, Arc<[Cidr]>>,
) -> Result<Rule, ConfigError> {
    let remote = match &message.remote {
        None => Remote::Any,
        Some(RemoteMessage::Cidr(text)) => Remote::In([text.parse()?].into()),
        Some(RemoteMessage::Group(name)) => {
            let group = groups.get(name.as_str());
            let group = group.ok_or_else(|| ConfigError::NoGroup(name.clone()))?;
            Remote::In(group.clone())
        }
    };
    Ok(Rule {
        direction: match message.direction() {
            device::Direction::Ingress => Direction::Ingress,
            device::Direction::Egress => Direction::Egress,
            device::Direction::Unspecified => {
                return Err(ConfigError::OutOfRange {
                    what: "direction",
                    value: 0,
                });
            }
        },
        family: match message.family() {
            AddressFamily::Unspecified => None,
            AddressFamily::Ipv4 => Some(Family::Ipv4),
            AddressFamily::Ipv6 => Some(Family::Ipv6),
        },
        protocol: protocol(message)?,
        remote,
        is_stateless: message.stateless,
    })
}

fn protocol(message: &device::SecurityRule) -> Result<Protocol, ConfigError> {
    let byte =
        |what, value| u8::try_from(value).map_err(|_| ConfigError::OutOfRange { what, value });
    let port = |value| {
        u16::try_from(value).map_err(|_| ConfigError::OutOfRange {
            what: "port",
            value,
        })
    };
    let number = byte("protocol", message.protocol)?;
    Ok(match (message.protocol, &message.ports) {
        (0, _) => Protocol::Any,
        (ICMP | ICMPV6, _) => {
            let code = message.icmp_code.map(|code| byte("ICMP code", code));
            let code = code.transpose()?;
            let kind = message.icmp_type.map(|kind| byte("ICMP type", kind));
            Protocol::Icmp(kind.transpose()?.map(|kind| (kind, code)))
        }
        (_, Some(range)) => Protocol::Ports(number, port(range.first)?, port(range.last)?),
        (_, None) => Protocol::Number(number),
    })
}

fn cidrs(texts: &[String]) -> Result<Vec<Cidr>, ConfigError> {
    let cidrs = texts.iter().map(|text| text.parse());
    Ok(cidrs.collect::<Result<_, _>>()?)
}
