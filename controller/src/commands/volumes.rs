//! Commands on volumes.

use api::controller as pb;
use api::names::{Name, VOLUMES};
use prost::Message;

use super::{CommandError, RequestKey, get_volume, with_retry};
use crate::model::{self, VmRecord, VolumeRecord, key, prefix, short};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};

/// Wants a volume.
///
/// # Errors
/// When the name is taken.
pub async fn create_volume(
    store: &SharedStore,
    name: &Name,
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
        let mut operation = model::new_operation(pb::OperationKind::CreateVolume, name, 1);
        if validate_only {
            return Ok(pb::Operation {
                name: String::new(),
                done: true,
                ..operation
            });
        }
        let uid = model::new_uid();
        let node_id = model::node_id(name, &uid);
        let record = VolumeRecord {
            volume: pb::Volume {
                name: name.to_string(),
                uid,
                create_time: Some(model::now()),
                spec: Some(spec.clone()),
                ..Default::default()
            },
            node_id: node_id.clone(),
        };
        let event = model::new_event(&name.to_string(), "VOLUME_CREATED", "");
        let node_id = model::node_id_key(name, &node_id);
        let transaction = request
            .begin(Transaction::new(), &mut operation)
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
        let current = model::etag(&record.volume.uid, 1);
        if !etag.is_empty() && etag != current {
            return Err(CommandError::EtagMismatch {
                what: short(name),
                given: etag.to_owned(),
                etag: current,
            });
        }
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

/// `vm web` for each VM of the same project whose spec names the volume.
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
    Ok(users)
}
