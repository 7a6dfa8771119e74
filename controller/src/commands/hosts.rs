//! Commands on hosts.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::vms::want_power;
use super::{CommandError, RequestKey, get_host, unplace, with_retry};
use crate::failover;
use crate::model::{self, VmRecord, VolumeRecord, prefix};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};

/// VMs and volumes of a host that are named when it cannot go.
const MAX_NAMED: usize = 8;
/// Evictions that go in one transaction.
const MAX_DELETED: usize = 100;

/// Forgets a host. With `force`, what is on it is taken from it: VMs are off and placed elsewhere, volumes
/// are lost. One that is started elsewhere by itself is waited for: only whoever renews leases knows when
/// the host does not run it any more.
///
/// # Errors
/// When there is none of that id, it changed, it answers, or something is on it, unless `force`.
pub async fn delete_host(
    store: &SharedStore,
    id: &str,
    etag: &str,
    force: bool,
    answers: bool,
) -> Result<(), CommandError> {
    with_retry(|| async {
        let Stored { record, revision } = get_host(store, id).await?;
        check_etag(&record, etag)?;
        let mut on_it = Vec::new();
        let mut roaming = Vec::new();
        let vms: Vec<Stored<VmRecord>> =
            records_on(store, prefix::VMS, |record: &VmRecord| record.host == id).await?;
        let is_here = |record: &VolumeRecord| record.host == id;
        let volumes: Vec<Stored<VolumeRecord>> =
            records_on(store, prefix::VOLUMES, is_here).await?;
        for Stored { record, .. } in &vms {
            on_it.push(record.vm.name.clone());
            let is_bound = |disk: &pb::Disk| match &disk.source {
                Some(pb::disk::Source::Volume(volume)) => {
                    volumes.iter().any(|own| own.record.volume.name == *volume)
                }
                _ => false,
            };
            let mut disks = record.vm.spec.iter().flat_map(|spec| &spec.disks);
            if failover::roams(record) && !disks.any(is_bound) {
                roaming.push(record.vm.name.clone());
            }
        }
        on_it.extend(
            volumes
                .iter()
                .map(|stored| stored.record.volume.name.clone()),
        );
        if answers && on_it.is_empty() && !force {
            on_it.push("an agent that answers".to_owned());
        }
        if !force && !on_it.is_empty() {
            let more = on_it.len().saturating_sub(MAX_NAMED);
            let mut what = on_it[..on_it.len() - more].join(", ");
            if more > 0 {
                what.push_str(&format!(" and {more} more"));
            }
            let host = id.to_owned();
            return Err(CommandError::HostInUse { host, what });
        }
        if !roaming.is_empty() {
            let (host, what) = (id.to_owned(), roaming.join(", "));
            return Err(CommandError::HostNotLost { host, what });
        }
        for stored in &vms {
            strand_vm(store, stored).await?;
        }
        for stored in &volumes {
            lose_volume(store, stored).await?;
        }
        let key = model::host_name(id);
        let event = model::new_event(&key, "HOST_DELETED", "");
        let withdrawn = crate::certificates::withdrawn_key(id);
        let mut transaction = Transaction::new()
            .if_unchanged(key.clone(), revision)
            .put(withdrawn, model::now().encode_to_vec())
            .delete(key)
            .delete(model::reservation_key(id))
            .put(event.name.clone(), event.encode_to_vec());
        let evictions = Range {
            limit: MAX_DELETED,
            ..Range::all(format!("{}{id}/", model::EVICTIONS))
        };
        for item in store.list(evictions).await?.items {
            transaction = transaction.delete(item.key);
        }
        store.commit(transaction).await?;
        Ok(())
    })
    .await
}

/// Records of one kind of which `is_meant` is true.
async fn records_on<R: Message + Default>(
    store: &SharedStore,
    prefix: &str,
    is_meant: impl Fn(&R) -> bool,
) -> Result<Vec<Stored<R>>, CommandError> {
    let mut found = Vec::new();
    for item in store.list(Range::all(prefix)).await?.items {
        let record: R = decode(&item.key, &item.value)?;
        if is_meant(&record) {
            let revision = item.revision;
            found.push(Stored { record, revision });
        }
    }
    Ok(found)
}

