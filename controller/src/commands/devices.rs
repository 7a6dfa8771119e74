//! Commands on the devices of VMs, whatever kind they are.

use api::controller as pb;
use api::names::Name;

use super::change::{Begun, Change, listed};
use super::{CommandError, RequestKey, with_retry};
use crate::store::{SharedStore, Transaction};

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
    Err(CommandError::NoDevice {
        vm: vm.id.clone(),
        device: device.to_owned(),
        devices: listed(devices(spec).map(|(name, _)| name)),
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
        let mut changing = match Change::begin(store, vm, etag, request).await? {
            Begun::Before(operation) => return Ok(*operation),
            Begun::Now(changing) => changing,
        };
        let spec = changing.spec();
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
        let (kind, part) = (pb::OperationKind::UpdateDevice, format!("devices/{device}"));
        let (part, transaction) = ((vm, part.as_str()), Transaction::new());
        changing
            .commit(store, part, kind, request, validate_only, transaction)
            .await
    })
    .await
}
