//! Quotas: what a project may have is compared with what it has in the transaction that makes more.
//!
//! What it has is counted from the records, so nothing has to be counted down and no count can be
//! wrong. Two that make something at the same time must see each other: both write the project's fence,
//! so one of them begins again.

use api::controller as pb;

use super::CommandError;
use crate::model::{
    self, NetworkRecord, ProjectRecord, VmRecord, VolumeRecord, prefix, project_key,
    quota_fence_key,
};
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};
use api::names::DEFAULT_PROJECT;

/// Adds to `transaction` that `project` is there and stays there, and that it may have `more`.
///
/// # Errors
/// When there is no such project, or it would have more than it may.
pub(super) async fn admit(
    store: &SharedStore,
    project: &str,
    more: &pb::QuotaUsage,
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    let key = project_key(project);
    let Some(item) = store.get(&key).await? else {
        let explicit = store.get(model::EXPLICIT_PROJECTS).await?.is_some();
        if explicit && project != DEFAULT_PROJECT {
            return Err(CommandError::NoSuchProject {
                project: project.to_owned(),
            });
        }
        return Ok(transaction);
    };
    let record: ProjectRecord = decode(&item.key, &item.value)?;
    if record.deleting {
        return Err(CommandError::NoSuchProject {
            project: project.to_owned(),
        });
    }
    transaction = transaction.if_unchanged(key, item.revision);
    let quota = record.project.quota.unwrap_or_default();
    if quota == pb::Quota::default() {
        return Ok(transaction);
    }
    let fence = quota_fence_key(project);
    transaction = match store.get(&fence).await? {
        Some(item) => transaction.if_unchanged(fence.clone(), item.revision),
        None => transaction.if_absent(fence.clone()),
    };
    check(project, &quota, &usage(store, project).await?, more)?;
    Ok(transaction.put(fence, vec![]))
}

/// What a project has, counted.
///
/// # Errors
/// When the store fails.
pub async fn usage(store: &SharedStore, project: &str) -> Result<pb::QuotaUsage, CommandError> {
    let mut usage = pb::QuotaUsage::default();
    let below = |prefix: &str| Range::all(format!("{prefix}{project}/"));
    for item in store.list(below(prefix::VMS)).await?.items {
        let record: VmRecord = decode(&item.key, &item.value)?;
        add(&mut usage, &of_vm(&record.vm.spec.unwrap_or_default()));
    }
    for item in store.list(below(prefix::VOLUMES)).await?.items {
        let record: VolumeRecord = decode(&item.key, &item.value)?;
        let spec = record.volume.spec.unwrap_or_default();
        let status = record.volume.status.unwrap_or_default();
        let bytes = spec
            .size_bytes
            .max(status.size_bytes)
            .max(record.wanted_bytes);
        add(&mut usage, &of_volume(bytes));
    }
    for item in store.list(below(prefix::NETWORKS)).await?.items {
        let _: NetworkRecord = decode(&item.key, &item.value)?;
        usage.networks += 1;
    }
    Ok(usage)
}

/// What a VM counts for.
pub(super) fn of_vm(spec: &pb::VmSpec) -> pb::QuotaUsage {
    let complete = model::complete_spec(spec.clone());
    pb::QuotaUsage {
        vms: 1,
        vcpus: complete.vcpus.into(),
        memory_bytes: complete.memory_bytes,
        ..Default::default()
    }
}

/// What a volume counts for. One whose size is its source's counts with it once that is known.
pub(super) fn of_volume(size_bytes: u64) -> pb::QuotaUsage {
    pb::QuotaUsage {
        volumes: 1,
        volume_bytes: size_bytes,
        ..Default::default()
    }
}

fn add(usage: &mut pb::QuotaUsage, more: &pb::QuotaUsage) {
    usage.vms += more.vms;
    usage.vcpus += more.vcpus;
    usage.memory_bytes = usage.memory_bytes.saturating_add(more.memory_bytes);
    usage.volumes += more.volumes;
    usage.volume_bytes = usage.volume_bytes.saturating_add(more.volume_bytes);
    usage.networks += more.networks;
}

fn check(
    project: &str,
    quota: &pb::Quota,
    used: &pb::QuotaUsage,
    more: &pb::QuotaUsage,
) -> Result<(), CommandError> {
    let figures = [
        ("vms", quota.vms, used.vms, more.vms),
        ("vcpus", quota.vcpus, used.vcpus, more.vcpus),
        (
            "memory_bytes",
            quota.memory_bytes,
            used.memory_bytes,
            more.memory_bytes,
        ),
        ("volumes", quota.volumes, used.volumes, more.volumes),
        (
            "volume_bytes",
            quota.volume_bytes,
            used.volume_bytes,
            more.volume_bytes,
        ),
        ("networks", quota.networks, used.networks, more.networks),
    ];
    for (figure, limit, used, more) in figures {
        // What is over its quota already may still get what the quota is not about.
        if limit != 0 && more != 0 && used.saturating_add(more) > limit {
            return Err(CommandError::QuotaExceeded {
                project: project.to_owned(),
                figure,
                limit,
                used,
                asked: more,
            });
        }
    }
    Ok(())
}

/// Whether anything is in a project.
pub(super) async fn is_empty(store: &SharedStore, project: &str) -> Result<bool, CommandError> {
    for collection in model::PROJECT_COLLECTIONS {
        let range = Range {
            limit: 1,
            ..Range::all(format!("{collection}{project}/"))
        };
        if !store.list(range).await?.items.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}
