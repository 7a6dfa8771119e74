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
//! operation's job:    host does not know it -----------> StartJob; as wished: Complete-, CancelJob
//! operation:          its outcome can be seen ---------> FinishOperation
//! network:            host has it not, or otherwise ---> ApplyNetwork; as wished: DeleteNetwork
//! VM in a network:    is told to start once it is there
//! job of no one:      it is over ----------------------> ForgetJob
//! ```

use std::collections::BTreeMap;

use api::controller as pb;
use api::node;
use tonic::Code;

use crate::model::{
    JobRecord, NetworkRecord, SecurityGroupRecord, VmRecord, VolumeRecord, job_id, network_status,
    node_create_volume, node_network_spec, node_vm_spec, noted_device, vm_status, volume_status,
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
    /// Networks by name.
    pub networks: BTreeMap<String, Stored<NetworkRecord>>,
    /// Security groups by name.
    pub security_groups: BTreeMap<String, Stored<SecurityGroupRecord>>,
    /// Operations that are not done.
    pub pending: Vec<pb::Operation>,
    /// Work of these on hosts, by the operations' names.
    pub jobs: BTreeMap<String, JobRecord>,
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
    /// By node id.
    pub networks: BTreeMap<String, node::NetworkStatus>,
    /// By id.
    pub jobs: BTreeMap<String, node::Job>,
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

impl Observed {
    /// Something goes on there that says nothing by itself.
    pub fn is_moving(&self) -> bool {
        self.volumes.values().any(|volume| volume.creating)
            || self.jobs.values().any(|job| !is_job_over(job))
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
        /// It lies on another volume.
        based: bool,
    },
    /// Tell the host what a network should be.
    ApplyNetwork {
        /// Its name.
        name: String,
        /// The whole of it.
        spec: node::NetworkSpec,
    },
    /// Have the host remove a network.
    DeleteNetwork {
        /// Its name.
        name: String,
        /// Its id on the host.
        node_id: String,
    },
    /// Remove the record.
    ForgetNetwork {
        /// Its name.
        name: String,
    },
    /// Store news about a network.
    RecordNetwork {
        /// Its name.
        name: String,
        /// To be stored.
        status: pb::NetworkStatus,
    },
    /// Have the host begin an operation's work.
    StartJob {
        /// The operation.
        name: String,
        /// The work.
        request: node::StartJobRequest,
    },
    /// Have a mirror switch over.
    CompleteJob {
        /// The operation.
        name: String,
        /// Of the job.
        job_id: String,
    },
    /// Have the host end an operation's work.
    CancelJob {
        /// The operation.
        name: String,
        /// Of the job.
        job_id: String,
    },
    /// Nobody asks for this job any more.
    ForgetJob {
        /// Of the job.
        job_id: String,
    },
    /// The operation is done.
    FinishOperation {
        /// Its name.
        name: String,
        /// What went wrong, if anything did.
        error: Option<pb::OperationError>,
        /// What was found.
        findings: Vec<String>,
    },
}

/// What to do next. News are recorded before operations finish, so that whoever waited for an
/// operation finds its effect.
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = Vec::new();
    // A host that does not answer is told nothing, and what it said last may not be true any more.
    if observed.connected {
        for (name, stored) in &desired.networks {
            plan_network(name, &stored.record, desired, observed, &mut actions);
        }
        for (name, stored) in &desired.vms {
            plan_vm(name, &stored.record, desired, observed, &mut actions);
        }
        for (name, stored) in &desired.volumes {
            plan_volume(name, &stored.record, desired, observed, &mut actions);
        }
        for (operation, job) in &desired.jobs {
            plan_job(operation, job, observed, &mut actions);
        }
        for (job_id, job) in &observed.jobs {
            // Also one whose operation was cancelled while the host was being told to begin.
            let wanted = desired
                .jobs
                .values()
                .any(|known| known.start.job_id == *job_id);
            if wanted {
                continue;
            }
            let job_id = job_id.clone();
            actions.push(if is_job_over(job) {
                Action::ForgetJob { job_id }
            } else {
                let name = job_id.clone();
                Action::CancelJob { name, job_id }
            });
        }
    }
    for operation in &desired.pending {
        if let Some(error) = outcome(operation, desired, observed) {
            let job = observed.jobs.get(job_id(&operation.name));
            actions.push(Action::FinishOperation {
                name: operation.name.clone(),
                error,
                findings: job.map(|job| job.findings.clone()).unwrap_or_default(),
            });
        }
    }
    actions
}

fn plan_job(operation: &str, job: &JobRecord, observed: &Observed, actions: &mut Vec<Action>) {
    let (name, job_id) = (operation.to_owned(), job.start.job_id.clone());
    match observed.jobs.get(&job_id) {
        None if !job.cancel => actions.push(Action::StartJob {
            name,
            request: job.start.clone(),
        }),
        Some(seen) if job.cancel && !is_job_over(seen) => {
            actions.push(Action::CancelJob { name, job_id });
        }
        Some(seen) if job.complete && seen.state() == node::JobState::Ready => {
            actions.push(Action::CompleteJob { name, job_id });
        }
        _ => {}
    }
}

fn is_job_over(job: &node::Job) -> bool {
    matches!(
        job.state(),
        node::JobState::Done | node::JobState::Failed | node::JobState::Cancelled
    )
}

