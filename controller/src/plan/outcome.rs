//! When an operation is over, and how it ended.

use api::controller as pb;
use api::node;
use tonic::Code;

use super::networks::{Layout, network_outcome};
use super::{Desired, Fleet, Observed, is_over};
use crate::model::{JobRecord, VmRecord, VolumeRecord};

/// `None` while the operation goes on; then its error, if any.
pub(super) fn outcome(
    operation: &pb::Operation,
    (desired, layout): (&Desired, &Layout),
    fleet: &Fleet,
) -> Option<Option<pb::OperationError>> {
    let metadata = operation.metadata.as_ref()?;
    let target = metadata.target.as_str();
    if let Some(job) = desired.jobs.get(&operation.name) {
        return job_outcome(job, fleet.of(desired.host_of_job(job)));
    }
    match metadata.kind() {
        pb::OperationKind::DeleteVm => (!desired.vms.contains_key(target)).then_some(None),
        pb::OperationKind::DeleteVolume => (!desired.volumes.contains_key(target)).then_some(None),
        pb::OperationKind::DeleteNetwork => {
            (!desired.networks.contains_key(target)).then_some(None)
        }
        pb::OperationKind::CreateNetwork | pb::OperationKind::UpdateNetwork => {
            match desired.networks.get(target) {
                None => Some(Some(gone(target))),
                Some(stored) => network_outcome(&stored.record, (desired, layout), fleet),
            }
        }
        pb::OperationKind::CreateVolume => match desired.volumes.get(target) {
            None => Some(Some(gone(target))),
            Some(stored) => volume_outcome(&stored.record),
        },
        kind @ (pb::OperationKind::UpdateDisk
        | pb::OperationKind::UpdateNic
        | pb::OperationKind::UpdateDevice) => {
            let devices = match kind {
                pb::OperationKind::UpdateNic => "/nics/",
                pb::OperationKind::UpdateDevice => "/devices/",
                _ => "/disks/",
            };
            let vm = target.split(devices).next().unwrap_or(target);
            match desired.vms.get(vm) {
                None => Some(Some(gone(vm))),
                Some(stored) => vm_outcome(metadata, &stored.record, fleet.of(&stored.record.host)),
            }
        }
        pb::OperationKind::CreateVm | pb::OperationKind::StartVm | pb::OperationKind::StopVm => {
            match desired.vms.get(target) {
                None => Some(Some(gone(target))),
                Some(stored) => vm_outcome(metadata, &stored.record, fleet.of(&stored.record.host)),
            }
        }
        // By whoever exchanges hosts' agents.
        pb::OperationKind::UpgradeHosts => None,
        // Their jobs are gone, or this controller is older than what stored them.
        _ => Some(Some(error(
            Code::Internal,
            "UNKNOWN_OPERATION",
            "its work is not known any more",
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
        pb::OperationKind::CreateVm
        | pb::OperationKind::UpdateDisk
        | pb::OperationKind::UpdateNic
        | pb::OperationKind::UpdateDevice => settled.map(|_| None),
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

pub(super) fn error(code: Code, reason: &str, message: &str) -> pb::OperationError {
    pb::OperationError {
        code: code as i32,
        message: message.to_owned(),
        reason: reason.to_owned(),
    }
}

fn job_outcome(job: &JobRecord, observed: &Observed) -> Option<Option<pb::OperationError>> {
    let Some(seen) = observed.jobs.get(&job.start.job_id) else {
        let gone = job.cancel && observed.connected;
        return gone.then(|| Some(error(Code::Cancelled, "CANCELLED", "cancelled")));
    };
    match seen.state() {
        // Other hosts follow.
        node::JobState::Done if !job.then.is_empty() => None,
        node::JobState::Done => Some(None),
        node::JobState::Cancelled => Some(Some(error(Code::Cancelled, "CANCELLED", &seen.error))),
        node::JobState::Failed => Some(Some(pb::OperationError {
            code: seen.error_code,
            message: seen.error.clone(),
            reason: "JOB_FAILED".to_owned(),
        })),
        _ => None,
    }
}
