//! Everything that is wanted, in memory: read from the store once and kept up by its watch, so that a
//! look at 50,000 VMs reads what changed and not all of them again.
//!
//! What it holds may be a little old. Whoever acts on it compares revisions, as with anything read.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use api::controller as pb;
use prost::Message;

use crate::focus::Focus;
use crate::model::{self, prefix};
use crate::plan::{Desired, Index, Stored};
use crate::reconciler::{self, decode, with_source};
use crate::store::{Change, SharedStore, StoreError, Watch};

/// See the module.
pub struct Cache {
    store: SharedStore,
    desired: Desired,
    index: Index,
    watch: Option<Watch>,
}

impl Cache {
    /// Of `store`, empty until [`Cache::refresh`].
    pub fn new(store: SharedStore) -> Self {
        Self {
            store,
            desired: Desired::default(),
            index: Index::default(),
            watch: None,
        }
    }

    /// Takes in all changes that have arrived, and says to `focus` what they are about; reads everything
    /// the first time, and again when changes were missed.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn refresh(&mut self, focus: &mut Focus) -> Result<(), StoreError> {
        loop {
            let Some(watch) = &mut self.watch else {
                // From before the first record is read: what changes meanwhile comes again.
                let revision = *self.store.revision().borrow();
                let watch = self.store.watch("", revision).await?;
                self.desired = reconciler::load(&self.store).await?;
                self.index = Index::of(&self.desired);
                self.watch = Some(watch);
                focus.everything(&self.desired);
                continue;
            };
            match watch.try_recv() {
                Ok(change) => self.take_in(Some(change), focus)?,
                Err(tokio::sync::mpsc::error::TryRecvError::Empty) => return Ok(()),
                Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => self.watch = None,
            }
        }
    }

    /// Waits for a change and takes it in. May be dropped at any time.
    ///
    /// # Errors
    /// When the store holds what cannot be read.
    pub async fn changed(&mut self, focus: &mut Focus) -> Result<(), StoreError> {
        let change = match &mut self.watch {
            Some(watch) => watch.recv().await,
            // To be read anew.
            None => return Ok(()),
        };
        self.take_in(change, focus)
    }

    /// What is wanted.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Where things are in that.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// What is wanted, for what is not in the store.
    pub fn desired_mut(&mut self) -> &mut Desired {
        &mut self.desired
    }

    fn take_in(
        &mut self,
        change: Option<Result<Change, StoreError>>,
        focus: &mut Focus,
    ) -> Result<(), StoreError> {
        match change {
            Some(Ok(change)) => self.apply(change, focus),
            Some(Err(error)) => {
                tracing::info!(error = %with_source(&error), "the store is read again");
                self.watch = None;
                Ok(())
            }
            None => {
                self.watch = None;
                Ok(())
            }
        }
    }

    fn apply(&mut self, change: Change, focus: &mut Focus) -> Result<(), StoreError> {
        let desired = &mut self.desired;
        let index = &mut self.index;
        let Some((collection, rest)) = change.key.split_once('/') else {
            return Ok(());
        };
        let name = || {
            let (project, id) = rest.split_once('/').unwrap_or(("", rest));
            format!("projects/{project}/{collection}/{id}")
        };
        match format!("{collection}/").as_str() {
            prefix::VMS => {
                let name = name();
                focus.name(&name);
                if let Some(before) = put(&mut desired.vms, &name, &change)? {
                    let before = before.stored.as_ref().map(|stored| &stored.record);
                    let after = desired.vms.get(&name).map(|stored| &stored.record);
                    index.vm(&name, before, after);
                }
            }
            prefix::VOLUMES => {
                let name = name();
                focus.name(&name);
                if let Some(before) = put(&mut desired.volumes, &name, &change)? {
                    let before = before.stored.as_ref().map(|stored| &stored.record);
                    let after = desired.volumes.get(&name).map(|stored| &stored.record);
                    index.volume(&name, before, after);
                }
                // A VM may wait for it.
                focus.unplaced(index);
            }
            prefix::NETWORKS => drop(put(&mut desired.networks, &name(), &change)?),
            prefix::SECURITY_GROUPS => drop(put(&mut desired.security_groups, &name(), &change)?),
            model::HOSTS => {
                put(&mut desired.hosts, rest, &change)?;
                focus.host(rest, index);
            }
            model::EVICTIONS => {
                if let Some((host, node_id)) = rest.split_once('/') {
                    let eviction = (host.to_owned(), node_id.to_owned());
                    match change.value {
                        Some(_) => desired.evictions.insert(eviction),
                        None => desired.evictions.remove(&eviction),
                    };
                    focus.told(host, index.vm_of(node_id).unwrap_or(node_id));
                }
            }
            prefix::OPERATIONS => {
                let operation = match &change.value {
                    Some(value) => Some(decode::<pb::Operation>(&change.key, value)?),
                    None => None,
                };
                let operation = operation.filter(|operation| !operation.done);
                let before = desired.pending.get(&change.key);
                index.operation(before, operation.as_ref());
                if let Some(metadata) = operation.as_ref().and_then(|of| of.metadata.as_ref()) {
                    focus.name(&metadata.target);
                }
                match operation {
                    Some(operation) => desired.pending.insert(change.key, operation),
                    None => desired.pending.remove(&change.key),
                };
            }
            prefix::JOBS => {
                let operation = format!("{}{rest}", prefix::OPERATIONS);
                if let Some(job) = desired.jobs.get(&operation) {
                    focus.job(desired.host_of_job(job));
                }
                match &change.value {
                    Some(value) => {
                        let record = decode(&change.key, value)?;
                        desired.jobs.insert(operation, record);
                    }
                    None => {
                        desired.jobs.remove(&operation);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// What was there before a change.
struct Before<S> {
    stored: Option<S>,
}

/// A change that is older than what was read, or the same, changes nothing.
fn put<T, S>(
    records: &mut BTreeMap<String, S>,
    name: &str,
    change: &Change,
) -> Result<Option<Before<S>>, StoreError>
where
    T: Message + Default,
    S: Borrow<Stored<T>> + From<Stored<T>>,
{
    let known: Option<&Stored<T>> = records.get(name).map(Borrow::borrow);
    if known.is_some_and(|known| known.revision >= change.revision) {
        return Ok(None);
    }
    let stored = match &change.value {
        Some(value) => {
            let record = decode(&change.key, value)?;
            let revision = change.revision;
            records.insert(name.to_owned(), Stored { record, revision }.into())
        }
        None => records.remove(name),
    };
    Ok(Some(Before { stored }))
}
