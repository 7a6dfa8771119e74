//! Commands on pools, and what counts the owners of volumes.

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::names::Name;
use api::validate::LOCAL_POOL;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{CommandError, get_vm, get_volume};
use crate::leader;
use crate::model::{
    self, ExportRecord, PoolRecord, VmRecord, VolumeRecord, is_fenced, pool_key, prefix,
};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, StoreError, Transaction};

/// One pool.
///
/// # Errors
/// When there is none of that id.
pub async fn get_pool(store: &SharedStore, id: &str) -> Result<Stored<PoolRecord>, CommandError> {
    let item = store.get(&pool_key(id)).await?;
    let item = item.ok_or_else(|| CommandError::NotFound {
        what: format!("pool {id}"),
    })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// What users see of a pool.
pub fn visible_pool(record: &PoolRecord) -> pb::Pool {
    let mut pool = record.pool.clone();
    pool.etag = model::etag(&pool.uid, 1);
    pool.fenced = is_fenced(pool.spec.as_ref().and_then(|spec| spec.kind.as_ref()));
    pool
}

/// The hosts' own pools, which nobody makes.
pub fn local_pool() -> pb::Pool {
    pb::Pool {
        name: format!("pools/{LOCAL_POOL}"),
        spec: Some(pb::PoolSpec {
            kind: Some(Kind::Local(pb::LocalPool {})),
        }),
        fenced: true,
        ..Default::default()
    }
}

/// Makes a pool.
///
/// # Errors
/// When there is one of that id, unless by this very request.
pub async fn create_pool(
    store: &SharedStore,
    request: &pb::CreatePoolRequest,
) -> Result<pb::Pool, CommandError> {
    let id = &request.pool_id;
    let fingerprint = Sha256::digest(request.encode_to_vec()).to_vec();
    let record = PoolRecord {
        pool: pb::Pool {
            name: format!("pools/{id}"),
            uid: model::new_uid(),
            create_time: Some(model::now()),
            spec: request.pool.clone().unwrap_or_default().spec,
            ..Default::default()
        },
        deleting: false,
        request_id: request.request_id.clone(),
        fingerprint: fingerprint.clone(),
    };
    let exists = || CommandError::AlreadyExists {
        what: format!("pool {id}"),
    };
    match get_pool(store, id).await {
        Err(CommandError::NotFound { .. }) => {}
        Err(error) => return Err(error),
        Ok(Stored { record: there, .. }) => {
            if request.request_id.is_empty() || there.request_id != request.request_id {
                return Err(exists());
            }
            return match there.fingerprint == fingerprint {
                true => Ok(visible_pool(&there)),
                false => Err(CommandError::RequestIdReused {
                    request_id: request.request_id.clone(),
                }),
            };
        }
    }
    if request.validate_only {
        return Ok(visible_pool(&record));
    }
    let event = model::new_event(&record.pool.name, "POOL_CREATED", "");
    let transaction = Transaction::new()
        .if_absent(pool_key(id))
        .put(pool_key(id), record.encode_to_vec())
        .put(event.name.clone(), event.encode_to_vec());
    match store.commit(transaction).await {
        Ok(_) => Ok(visible_pool(&record)),
        Err(StoreError::Conflict { .. }) => Err(exists()),
        Err(error) => Err(error.into()),
    }
}

/// Removes a pool. It is marked first: whoever makes a volume in it at this moment compares the pool, and
/// finds it changed.
///
/// # Errors
/// When there is none, it is not as `etag` says, or a volume is in it.
pub async fn delete_pool(store: &SharedStore, id: &str, etag: &str) -> Result<(), CommandError> {
    let Stored {
        mut record,
        revision,
    } = get_pool(store, id).await?;
    let own = model::etag(&record.pool.uid, 1);
    if !etag.is_empty() && etag != own {
        return Err(CommandError::EtagMismatch {
            what: format!("pool {id}"),
            given: etag.to_owned(),
            etag: own,
        });
    }
    let key = pool_key(id);
    record.deleting = true;
    let marked = Transaction::new()
        .if_unchanged(key.clone(), revision)
        .put(key.clone(), record.encode_to_vec());
    let revision = store.commit(marked).await?;
    let transaction = Transaction::new().if_unchanged(key.clone(), revision);
    if let Some(volume) = volume_in(store, &record.pool.name).await? {
        record.deleting = false;
        store
            .commit(transaction.put(key, record.encode_to_vec()))
            .await?;
        return Err(CommandError::PoolInUse {
            pool: id.to_owned(),
            volume,
        });
    }
    let event = model::new_event(&record.pool.name, "POOL_DELETED", "");
    let transaction = transaction
        .delete(key)
        .put(event.name.clone(), event.encode_to_vec());
    store.commit(transaction).await?;
    Ok(())
}

/// The name of a volume in a pool.
async fn volume_in(store: &SharedStore, pool: &str) -> Result<Option<String>, CommandError> {
    let all = store.list(Range::all(prefix::VOLUMES)).await?;
    for item in all.items {
        let record: VolumeRecord = decode(&item.key, &item.value)?;
        if record.volume.spec.is_some_and(|spec| spec.pool == pool) {
            return Ok(Some(record.volume.name));
        }
    }
    Ok(None)
}

/// The pool of a volume that is to be made, if it is not a host's own; adds to the transaction that it is
/// there and stays there.
///
/// # Errors
/// When there is none of that name.
pub(super) async fn require_pool(
    store: &SharedStore,
    spec: &pb::VolumeSpec,
    transaction: Transaction,
) -> Result<(Option<pb::PoolSpec>, Transaction), CommandError> {
    let id = match spec.pool.strip_prefix("pools/") {
        None | Some(LOCAL_POOL) => return Ok((None, transaction)),
        Some(id) => id,
    };
    let Stored { record, revision } = get_pool(store, id).await?;
    if record.deleting {
        let what = format!("pool {id}");
        return Err(CommandError::Deleting { what });
    }
    let transaction = transaction.if_unchanged(pool_key(id), revision);
    Ok((record.pool.spec, transaction))
}

/// Adds to the transaction that makes a volume of a pool that hosts share that nobody else has its place
/// there.
///
/// # Errors
/// When another volume has it.
pub(super) async fn claim_export(
    store: &SharedStore,
    record: &VolumeRecord,
    transaction: Transaction,
) -> Result<Transaction, CommandError> {
    let Some(key) = record.export_key() else {
        return Ok(transaction);
    };
    let mut export = get_export(store, &key).await?;
    if !export.record.volume.is_empty() {
        return Err(CommandError::ExportTaken {
            export: record.export(),
            volume: export.record.volume,
        });
    }
    export.record.volume.clone_from(&record.volume.name);
    Ok(put_export(transaction, key, &export))
}

/// The place of a volume that goes is free; how many owners it had stays known, as its server knows.
///
/// # Errors
/// When the store fails.
pub async fn release_export(
    store: &SharedStore,
    record: &VolumeRecord,
    transaction: Transaction,
) -> Result<Transaction, StoreError> {
    let Some(key) = record.export_key() else {
        return Ok(transaction);
    };
    let mut export = get_export(store, &key).await?;
    export.record.volume.clear();
    export.record.vm.clear();
    Ok(put_export(transaction, key, &export))
}

async fn get_export(store: &SharedStore, key: &str) -> Result<Stored<ExportRecord>, StoreError> {
    Ok(match store.get(key).await? {
        Some(item) => Stored {
            record: decode(&item.key, &item.value)?,
            revision: item.revision,
        },
        None => Stored {
            record: ExportRecord::default(),
            revision: 0,
        },
    })
}

fn put_export(transaction: Transaction, key: String, export: &Stored<ExportRecord>) -> Transaction {
    let transaction = match export.revision {
        0 => transaction.if_absent(key.clone()),
        revision => transaction.if_unchanged(key.clone(), revision),
    };
    transaction.put(key, export.record.encode_to_vec())
}

/// Counts one more owner of each volume that a VM writes to, before it is started: those before it are
/// kept from writing from then on. `record` has yet to be put.
///
/// Numbers are never given twice: they count from what each restore of the state raises above all that was
/// given before.
///
/// # Errors
/// When another VM may be running with a volume, or the store fails.
pub async fn attach(
    store: &SharedStore,
    record: &mut VmRecord,
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    let base = leader::epoch_base(store).await?;
    let spec = record.vm.spec.clone().unwrap_or_default();
    record.attachments.clear();
    // A volume that is written to counts, whatever else the VM does with it.
    let mut disks: Vec<&pb::Disk> = spec.disks.iter().collect();
    disks.sort_by_key(|disk| disk.read_only);
    for disk in disks {
        let Some(pb::disk::Source::Volume(volume)) = &disk.source else {
            continue;
        };
        // A VM with one volume twice is refused by its host.
        if record.attachments.contains_key(volume) {
            continue;
        }
        let Ok(name) = Name::parse_volume(volume) else {
            continue;
        };
        let mut owned = match get_volume(store, &name).await {
            Ok(stored) => stored,
            // Its host says so.
            Err(CommandError::NotFound { .. }) => continue,
            Err(error) => return Err(error),
        };
        let number = match owned.record.export_key() {
            Some(key) => {
                let mut export = get_export(store, &key).await?;
                if !disk.read_only {
                    check_holder(store, &name, &export.record.vm, &record.vm.name).await?;
                    export.record.owners += 1;
                    export.record.vm.clone_from(&record.vm.name);
                    transaction = put_export(transaction, key, &export);
                }
                // Whoever only reads it is as good as who has it now.
                export.record.owners.max(1)
            }
            None if disk.read_only => continue,
            None => {
                owned.record.attachments += 1;
                transaction = transaction
                    .if_unchanged(model::key(&name), owned.revision)
                    .put(model::key(&name), owned.record.encode_to_vec());
                owned.record.attachments
            }
        };
        let number = base.saturating_add(number);
        record.attachments.insert(volume.clone(), number);
    }
    Ok(transaction)
}

/// Says what the placements of a VM with disks of its own choice on other hosts count from.
///
/// # Errors
/// When the store fails.
pub async fn count_placements(
    store: &SharedStore,
    record: &mut VmRecord,
) -> Result<(), StoreError> {
    let mut disks = record.vm.spec.iter().flat_map(|spec| &spec.disks);
    if disks.any(|disk| disk.nbd.is_some()) {
        record.placements_base = leader::epoch_base(store).await?;
    }
    Ok(())
}

/// Whoever was started with the volume last does not run any more.
async fn check_holder(
    store: &SharedStore,
    volume: &Name,
    holder: &str,
    vm: &str,
) -> Result<(), CommandError> {
    if holder == vm {
        return Ok(());
    }
    let Ok(holder) = Name::parse_vm(holder) else {
        return Ok(());
    };
    match get_vm(store, &holder).await {
        Ok(stored) if may_run(&stored.record) => Err(CommandError::VolumeHeld {
            volume: volume.id.clone(),
            vm: holder.id,
        }),
        Ok(_) | Err(CommandError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// It is to run, or was not seen to have ended.
pub(super) fn may_run(record: &VmRecord) -> bool {
    use pb::VmPhase::{Failed, Pending, Stopped, Unspecified};
    record.vm.desired_power() == pb::DesiredPower::On
        || !matches!(
            record.status().phase(),
            Unspecified | Pending | Stopped | Failed
        )
}
