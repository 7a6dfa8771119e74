//! Commands on the NICs of VMs.

use api::controller as pb;
use api::names::Name;

use super::change::{Begun, Change, listed};
use super::{CommandError, RequestKey, addresses, with_retry};
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
        let mut changing = match Change::begin(store, vm, etag, request).await? {
            Begun::Before(operation) => return Ok(*operation),
            Begun::Now(changing) => changing,
        };
        let spec = changing.spec();
        let before = find_nic(spec, vm, nic)?.clone();
        spec.nics
            .iter_mut()
            .filter(|found| found.name == *nic)
            .for_each(&change);
        let after = find_nic(spec, vm, nic)?;
        let transaction = addresses::reclaim(store, vm, &before, after).await?;
        let (kind, part) = (pb::OperationKind::UpdateNic, format!("nics/{nic}"));
        let part = (vm, part.as_str());
        changing
            .commit(store, part, kind, request, validate_only, transaction)
            .await
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
    found.ok_or_else(|| CommandError::NoNic {
        vm: vm.id.clone(),
        nic: nic.to_owned(),
        nics: listed(spec.nics.iter().map(|nic| nic.name.as_str())),
    })
}
