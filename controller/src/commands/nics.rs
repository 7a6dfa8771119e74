//! Commands on the NICs of VMs.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::{CommandError, RequestKey, addresses, check_etag, get_vm, validated, with_retry};
use crate::model::{self, key, short};
use crate::plan::Stored;
use crate::store::SharedStore;

/// Changes what may change of a NIC.
///
/// # Errors
/// When there is no such NIC, or the VM changed.
pub async fn update_nic(
    store: &SharedStore,
    (vm, nic): &(Name, String),
    etag: &str,
    request: &RequestKey,
    validate_only: bool,
    change: impl Fn(&mut pb::Nic),
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let Stored {
            mut record,
            revision,
        } = get_vm(store, vm).await?;
        check_etag(vm, &record.vm.uid, record.vm.generation, etag)?;
        if record.vm.deleting {
            return Err(CommandError::Deleting { what: short(vm) });
        }
        let spec = record.vm.spec.get_or_insert_default();
        let before = find_nic(spec, vm, nic)?.clone();
        spec.nics
            .iter_mut()
            .filter(|found| found.name == *nic)
            .for_each(&change);
        let after = find_nic(spec, vm, nic)?;
        let transaction = addresses::reclaim(store, vm, &before, after).await?;
        record.vm.generation += 1;
        let target = format!("{vm}/nics/{nic}");
        let kind = pb::OperationKind::UpdateNic;
        let mut operation = model::new_operation(kind, &target, record.vm.generation);
        if validate_only {
            return Ok(validated(operation));
        }
        let transaction = request
            .begin(transaction, &mut operation)
            .if_unchanged(key(vm), revision)
            .put(key(vm), record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// A VM's NIC by its name.
///
/// # Errors
/// When it has none of that name.
pub fn find_nic<'a>(
    spec: &'a pb::VmSpec,
    vm: &Name,
    nic: &str,
) -> Result<&'a pb::Nic, CommandError> {
    let found = spec.nics.iter().find(|found| found.name == nic);
    found.ok_or_else(|| {
        let names: Vec<&str> = spec.nics.iter().map(|nic| nic.name.as_str()).collect();
        CommandError::NoNic {
            vm: vm.id.clone(),
            nic: nic.to_owned(),
            nics: match names.is_empty() {
                true => "none".to_owned(),
                false => names.join(", "),
            },
        }
    })
}
