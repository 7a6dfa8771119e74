//! Commands on the disks of VMs, and on the work that hosts do for them.

use api::controller as pb;
use api::names::Name;
use api::node::{StartJobRequest, start_job_request::Work};
use prost::Message;

use super::change::{Begun, Change, listed};
use super::{CommandError, RequestKey, get_operation, get_vm, get_volume, with_retry};
use crate::model::{self, JobRecord};
use crate::reconciler::decode;
use crate::store::{SharedStore, Transaction};

/// A disk and the ids that hosts know it by.
pub struct DiskOnHost {
    /// Of the VM.
    pub vm_id: String,
    /// Of the volume; empty for a disk that is on none.
    pub volume_id: String,
}

/// Adds an operation's work to a transaction, for the host of that id.
pub(super) fn with_job(
    transaction: Transaction,
    operation: &pb::Operation,
    host: &str,
    work: Work,
) -> Transaction {
    with_jobs(transaction, operation, (host, Vec::new()), work)
}

/// The same, for hosts that do it one after the other.
pub(super) fn with_jobs(
    transaction: Transaction,
    operation: &pb::Operation,
    (host, then): (&str, Vec<String>),
    work: Work,
) -> Transaction {
    let record = JobRecord {
        start: StartJobRequest {
            job_id: model::job_id(&operation.name).to_owned(),
            work: Some(work),
        },
        complete: false,
        cancel: false,
        host: host.to_owned(),
        then,
    };
    transaction.put(model::job_key(&operation.name), record.encode_to_vec())
}

/// Wants work done on a disk. `work` says which, for the disk's ids; `what` names it for people
/// where only volumes can have it done.
///
/// # Errors
/// When there is no such disk, or it is on no volume and has to be.
pub async fn disk_job(
    store: &SharedStore,
    (vm, disk): &(Name, String),
    kind: pb::OperationKind,
    what: Option<&'static str>,
    request: &RequestKey,
    work: impl Fn(DiskOnHost) -> Work,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let record = get_vm(store, vm).await?.record;
        let spec = &record.vm.spec.clone().unwrap_or_default();
        let found = find_disk(spec, vm, disk)?;
        let volume_id = match (&found.source, what) {
            (Some(pb::disk::Source::Volume(volume)), _) => {
                let name = Name::parse_volume(volume).map_err(|_| CommandError::NotFound {
                    what: volume.clone(),
                })?;
                get_volume(store, &name).await?.record.node_id
            }
            (_, Some(what)) => {
                return Err(CommandError::NotAVolume {
                    vm: vm.id.clone(),
                    disk: disk.clone(),
                    what,
                });
            }
            (_, None) => String::new(),
        };
        let target = format!("{vm}/disks/{disk}");
        let mut operation = model::new_operation(kind, &target, record.vm.generation);
        let transaction = request.begin(Transaction::new(), &mut operation);
        let work = work(DiskOnHost {
            vm_id: record.node_id,
            volume_id,
        });
        store
            .commit(with_job(transaction, &operation, &record.host, work))
            .await?;
        Ok(operation)
    })
    .await
}

/// Changes a disk's limits and polling, as far as `mask` says.
///
/// # Errors
/// When there is no such disk, or the VM changed.
pub async fn update_disk(
    store: &SharedStore,
    (vm, disk): &(Name, String),
    etag: &str,
    request: &RequestKey,
    validate_only: bool,
    change: impl Fn(&mut pb::Disk) -> Result<(), CommandError>,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        let mut changing = match Change::begin(store, vm, etag, request).await? {
            Begun::Before(operation) => return Ok(*operation),
            Begun::Now(changing) => changing,
        };
        let spec = changing.spec();
        find_disk(spec, vm, disk)?;
        for found in spec.disks.iter_mut().filter(|found| found.name == *disk) {
            change(found)?;
        }
        let (kind, part) = (pb::OperationKind::UpdateDisk, format!("disks/{disk}"));
        let (part, transaction) = ((vm, part.as_str()), Transaction::new());
        changing
            .commit(store, part, kind, request, validate_only, transaction)
            .await
    })
    .await
}

/// Has a mirror switch over once it is ready.
///
/// # Errors
/// When the operation is no mirror, or is over.
pub async fn complete_mirror(
    store: &SharedStore,
    name: &str,
) -> Result<pb::Operation, CommandError> {
    let operation = get_operation(store, name).await?.record;
    let kind = operation.metadata.clone().unwrap_or_default().kind();
    if kind != pb::OperationKind::MirrorDisk || (operation.done && operation.error.is_some()) {
        return Err(CommandError::NotAMirror {
            operation: name.to_owned(),
        });
    }
    if !operation.done {
        change_job(store, name, |job| job.complete = true).await?;
    }
    Ok(operation)
}

/// Has an operation's work end.
pub(super) async fn cancel_job(store: &SharedStore, name: &str) -> Result<(), CommandError> {
    change_job(store, name, |job| job.cancel = true).await
}

async fn change_job(
    store: &SharedStore,
    name: &str,
    change: impl Fn(&mut JobRecord),
) -> Result<(), CommandError> {
    with_retry(|| async {
        let key = model::job_key(name);
        // Gone with the operation's end.
        let Some(item) = store.get(&key).await? else {
            return Ok(());
        };
        let mut record: JobRecord = decode(&item.key, &item.value)?;
        change(&mut record);
        let transaction = Transaction::new()
            .if_unchanged(key.clone(), item.revision)
            .put(key, record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(())
    })
    .await
}

/// A VM's disk by its name.
///
/// # Errors
/// When it has none of that name.
pub fn find_disk<'a>(
    spec: &'a pb::VmSpec,
    vm: &Name,
    disk: &str,
) -> Result<&'a pb::Disk, CommandError> {
    let found = spec.disks.iter().find(|found| found.name == disk);
    found.ok_or_else(|| CommandError::NoDisk {
        vm: vm.id.clone(),
        disk: disk.to_owned(),
        disks: listed(spec.disks.iter().map(|disk| disk.name.as_str())),
    })
}
