//! What to do next: a pure function of what is wanted and what was seen. Calling it again with the
//! same arguments gives the same answer, and every action may be done twice; so nothing is
//! remembered between two calls, and a restarted controller goes on where the last one ended.
//!
//! ```text
//! VM, not deleting:   host has not this generation ----> ApplyVm
//!                     host has it, its status is news -> RecordVm (and note a guest's own shutdown)
//! VM, deleting:       host knows it, it runs ----------> ApplyVm (powered off), wait
//!                     host knows it, it is stopped ----> DeleteVm
//!                     host does not know it -----------> ForgetVm
//! operation:          its outcome can be seen ---------> FinishOperation
//! ```

use std::collections::BTreeMap;

use api::controller as pb;
use api::node;
use tonic::Code;

use crate::model::{
    VmRecord, VolumeRecord, node_create_volume, node_vm_spec, vm_status, volume_status,
};

/// A record and the revision that wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<T> {
    /// As stored.
    pub record: T,
    /// To compare with when it is changed.
    pub revision: u64,
}

/// Everything that is wanted.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// VMs by name.
    pub vms: BTreeMap<String, Stored<VmRecord>>,
    /// Volumes by name.
    pub volumes: BTreeMap<String, Stored<VolumeRecord>>,
    /// Operations that are not done.
    pub pending: Vec<pb::Operation>,
}

/// Everything that was seen on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// The host, once it answered.
    pub host: Option<node::HostStatus>,
    /// By node id.
    pub vms: BTreeMap<String, node::VmStatus>,
    /// By node id.
    pub volumes: BTreeMap<String, node::VolumeStatus>,
    /// It answered the last time it was asked.
    pub connected: bool,
    /// When it answered last.
    pub last_seen: Option<prost_types::Timestamp>,
}

impl Observed {
    /// The host's resource name; empty if it never answered.
    pub fn host_name(&self) -> String {
        self.host
            .as_ref()
            .map(|host| format!("hosts/{}", host.host_id))
            .unwrap_or_default()
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell the host what the VM should be.
    ApplyVm {
        /// Its name.
        name: String,
        /// The whole of it.
        spec: node::VmSpec,
    },
    /// Have the host remove a stopped VM's leftovers.
    DeleteVm {
        /// Its name.
        name: String,
        /// Its id on the host.
        node_id: String,
    },
    /// Remove the record: nothing is left on any host.
    ForgetVm {
        /// Its name.
        name: String,
    },
    /// Store news about a VM.
    RecordVm {
        /// Its name.
        name: String,
        /// To be stored.
        status: pb::VmStatus,
        /// The VM ended by itself: it is not wanted running any more.
        ended: bool,
    },
    /// Have the host make a volume.
    CreateVolume {
        /// Its name.
        name: String,
        /// The whole of it.
        request: node::CreateVolumeRequest,
    },
    /// Have the host remove a volume.
    DeleteVolume {
        /// Its name.
        name: String,
        /// Its id on the host.
        node_id: String,
    },
    /// Remove the record.
    ForgetVolume {
        /// Its name.
        name: String,
    },
    /// Store news about a volume.
    RecordVolume {
        /// Its name.
        name: String,
        /// To be stored.
        status: pb::VolumeStatus,
    },
    /// The operation is done.
    FinishOperation {
        /// Its name.
        name: String,
        /// What went wrong, if anything did.
        error: Option<pb::OperationError>,
    },
}

/// What to do next. News are recorded before operations finish, so that whoever waited for an
/// operation finds its effect.
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = Vec::new();
    // A host that does not answer is told nothing, and what it said last may not be true any more.
    if observed.connected {
        for (name, stored) in &desired.vms {
            plan_vm(name, &stored.record, desired, observed, &mut actions);
        }
        for (name, stored) in &desired.volumes {
            plan_volume(name, &stored.record, observed, &mut actions);
        }
    }
    for operation in &desired.pending {
        if let Some(error) = outcome(operation, desired, observed) {
            actions.push(Action::FinishOperation {
                name: operation.name.clone(),
                error,
            });
        }
    }
    actions
}

fn plan_vm(
    name: &str,
    record: &VmRecord,
    desired: &Desired,
    observed: &Observed,
    actions: &mut Vec<Action>,
) {
    let seen = observed.vms.get(&record.node_id);
    let current = seen.is_some_and(|seen| seen.observed_generation >= record.vm.generation);
    let apply = || Action::ApplyVm {
        name: name.to_owned(),
        spec: node_vm_spec(record, |volume| {
            desired
                .volumes
                .get(volume)
                .map(|stored| stored.record.node_id.clone())
        }),
    };
    if let Some(seen) = seen {
        let status = vm_status(seen, &observed.host_name());
        let ended = current && record.vm.desired_power() == pb::DesiredPower::On && is_over(seen);
        if ended || is_news(&record.status(), &status, record) {
            actions.push(Action::RecordVm {
                name: name.to_owned(),
                status,
                ended,
            });
        }
    }
    if record.vm.deleting {
        match seen {
            None => actions.push(Action::ForgetVm {
                name: name.to_owned(),
            }),
            Some(seen) if is_over(seen) => actions.push(Action::DeleteVm {
                name: name.to_owned(),
                node_id: record.node_id.clone(),
            }),
            Some(_) if !current => actions.push(apply()),
            Some(_) => {}
        }
    } else if !current && record.rejected_generation != record.vm.generation {
        actions.push(apply());
    }
}

