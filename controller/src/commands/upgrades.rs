//! Exchanging device daemons for another version: work of the host that runs them.

use api::controller as pb;
use api::names::DEFAULT_PROJECT;
use api::node::{self, start_job_request::Work};
use api::validate::UpgradeTarget;

use super::disks::with_jobs;
use super::{CommandError, RequestKey, get_host, get_vm, validated, with_retry};
use crate::model;
use crate::store::{Range, SharedStore, Transaction};

/// Instead of a host's id.
const ALL_HOSTS: &str = "-";

/// Wants daemons exchanged.
///
/// # Errors
/// When there is no such VM or host, or the VM does not run.
pub async fn upgrade_devices(
    store: &SharedStore,
    target: &UpgradeTarget,
    request: &pb::UpgradeDevicesRequest,
) -> Result<pb::Operation, CommandError> {
    let project = match target {
        UpgradeTarget::Device(vm, _) | UpgradeTarget::Vm(vm) => &vm.project,
        UpgradeTarget::Host(_) => DEFAULT_PROJECT,
    };
    let key = RequestKey::new(project, &request.request_id, "UpgradeDevices", request);
    with_retry(|| async {
        if let Some(earlier) = key.earlier(store).await? {
            return Ok(earlier);
        }
        let mut then = Vec::new();
        let (host, vm_ids, device) = match target {
            UpgradeTarget::Host(id) if id == ALL_HOSTS => {
                let listed = store.list(Range::all(model::HOSTS)).await?.items;
                let mut ids = listed
                    .iter()
                    .map(|item| model::host_id(&item.key).to_owned());
                let Some(first) = ids.next() else {
                    return Err(CommandError::NotFound {
                        what: "a host".to_owned(),
                    });
                };
                then = ids.collect();
                (first, Vec::new(), String::new())
            }
            UpgradeTarget::Host(id) => {
                get_host(store, id).await?;
                (id.clone(), Vec::new(), String::new())
            }
            UpgradeTarget::Vm(vm) | UpgradeTarget::Device(vm, _) => {
                let record = get_vm(store, vm).await?.record;
                let phase = record.status().phase();
                if !matches!(phase, pb::VmPhase::Running | pb::VmPhase::Paused) {
                    return Err(CommandError::NotRunning {
                        vm: vm.id.clone(),
                        phase: super::phase_word(phase),
                    });
                }
                let device = match target {
                    UpgradeTarget::Device(_, device) => device.clone(),
                    _ => String::new(),
                };
                (record.host, vec![record.node_id], device)
            }
        };
        let kind = pb::OperationKind::UpgradeDevices;
        let mut operation = model::new_operation(kind, &request.target, 0);
        if request.validate_only {
            return Ok(validated(operation));
        }
        let transaction = key.begin(Transaction::new(), &mut operation);
        let work = Work::Upgrade(node::UpgradeDaemons {
            vm_ids,
            device,
            binary: request.binary.clone(),
            program: request.program.clone(),
            max_unavailable: request.max_unavailable,
            gate_ms: request.gate_ms,
            watch_ms: request.watch_ms,
            drain_ms: request.drain_ms,
            version: request.version.clone(),
        });
        store
            .commit(with_jobs(transaction, &operation, (&host, then), work))
            .await?;
        Ok(operation)
    })
    .await
}
