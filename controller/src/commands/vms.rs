//! Commands on VMs.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::pools::{count_placements, may_run};
use super::{
    CommandError, Place, Placing, RequestKey, addresses, attach, check_etag, get_vm, no_host,
    place, quota, validated, visible_vm, vm_request, with_retry,
};
use crate::hosts::Hosts;
use crate::model::{self, VmRecord, VolumeRecord, key, short};
use crate::plan::{Fleet, Stored};
use crate::reconciler::decode;
use crate::scheduler;
use crate::store::{SharedStore, Transaction};

/// Hosts of which a VM that is only checked is told.
const MAX_TOLD: usize = 1_000;

/// Stores a VM, not started, and chooses a host for it. While none can have it that may be able to in a
/// moment, it waits for one.
///
/// # Errors
/// When the name is taken, the spec names a volume that is not there, or no host can have it.
pub async fn create_vm(
    store: &SharedStore,
    hosts: &Hosts,
    name: &Name,
    spec: &pb::VmSpec,
    request: &RequestKey,
    validate_only: bool,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        if store.get(&key(name)).await?.is_some() {
            // By this very request, if it was sent twice and the other one was faster.
            return request
                .earlier(store)
                .await?
                .ok_or_else(|| CommandError::AlreadyExists { what: short(name) });
        }
        let transaction = require_volumes(store, name, spec, Transaction::new()).await?;
        let uid = model::new_uid();
        let mut spec = model::complete_spec(spec.clone());
        let transaction = addresses::claim(store, name, &uid, &mut spec, transaction).await?;
        let more = quota::of_vm(&spec);
        let transaction = quota::admit(store, &name.project, &more, transaction).await?;
        let mut operation = model::new_operation(pb::OperationKind::CreateVm, name, 1);
        if validate_only {
            return Ok(validated(
                explained(store, hosts, name, &spec, operation).await?,
            ));
        }
        let (place, unplaced) = find_host(store, hosts, name, &spec).await?;
        let node_id = model::node_id(name, &uid);
        let seed = model::take_seed(&mut spec, name, &uid);
        let mut record = VmRecord {
            vm: pb::Vm {
                name: name.to_string(),
                uid,
                generation: 1,
                create_time: Some(model::now()),
                spec: Some(spec),
                desired_power: pb::DesiredPower::Off as i32,
                ..Default::default()
            },
            node_id: node_id.clone(),
            unplaced,
            ..Default::default()
        };
        if let Some(place) = &place {
            place.note(&mut record);
            count_placements(store, &mut record).await?;
        }
        let event = model::new_event(&name.to_string(), "VM_CREATED", "");
        let node_id = model::node_id_key(name, &node_id);
        let transaction = match seed {
            Some(seed) => transaction.put(model::seed_key(name), seed.encode_to_vec()),
            None => transaction,
        };
        let transaction = request
            .begin(transaction, &mut operation)
            .if_absent(key(name))
            .if_absent(node_id.clone())
            .put(key(name), record.encode_to_vec())
            .put(node_id, name.to_string().into_bytes())
            .put(event.name.clone(), event.encode_to_vec());
        match place {
            Some(place) => {
                let done = store.commit(place.promise(transaction)).await;
                place.settle(store, hosts, done).await?;
            }
            None => drop(store.commit(transaction).await?),
        }
        Ok(operation)
    })
    .await
}

/// With what every host says to a VM.
async fn explained(
    store: &SharedStore,
    hosts: &Hosts,
    name: &Name,
    spec: &pb::VmSpec,
    mut operation: pb::Operation,
) -> Result<pb::Operation, CommandError> {
    if let Some(request) = vm_request(store, name, spec).await? {
        let told = hosts.explain(&request).into_iter().take(MAX_TOLD);
        operation.metadata.get_or_insert_default().placement = told.map(told_verdict).collect();
    }
    Ok(operation)
}

fn told_verdict(verdict: scheduler::Verdict) -> pb::PlacementVerdict {
    let refusals = verdict.refusals.into_iter();
    pb::PlacementVerdict {
        host: verdict.host,
        score: verdict.score,
        refusals: refusals
            .map(|refusal| pb::PlacementRefusal {
                filter: refusal.filter.to_owned(),
                reason: refusal.reason,
                passing: refusal.passing,
            })
            .collect(),
    }
}

/// A host, or why there is none yet.
async fn find_host(
    store: &SharedStore,
    hosts: &Hosts,
    name: &Name,
    spec: &pb::VmSpec,
) -> Result<(Option<Place>, String), CommandError> {
    let Some(request) = vm_request(store, name, spec).await? else {
        return Ok((None, "its volumes have no host yet".to_owned()));
    };
    match place(hosts, &request).await? {
        Placing::Found(place) => Ok((Some(*place), String::new())),
        Placing::None(verdicts) if scheduler::may_pass(&verdicts) => {
            Ok((None, scheduler::words(&verdicts)))
        }
        Placing::None(verdicts) => Err(no_host(&short(name), verdicts)),
    }
}

