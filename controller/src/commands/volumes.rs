//! Commands on volumes.

use api::controller as pb;
use api::names::{Name, VOLUMES};
use api::node::{self, start_job_request::Work};
use prost::Message;

use super::{
    CommandError, RequestKey, check_etag, disks, get_volume, pools, quota, validated, with_retry,
};
use crate::model::{self, VmRecord, VolumeRecord, key, prefix, short};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};

/// Wants a volume. `uid` is a new one; with the name it makes the volume's id on hosts. `host` is the id of
/// the host whose pool gets it; empty: one is chosen later.
///
/// # Errors
/// When the name is taken, or the volume that it is to be based on is not there.
pub async fn create_volume(
    store: &SharedStore,
    name: &Name,
    (uid, host): (&str, &str),
    spec: &pb::VolumeSpec,
    request: &RequestKey,
    validate_only: bool,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        if store.get(&key(name)).await?.is_some() {
            // By this very request, if it was sent twice and the other one was faster.
            return request
                .earlier(store)
                .await?
                .ok_or_else(|| CommandError::AlreadyExists { what: short(name) });
        }
        let transaction = require_base(store, spec).await?;
        let (pool, transaction) = pools::require_pool(store, spec, transaction).await?;
        let more = quota::of_volume(spec.size_bytes);
        let transaction = quota::admit(store, &name.project, &more, transaction).await?;
        let mut operation = model::new_operation(pb::OperationKind::CreateVolume, name, 1);
        if validate_only {
            return Ok(validated(operation));
        }
        let node_id = model::node_id(name, uid);
        let mut record = VolumeRecord {
            volume: pb::Volume {
                name: name.to_string(),
                uid: uid.to_owned(),
                generation: 1,
                create_time: Some(model::now()),
                spec: Some(spec.clone()),
                ..Default::default()
            },
            node_id: node_id.clone(),
            host: host.to_owned(),
            pool,
            ..Default::default()
        };
        let transaction = pools::claim_export(store, &record, transaction).await?;
        if record.shared().is_some() {
            record.volume.status = Some(record.shared_status());
        }
        let event = model::new_event(&name.to_string(), "VOLUME_CREATED", "");
        let node_id = model::node_id_key(name, &node_id);
        let transaction = request
            .begin(transaction, &mut operation)
            .if_absent(key(name))
            .if_absent(node_id.clone())
            .put(key(name), record.encode_to_vec())
            .put(node_id, name.to_string().into_bytes())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// Wants a volume to be gone.
///
/// # Errors
/// When it does not exist, changed, or a VM's spec names it.
pub async fn delete_volume(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    request: &RequestKey,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        // Creating a VM compares its volumes' revisions, so no VM can come to name this one between
        // here and the commit.
        let Stored {
            mut record,
            revision,
        } = get_volume(store, name).await?;
        check_etag(
            name,
            &record.volume.uid,
            record.volume.generation.max(1),
            etag,
        )?;
        let users = users_of(store, name).await?;
        if !users.is_empty() {
            return Err(CommandError::VolumeInUse {
                volume: name.id.clone(),
                vms: users.join(", "),
            });
        }
        record.volume.deleting = true;
        let mut operation = model::new_operation(pb::OperationKind::DeleteVolume, name, 1);
        let transaction = request
            .begin(Transaction::new(), &mut operation)
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// Adds to a transaction that the volume which another is to be based on is there and stays there.
async fn require_base(
    store: &SharedStore,
    spec: &pb::VolumeSpec,
) -> Result<Transaction, CommandError> {
    let Ok(base) = Name::parse_volume(&spec.base) else {
        return Ok(Transaction::new());
    };
    let Some(item) = store.get(&key(&base)).await? else {
        return Err(CommandError::NoSuchVolume {
            field: "volume.spec.base".to_owned(),
            volume: base.id,
        });
    };
    let record: VolumeRecord = decode(&item.key, &item.value)?;
    if record.volume.deleting {
        return Err(CommandError::Deleting { what: short(&base) });
    }
    Ok(Transaction::new().if_unchanged(key(&base), item.revision))
}

/// Makes a volume larger.
///
/// # Errors
/// When it does not exist, changed, is not complete, or is larger already.
pub async fn resize_volume(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    size_bytes: u64,
    request: &RequestKey,
    validate_only: bool,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let Stored {
            mut record,
            revision,
        } = get_volume(store, name).await?;
        check_etag(
            name,
            &record.volume.uid,
            record.volume.generation.max(1),
            etag,
        )?;
        let status = ready_status(&record, name)?;
        if size_bytes < status.size_bytes {
            return Err(CommandError::Shrink {
                volume: name.id.clone(),
                size_bytes: status.size_bytes,
            });
        }
        let more = pb::QuotaUsage {
            volume_bytes: size_bytes - status.size_bytes.max(record.wanted_bytes).min(size_bytes),
            ..Default::default()
        };
        let transaction = quota::admit(store, &name.project, &more, Transaction::new()).await?;
        record.wanted_bytes = size_bytes;
        record.volume.generation = record.volume.generation.max(1) + 1;
        let generation = record.volume.generation;
        let kind = pb::OperationKind::ResizeVolume;
        let mut operation = model::new_operation(kind, name, generation);
        if validate_only {
            return Ok(validated(operation));
        }
        let host = record.host.clone();
        let work = Work::Resize(node::ResizeVolume {
            volume: record.node_id.clone(),
            size_bytes,
        });
        let transaction = request
            .begin(transaction, &mut operation)
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec());
        let transaction = disks::with_job(transaction, &operation, &host, work);
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// Has a volume's tables looked at.
///
/// # Errors
/// When it does not exist or is not complete.
pub async fn check_volume(
    store: &SharedStore,
    name: &Name,
    repair_leaks: bool,
    request: &RequestKey,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let record = get_volume(store, name).await?.record;
        ready_status(&record, name)?;
        let kind = pb::OperationKind::CheckVolume;
        let mut operation = model::new_operation(kind, name, record.volume.generation.max(1));
        let host = record.host.clone();
        let work = Work::Check(node::CheckVolume {
            volume: record.node_id,
            repair_leaks,
        });
        let transaction = request.begin(Transaction::new(), &mut operation);
        store
            .commit(disks::with_job(transaction, &operation, &host, work))
            .await?;
        Ok(operation)
    })
    .await
}

