//! What is kept for a while and then goes: operations that are done, and events.

use std::time::Duration;

use api::controller as pb;

use super::loading::Pages;
use super::{decode, with_source};
use crate::model::{self, prefix};
use crate::store::{Item, SharedStore, StoreError, Transaction};

/// How often what is too much goes.
pub(super) const COLLECT_INTERVAL: Duration = Duration::from_secs(60);
/// Done operations and events that are kept.
const MAX_OPERATIONS: usize = 1_000;
const MAX_EVENTS: usize = 10_000;
/// Records removed in one transaction; etcd takes 128 operations.
const COLLECT_BATCH: usize = 50;

/// Removes what is too much, or says why it cannot.
pub(super) async fn collect_all(store: SharedStore) {
    if let Err(error) = collect(&store).await {
        tracing::warn!(error = %with_source(&error), "cannot remove old records");
    }
}

/// Removes the oldest done operations, with their request ids, and the oldest events.
async fn collect(store: &SharedStore) -> Result<(), StoreError> {
    remove_oldest(store, prefix::OPERATIONS, MAX_OPERATIONS, |item, keys| {
        let operation: pb::Operation = decode(&item.key, &item.value)?;
        if !operation.done {
            return Ok(());
        }
        keys.push(item.key);
        let metadata = operation.metadata.unwrap_or_default();
        let project = metadata.target.split('/').nth(1);
        if let Some(project) = project.filter(|_| !metadata.request_id.is_empty()) {
            keys.push(model::request_key(project, &metadata.request_id));
        }
        Ok(())
    })
    .await?;
    remove_oldest(store, prefix::EVENTS, MAX_EVENTS, |item, keys| {
        keys.push(item.key);
        Ok(())
    })
    .await
}

/// Removes what `keys_of` says of each of the oldest of a collection, beyond those that are kept.
async fn remove_oldest(
    store: &SharedStore,
    prefix: &str,
    kept: usize,
    keys_of: impl Fn(Item, &mut Vec<String>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut count = 0;
    let mut pages = Pages::of(store, prefix);
    while let Some(items) = pages.next().await? {
        count += items.len();
    }
    let mut surplus = count.saturating_sub(kept);
    let mut pages = Pages::of(store, prefix);
    while surplus > 0
        && let Some(items) = pages.next().await?
    {
        let mut keys = Vec::new();
        for item in items.into_iter().take(surplus) {
            surplus -= 1;
            keys_of(item, &mut keys)?;
        }
        for batch in keys.chunks(COLLECT_BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |transaction, key| {
                transaction.delete(key)
            });
            store.commit(transaction).await?;
        }
    }
    Ok(())
}