/// Nothing of the VM runs.
fn is_over(seen: &node::VmStatus) -> bool {
    matches!(seen.phase(), node::VmPhase::Stopped | node::VmPhase::Failed)
}

/// Worth storing and worth an event. Figures that change all the time are not: readers get those
/// from what was seen last.
fn is_news(stored: &pb::VmStatus, seen: &pb::VmStatus, record: &VmRecord) -> bool {
    // A refusal stands until a new generation; the host knows nothing of it.
    let refused = record.rejected_generation == record.vm.generation;
    (
        stored.phase,
        &stored.stop_reason,
        &stored.host,
        stored.resets,
    ) != (seen.phase, &seen.stop_reason, &seen.host, seen.resets)
        || stored.observed_generation != seen.observed_generation
        || (!refused && stored.error != seen.error)
}

fn plan_volume(name: &str, record: &VolumeRecord, observed: &Observed, actions: &mut Vec<Action>) {
    let name = name.to_owned();
    let seen = observed.volumes.get(&record.node_id);
    let stored = record.volume.status.clone().unwrap_or_default();
    match (record.volume.deleting, seen) {
        (true, None) => actions.push(Action::ForgetVolume { name }),
        (true, Some(_)) => {
            actions.push(Action::DeleteVolume {
                name,
                node_id: record.node_id.clone(),
            });
        }
        (false, Some(seen)) if !seen.creating => {
            let status = volume_status(seen, &observed.host_name());
            if (stored.phase, stored.size_bytes, &stored.path, &stored.host)
                != (status.phase, status.size_bytes, &status.path, &status.host)
            {
                actions.push(Action::RecordVolume { name, status });
            }
        }
        // Asking again for one that is being made waits for it.
        (false, _) if stored.phase() != pb::VolumePhase::Failed => {
            actions.push(Action::CreateVolume {
                name,
                request: node_create_volume(record),
            });
        }
        (false, _) => {}
    }
}

/// `None` while the operation goes on; then its error, if any.
fn outcome(
    operation: &pb::Operation,
    desired: &Desired,
    observed: &Observed,
) -> Option<Option<pb::OperationError>> {
    let metadata = operation.metadata.as_ref()?;
    let target = metadata.target.as_str();
    match metadata.kind() {
        pb::OperationKind::DeleteVm => (!desired.vms.contains_key(target)).then_some(None),
        pb::OperationKind::DeleteVolume => (!desired.volumes.contains_key(target)).then_some(None),
        pb::OperationKind::CreateVolume => match desired.volumes.get(target) {
            None => Some(Some(gone(target))),
            Some(stored) => volume_outcome(&stored.record),
        },
        pb::OperationKind::CreateVm | pb::OperationKind::StartVm | pb::OperationKind::StopVm => {
            match desired.vms.get(target) {
                None => Some(Some(gone(target))),
                Some(stored) => vm_outcome(metadata, &stored.record, observed),
            }
        }
        pb::OperationKind::Unspecified => Some(Some(error(
            Code::Internal,
            "UNKNOWN_OPERATION",
            "of an unknown kind",
        ))),
    }
}

fn volume_outcome(record: &VolumeRecord) -> Option<Option<pb::OperationError>> {
    let status = record.volume.status.clone().unwrap_or_default();
    match status.phase() {
        pb::VolumePhase::Ready => Some(None),
        pb::VolumePhase::Failed => Some(status.error),
        _ => None,
    }
}

fn vm_outcome(
    metadata: &pb::OperationMetadata,
    record: &VmRecord,
    observed: &Observed,
) -> Option<Option<pb::OperationError>> {
    let generation = metadata.generation;
    if record.rejected_generation >= generation && record.rejected_generation > 0 {
        let refusal = record.status().error;
        return Some(refusal.or_else(|| Some(superseded(metadata))));
    }
    let seen = observed
        .vms
        .get(&record.node_id)
        .filter(|_| observed.connected);
    let settled = seen.filter(|seen| seen.observed_generation >= generation);
    match metadata.kind() {
        pb::OperationKind::CreateVm => settled.map(|_| None),
        pb::OperationKind::StartVm if record.vm.generation > generation => {
            Some(Some(superseded(metadata)))
        }
        pb::OperationKind::StartVm => settled.and_then(|seen| match seen.phase() {
            // Paused and stopped guests were running before.
            node::VmPhase::Running | node::VmPhase::Paused | node::VmPhase::Stopped => Some(None),
            node::VmPhase::Failed => Some(Some(pb::OperationError {
                code: if seen.error_code == 0 {
                    Code::Internal as i32
                } else {
                    seen.error_code
                },
                message: seen.error.clone(),
                reason: "VM_START_FAILED".to_owned(),
            })),
            _ => None,
        }),
        _ if record.vm.generation > generation
            && record.vm.desired_power() == pb::DesiredPower::On =>
        {
            Some(Some(superseded(metadata)))
        }
        _ => settled.filter(|seen| is_over(seen)).map(|_| None),
    }
}

fn superseded(metadata: &pb::OperationMetadata) -> pb::OperationError {
    error(
        Code::Aborted,
        "SUPERSEDED",
        &format!(
            "something else was asked of {} before this was done",
            metadata.target
        ),
    )
}

/// Why an operation on something that was deleted meanwhile ends.
pub(crate) fn gone(target: &str) -> pb::OperationError {
    error(Code::Aborted, "DELETED", &format!("{target} was deleted"))
}

fn error(code: Code, reason: &str, message: &str) -> pb::OperationError {
    pb::OperationError {
        code: code as i32,
        message: message.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests;
