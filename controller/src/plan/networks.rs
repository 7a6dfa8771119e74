//! Networks: on which hosts they are, and what each of those is told.
//!
//! ```text
//! VM with a NIC in it is placed on a host  --> the host has it
//! there is one host                        --> it has it, whatever is in it
//! nothing on the host needs it any more    --> DeleteNetwork there
//! ```
//!
//! The record says which hosts may have a network before any of them is told, so that none is forgotten.

use std::collections::{BTreeMap, BTreeSet};

use api::controller as pb;
use api::node;

use super::{Action, Call, Desired, Fleet, Stored};
use crate::model::{
    NetworkRecord, VmRecord, host_id, host_name, network_status, node_network_spec,
};

/// What is in each network and group, found once for a whole plan.
pub struct Layout<'a> {
    /// VMs with a NIC in the network, by its name.
    vms: BTreeMap<&'a str, Vec<&'a VmRecord>>,
    /// Addresses of the NICs in a security group, by its name.
    members: BTreeMap<&'a str, Vec<String>>,
    only_host: Option<&'a str>,
}

impl<'a> Layout<'a> {
    /// Of everything that is wanted.
    pub fn of(desired: &'a Desired) -> Self {
        let mut layout = Self {
            vms: BTreeMap::new(),
            members: BTreeMap::new(),
            only_host: desired.only_host(),
        };
        if desired.networks.is_empty() && desired.security_groups.is_empty() {
            return layout;
        }
        for stored in desired.vms.values() {
            layout.add(&stored.record);
        }
        for addresses in layout.members.values_mut() {
            addresses.sort_by_key(|text| text.parse::<std::net::IpAddr>().ok());
        }
        layout
    }

    fn add(&mut self, record: &'a VmRecord) {
        for nic in record.vm.spec.iter().flat_map(|spec| &spec.nics) {
            if !nic.network.is_empty() {
                let vms = self.vms.entry(&nic.network).or_default();
                if vms.last().is_none_or(|last| !std::ptr::eq(*last, record)) {
                    vms.push(record);
                }
            }
            for group in &nic.security_groups {
                let own = [&nic.ipv4_address, &nic.ipv6_address];
                let own = own.into_iter().filter(|text| !text.is_empty());
                self.members.entry(group).or_default().extend(own.cloned());
            }
        }
    }

    /// VMs with a NIC in a network, in the order of their names.
    pub fn vms(&self, network: &str) -> &[&'a VmRecord] {
        self.vms.get(network).map_or(&[], Vec::as_slice)
    }

    /// The addresses of all NICs in a security group.
    pub fn members(&self, group: &str) -> &[String] {
        self.members.get(group).map_or(&[], Vec::as_slice)
    }

    /// Ids of the hosts that need a network.
    pub fn hosts(&self, network: &str) -> BTreeSet<&'a str> {
        let placed = self.vms(network).iter().map(|record| record.host.as_str());
        let placed = placed.filter(|host| !host.is_empty());
        placed.chain(self.only_host).collect()
    }
}

pub(super) fn plan_network(
    name: &str,
    record: &NetworkRecord,
    (desired, layout): (&Desired, &Layout),
    fleet: &Fleet,
    actions: &mut Vec<Action>,
) {
    let needed = match record.network.deleting {
        true => BTreeSet::new(),
        false => layout.hosts(name),
    };
    let had = had(record);
    let mut has: BTreeSet<&str> = needed.clone();
    for host in had.iter().map(String::as_str) {
        if needed.contains(host) || !desired.hosts.contains_key(host) {
            continue;
        }
        let observed = fleet.of(host);
        // A host that does not answer may have it.
        if !observed.connected || observed.networks.contains_key(&record.node_id) {
            has.insert(host);
        }
        if observed.connected && observed.networks.contains_key(&record.node_id) {
            let call = Call::DeleteNetwork(record.node_id.clone());
            actions.push(Action::call(host, name, call));
        }
    }
    if record.network.deleting && has.is_empty() {
        actions.push(Action::ForgetNetwork {
            name: name.to_owned(),
        });
        return;
    }
    if !has
        .iter()
        .copied()
        .eq(record.hosts.iter().map(String::as_str))
    {
        actions.push(Action::NoteNetwork {
            name: name.to_owned(),
            hosts: has.into_iter().map(str::to_owned).collect(),
        });
    }
    if record.network.deleting {
        return;
    }
    let status = status_of(record, &needed, (desired, layout), fleet);
    let stored = record.network.status.clone().unwrap_or_default();
    // While something new is told there is no news yet.
    if let Some(status) = status
        && status.phase() != pb::NetworkPhase::Pending
        && stored != status
    {
        actions.push(Action::RecordNetwork {
            name: name.to_owned(),
            status,
        });
    }
    for host in needed {
        let observed = fleet.of(host);
        if !observed.connected || !had.contains(host) {
            continue;
        }
        let spec = node_network_spec(record, host, desired, layout);
        let seen = observed.networks.get(&record.node_id);
        if seen.is_none_or(|seen| !seen.ready || seen.observed_revision != spec.revision) {
            let call = Call::ApplyNetwork(Box::new(spec));
            actions.push(Action::call(host, name, call));
        }
    }
}

