//! Commands on the devices of VMs, whatever kind they are.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::{CommandError, RequestKey, check_etag, get_vm, validated, with_retry};
use crate::model::{self, key, short};
use crate::plan::Stored;
use crate::store::SharedStore;

/// Names and types of a VM's devices, in the order in which its guest finds them.
pub fn devices(spec: &pb::VmSpec) -> impl Iterator<Item = (&str, &str)> {
    let disks = spec.disks.iter().map(|disk| (disk.name.as_str(), "blk"));
    let nics = spec.nics.iter().map(|nic| (nic.name.as_str(), "net"));
    let others = spec.vhost_user.iter();
    let others = others.map(|device| (device.name.as_str(), device.r#type.as_str()));
    disks.chain(nics).chain(others)
}

/// What is done in outages of a device.
pub fn outage_policy(spec: &pb::VmSpec, device: &str) -> pb::OutagePolicy {
    let own = spec.outage_policies.iter();
    let own = own.clone().find(|policy| policy.device == device);
    own.cloned().unwrap_or_else(|| pb::OutagePolicy {
        device: device.to_owned(),
        action: pb::OutageAction::Stall as i32,
        error_after_ms: 0,
    })
}

/// Whether a VM's device is a disk.
///
/// # Errors
/// When the VM has no such device.
pub fn check_device(spec: &pb::VmSpec, vm: &Name, device: &str) -> Result<bool, CommandError> {
    if devices(spec).any(|(name, _)| name == device) {
        return Ok(spec.disks.iter().any(|disk| disk.name == device));
    }
    let names: Vec<&str> = devices(spec).map(|(name, _)| name).collect();
    Err(CommandError::NoDevice {
        vm: vm.id.clone(),
        device: device.to_owned(),
        devices: match names.is_empty() {
            true => "none".to_owned(),
            false => names.join(", "),
        },
    })
}

/// Changes what is done in outages of a device.
///
/// # Errors
/// When there is no such device, or the VM changed.
pub async fn update_device(
    store: &SharedStore,
    (vm, device): &(Name, String),
    etag: &str,
    request: &RequestKey,
    validate_only: bool,
    policy: pb::OutagePolicy,
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
        check_device(spec, vm, device)?;
        spec.outage_policies.retain(|own| own.device != *device);
        let is_default = matches!(
            policy.action(),
            pb::OutageAction::Unspecified | pb::OutageAction::Stall
        );
        if !is_default {
            spec.outage_policies.push(pb::OutagePolicy {
                device: device.clone(),
                ..policy.clone()
            });
        }
        record.vm.generation += 1;
        let target = format!("{vm}/devices/{device}");
        let kind = pb::OperationKind::UpdateDevice;
        let mut operation = model::new_operation(kind, &target, record.vm.generation);
        if validate_only {
            return Ok(validated(operation));
        }
        let transaction = request
            .begin(crate::store::Transaction::new(), &mut operation)
            .if_unchanged(key(vm), revision)
            .put(key(vm), record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}
