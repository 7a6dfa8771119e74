//! What hosts report of what they have, stored when it is news, with the event that says so.

use api::controller as pb;
use api::node::HostStatus;
use prost::Message;

use crate::model::{self, HostRecord, NetworkRecord, VmRecord, VolumeRecord};
use crate::plan::Stored;
use crate::store::{SharedStore, StoreError, Transaction};

/// Stores what a host's agent reports of the host.
pub(super) async fn record_host(
    store: &SharedStore,
    stored: &Stored<HostRecord>,
    inventory: HostStatus,
) -> Result<(), StoreError> {
    let Stored { record, revision } = stored.clone();
    let record = HostRecord {
        inventory: Some(inventory),
        ..record
    };
    let key = record.name.clone();
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// Stores which hosts may have a network.
pub(super) async fn note_network(
    store: &SharedStore,
    stored: &Stored<NetworkRecord>,
    hosts: Vec<String>,
) -> Result<(), StoreError> {
    let Stored { record, revision } = stored.clone();
    let key = key_of(&record.network.name);
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), revision)
        .put(key, NetworkRecord { hosts, ..record }.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

pub(super) async fn record_network(
    store: &SharedStore,
    stored: &Stored<NetworkRecord>,
    status: &pb::NetworkStatus,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let name = record.network.name.clone();
    let before = record.network.status.replace(status.clone());
    let mut transaction = Transaction::new();
    let (reason, words) = match &status.error {
        Some(error) => ("NETWORK_FAILED", error.message.clone()),
        None => ("NETWORK_READY", format!("on {}", status.host)),
    };
    let told = before
        .is_some_and(|before| (before.phase, before.error) == (status.phase, status.error.clone()));
    if !told {
        let mut event = model::new_event(&name, reason, words);
        event.warning = status.error.is_some();
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let key = key_of(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

pub(super) async fn record_vm(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    status: &pb::VmStatus,
    ended: bool,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let before = record.status();
    let mut status = status.clone();
    // Figures that change all the time are added when somebody reads.
    status.processes.clear();
    let events = model::device_events(&record.vm.name, &before, &status);
    status.devices = status.devices.iter().map(model::noted_device).collect();
    if record.rejected_generation == record.vm.generation {
        status.error = before.error.clone();
    }
    if ended {
        record.vm.desired_power = pb::DesiredPower::Off as i32;
    }
    let name = record.vm.name.clone();
    let mut transaction = Transaction::new();
    if before.phase != status.phase || before.resets != status.resets {
        let event = phase_event(&name, &before, &status);
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    for event in events {
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    record.vm.status = Some(status);
    let key = key_of(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

fn phase_event(name: &str, before: &pb::VmStatus, status: &pb::VmStatus) -> pb::Event {
    if before.phase == status.phase {
        return model::new_event(name, "VM_RESET", format!("reset {} so far", status.resets));
    }
    let reason = status.phase().as_str_name().replace("VM_PHASE_", "VM_");
    let error = status
        .error
        .as_ref()
        .map(|error| error.message.clone())
        .unwrap_or_default();
    let message = match status.phase() {
        pb::VmPhase::Failed => error,
        pb::VmPhase::Stopped => status.stop_reason.clone(),
        pb::VmPhase::Running => format!("on {}", status.host),
        _ => String::new(),
    };
    let mut event = model::new_event(name, &reason, message);
    event.warning = status.phase() == pb::VmPhase::Failed;
    event
}

pub(super) async fn record_volume(
    store: &SharedStore,
    stored: &Stored<VolumeRecord>,
    status: &pb::VolumeStatus,
    based: bool,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let name = record.volume.name.clone();
    let was_ready =
        record.volume.status.as_ref().map(pb::VolumeStatus::phase) == Some(pb::VolumePhase::Ready);
    record.volume.status = Some(pb::VolumeStatus {
        attached_to: String::new(),
        ..status.clone()
    });
    let spec = record.volume.spec.get_or_insert_default();
    if was_ready {
        // It was made larger.
        spec.size_bytes = status.size_bytes;
    }
    if !based {
        spec.base.clear();
        spec.base_snapshot.clear();
    }
    let mut transaction = Transaction::new();
    if !was_ready {
        let bytes = format!("{} bytes", status.size_bytes);
        let event = model::new_event(&name, "VOLUME_READY", bytes);
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let key = key_of(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// `projects/p/vms/v` is stored at `vms/p/v`.
pub(super) fn key_of(name: &str) -> String {
    let mut parts = name.split('/').skip(1);
    let project = parts.next().unwrap_or_default();
    let collection = parts.next().unwrap_or_default();
    format!(
        "{collection}/{project}/{}",
        parts.next().unwrap_or_default()
    )
}