fn ready_status(record: &VolumeRecord, name: &Name) -> Result<pb::VolumeStatus, CommandError> {
    if record.volume.deleting {
        return Err(CommandError::Deleting { what: short(name) });
    }
    if record.shared().is_some() {
        let volume = name.id.clone();
        return Err(CommandError::SharedVolume { volume });
    }
    let status = record.volume.status.clone().unwrap_or_default();
    match status.phase() {
        pb::VolumePhase::Ready => Ok(status),
        phase => Err(CommandError::VolumeNotReady {
            volume: name.id.clone(),
            phase: phase
                .as_str_name()
                .trim_start_matches("VOLUME_PHASE_")
                .to_lowercase(),
        }),
    }
}

/// `vm web` for each VM, and `volume a` for each volume, of the same project whose spec names the
/// volume.
async fn users_of(store: &SharedStore, name: &Name) -> Result<Vec<String>, CommandError> {
    debug_assert_eq!(name.collection, VOLUMES);
    let wanted = name.to_string();
    let mut users = Vec::new();
    let range = Range::all(format!("{}{}/", prefix::VMS, name.project));
    for item in store.list(range).await?.items {
        let record: VmRecord = decode(&item.key, &item.value)?;
        let spec = record.vm.spec.unwrap_or_default();
        let uses = spec.disks.iter().any(|disk| {
            matches!(&disk.source, Some(pb::disk::Source::Volume(volume)) if *volume == wanted)
        });
        if uses && let Ok(vm) = Name::parse_vm(&record.vm.name) {
            users.push(short(&vm));
        }
    }
    let range = Range::all(format!("{}{}/", prefix::VOLUMES, name.project));
    for item in store.list(range).await?.items {
        let record: VolumeRecord = decode(&item.key, &item.value)?;
        let spec = record.volume.spec.unwrap_or_default();
        if spec.base == wanted
            && let Ok(clone) = Name::parse_volume(&record.volume.name)
        {
            users.push(short(&clone));
        }
    }
    Ok(users)
}
