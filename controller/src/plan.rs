//! What to do next: a pure function of what is wanted and what was seen. Calling it again with the
//! same arguments gives the same answer, and every action may be done twice; so nothing is
//! remembered between two calls, and a restarted controller goes on where the last one ended.
//! What is to be done about one thing does not depend on which others are looked at: [`Part`] bounds
//! what a look costs.
//!
//! ```text
//! VM on no host:      ---------------------------------> PlaceVm: the scheduler says where
//! VM seen elsewhere:  it was taken from that host -----> EvictVm there
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

use std::collections::{BTreeMap, BTreeSet};

use api::controller as pb;
use api::node;

use crate::failover;
use crate::model::{
    HostRecord, JobRecord, NetworkRecord, SecurityGroupRecord, VmRecord, VolumeRecord, host_name,
    job_id, node_create_volume, node_vm_spec, noted_device, vm_status, volume_status,
};

mod drain;
mod fleet;
mod index;
mod networks;
mod outcome;
mod part;

pub use fleet::{Fleet, Observed};
pub use index::Index;
pub use networks::{Layout, network_status_now};
pub(crate) use outcome::gone;
pub use part::Part;

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
    /// Hosts by id.
    pub hosts: BTreeMap<String, Stored<HostRecord>>,
    /// What is to go from hosts: a host's id, and a VM's id there.
    pub evictions: BTreeSet<(String, String)>,
    /// Ids of hosts that surely run nothing any more that needs a lease.
    pub lost: BTreeSet<String>,
    /// VMs by name; boxed, since a tree has room for twice as many as there are.
    pub vms: BTreeMap<String, Box<Stored<VmRecord>>>,
    /// Volumes by name.
    pub volumes: BTreeMap<String, Stored<VolumeRecord>>,
    /// Networks by name.
    pub networks: BTreeMap<String, Stored<NetworkRecord>>,
    /// Security groups by name.
    pub security_groups: BTreeMap<String, Stored<SecurityGroupRecord>>,
    /// Operations that are not done, by name.
    pub pending: BTreeMap<String, pb::Operation>,
    /// Work of these on hosts, by the operations' names.
    pub jobs: BTreeMap<String, JobRecord>,
}

impl Desired {
    /// The id of the host that there is, if there is one alone.
    pub fn only_host(&self) -> Option<&str> {
        match self.hosts.len() {
            1 => self.hosts.keys().next().map(String::as_str),
            _ => None,
        }
    }

    /// Who does a job. One of an older controller does not say.
    pub fn host_of_job<'a>(&'a self, job: &'a JobRecord) -> &'a str {
        match job.host.as_str() {
            "" => self.only_host().unwrap_or_default(),
            host => host,
        }
    }
}

