//! Commands on pools, and what counts the owners of volumes.

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::names::Name;
use api::validate::LOCAL_POOL;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{CommandError, get_volume};
use crate::model::{self, PoolRecord, VmRecord, VolumeRecord, is_fenced, pool_key, prefix};
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

/// Counts one more owner of each volume that a VM writes to, before it is started: those before it are
/// kept from writing from then on. `record` has yet to be put.
///
/// # Errors
/// When the store fails.
pub async fn attach(
    store: &SharedStore,
    record: &mut VmRecord,
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    let spec = record.vm.spec.clone().unwrap_or_default();
    record.attachments.clear();
    for disk in spec.disks.iter().filter(|disk| !disk.read_only) {
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
        let stored = match get_volume(store, &name).await {
            Ok(stored) => stored,
            // Its host says so.
            Err(CommandError::NotFound { .. }) => continue,
            Err(error) => return Err(error),
        };
        let mut owned = stored.record;
        owned.attachments += 1;
        record.attachments.insert(volume.clone(), owned.attachments);
        transaction = transaction
            .if_unchanged(model::key(&name), stored.revision)
            .put(model::key(&name), owned.encode_to_vec());
    }
    Ok(transaction)
}