fn job_outcome(job: &JobRecord, observed: &Observed) -> Option<Option<pb::OperationError>> {
    let Some(seen) = observed.jobs.get(&job.start.job_id) else {
        let gone = job.cancel && observed.connected;
        return gone.then(|| Some(error(Code::Cancelled, "CANCELLED", "cancelled")));
    };
    match seen.state() {
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
        spec: node_vm_spec(
            record,
            |volume| {
                let stored = desired.volumes.get(volume)?;
                Some(stored.record.node_id.clone())
            },
            |network| {
                let stored = desired.networks.get(network)?;
                Some(stored.record.node_id.clone())
            },
        ),
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
    } else if !current
        && record.rejected_generation != record.vm.generation
        && (record.vm.desired_power() != pb::DesiredPower::On
            || has_networks(record, desired, observed))
    {
        actions.push(apply());
    }
}

/// The host was told all that is wanted of the networks that the VM's NICs are in. Whether that went
/// well it says itself when the VM starts.
fn has_networks(record: &VmRecord, desired: &Desired, observed: &Observed) -> bool {
    let spec = record.vm.spec.as_ref();
    spec.into_iter()
        .flat_map(|spec| &spec.nics)
        .filter_map(|nic| desired.networks.get(&nic.network))
        .all(|stored| {
            let wanted = node_network_spec(&stored.record, desired);
            let seen = observed.networks.get(&wanted.id);
            seen.is_some_and(|seen| seen.observed_revision == wanted.revision)
        })
}

fn plan_network(
    name: &str,
    record: &NetworkRecord,
    desired: &Desired,
    observed: &Observed,
    actions: &mut Vec<Action>,
) {
    let name = name.to_owned();
    let seen = observed.networks.get(&record.node_id);
    if record.network.deleting {
        actions.push(match seen {
            None => Action::ForgetNetwork { name },
            Some(_) => Action::DeleteNetwork {
                name,
                node_id: record.node_id.clone(),
            },
        });
        return;
    }
    let spec = node_network_spec(record, desired);
    if let Some(seen) = seen {
        // What changes all the time is added when somebody reads.
        let status = pb::NetworkStatus {
            leases: Vec::new(),
            ..network_status(seen, &spec.revision, &observed.host_name())
        };
        let stored = record.network.status.clone().unwrap_or_default();
        // While something new is told there is no news yet.
        if status.phase() != pb::NetworkPhase::Pending && stored != status {
            actions.push(Action::RecordNetwork {
                name: name.clone(),
                status,
            });
        }
    }
    if seen.is_none_or(|seen| !seen.ready || seen.observed_revision != spec.revision) {
        actions.push(Action::ApplyNetwork { name, spec });
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
        || stored.devices != seen.devices.iter().map(noted_device).collect::<Vec<_>>()
        || (!refused && stored.error != seen.error)
}

fn plan_volume(
    name: &str,
    record: &VolumeRecord,
    desired: &Desired,
    observed: &Observed,
    actions: &mut Vec<Action>,
) {
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
            let spec = record.volume.spec.as_ref();
            // A mirror made one of its own of a linked clone.
            let detached = seen.base.is_empty() && spec.is_some_and(|spec| !spec.base.is_empty());
            if detached
                || (stored.phase, stored.size_bytes, &stored.path, &stored.host)
                    != (status.phase, status.size_bytes, &status.path, &status.host)
            {
                actions.push(Action::RecordVolume {
                    name,
                    status,
                    based: !seen.base.is_empty(),
                });
            }
        }
        // Asking again for one that is being made waits for it.
        (false, _) if stored.phase() != pb::VolumePhase::Failed => {
            actions.push(Action::CreateVolume {
                name,
                request: node_create_volume(record, |volume| {
                    desired
                        .volumes
                        .get(volume)
                        .map(|stored| stored.record.node_id.clone())
                }),
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
    if let Some(job) = desired.jobs.get(&operation.name) {
        return job_outcome(job, observed);
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
                Some(stored) => network_outcome(&stored.record, desired, observed),
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
                Some(stored) => vm_outcome(metadata, &stored.record, observed),
            }
        }
        pb::OperationKind::CreateVm | pb::OperationKind::StartVm | pb::OperationKind::StopVm => {
            match desired.vms.get(target) {
                None => Some(Some(gone(target))),
                Some(stored) => vm_outcome(metadata, &stored.record, observed),
            }
        }
        // Their jobs are gone, or this controller is older than what stored them.
        _ => Some(Some(error(
            Code::Internal,
            "UNKNOWN_OPERATION",
            "its work is not known any more",
        ))),
    }
}

fn network_outcome(
    record: &NetworkRecord,
    desired: &Desired,
    observed: &Observed,
) -> Option<Option<pb::OperationError>> {
    let wanted = node_network_spec(record, desired);
    let seen = observed
        .networks
        .get(&record.node_id)
        .filter(|seen| observed.connected && seen.observed_revision == wanted.revision)?;
    let status = network_status(seen, &wanted.revision, "");
    match status.phase() {
        pb::NetworkPhase::Ready => Some(None),
        pb::NetworkPhase::Failed => Some(status.error),
        _ => None,
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

fn error(code: Code, reason: &str, message: &str) -> pb::OperationError {
    pb::OperationError {
        code: code as i32,
        message: message.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests;
