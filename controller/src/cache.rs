//! Everything that is wanted, in memory: read from the store once and kept up by its watch, so that a
//! look at 50,000 VMs reads what changed and not all of them again.
//!
//! What it holds may be a little old. Whoever acts on it compares revisions, as with anything read.

use api::controller as pb;
use prost::Message;

use crate::model::{self, prefix};
use crate::plan::{Desired, Stored};
use crate::reconciler::{self, decode, with_source};
use crate::store::{Change, SharedStore, StoreError, Watch};

/// See the module.
pub struct Cache {
    store: SharedStore,
    desired: Desired,
    watch: Option<Watch>,
}

impl Cache {
    /// Of `store`, empty until [`Cache::refresh`].
    pub fn new(store: SharedStore) -> Self {
        Self {
            store,
            desired: Desired::default(),
            watch: None,
        }
    }

    /// Takes in all changes that have arrived; reads everything the first time, and again when changes
    /// were missed.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn refresh(&mut self) -> Result<(), StoreError> {
        loop {
            let Some(watch) = &mut self.watch else {
                // From before the first record is read: what changes meanwhile comes again.
                let revision = *self.store.revision().borrow();
                let watch = self.store.watch("", revision).await?;
                self.desired = reconciler::load(&self.store).await?;
                self.watch = Some(watch);
                continue;
            };
            match watch.try_recv() {
                Ok(change) => self.take_in(Some(change))?,
                Err(tokio::sync::mpsc::error::TryRecvError::Empty) => return Ok(()),
                Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => self.watch = None,
            }
        }
    }

    /// Waits for a change and takes it in. May be dropped at any time.
    ///
    /// # Errors
    /// When the store holds what cannot be read.
    pub async fn changed(&mut self) -> Result<(), StoreError> {
        let change = match &mut self.watch {
            Some(watch) => watch.recv().await,
            // To be read anew.
            None => return Ok(()),
        };
        self.take_in(change)
    }

    /// What is wanted.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The same, for what is not in the store.
    pub fn desired_mut(&mut self) -> &mut Desired {
        &mut self.desired
    }

    fn take_in(&mut self, change: Option<Result<Change, StoreError>>) -> Result<(), StoreError> {
        match change {
            Some(Ok(change)) => self.apply(change),
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

    fn apply(&mut self, change: Change) -> Result<(), StoreError> {
        let desired = &mut self.desired;
        let Some((collection, rest)) = change.key.split_once('/') else {
            return Ok(());
        };
        let name = || {
            let (project, id) = rest.split_once('/').unwrap_or(("", rest));
            format!("projects/{project}/{collection}/{id}")
        };
        match format!("{collection}/").as_str() {
            prefix::VMS => put(&mut desired.vms, name(), &change)?,
            prefix::VOLUMES => put(&mut desired.volumes, name(), &change)?,
            prefix::NETWORKS => put(&mut desired.networks, name(), &change)?,
            prefix::SECURITY_GROUPS => put(&mut desired.security_groups, name(), &change)?,
            model::HOSTS => put(&mut desired.hosts, rest.to_owned(), &change)?,
            model::EVICTIONS => {
                if let Some((host, node_id)) = rest.split_once('/') {
                    let eviction = (host.to_owned(), node_id.to_owned());
                    match change.value {
                        Some(_) => desired.evictions.insert(eviction),
                        None => desired.evictions.remove(&eviction),
                    };
                }
            }
            prefix::OPERATIONS => {
                let operation = match &change.value {
                    Some(value) => Some(decode::<pb::Operation>(&change.key, value)?),
                    None => None,
                };
                match operation.filter(|operation| !operation.done) {
                    Some(operation) => desired.pending.insert(change.key, operation),
                    None => desired.pending.remove(&change.key),
                };
            }
            prefix::JOBS => {
                let operation = format!("{}{rest}", prefix::OPERATIONS);
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

/// A change that is older than what was read, or the same, changes nothing.
fn put<T: Message + Default>(
    records: &mut std::collections::BTreeMap<String, Stored<T>>,
    name: String,
    change: &Change,
) -> Result<(), StoreError> {
    let known = records.get(&name);
    if known.is_some_and(|known| known.revision >= change.revision) {
        return Ok(());
    }
    match &change.value {
        Some(value) => {
            let record = decode(&change.key, value)?;
            let revision = change.revision;
            records.insert(name, Stored { record, revision });
        }
        None => {
            records.remove(&name);
        }
    }
    Ok(())
}