/// What a host is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// What a VM should be.
    ApplyVm(Box<node::VmSpec>),
    /// Remove a stopped VM's leftovers, by its id there.
    DeleteVm(String),
    /// Stop a VM that is not the host's any more, at once, and remove its leftovers; by its id there.
    EvictVm(String),
    /// Make a volume.
    CreateVolume(Box<node::CreateVolumeRequest>),
    /// Remove a volume, by its id there.
    DeleteVolume(String),
    /// What a network should be.
    ApplyNetwork(Box<node::NetworkSpec>),
    /// Remove a network, by its id there.
    DeleteNetwork(String),
    /// Begin an operation's work.
    StartJob(Box<node::StartJobRequest>),
    /// Have a mirror switch over, by the job's id.
    CompleteJob(String),
    /// End an operation's work, by the job's id.
    CancelJob(String),
    /// Nobody asks for this job any more.
    ForgetJob(String),
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell a host something.
    Call {
        /// Its id.
        host: String,
        /// Whom it is about: calls about the same thing follow one another.
        name: String,
        /// What to tell.
        call: Call,
    },
    /// Choose a host for a VM.
    PlaceVm {
        /// Its name.
        name: String,
        /// Where it is already, found there: it was made before hosts were chosen.
        found: Option<String>,
    },
    /// Take a VM from its host, which runs it no more, so that another one is chosen.
    TakeVm {
        /// Its name.
        name: String,
        /// For people.
        why: String,
    },
    /// Choose a host for a volume.
    PlaceVolume {
        /// Its name.
        name: String,
        /// Where it is already, found there.
        found: Option<String>,
    },
    /// Store why a drain leaves a VM where it is.
    NoteStays {
        /// Its name.
        name: String,
        /// The drain's operation.
        drain: String,
        /// In words.
        why: String,
    },
    /// Shut a VM down, to start it on another host.
    StopToMove {
        /// Its name.
        name: String,
        /// The drain's operation.
        drain: String,
    },
    /// Take a VM that is off from its host.
    MoveVm {
        /// Its name.
        name: String,
        /// The drain's operation; empty if that is over.
        drain: String,
    },
    /// Work that several hosts do one after the other is done on one of them.
    AdvanceJob {
        /// The operation.
        name: String,
        /// Id of the host that is done.
        host: String,
    },
    /// Nothing is left of a VM that was taken from a host.
    NoteEvicted {
        /// The host's id.
        host: String,
        /// The VM's id there.
        node_id: String,
    },
    /// Store what a host's agent reports of it.
    RecordHost {
        /// Its id.
        host: String,
        /// To be stored.
        inventory: Box<node::HostStatus>,
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
    /// Store which hosts may have a network, before they are told and after it is gone from some.
    NoteNetwork {
        /// Its name.
        name: String,
        /// Ids of hosts.
        hosts: Vec<String>,
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

impl Action {
    /// The VM, volume or other thing that it is about, by name.
    pub fn about(&self) -> Option<&str> {
        match self {
            Self::NoteEvicted { .. } | Self::RecordHost { .. } => None,
            Self::Call { name, .. }
            | Self::PlaceVm { name, .. }
            | Self::TakeVm { name, .. }
            | Self::PlaceVolume { name, .. }
            | Self::NoteStays { name, .. }
            | Self::StopToMove { name, .. }
            | Self::MoveVm { name, .. }
            | Self::AdvanceJob { name, .. }
            | Self::ForgetVm { name }
            | Self::RecordVm { name, .. }
            | Self::ForgetVolume { name }
            | Self::RecordVolume { name, .. }
            | Self::NoteNetwork { name, .. }
            | Self::ForgetNetwork { name }
            | Self::RecordNetwork { name, .. }
            | Self::FinishOperation { name, .. } => Some(name),
        }
    }

    fn call(host: &str, name: &str, call: Call) -> Self {
        Self::Call {
            host: host.to_owned(),
            name: name.to_owned(),
            call,
        }
    }
}

/// What to do next about everything.
pub fn plan(desired: &Desired, fleet: &Fleet) -> Vec<Action> {
    let mut part = Part::all(desired);
    part.hosts
        .extend(fleet.hosts.keys().map(|id| id.to_string()));
    plan_part(desired, fleet, &part, &Index::of(desired))
}

/// What to do next about a part of everything; `index` is that of `desired`. News are recorded before
/// operations finish, so that whoever waited for an operation finds its effect.
pub fn plan_part(desired: &Desired, fleet: &Fleet, part: &Part, index: &Index) -> Vec<Action> {
    let mut actions = Vec::new();
    let layout = Layout::of(desired);
    let wanted = (desired, &layout);
    plan_hosts(desired, fleet, (part, index), &mut actions);
    for (name, stored) in &desired.networks {
        networks::plan_network(name, &stored.record, wanted, fleet, &mut actions);
    }
    for name in &part.names {
        if let Some(stored) = desired.vms.get(name) {
            plan_vm(name, &stored.record, wanted, fleet, &mut actions);
        } else if let Some(stored) = desired.volumes.get(name) {
            plan_volume(name, &stored.record, desired, fleet, &mut actions);
        }
    }
    drain::plan_drains(desired, fleet, part, &mut actions);
    plan_jobs(desired, fleet, part, &mut actions);
    let operations = part.operations.iter();
    for operation in operations.filter_map(|name| desired.pending.get(name)) {
        let metadata = operation.metadata.as_ref();
        if let Some(drained) = metadata
            && drained.kind() == pb::OperationKind::DrainHost
        {
            let outcome = drain::drain_outcome(operation, &drained.target, desired);
            actions.extend(outcome.map(|(error, findings)| Action::FinishOperation {
                name: operation.name.clone(),
                error,
                findings,
            }));
            continue;
        }
        if let Some(error) = outcome::outcome(operation, wanted, fleet) {
            let job = fleet.job(job_id(&operation.name));
            actions.push(Action::FinishOperation {
                name: operation.name.clone(),
                error,
                findings: job.map(|job| job.findings.clone()).unwrap_or_default(),
            });
        }
    }
    actions
}

/// What hosts report of themselves, and what they have that is not theirs any more.
fn plan_hosts(
    desired: &Desired,
    fleet: &Fleet,
    (part, index): (&Part, &Index),
    actions: &mut Vec<Action>,
) {
    let many = fleet.hosts.len() > 1;
    for host in &part.hosts {
        let observed = fleet.of(host);
        if !observed.connected {
            continue;
        }
        let stored = desired.hosts.get(host);
        let seen = observed.host.as_ref().map(crate::model::inventory);
        if let (Some(stored), Some(inventory)) = (stored, seen)
            && stored.record.inventory.as_ref() != Some(&inventory)
        {
            actions.push(Action::RecordHost {
                host: host.to_owned(),
                inventory: Box::new(inventory),
            });
        }
        for node_id in observed.vms.keys() {
            let home = index.home_of(node_id).filter(|_| many);
            let moved = home.is_some_and(|home| home != host);
            if moved || is_evicted(desired, host, node_id) {
                let call = Call::EvictVm(node_id.clone());
                actions.push(Action::call(host, node_id, call));
            }
        }
    }
    for (host, node_id) in &desired.evictions {
        let observed = fleet.of(host);
        if observed.connected && !observed.vms.contains_key(node_id) {
            actions.push(Action::NoteEvicted {
                host: host.clone(),
                node_id: node_id.clone(),
            });
        }
    }
}

fn is_evicted(desired: &Desired, host: &str, node_id: &str) -> bool {
    !desired.evictions.is_empty()
        && desired
            .evictions
            .contains(&(host.to_owned(), node_id.to_owned()))
}

fn plan_jobs(desired: &Desired, fleet: &Fleet, part: &Part, actions: &mut Vec<Action>) {
    let mut wanted: BTreeSet<&str> = BTreeSet::new();
    for (operation, job) in &desired.jobs {
        wanted.insert(&job.start.job_id);
        let host = desired.host_of_job(job);
        if fleet.of(host).connected {
            plan_job(operation, job, (host, fleet.of(host)), actions);
        }
    }
    let hosts = part.hosts.iter().map(|host| (host, fleet.of(host)));
    for (host, observed) in hosts.filter(|(_, observed)| observed.connected) {
        for (job_id, job) in &observed.jobs {
            // Also one whose operation was cancelled while the host was being told to begin.
            if !wanted.contains(job_id.as_str()) {
                let call = match is_job_over(job) {
                    true => Call::ForgetJob(job_id.clone()),
                    false => Call::CancelJob(job_id.clone()),
                };
                actions.push(Action::call(host, job_id, call));
            }
        }
    }
}

fn plan_job(
    operation: &str,
    job: &JobRecord,
    (host, observed): (&str, &Observed),
    actions: &mut Vec<Action>,
) {
    let job_id = job.start.job_id.clone();
    if !job.then.is_empty()
        && let Some(seen) = observed.jobs.get(&job_id)
        && seen.state() == node::JobState::Done
    {
        actions.push(Action::AdvanceJob {
            name: operation.to_owned(),
            host: host.to_owned(),
        });
        return;
    }
    let call = match observed.jobs.get(&job_id) {
        None if !job.cancel => Call::StartJob(Box::new(job.start.clone())),
        Some(seen) if job.cancel && !is_job_over(seen) => Call::CancelJob(job_id),
        Some(seen) if job.complete && seen.state() == node::JobState::Ready => {
            Call::CompleteJob(job_id)
        }
        _ => return,
    };
    actions.push(Action::call(host, operation, call));
}

fn is_job_over(job: &node::Job) -> bool {
    matches!(
        job.state(),
        node::JobState::Done | node::JobState::Failed | node::JobState::Cancelled
    )
}

fn plan_vm(
    name: &str,
    record: &VmRecord,
    wanted: (&Desired, &Layout),
    fleet: &Fleet,
    actions: &mut Vec<Action>,
) {
    let (desired, _) = wanted;
    let host = record.host.as_str();
    if host.is_empty() {
        plan_unplaced_vm(name, record, fleet, actions);
        return;
    }
    let observed = fleet.of(host);
    let seen = observed
        .vms
        .get(&record.node_id)
        .filter(|_| observed.connected);
    if let Some(why) = failover::taken(record, desired, &desired.lost, seen) {
        let name = name.to_owned();
        actions.push(Action::TakeVm { name, why });
        return;
    }
    // A host that does not answer is told nothing, and what it said last may not be true any more. What
    // is to go from it goes first.
    if !observed.connected || is_evicted(desired, host, &record.node_id) {
        return;
    }
    let seen = observed.vms.get(&record.node_id);
    let current = seen.is_some_and(|seen| seen.observed_generation >= record.vm.generation);
    let session = observed.host.as_ref();
    let session = session.map(|host| host.lease_session.clone());
    let session = session.unwrap_or_default();
    // An agent without leases would run it whatever happens.
    let may_start = !failover::roams(record) || !session.is_empty();
    let apply = || {
        let mut spec = node_vm_spec(
            record,
            |volume| desired.volumes.get(volume).map(|stored| &stored.record),
            |network| {
                let stored = desired.networks.get(network)?;
                Some(stored.record.node_id.clone())
            },
        );
        // Read before the records were: what is decided now belongs to this session of the host.
        spec.lease_session.clone_from(&session);
        Action::call(host, name, Call::ApplyVm(Box::new(spec)))
    };
    if let Some(seen) = seen {
        let status = vm_status(seen, &host_name(host));
        let ended = current
            && record.vm.desired_power() == pb::DesiredPower::On
            && is_over(seen)
            && !failover::is_given_up(record, seen);
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
            Some(seen) if is_over(seen) => {
                let call = Call::DeleteVm(record.node_id.clone());
                actions.push(Action::call(host, name, call));
            }
            Some(_) if !current => actions.push(apply()),
            Some(_) => {}
        }
    } else if !current
        && record.rejected_generation != record.vm.generation
        && may_start
        && (record.vm.desired_power() != pb::DesiredPower::On
            || networks::has_networks(record, wanted, &observed.networks))
    {
        actions.push(apply());
    }
}

/// One that no host was ever chosen for is where it is seen: its record is older than that hosts are
/// chosen.
fn plan_unplaced_vm(name: &str, record: &VmRecord, fleet: &Fleet, actions: &mut Vec<Action>) {
    let seen = |(_, observed): &(&str, &Observed)| observed.vms.contains_key(&record.node_id);
    let found = match record.placements {
        0 => fleet.connected().find(seen),
        _ => None,
    };
    let name = name.to_owned();
    actions.push(match (record.vm.deleting, found) {
        (true, None) => Action::ForgetVm { name },
        (_, found) => Action::PlaceVm {
            name,
            found: found.map(|(host, _)| host.to_owned()),
        },
    });
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
    fleet: &Fleet,
    actions: &mut Vec<Action>,
) {
    let host = record.host.as_str();
    if record.shared().is_some() {
        // Nobody makes or removes what it is; only that it is known ends.
        if record.volume.deleting {
            let name = name.to_owned();
            actions.push(Action::ForgetVolume { name });
        }
        return;
    }
    if host.is_empty() {
        plan_unplaced_volume(name, record, fleet, actions);
        return;
    }
    let observed = fleet.of(host);
    if !observed.connected {
        return;
    }
    let name = name.to_owned();
    let seen = observed.volumes.get(&record.node_id);
    let stored = record.volume.status.clone().unwrap_or_default();
    match (record.volume.deleting, seen) {
        (true, None) => actions.push(Action::ForgetVolume { name }),
        (true, Some(_)) => {
            let call = Call::DeleteVolume(record.node_id.clone());
            actions.push(Action::call(host, &name, call));
        }
        (false, Some(seen)) if !seen.creating => {
            let status = volume_status(seen, &host_name(host));
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
            let request = node_create_volume(record, |volume| {
                desired
                    .volumes
                    .get(volume)
                    .map(|stored| stored.record.node_id.clone())
            });
            let call = Call::CreateVolume(Box::new(request));
            actions.push(Action::call(host, &name, call));
        }
        (false, _) => {}
    }
}

/// As with VMs: one that is seen is there.
fn plan_unplaced_volume(
    name: &str,
    record: &VolumeRecord,
    fleet: &Fleet,
    actions: &mut Vec<Action>,
) {
    let seen = |(_, observed): &(&str, &Observed)| observed.volumes.contains_key(&record.node_id);
    let found = fleet.connected().find(seen);
    let failed =
        record.volume.status.as_ref().map(pb::VolumeStatus::phase) == Some(pb::VolumePhase::Failed);
    let name = name.to_owned();
    actions.push(match (record.volume.deleting, found) {
        (true, None) => Action::ForgetVolume { name },
        (false, None) if failed => return,
        (_, found) => Action::PlaceVolume {
            name,
            found: found.map(|(host, _)| host.to_owned()),
        },
    });
}

#[cfg(test)]
mod tests;