/// Adds to `transaction` that each volume of `spec` is there and stays there.
async fn require_volumes(
    store: &SharedStore,
    vm: &Name,
    spec: &pb::VmSpec,
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    for (index, disk) in spec.disks.iter().enumerate() {
        let Some(pb::disk::Source::Volume(volume)) = &disk.source else {
            continue;
        };
        let field = format!("vm.spec.disks[{index}].volume");
        let name = Name::parse_volume(volume)
            .ok()
            .filter(|name| name.project == vm.project);
        let Some(name) = name else {
            return Err(CommandError::ForeignVolume {
                field,
                volume: volume.clone(),
            });
        };
        let Some(item) = store.get(&key(&name)).await? else {
            return Err(CommandError::NoSuchVolume {
                field,
                volume: name.id,
            });
        };
        let record: VolumeRecord = decode(&item.key, &item.value)?;
        if record.volume.deleting {
            return Err(CommandError::Deleting { what: short(&name) });
        }
        transaction = transaction.if_unchanged(key(&name), item.revision);
    }
    Ok(transaction)
}

/// Wants a VM to run.
///
/// # Errors
/// When it does not exist, changed, or is being deleted.
pub async fn start_vm(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    request: &RequestKey,
) -> Result<pb::Operation, CommandError> {
    let kind = pb::OperationKind::StartVm;
    set_power(store, name, etag, request, kind, pb::DesiredPower::On).await
}

/// Wants a VM not to run.
///
/// # Errors
/// As [`start_vm`].
pub async fn stop_vm(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    request: &RequestKey,
    force: bool,
) -> Result<pb::Operation, CommandError> {
    let power = if force {
        pb::DesiredPower::OffNow
    } else {
        pb::DesiredPower::Off
    };
    set_power(store, name, etag, request, pb::OperationKind::StopVm, power).await
}

async fn set_power(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    request: &RequestKey,
    kind: pb::OperationKind,
    power: pb::DesiredPower,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let Stored {
            mut record,
            revision,
        } = get_vm(store, name).await?;
        check_etag(name, &record.vm.uid, record.vm.generation, etag)?;
        if record.vm.deleting {
            return Err(CommandError::Deleting { what: short(name) });
        }
        let transaction = match is_start(&record, power) {
            true => attach(store, &mut record, Transaction::new()).await?,
            false => Transaction::new(),
        };
        want_power(&mut record, power);
        let mut operation = model::new_operation(kind, name, record.vm.generation);
        let reason = match kind {
            pb::OperationKind::StartVm => "VM_START_REQUESTED",
            _ => "VM_STOP_REQUESTED",
        };
        let event = model::new_event(&name.to_string(), reason, "");
        let transaction = request
            .begin(transaction, &mut operation)
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// It has surely ended, and is to run: what it is told of its disks may change.
fn is_start(record: &VmRecord, power: pb::DesiredPower) -> bool {
    power == pb::DesiredPower::On && !may_run(record)
}

/// A new generation, unless this is wanted already. What is on its way off stays so.
pub(super) fn want_power(record: &mut VmRecord, power: pb::DesiredPower) {
    use pb::DesiredPower::{Off, OffNow};
    // Whoever says what is wanted now does not want it started again elsewhere.
    record.moving = false;
    let already = match (record.vm.desired_power(), power) {
        (OffNow, Off) => true,
        (wanted, power) => wanted == power,
    };
    if !already {
        record.vm.desired_power = power as i32;
        record.vm.generation += 1;
    }
}

/// Wants a VM to be gone.
///
/// # Errors
/// When it does not exist, changed, or runs and `force` is not given.
pub async fn delete_vm(
    store: &SharedStore,
    fleet: &Fleet,
    name: &Name,
    etag: &str,
    request: &RequestKey,
    force: bool,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let Stored {
            mut record,
            revision,
        } = get_vm(store, name).await?;
        check_etag(name, &record.vm.uid, record.vm.generation, etag)?;
        let phase = visible_vm(&record, fleet)
            .status
            .unwrap_or_default()
            .phase();
        let idle = matches!(
            phase,
            pb::VmPhase::Pending | pb::VmPhase::Stopped | pb::VmPhase::Failed
        );
        let wanted_on = record.vm.desired_power() == pb::DesiredPower::On;
        if !force && !record.vm.deleting && (!idle || wanted_on) {
            let phase = if idle { pb::VmPhase::Starting } else { phase };
            return Err(CommandError::Running {
                vm: name.id.clone(),
                phase: phase_word(phase),
            });
        }
        if !record.vm.deleting {
            record.vm.deleting = true;
            record.vm.generation += 1;
            record.vm.desired_power = pb::DesiredPower::OffNow as i32;
        }
        let generation = record.vm.generation;
        let mut operation = model::new_operation(pb::OperationKind::DeleteVm, name, generation);
        let transaction = request
            .begin(Transaction::new(), &mut operation)
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// `VM_PHASE_RUNNING` as people write it.
pub(crate) fn phase_word(phase: pb::VmPhase) -> String {
    phase
        .as_str_name()
        .trim_start_matches("VM_PHASE_")
        .to_lowercase()
}
