//! Rolling upgrades of hosts, and what each agent is asked.

use std::collections::{BTreeMap, BTreeSet};

use tonic::Status;

use super::fields::*;
use crate::errors::Violations;
use crate::{controller as pb, names, node};

/// Whoever needs longer does not come up.
const MAX_CONFIRM_MS: u32 = 600_000;
/// Hosts in one request; a fleet of more is named by labels, or as a whole.
const MAX_HOSTS: usize = 10_000;

/// Which hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostSelection {
    /// These, by their ids, in this order.
    Named(Vec<String>),
    /// Those that have all these labels.
    Labelled(BTreeMap<String, String>),
    /// All of them.
    All,
}

/// Checks an upgrade of hosts, and finds out of which.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn upgrade_hosts_request(request: &pb::UpgradeHostsRequest) -> Result<HostSelection, Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let mut ids = Vec::new();
    let mut seen = BTreeSet::new();
    for (index, name) in request.hosts.iter().enumerate() {
        let field = format!("hosts[{index}]");
        match names::flat_id(name, "hosts") {
            Ok(id) if seen.insert(id.to_owned()) => ids.push(id.to_owned()),
            Ok(_) => found.add(field, format!("{name:?} is named twice")),
            Err(error) => found.add(field, error.to_string()),
        }
    }
    found.require(ids.len() <= MAX_HOSTS, "hosts", || {
        format!("are more than {MAX_HOSTS}; name them by a label")
    });
    let ways = [
        !request.hosts.is_empty(),
        !request.selector.is_empty(),
        request.all,
    ];
    let given = ways.iter().filter(|given| **given).count();
    found.require(given == 1, "hosts", || {
        "say which: exactly one of hosts, selector and all".to_owned()
    });
    let binaries = [
        ("agent_binary", &request.agent_binary),
        ("device_blk", &request.device_blk),
        ("device_net", &request.device_net),
    ];
    for (field, path) in binaries.iter().filter(|(_, path)| !path.is_empty()) {
        absolute(&mut found, field, path);
    }
    let any = binaries.iter().any(|(_, path)| !path.is_empty());
    found.require(any, "agent_binary", || {
        "name a binary of the agent, or of a daemon".to_owned()
    });
    at_most(&mut found, "confirm_ms", request.confirm_ms, MAX_CONFIRM_MS);
    found.into_result()?;
    Ok(match (request.all, request.selector.is_empty()) {
        (true, _) => HostSelection::All,
        (false, false) => HostSelection::Labelled(request.selector.clone()),
        (false, true) => HostSelection::Named(ids),
    })
}

/// Checks what an agent is asked to be exchanged for.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn upgrade_agent_request(request: &node::UpgradeAgentRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    let id = &request.upgrade_id;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let fits = (1..=64).contains(&id.len()) && id.bytes().all(plain);
    found.require(fits, "upgrade_id", || {
        "must be 1 to 64 of A-Z, a-z, 0-9, - and _".into()
    });
    for (field, path) in [
        ("binary", &request.binary),
        ("device_blk", &request.device_blk),
        ("device_net", &request.device_net),
    ] {
        if !path.is_empty() {
            absolute(&mut found, field, path);
        }
    }
    let only_checks = request.validate_only || !request.binary.is_empty();
    found.require(only_checks, "binary", || "is missing".into());
    let within_ms = request.confirm_within_ms;
    at_most(&mut found, "confirm_within_ms", within_ms, MAX_CONFIRM_MS);
    found.into_result()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> pb::UpgradeHostsRequest {
        pb::UpgradeHostsRequest {
            hosts: vec!["hosts/b".into(), "hosts/a".into()],
            agent_binary: "/opt/node-agent".into(),
            ..Default::default()
        }
    }

    #[test]
    fn hosts_are_named_in_order_or_by_label_or_all() {
        let named = upgrade_hosts_request(&request()).unwrap();
        assert_eq!(named, HostSelection::Named(vec!["b".into(), "a".into()]));
        let labels: BTreeMap<String, String> = [("rack".into(), "1".into())].into();
        let labelled = pb::UpgradeHostsRequest {
            hosts: Vec::new(),
            selector: labels.clone(),
            ..request()
        };
        let found = upgrade_hosts_request(&labelled).unwrap();
        assert_eq!(found, HostSelection::Labelled(labels));
        let all = pb::UpgradeHostsRequest {
            hosts: Vec::new(),
            all: true,
            ..request()
        };
        assert_eq!(upgrade_hosts_request(&all).unwrap(), HostSelection::All);
    }

    #[test]
    fn what_is_not_clear_is_refused() {
        let changes: [fn(&mut pb::UpgradeHostsRequest); 6] = [
            |wrong| wrong.hosts.clear(),
            |wrong| wrong.all = true,
            |wrong| wrong.agent_binary.clear(),
            |wrong| wrong.agent_binary = "node-agent".into(),
            |wrong| wrong.hosts.push("hosts/a".into()),
            |wrong| wrong.confirm_ms = MAX_CONFIRM_MS + 1,
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut wrong = request();
            change(&mut wrong);
            assert!(upgrade_hosts_request(&wrong).is_err(), "change {index}");
        }
    }

    #[test]
    fn agents_are_told_a_path_unless_they_only_check() {
        let mut request = node::UpgradeAgentRequest {
            upgrade_id: "0-1".into(),
            ..Default::default()
        };
        assert!(upgrade_agent_request(&request).is_err());
        request.validate_only = true;
        upgrade_agent_request(&request).unwrap();
        request.upgrade_id.clear();
        assert!(upgrade_agent_request(&request).is_err());
    }
}
