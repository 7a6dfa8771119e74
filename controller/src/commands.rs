//! What users can ask for: each command is one transaction on the store that changes what is wanted
//! and leaves an operation behind. Nothing here talks to a host.
//!
//! A command that carries a request id is done once: its repetition answers the same operation.

use api::controller as pb;
use api::names::Name;
use prost::Message;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::model::{self, RequestRecord, VmRecord, VolumeRecord, key, short};
use crate::plan::{Fleet, Observed, Stored};
use crate::reconciler::decode;
use crate::scheduler::Verdict;
use crate::store::{SharedStore, StoreError, Transaction};

mod addresses;
mod change;
mod devices;
mod disks;
mod host_upgrades;
mod hosts;
mod networks;
mod nics;
mod placement;
mod pools;
mod projects;
mod quota;
mod security_groups;
mod upgrades;
mod vms;
mod volumes;

pub use devices::{check_device, devices, outage_policy, update_device};
pub use disks::{DiskOnHost, complete_mirror, disk_job, find_disk, update_disk};
pub use host_upgrades::{checked_upgrade, selected_hosts, upgrade_hosts};
pub use hosts::{cordon_host, delete_host, drain_host, update_host};
pub use networks::{create_network, delete_network, get_network, update_network, visible_network};
pub use nics::{find_nic, update_nic};
pub use placement::{
    Place, Placing, get_host, is_local, no_host, place, place_at, place_upload, place_volume,
    release, unplace, upload_host, vm_request,
};
pub use pools::{
    attach, count_placements, create_pool, delete_pool, get_pool, local_pool, release_export,
    visible_pool,
};
pub use projects::{
    create_project, default_project, delete_project, get_project, update_project, visible_project,
};
pub use quota::usage;
pub use security_groups::{
    Members, create_security_group, delete_security_group, get_security_group, members_of_groups,
    security_group_with, update_security_group, visible_security_group,
};
pub use upgrades::upgrade_devices;
pub(crate) use vms::phase_word;
pub use vms::{create_vm, delete_vm, start_vm, stop_vm};
pub use volumes::{check_volume, create_volume, delete_volume, resize_volume};

/// Others may change the same record at the same time; this many in a row do not happen.
const MAX_ATTEMPTS: usize = 16;

/// A request id and what it stands for.
pub struct RequestKey {
    project: String,
    id: String,
    fingerprint: Vec<u8>,
}

impl RequestKey {
    /// Of `request`, a message of `method` on something in `project`. An empty `id` means none.
    pub fn new(project: &str, id: &str, method: &str, request: &impl Message) -> Self {
        // A digest: requests may hold what is not to be kept, such as a seed's passwords.
        let digest = Sha256::new()
            .chain_update(method)
            .chain_update([0])
            .chain_update(request.encode_to_vec());
        Self {
            project: project.to_owned(),
            id: id.to_owned(),
            fingerprint: digest.finalize().to_vec(),
        }
    }

    /// The operation that this request began earlier.
    async fn earlier(&self, store: &SharedStore) -> Result<Option<pb::Operation>, CommandError> {
        if self.id.is_empty() {
            return Ok(None);
        }
        let Some(item) = store
            .get(&model::request_key(&self.project, &self.id))
            .await?
        else {
            return Ok(None);
        };
        let earlier: RequestRecord = decode(&item.key, &item.value)?;
        if earlier.fingerprint != self.fingerprint {
            return Err(CommandError::RequestIdReused {
                request_id: self.id.clone(),
            });
        }
        let operation = store.get(&earlier.operation).await?;
        operation
            .map(|item| Ok(decode(&item.key, &item.value)?))
            .transpose()
    }

    /// Stores `operation`, pending, under this request.
    fn begin(&self, transaction: Transaction, operation: &mut pb::Operation) -> Transaction {
        if let Some(metadata) = &mut operation.metadata {
            metadata.request_id = self.id.clone();
            metadata.trace_parent = telemetry::trace_parent();
        }
        let transaction = transaction
            .put(operation.name.clone(), operation.encode_to_vec())
            .put(model::pending_key(&operation.name), vec![]);
        if self.id.is_empty() {
            return transaction;
        }
        let record = RequestRecord {
            operation: operation.name.clone(),
            fingerprint: self.fingerprint.clone(),
        };
        let key = model::request_key(&self.project, &self.id);
        transaction
            .if_absent(key.clone())
            .put(key, record.encode_to_vec())
    }
}

