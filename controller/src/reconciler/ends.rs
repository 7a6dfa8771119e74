//! How things end: records that nothing stands for any more go, operations are done, and what a host will
//! never do is not wanted any more.

use api::controller as pb;
use api::names::{NETWORKS, Name, VMS};
use prost::Message;
use tonic::Status;

use super::calls::Told;
use super::decode;
use super::records::key_of;
use crate::model::{self, JobRecord, VmRecord, VolumeRecord};
use crate::plan::{self, Call};
use crate::store::{SharedStore, StoreError, Transaction};

/// Removes a record that nothing stands for any more, and ends its operations in the same
/// transaction: the next thing of this name must not be taken for it.
pub(super) async fn forget(
    store: &SharedStore,
    asked: &[&pb::Operation],
    name: &str,
    node_id: &str,
    revision: u64,
    transaction: Transaction,
) -> Result<(), StoreError> {
    let parsed = Name::parse_vm(name)
        .or_else(|_| Name::parse_volume(name))
        .or_else(|_| Name::parse_network(name));
    let Ok(parsed) = parsed else { return Ok(()) };
    let reason = match parsed.collection {
        VMS => "VM_DELETED",
        NETWORKS => "NETWORK_DELETED",
        _ => "VOLUME_DELETED",
    };
    let event = model::new_event(name, reason, "");
    let mut transaction = transaction
        .if_unchanged(model::key(&parsed), revision)
        .delete(model::key(&parsed))
        .delete(model::node_id_key(&parsed, node_id))
        .put(event.name.clone(), event.encode_to_vec());
    if parsed.collection == VMS {
        transaction = transaction.delete(model::seed_key(&parsed));
        // What its NICs had is free again.
        let record = store.get(&model::key(&parsed)).await?;
        let record = record.map(|item| decode::<VmRecord>(&item.key, &item.value));
        let spec = record.transpose()?.and_then(|record| record.vm.spec);
        for nic in spec.unwrap_or_default().nics {
            for claim in model::claim::all_of(&nic) {
                transaction = transaction.delete(claim);
            }
        }
    }
    for operation in asked.iter().copied() {
        let metadata = operation.metadata.clone().unwrap_or_default();
        let wanted = matches!(
            metadata.kind(),
            pb::OperationKind::DeleteVm
                | pb::OperationKind::DeleteVolume
                | pb::OperationKind::DeleteNetwork
        );
        let done = ended(operation.clone(), (!wanted).then(|| plan::gone(name)));
        transaction = transaction
            .put(done.name.clone(), done.encode_to_vec())
            .delete(model::pending_key(&done.name));
    }
    store.commit(transaction).await.map(drop)
}

fn ended(mut operation: pb::Operation, error: Option<pb::OperationError>) -> pb::Operation {
    operation.done = true;
    operation.error = error;
    operation.end_time = Some(model::now());
    operation
}

pub(super) async fn finish(
    store: &SharedStore,
    name: &str,
    error: Option<pb::OperationError>,
    findings: &[String],
) -> Result<(), StoreError> {
    let Some(item) = store.get(name).await? else {
        return Ok(());
    };
    let mut operation = ended(decode(name, &item.value)?, error);
    let mut transaction = Transaction::new();
    let metadata = operation.metadata.get_or_insert_default();
    metadata.findings = findings.to_vec();
    if let Some(event) = job_event(&operation) {
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let transaction = transaction
        .if_unchanged(name, item.revision)
        .put(name, operation.encode_to_vec())
        .delete(model::pending_key(name))
        .delete(model::job_key(name));
    store.commit(transaction).await.map(drop)
}

/// Work on disks and volumes is an event when it ends: VOLUME_RESIZED, DISK_SNAPSHOT_FAILED ...
fn job_event(operation: &pb::Operation) -> Option<pb::Event> {
    let metadata = operation.metadata.as_ref()?;
    let (stem, verb) = match metadata.kind() {
        pb::OperationKind::ResizeVolume => ("VOLUME_RESIZE", "VOLUME_RESIZED"),
        pb::OperationKind::CheckVolume => ("VOLUME_CHECK", "VOLUME_CHECKED"),
        pb::OperationKind::SnapshotDisk => ("DISK_SNAPSHOT", "DISK_SNAPSHOT_MADE"),
        pb::OperationKind::MirrorDisk => ("DISK_MIRROR", "DISK_MIRRORED"),
        pb::OperationKind::BackupDisk => ("DISK_BACKUP", "DISK_BACKED_UP"),
        pb::OperationKind::CommitDisk => ("DISK_COMMIT", "DISK_COMMITTED"),
        pb::OperationKind::UpgradeDevices => ("DEVICE_UPGRADE", "DEVICES_UPGRADED"),
        _ => return None,
    };
    let mut event = match &operation.error {
        None => model::new_event(&metadata.target, verb, metadata.findings.join("; ")),
        Some(error) => {
            let reason = format!("{stem}_FAILED");
            model::new_event(&metadata.target, &reason, error.message.clone())
        }
    };
    event.warning = operation.error.is_some();
    Some(event)
}

/// The next host does it.
pub(super) async fn advance_job(
    store: &SharedStore,
    name: &str,
    host: &str,
) -> Result<(), StoreError> {
    let key = model::job_key(name);
    let Some(item) = store.get(&key).await? else {
        return Ok(());
    };
    let mut record: JobRecord = decode(&key, &item.value)?;
    if record.host != host || record.then.is_empty() {
        return Ok(());
    }
    record.host = record.then.remove(0);
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), item.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// A host will never do this: note why, and stop wanting it.
pub(super) async fn record_refusal(
    store: &SharedStore,
    told: &Told,
    status: &Status,
) -> Result<(), StoreError> {
    let error = pb::OperationError {
        code: status.code() as i32,
        message: api::errors::explain(status),
        reason: api::errors::reason(status).unwrap_or_else(|| "HOST_REFUSED".to_owned()),
    };
    let name = &told.name;
    let generation = match &told.call {
        Call::StartJob(_) => return finish(store, name, Some(error), &[]).await,
        Call::ApplyVm(spec) => spec.generation,
        Call::CreateVolume(_) => 0,
        // A deletion stays wanted: what stands in its way may go.
        _ => return Ok(()),
    };
    let key = key_of(name);
    let Some(item) = store.get(&key).await? else {
        return Ok(());
    };
    let mut event = model::new_event(name, "HOST_REFUSED", error.message.clone());
    event.warning = true;
    let value = if matches!(told.call, Call::ApplyVm(_)) {
        let mut record: VmRecord = decode(&key, &item.value)?;
        if record.vm.generation != generation || record.host != told.host {
            return Ok(());
        }
        record.rejected_generation = generation;
        record.vm.desired_power = pb::DesiredPower::Off as i32;
        record.vm.status.get_or_insert_default().error = Some(error);
        record.encode_to_vec()
    } else {
        let mut record: VolumeRecord = decode(&key, &item.value)?;
        let status = record.volume.status.get_or_insert_default();
        status.phase = pb::VolumePhase::Failed as i32;
        status.error = Some(error);
        record.encode_to_vec()
    };
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), item.revision)
        .put(key, value)
        .put(event.name.clone(), event.encode_to_vec());
    store.commit(transaction).await.map(drop)
}
