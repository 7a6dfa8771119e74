//! Everything that is wanted, read from the store page by page.

use api::controller as pb;
use prost::Message;

use super::decode;
use crate::model::{
    self, HostRecord, JobRecord, NetworkRecord, SecurityGroupRecord, VmRecord, VolumeRecord, prefix,
};
use crate::plan::{Desired, Stored};
use crate::store::{Item, Range, SharedStore, StoreError};

/// Records read in one go.
const PAGE: usize = 500;

/// Everything that is wanted. What changes while it is read is there as it was or as it is.
pub async fn load(store: &SharedStore) -> Result<Desired, StoreError> {
    let mut desired = Desired::default();
    let mut pages = Pages::of(store, model::HOSTS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<HostRecord>(&item)?;
            desired.hosts.insert(stored.record.id().to_owned(), stored);
        }
    }
    let mut pages = Pages::of(store, model::EVICTIONS);
    while let Some(items) = pages.next().await? {
        let evictions = items.iter().filter_map(|item| {
            let of = item.key.trim_start_matches(model::EVICTIONS);
            let (host, node_id) = of.split_once('/')?;
            Some((host.to_owned(), node_id.to_owned()))
        });
        desired.evictions.extend(evictions);
    }
    // Operations come first: each was stored together with its target, so a target that is missing
    // from what is read after it was deleted, and is not merely too new to be seen.
    let mut pages = Pages::of(store, prefix::PENDING);
    while let Some(items) = pages.next().await? {
        for item in items {
            let id = item.key.trim_start_matches(prefix::PENDING);
            let Some(item) = store.get(&format!("{}{id}", prefix::OPERATIONS)).await? else {
                continue;
            };
            let operation: pb::Operation = decode(&item.key, &item.value)?;
            if let Some(job) = store.get(&model::job_key(&operation.name)).await? {
                let record: JobRecord = decode(&job.key, &job.value)?;
                desired.jobs.insert(operation.name.clone(), record);
            }
            desired.pending.insert(operation.name.clone(), operation);
        }
    }
    let mut pages = Pages::of(store, prefix::VMS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<VmRecord>(&item)?;
            let name = stored.record.vm.name.clone();
            desired.vms.insert(name, stored.into());
        }
    }
    let mut pages = Pages::of(store, prefix::VOLUMES);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<VolumeRecord>(&item)?;
            let name = stored.record.volume.name.clone();
            desired.volumes.insert(name, stored);
        }
    }
    let mut pages = Pages::of(store, prefix::NETWORKS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<NetworkRecord>(&item)?;
            let name = stored.record.network.name.clone();
            desired.networks.insert(name, stored);
        }
    }
    let mut pages = Pages::of(store, prefix::SECURITY_GROUPS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<SecurityGroupRecord>(&item)?;
            let name = stored.record.group.name.clone();
            desired.security_groups.insert(name, stored);
        }
    }
    Ok(desired)
}

fn stored<T: Message + Default>(item: &Item) -> Result<Stored<T>, StoreError> {
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// All of a collection, some at a time; what changes meanwhile is there as it was or as it is.
pub(super) struct Pages<'a> {
    store: &'a SharedStore,
    range: Option<Range>,
}

impl<'a> Pages<'a> {
    pub(super) fn of(store: &'a SharedStore, prefix: &str) -> Self {
        let range = Range {
            limit: PAGE,
            ..Range::all(prefix)
        };
        Self {
            store,
            range: Some(range),
        }
    }

    pub(super) async fn next(&mut self) -> Result<Option<Vec<Item>>, StoreError> {
        let Some(range) = self.range.take() else {
            return Ok(None);
        };
        let listing = self.store.list(range.clone()).await?;
        if listing.more {
            let after = listing.items.last().map(|item| item.key.clone());
            self.range = Some(Range { after, ..range });
        }
        Ok(Some(listing.items))
    }
}
