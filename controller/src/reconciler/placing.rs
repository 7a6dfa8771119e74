//! VMs and volumes that have no host get one.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::records::key_of;
use crate::commands::{self, CommandError, Placing};
use crate::hosts::Hosts;
use crate::model::{self, VmRecord, VolumeRecord};
use crate::plan::Stored;
use crate::scheduler;
use crate::store::{SharedStore, StoreError, Transaction};

/// Chooses a host for a VM that has none, or notes where it was found.
pub(super) async fn place_vm(
    store: &SharedStore,
    hosts: &Hosts,
    stored: &Stored<VmRecord>,
    found: Option<String>,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let Ok(name) = Name::parse_vm(&record.vm.name) else {
        return Ok(());
    };
    let spec = record.vm.spec.clone().unwrap_or_default();
    let request = match commands::vm_request(store, &name, &spec).await {
        Ok(Some(request)) => request,
        Ok(None) => return unplaced(store, stored, "its volumes have no host yet").await,
        Err(CommandError::Store(error)) => return Err(error),
        Err(error) => return unplaced(store, stored, &error.to_string()).await,
    };
    let place = match found {
        Some(host) => commands::place_at(store, &host, &request).await?,
        None => match commands::place(hosts, &request).await? {
            Placing::Found(place) => *place,
            Placing::None(verdicts) => {
                return unplaced(store, stored, &scheduler::words(&verdicts)).await;
            }
        },
    };
    place.note(&mut record);
    commands::count_placements(store, &mut record).await?;
    let target = model::host_name(place.host());
    let event = model::new_event(&record.vm.name, "VM_PLACED", format!("on {target}"));
    let mut transaction = Transaction::new();
    if record.vm.desired_power() == pb::DesiredPower::On {
        transaction = match commands::attach(store, &mut record, transaction).await {
            Ok(transaction) => transaction,
            Err(CommandError::Store(error)) => return Err(error),
            Err(error) => return unplaced(store, stored, &error.to_string()).await,
        };
    }
    let transaction = transaction
        .if_unchanged(model::key(&name), stored.revision)
        .put(model::key(&name), record.encode_to_vec())
        .put(event.name.clone(), event.encode_to_vec());
    let done = store.commit(place.promise(transaction)).await;
    place.settle(store, hosts, done).await.map(drop)
}

/// Notes why no host can have a VM, if that is news.
async fn unplaced(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    words: &str,
) -> Result<(), StoreError> {
    if stored.record.unplaced == words {
        return Ok(());
    }
    let record = VmRecord {
        unplaced: words.to_owned(),
        ..stored.record.clone()
    };
    let key = key_of(&record.vm.name);
    let mut transaction = Transaction::new().if_unchanged(key.clone(), stored.revision);
    if !words.is_empty() {
        let mut event = model::new_event(&record.vm.name, "VM_NOT_PLACED", words);
        event.warning = true;
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let transaction = transaction.put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// Chooses a host for a volume that has none, or notes where it was found.
pub(super) async fn place_volume(
    store: &SharedStore,
    hosts: &Hosts,
    stored: &Stored<VolumeRecord>,
    found: Option<String>,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let Ok(name) = Name::parse_volume(&record.volume.name) else {
        return Ok(());
    };
    let spec = record.volume.spec.clone().unwrap_or_default();
    let host = match found {
        Some(host) => host,
        None => match commands::place_volume(store, hosts, &name, &spec).await {
            Ok(host) => host,
            Err(CommandError::Store(error)) => return Err(error),
            Err(error) => {
                tracing::debug!(%name, %error, "no host can have a volume");
                return Ok(());
            }
        },
    };
    if host.is_empty() {
        return Ok(());
    }
    record.host = host;
    let key = model::key(&name);
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}
