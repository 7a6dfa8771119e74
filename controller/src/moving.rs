//! Moving VMs off a host that is drained: what each step of [`crate::plan`]'s does to the record.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use crate::commands::{self, CommandError};
use crate::hosts::Hosts;
use crate::model::{self, VmRecord};
use crate::plan::Stored;
use crate::scheduler;
use crate::store::{SharedStore, StoreError, Transaction};

/// Notes why a VM stays.
///
/// # Errors
/// When the store does not take it.
pub async fn note_stays(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    drain: &str,
    why: &str,
) -> Result<(), StoreError> {
    let record = VmRecord {
        stays: format!("{drain} {why}"),
        ..stored.record.clone()
    };
    put(store, stored, record, Transaction::new()).await
}

/// Shuts a running VM down, if another host can have it.
///
/// # Errors
/// When the store does not take it.
pub async fn stop_to_move(
    store: &SharedStore,
    hosts: &Hosts,
    stored: &Stored<VmRecord>,
    drain: &str,
) -> Result<(), StoreError> {
    if let Some(why) = nowhere_else(store, hosts, &stored.record).await? {
        return note_stays(store, stored, drain, &why).await;
    }
    let mut record = stored.record.clone();
    record.vm.desired_power = pb::DesiredPower::Off as i32;
    record.vm.generation += 1;
    record.moving = true;
    let words = format!("off {}", model::host_name(&record.host));
    let event = model::new_event(&record.vm.name, "VM_MOVING", words);
    let transaction = Transaction::new().put(event.name.clone(), event.encode_to_vec());
    put(store, stored, record, transaction).await
}

/// Takes a VM that is off from its host; it gets another one, and runs again there if it was shut down for
/// this. Where no other host can have it any more it goes on where it is.
///
/// # Errors
/// When the store does not take it.
pub async fn move_vm(
    store: &SharedStore,
    hosts: &Hosts,
    stored: &Stored<VmRecord>,
    drain: &str,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let nowhere = nowhere_else(store, hosts, &record).await?;
    if record.moving {
        record.vm.desired_power = pb::DesiredPower::On as i32;
        record.vm.generation += 1;
        record.moving = false;
    }
    if let Some(why) = nowhere {
        record.stays = format!("{drain} {why}");
        return put(store, stored, record, Transaction::new()).await;
    }
    let words = format!("from {}", model::host_name(&record.host));
    let event = model::new_event(&record.vm.name, "VM_MOVED", words);
    let transaction = Transaction::new().put(event.name.clone(), event.encode_to_vec());
    let transaction = commands::unplace(store, &mut record, transaction).await?;
    put(store, stored, record, transaction).await
}

/// Why no host but its own can have a VM, if so.
async fn nowhere_else(
    store: &SharedStore,
    hosts: &Hosts,
    record: &VmRecord,
) -> Result<Option<String>, StoreError> {
    let Ok(name) = Name::parse_vm(&record.vm.name) else {
        return Ok(None);
    };
    let spec = record.vm.spec.clone().unwrap_or_default();
    let mut request = match commands::vm_request(store, &name, &spec).await {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(Some("has volumes that are nowhere yet".to_owned())),
        Err(CommandError::Store(error)) => return Err(error),
        Err(error) => return Ok(Some(format!("cannot be placed: {error}"))),
    };
    let own = (record.host.clone(), "it is there now".to_owned());
    request.excluded.extend([own]);
    let verdicts = match hosts.choose(&request) {
        Ok(_) => return Ok(None),
        Err(verdicts) => verdicts,
    };
    let words = scheduler::words(&verdicts);
    Ok(Some(format!("finds no other host: {words}")))
}

async fn put(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    record: VmRecord,
    transaction: Transaction,
) -> Result<(), StoreError> {
    let Ok(name) = Name::parse_vm(&record.vm.name) else {
        return Ok(());
    };
    let key = model::key(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}