/// Refuses a change to what is not as the caller last saw it; an empty etag wants any.
fn check_etag(name: &Name, uid: &str, generation: u64, given: &str) -> Result<(), CommandError> {
    let etag = model::etag(uid, generation);
    if given.is_empty() || given == etag {
        return Ok(());
    }
    Err(CommandError::EtagMismatch {
        what: short(name),
        given: given.to_owned(),
        etag,
    })
}

/// The answer to a request that was only to be checked: done, and kept nowhere.
fn validated(operation: pb::Operation) -> pb::Operation {
    pb::Operation {
        name: String::new(),
        done: true,
        ..operation
    }
}

/// Runs `attempt` until nobody else interferes.
async fn with_retry<T, F>(mut attempt: impl FnMut() -> F) -> Result<T, CommandError>
where
    F: Future<Output = Result<T, CommandError>>,
{
    for _ in 1..MAX_ATTEMPTS {
        match attempt().await {
            Err(CommandError::Store(StoreError::Conflict { .. })) => {}
            done => return done,
        }
    }
    attempt().await
}

/// One VM.
///
/// # Errors
/// When there is none of that name.
pub async fn get_vm(store: &SharedStore, name: &Name) -> Result<Stored<VmRecord>, CommandError> {
    let item = store.get(&key(name)).await?;
    let item = item.ok_or_else(|| CommandError::NotFound { what: short(name) })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// One volume.
///
/// # Errors
/// When there is none of that name.
pub async fn get_volume(
    store: &SharedStore,
    name: &Name,
) -> Result<Stored<VolumeRecord>, CommandError> {
    let item = store.get(&key(name)).await?;
    let item = item.ok_or_else(|| CommandError::NotFound { what: short(name) })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// One operation.
///
/// # Errors
/// When there is none of that name, or it is too old.
pub async fn get_operation(
    store: &SharedStore,
    name: &str,
) -> Result<Stored<pb::Operation>, CommandError> {
    let item = store.get(name).await?;
    let item = item.ok_or_else(|| CommandError::NotFound {
        what: name.to_owned(),
    })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// Takes an operation back as far as that is possible: a start becomes a stop.
///
/// # Errors
/// When it cannot be taken back.
pub async fn cancel_operation(
    store: &SharedStore,
    name: &str,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        let Stored {
            record: mut operation,
            revision,
        } = get_operation(store, name).await?;
        if operation.done {
            return Ok(operation);
        }
        let metadata = operation.metadata.clone().unwrap_or_default();
        if is_cancellable_job(metadata.kind()) {
            disks::cancel_job(store, name).await?;
            return Ok(operation);
        }
        if metadata.kind() == pb::OperationKind::UpgradeHosts {
            host_upgrades::cancel_host_upgrade(store, name).await?;
            return Ok(operation);
        }
        let target = Name::parse_vm(&metadata.target).ok();
        let (pb::OperationKind::StartVm, Some(target)) = (metadata.kind(), target) else {
            return Err(CommandError::NotCancellable {
                operation: name.to_owned(),
            });
        };
        let mut vm = get_vm(store, &target).await?;
        vms::want_power(&mut vm.record, pb::DesiredPower::OffNow);
        operation.done = true;
        operation.end_time = Some(model::now());
        operation.error = Some(pb::OperationError {
            code: tonic::Code::Cancelled as i32,
            message: "cancelled; the VM is stopped".to_owned(),
            reason: "CANCELLED".to_owned(),
        });
        let transaction = Transaction::new()
            .if_unchanged(name, revision)
            .if_unchanged(key(&target), vm.revision)
            .put(key(&target), vm.record.encode_to_vec())
            .put(name, operation.encode_to_vec())
            .delete(model::pending_key(name));
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// Snapshots and growing are over in a moment and cannot be stopped half-way.
fn is_cancellable_job(kind: pb::OperationKind) -> bool {
    matches!(
        kind,
        pb::OperationKind::MirrorDisk
            | pb::OperationKind::UpgradeDevices
            | pb::OperationKind::BackupDisk
            | pb::OperationKind::CommitDisk
            | pb::OperationKind::CheckVolume
    )
}

/// What users see of a VM: as stored, with what was seen last.
pub fn visible_vm(record: &VmRecord, fleet: &Fleet) -> pb::Vm {
    let observed: &Observed = fleet.of(&record.host);
    let mut vm = record.vm.clone();
    vm.etag = model::etag(&vm.uid, vm.generation);
    let stored = vm.status.take().unwrap_or_default();
    let mut status = match observed.vms.get(&record.node_id) {
        Some(seen) => model::vm_status(seen, &model::host_name(&record.host)),
        None => stored.clone(),
    };
    if record.host.is_empty() {
        status.host.clear();
    } else if status.host.is_empty() {
        // It was placed there, and the host has yet to say so.
        status.host = model::host_name(&record.host);
    }
    if record.host.is_empty() && !record.unplaced.is_empty() && status.error.is_none() {
        status.error = Some(pb::OperationError {
            code: tonic::Code::ResourceExhausted as i32,
            message: format!("no host can have it: {}", record.unplaced),
            reason: "NO_HOST".to_owned(),
        });
    }
    if status.phase() == pb::VmPhase::Unspecified {
        status.phase = pb::VmPhase::Pending as i32;
    }
    if record.rejected_generation == vm.generation {
        status.error = stored.error;
    }
    status.stale = !observed.connected;
    vm.status = Some(status);
    vm
}

/// What users see of a volume: as stored, with what was seen last.
pub fn visible_volume(record: &VolumeRecord, fleet: &Fleet) -> pb::Volume {
    let observed: &Observed = fleet.of(&record.host);
    let mut volume = record.volume.clone();
    volume.generation = volume.generation.max(1);
    volume.etag = model::etag(&volume.uid, volume.generation);
    let stored = volume.status.take().unwrap_or_default();
    let mut status = match observed.volumes.get(&record.node_id) {
        Some(seen) => model::volume_status(seen, &model::host_name(&record.host)),
        None => stored,
    };
    status.fenced = model::is_fenced(record.shared());
    if status.phase() == pb::VolumePhase::Unspecified {
        status.phase = pb::VolumePhase::Pending as i32;
    }
    volume.status = Some(status);
    volume
}

/// Why a command was refused.
#[derive(Debug, Error)]
pub enum CommandError {
    /// No such thing.
    #[error("{what} does not exist")]
    NotFound {
        /// `vm web`
        what: String,
    },
    /// The name is taken.
    #[error("{what} exists already; choose another name or delete it first")]
    AlreadyExists {
        /// `vm web`
        what: String,
    },
    /// The id was used for something else.
    #[error(
        "request id {request_id:?} was used for a different request; use a new id for each request"
    )]
    RequestIdReused {
        /// As given.
        request_id: String,
    },
    /// Somebody changed it since the caller looked.
    #[error("{what} was changed meanwhile: its etag is {etag:?}, not {given:?}; look again")]
    EtagMismatch {
        /// `vm web`
        what: String,
        /// As given.
        given: String,
        /// As it is.
        etag: String,
    },
    /// A running VM cannot be deleted.
    #[error("vm {vm} is {phase}; stop it first: vmctl vm stop {vm}")]
    Running {
        /// Its id.
        vm: String,
        /// What it is doing.
        phase: String,
    },
    /// Only a running VM can be reset and has a console.
    #[error("vm {vm} is {phase}; start it first: vmctl vm start {vm}")]
    NotRunning {
        /// Its id.
        vm: String,
        /// What it is doing.
        phase: String,
    },
    /// Deletion is under way.
    #[error("{what} is being deleted")]
    Deleting {
        /// `vm web`
        what: String,
    },
    /// A VM's spec names the volume.
    #[error(
        "volume {volume} belongs to {vms}; delete what uses it first: vmctl vm delete NAME, vmctl volume delete NAME"
    )]
    VolumeInUse {
        /// Its id.
        volume: String,
        /// Those that name it.
        vms: String,
    },
    /// A spec names a volume that is not there.
    #[error(
        "{field}: there is no volume {volume}; create it first: vmctl volume create {volume} --size 1G"
    )]
    NoSuchVolume {
        /// Path of the field.
        field: String,
        /// Its id.
        volume: String,
    },
    /// A spec names another project's volume.
    #[error("{field}: {volume} belongs to another project")]
    ForeignVolume {
        /// Path of the field.
        field: String,
        /// As given.
        volume: String,
    },
    /// A spec names a network that is not there.
    #[error(
        "{field}: there is no network {network}; create it first: vmctl network create {network} --kind nat"
    )]
    NoSuchNetwork {
        /// Path of the field.
        field: String,
        /// Its id.
        network: String,
    },
    /// A spec names another project's network.
    #[error("{field}: {network} belongs to another project")]
    ForeignNetwork {
        /// Path of the field.
        field: String,
        /// As given.
        network: String,
    },
    /// A VM's spec names the network.
    #[error(
        "network {network} is in use by {vms}; delete what uses it first: vmctl vm delete NAME"
    )]
    NetworkInUse {
        /// Its id.
        network: String,
        /// Those that name it.
        vms: String,
    },
    /// Somebody else has it: an address, a MAC, a port, a subnet.
    #[error("{field}: {value} belongs to {owner}; choose another")]
    Taken {
        /// Path of the field.
        field: String,
        /// What is taken.
        value: String,
        /// By whom.
        owner: String,
    },
    /// No host of the network can have the address.
    #[error(
        "{field}: {address} is no free address of {subnet}, whose gateway is {gateway}; choose one, or leave it out"
    )]
    AddressOutside {
        /// Path of the field.
        field: String,
        /// As given.
        address: String,
        /// The network's.
        subnet: String,
        /// The host's own.
        gateway: String,
    },
    /// All addresses are taken.
    #[error(
        "{field}: network {network} has no free address between {first} and {last}; delete VMs, or make a larger network"
    )]
    PoolExhausted {
        /// Path of the field.
        field: String,
        /// Its id.
        network: String,
        /// Of the pool.
        first: String,
        /// Of the pool.
        last: String,
    },
    /// All automatic subnets are taken.
    #[error("network.spec.ipv4_cidr: all subnets of 10.64.0.0/10 are taken; name one")]
    NoSubnet,
    /// Only NAT networks translate.
    #[error("{field}: network {network} is no NAT network, and only those forward ports")]
    NoForwards {
        /// Path of the field.
        field: String,
        /// Its id.
        network: String,
    },
    /// Its frames could not be kept apart.
    #[error(
        "{field}: network {network} has no VLANs; create one that has: vmctl network create NAME --kind isolated|bridged --datapath switch --vlan-aware"
    )]
    NoVlans {
        /// Path of the field.
        field: String,
        /// Its id.
        network: String,
    },
    /// A security group is not there.
    #[error(
        "{field}: there is no security group {group} in this project; create it first: vmctl security-group create"
    )]
    NoSuchGroup {
        /// Path of the field.
        field: String,
        /// As given.
        group: String,
    },
    /// NICs or rules name the group.
    #[error("security group {group} is in use by {users}; delete what uses it first")]
    GroupInUse {
        /// Its id.
        group: String,
        /// Those that name it.
        users: String,
    },
    /// The VM has no such device.
    #[error("vm {vm} has no device {device}; it has {devices}")]
    NoDevice {
        /// Its id.
        vm: String,
        /// As given.
        device: String,
        /// Those that it has.
        devices: String,
    },
    /// The VM has no such NIC.
    #[error("vm {vm} has no NIC {nic}; it has {nics}")]
    NoNic {
        /// Its id.
        vm: String,
        /// As given.
        nic: String,
        /// Those that it has.
        nics: String,
    },
    /// The VM has no such disk.
    #[error("vm {vm} has no disk {disk}; it has {disks}")]
    NoDisk {
        /// Its id.
        vm: String,
        /// As given.
        disk: String,
        /// Those that it has.
        disks: String,
    },
    /// What only volumes can do.
    #[error(
        "disk {disk} of vm {vm} is not on a volume, and only volumes have {what}; import its image: vmctl volume import"
    )]
    NotAVolume {
        /// The VM's id.
        vm: String,
        /// The disk.
        disk: String,
        /// snapshots, mirrors ...
        what: &'static str,
    },
    /// Volumes grow only.
    #[error("volume {volume} has {size_bytes} bytes; it cannot be made smaller")]
    Shrink {
        /// Its id.
        volume: String,
        /// As it is.
        size_bytes: u64,
    },
    /// The volume is not complete.
    #[error("volume {volume} is {phase}; wait until it is ready")]
    VolumeNotReady {
        /// Its id.
        volume: String,
        /// What it is doing.
        phase: String,
    },
    /// The operation is none that waits for a switch.
    #[error("{operation} is not a mirror that goes on; vmctl op list shows those")]
    NotAMirror {
        /// Its name.
        operation: String,
    },
    /// One at a time.
    #[error(
        "hosts are being upgraded by {operation}; wait for it (vmctl op wait {operation}) or cancel it (vmctl op cancel {operation})"
    )]
    UpgradeUnderWay {
        /// Its name.
        operation: String,
    },
    /// More than one upgrade can be about.
    #[error(
        "{found} hosts are more than the {most} of one upgrade; name them by a label (--selector), group after group"
    )]
    TooManyHosts {
        /// Meant.
        found: usize,
        /// Possible.
        most: usize,
    },
    /// Only starts can be taken back.
    #[error("{operation} cannot be cancelled; wait for it, then undo what it did")]
    NotCancellable {
        /// Its name.
        operation: String,
    },
    /// No host can have it, and waiting does not help.
    #[error("no host can have {what}: {hosts}")]
    NoHost {
        /// `vm web`
        what: String,
        /// What each of them says, in words.
        hosts: String,
        /// What each of them says.
        verdicts: Vec<Verdict>,
    },
    /// Something is on the host.
    #[error(
        "host {host} has {what}; move or delete that first, or use --force where the host is gone for good"
    )]
    HostInUse {
        /// Its id.
        host: String,
        /// VMs and volumes.
        what: String,
    },
    /// Nobody made the project.
    #[error("there is no project {project}; an admin makes it: vmctl project create {project}")]
    NoSuchProject {
        /// Its id.
        project: String,
    },
    /// Only when it is lost for sure others may run what it ran.
    #[error(
        "{what} may still run on host {host}, and is started elsewhere once the host is lost for sure; try again in a minute"
    )]
    HostNotLost {
        /// Its id.
        host: String,
        /// VMs.
        what: String,
    },
    /// A place in a pool is one volume's.
    #[error("{export} is {volume} already; name another export, or delete that volume first")]
    ExportTaken {
        /// What it is called in the pool.
        export: String,
        /// Whose it is.
        volume: String,
    },
    /// Two may not write to it.
    #[error("vm {vm} may be running with volume {volume}; stop it first: vmctl vm stop {vm}")]
    VolumeHeld {
        /// Its id.
        volume: String,
        /// Who has it.
        vm: String,
    },
    /// Pools with volumes in them stay.
    #[error("{volume} is in pool {pool}; delete it first")]
    PoolInUse {
        /// Its id.
        pool: String,
        /// One of them.
        volume: String,
    },
    /// No host does anything with it but use it.
    #[error("volume {volume} is in a pool that hosts share; do that where the pool is served")]
    SharedVolume {
        /// Its id.
        volume: String,
    },
    /// Projects with something in them stay.
    #[error("something is in project {project}; delete it first")]
    ProjectInUse {
        /// Its id.
        project: String,
    },
    /// The project has what it may have.
    #[error(
        "project {project} may have {limit} {figure} and has {used}: {asked} more is too much; delete something, or have an admin raise it: vmctl quota set {project}"
    )]
    QuotaExceeded {
        /// Its id.
        project: String,
        /// Of the quota.
        figure: &'static str,
        /// The most there may be.
        limit: u64,
        /// What there is.
        used: u64,
        /// What was asked for.
        asked: u64,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests;