/// Hosts that may have it. A record of an older controller says only which host it was seen on.
fn had(record: &NetworkRecord) -> BTreeSet<String> {
    let status = record.network.status.as_ref();
    let seen = status.map_or("", |status| host_id(&status.host));
    match (record.hosts.is_empty(), seen) {
        (false, _) | (true, "") => record.hosts.iter().cloned().collect(),
        (true, host) => [host.to_owned()].into(),
    }
}

/// What its hosts say of it, together; `None` while none of those that need it says anything.
pub(super) fn status_of(
    record: &NetworkRecord,
    needed: &BTreeSet<&str>,
    (desired, layout): (&Desired, &Layout),
    fleet: &Fleet,
) -> Option<pb::NetworkStatus> {
    let mut together: Option<pb::NetworkStatus> = None;
    for host in needed {
        let observed = fleet.of(host);
        let Some(seen) = observed.networks.get(&record.node_id) else {
            continue;
        };
        let wanted = node_network_spec(record, host, desired, layout).revision;
        let status = pb::NetworkStatus {
            // What changes all the time is added when somebody reads.
            leases: Vec::new(),
            hosts: vec![host_name(host)],
            ..network_status(seen, &wanted, &host_name(host))
        };
        together = Some(match together {
            None => status,
            Some(together) => joined(together, status),
        });
    }
    together
}

/// The worse phase of two hosts' states, and the processes of both.
fn joined(mut one: pb::NetworkStatus, other: pb::NetworkStatus) -> pb::NetworkStatus {
    let rank = |status: &pb::NetworkStatus| match status.phase() {
        pb::NetworkPhase::Failed => 2,
        pb::NetworkPhase::Pending | pb::NetworkPhase::Unspecified => 1,
        pb::NetworkPhase::Ready => 0,
    };
    if rank(&other) > rank(&one) {
        one.phase = other.phase;
        one.error = other.error.map(|error| pb::OperationError {
            message: format!("{}: {}", other.host, error.message),
            ..error
        });
    }
    one.hosts.extend(other.hosts);
    one.processes.extend(other.processes);
    one.leases.extend(other.leases);
    one
}

/// What users see of a network's hosts: figures that change all the time included.
pub fn network_status_now(
    record: &NetworkRecord,
    (desired, layout): (&Desired, &Layout),
    fleet: &Fleet,
) -> Option<pb::NetworkStatus> {
    let needed = layout.hosts(&record.network.name);
    let mut status = status_of(record, &needed, (desired, layout), fleet)?;
    for host in &needed {
        if let Some(seen) = fleet.of(host).networks.get(&record.node_id) {
            status.leases.extend(network_status(seen, "", "").leases);
        }
    }
    Some(status)
}

/// The host was told all that is wanted of the networks that the VM's NICs are in. Whether that went
/// well it says itself when the VM starts.
pub(super) fn has_networks(
    record: &VmRecord,
    (desired, layout): (&Desired, &Layout),
    networks: &BTreeMap<String, node::NetworkStatus>,
) -> bool {
    let spec = record.vm.spec.as_ref();
    spec.into_iter()
        .flat_map(|spec| &spec.nics)
        .filter_map(|nic| desired.networks.get(&nic.network))
        .all(|stored: &Stored<NetworkRecord>| {
            let wanted = node_network_spec(&stored.record, &record.host, desired, layout);
            let seen = networks.get(&wanted.id);
            seen.is_some_and(|seen| seen.observed_revision == wanted.revision)
        })
}

/// The outcome of making or changing a network: on all hosts that need it.
pub(super) fn network_outcome(
    record: &NetworkRecord,
    (desired, layout): (&Desired, &Layout),
    fleet: &Fleet,
) -> Option<Option<pb::OperationError>> {
    if desired.hosts.is_empty() {
        return None;
    }
    let needed = layout.hosts(&record.network.name);
    for host in &needed {
        let wanted = node_network_spec(record, host, desired, layout);
        let observed = fleet.of(host);
        let seen = observed.networks.get(&record.node_id);
        let seen =
            seen.filter(|seen| observed.connected && seen.observed_revision == wanted.revision)?;
        let status = network_status(seen, &wanted.revision, "");
        match status.phase() {
            pb::NetworkPhase::Ready => {}
            pb::NetworkPhase::Failed => return Some(status.error),
            _ => return None,
        }
    }
    Some(None)
}
