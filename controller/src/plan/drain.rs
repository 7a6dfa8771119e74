//! Draining a host: what can be moved is moved, what stays is named.
//!
//! ```text
//! VM that is off:                         --> MoveVm
//! runs, may restart anywhere, fits elsewhere: StopToMove (shut down) --off--> MoveVm, wanted on again
//! anything else:                          stays; the record says why, for this drain
//! nothing is left that is not said to stay: the operation is done
//! ```

use api::controller as pb;
use api::names::Name;

use super::{Action, Desired, Fleet, Part, is_over};
use crate::commands::is_local;
use crate::model::{HostRecord, VmRecord, host_name};

pub(super) fn plan_drains(
    desired: &Desired,
    fleet: &Fleet,
    part: &Part,
    actions: &mut Vec<Action>,
) {
    // One that was begun for a drain ends, whatever became of the drain.
    for name in &part.names {
        let Some(stored) = desired.vms.get(name) else {
            continue;
        };
        let record = &stored.record;
        let host = desired.hosts.get(&record.host);
        let drained = host.filter(|stored| !stored.record.drain.is_empty());
        if let Some(host) = drained {
            plan_vm(name, record, &host.record, desired, fleet, actions);
        } else if record.moving && !record.host.is_empty() {
            move_once_off(name, record, fleet, actions);
        }
    }
}

fn plan_vm(
    name: &str,
    record: &VmRecord,
    host: &HostRecord,
    desired: &Desired,
    fleet: &Fleet,
    actions: &mut Vec<Action>,
) {
    if record.moving {
        move_once_off(name, record, fleet, actions);
        return;
    }
    if record.vm.deleting || is_said_to_stay(record, &host.drain) {
        return;
    }
    let name = name.to_owned();
    let drain = host.drain.clone();
    if let Some(why) = stays(record, desired) {
        actions.push(Action::NoteStays { name, drain, why });
        return;
    }
    let on = record.vm.desired_power() == pb::DesiredPower::On;
    actions.push(match on {
        true => Action::StopToMove { name, drain },
        false if is_off(record, fleet) => Action::MoveVm { name, drain },
        // Somebody stops it.
        false => return,
    });
}

/// Shut down, it goes elsewhere; somebody may want it off meanwhile, and it moves nevertheless.
fn move_once_off(name: &str, record: &VmRecord, fleet: &Fleet, actions: &mut Vec<Action>) {
    if is_off(record, fleet) && !record.vm.deleting {
        actions.push(Action::MoveVm {
            name: name.to_owned(),
            drain: String::new(),
        });
    }
}

/// Its host says that nothing of it runs, and knows what was wanted last.
fn is_off(record: &VmRecord, fleet: &Fleet) -> bool {
    let observed = fleet.of(&record.host);
    let seen = observed.vms.get(&record.node_id);
    let over =
        seen.is_some_and(|seen| is_over(seen) && seen.observed_generation >= record.vm.generation);
    observed.connected && over
}

/// Why a VM cannot go to another host, whatever that is.
fn stays(record: &VmRecord, desired: &Desired) -> Option<String> {
    let spec = record.vm.spec.clone().unwrap_or_default();
    let placement = spec.placement.clone().unwrap_or_default();
    let anywhere = spec.restart_policy() == pb::RestartPolicy::Anywhere;
    if !placement.host.is_empty() {
        return Some(format!("is to be on {}", placement.host));
    }
    for disk in &spec.disks {
        match &disk.source {
            Some(pb::disk::Source::Volume(volume)) => {
                let stored = desired.volumes.get(volume);
                if stored.is_some_and(|stored| is_local(&stored.record)) {
                    let id = Name::parse_volume(volume).map_or(volume.clone(), |name| name.id);
                    let host = host_name(&record.host);
                    return Some(format!("has volume {id} in the pool of {host}"));
                }
            }
            // Whoever may restart anywhere has it where all hosts reach it.
            Some(pb::disk::Source::Path(path)) if !disk.read_only && !anywhere => {
                return Some(format!("writes to {path} on its host"));
            }
            _ => {}
        }
    }
    if let Some(device) = spec.vhost_user.first() {
        return Some(format!("has the device {} of its host", device.name));
    }
    let own = |nic: &&pb::Nic| !nic.tap.is_empty() || !nic.bridge.is_empty();
    if let Some(nic) = spec.nics.iter().find(own) {
        return Some(format!("has the NIC {} on its host's interfaces", nic.name));
    }
    let on = record.vm.desired_power() == pb::DesiredPower::On;
    if on && !anywhere {
        return Some("runs, and its restart policy is not anywhere; stop it first".to_owned());
    }
    None
}

fn is_said_to_stay(record: &VmRecord, drain: &str) -> bool {
    let said = record.stays.split_once(' ');
    said.is_some_and(|(operation, _)| operation == drain)
}

/// The outcome of a drain, with the names of what stays; `None` while something is yet to be moved.
pub(super) fn drain_outcome(
    operation: &pb::Operation,
    target: &str,
    desired: &Desired,
) -> Option<(Option<pb::OperationError>, Vec<String>)> {
    let id = crate::model::host_id(target);
    let ended = |stored: &super::Stored<HostRecord>| stored.record.drain != operation.name;
    if desired.hosts.get(id).is_none_or(ended) {
        let error = super::outcome::error(
            tonic::Code::Aborted,
            "DRAIN_ENDED",
            "the host was uncordoned, drained anew, or deleted before all was moved",
        );
        return Some((Some(error), Vec::new()));
    }
    let mut findings = Vec::new();
    for stored in desired.vms.values() {
        let record = &stored.record;
        if record.host != id {
            continue;
        }
        if !is_said_to_stay(record, &operation.name) {
            return None;
        }
        let why = record.stays.split_once(' ').map_or("", |(_, why)| why);
        let vm = Name::parse_vm(&record.vm.name);
        let vm = vm.map_or(record.vm.name.clone(), |name| crate::model::short(&name));
        findings.push(format!("{vm} stays: it {why}"));
    }
    Some((None, findings))
}