/// Takes a VM from a host that is deleted: nobody knows whether it runs, so it is off until somebody says
/// otherwise.
async fn strand_vm(store: &SharedStore, stored: &Stored<VmRecord>) -> Result<(), CommandError> {
    let mut record = stored.record.clone();
    let Ok(name) = Name::parse_vm(&record.vm.name) else {
        return Ok(());
    };
    let key = model::key(&name);
    let transaction = Transaction::new().if_unchanged(key.clone(), stored.revision);
    let transaction = unplace(store, &mut record, transaction).await?;
    want_power(&mut record, pb::DesiredPower::OffNow);
    let status = record.vm.status.get_or_insert_default();
    status.set_phase(pb::VmPhase::Failed);
    status.error = Some(host_deleted());
    let transaction = transaction.put(key, record.encode_to_vec());
    store.commit(transaction).await?;
    Ok(())
}

/// What was in the pool of a host that is deleted is no more; its record can be deleted.
async fn lose_volume(
    store: &SharedStore,
    stored: &Stored<VolumeRecord>,
) -> Result<(), CommandError> {
    let mut record = stored.record.clone();
    let Ok(name) = Name::parse_volume(&record.volume.name) else {
        return Ok(());
    };
    record.host.clear();
    let status = record.volume.status.get_or_insert_default();
    status.set_phase(pb::VolumePhase::Failed);
    status.error = Some(host_deleted());
    let key = model::key(&name);
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await?;
    Ok(())
}

fn host_deleted() -> pb::OperationError {
    pb::OperationError {
        code: tonic::Code::DataLoss as i32,
        message: "its host was deleted".to_owned(),
        reason: "HOST_DELETED".to_owned(),
    }
}

/// Changes what is decided about a host.
///
/// # Errors
/// When there is none of that id, or it changed.
pub async fn update_host(
    store: &SharedStore,
    id: &str,
    etag: &str,
    change: impl Fn(&mut pb::HostSpec),
) -> Result<model::HostRecord, CommandError> {
    let event = |_: &model::HostRecord| ("HOST_UPDATED", "");
    change_host(store, id, etag, event, |record| change(&mut record.spec)).await
}

/// Has nothing more placed on a host, or takes that back and with it a drain.
///
/// # Errors
/// When there is none of that id.
pub async fn cordon_host(
    store: &SharedStore,
    id: &str,
    cordoned: bool,
) -> Result<model::HostRecord, CommandError> {
    let event = |record: &model::HostRecord| match record.spec.cordoned {
        true => ("HOST_CORDONED", ""),
        false => ("HOST_UNCORDONED", ""),
    };
    change_host(store, id, "", event, |record| {
        record.spec.cordoned = cordoned;
        if !cordoned {
            record.drain.clear();
        }
    })
    .await
}

async fn change_host(
    store: &SharedStore,
    id: &str,
    etag: &str,
    event: impl Fn(&model::HostRecord) -> (&'static str, &'static str),
    change: impl Fn(&mut model::HostRecord),
) -> Result<model::HostRecord, CommandError> {
    with_retry(|| async {
        let Stored { record, revision } = get_host(store, id).await?;
        check_etag(&record, etag)?;
        let mut changed = record.clone();
        change(&mut changed);
        if changed == record {
            return Ok(record);
        }
        changed.generation += 1;
        let key = changed.name.clone();
        let (reason, words) = event(&changed);
        let event = model::new_event(&key, reason, words);
        let transaction = Transaction::new()
            .if_unchanged(key.clone(), revision)
            .put(key, changed.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(changed)
    })
    .await
}

/// Has a host cordoned, and moved from it what can be moved.
///
/// # Errors
/// When there is none of that id.
pub async fn drain_host(
    store: &SharedStore,
    id: &str,
    request: &RequestKey,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let Stored {
            mut record,
            revision,
        } = get_host(store, id).await?;
        let kind = pb::OperationKind::DrainHost;
        record.generation += 1;
        let mut operation = model::new_operation(kind, &record.name, record.generation);
        record.spec.cordoned = true;
        record.drain = operation.name.clone();
        let key = record.name.clone();
        let event = model::new_event(&key, "HOST_DRAINING", "");
        let transaction = request
            .begin(Transaction::new(), &mut operation)
            .if_unchanged(key.clone(), revision)
            .put(key, record.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

fn check_etag(record: &model::HostRecord, given: &str) -> Result<(), CommandError> {
    let etag = record.etag();
    if given.is_empty() || given == etag {
        return Ok(());
    }
    Err(CommandError::EtagMismatch {
        what: format!("host {}", record.id()),
        given: given.to_owned(),
        etag,
    })
}
