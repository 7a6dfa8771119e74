//! The audit log: a bounded queue of entries and a task that stores them, many in one transaction. Who
//! waits for an answer waits for a place in the queue, so entries are never dropped while the store
//! works; how many could not be kept is logged.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::api::controller as pb;
use ::api::errors;
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::auth::Principal;
use store::{Range, SharedStore, StoreError, Transaction};

/// Entries are below this, and their names are their keys.
pub const PREFIX: &str = "audit/";
/// Entries that wait to be stored.
const QUEUE: usize = 4_096;
/// Entries in one transaction; etcd takes 128 operations.
const BATCH: usize = 100;
/// Entries kept.
const MAX_ENTRIES: u64 = 100_000;
/// Beyond that, so many are removed at once.
const SLACK: u64 = 1_000;
/// A store that fails is given this long, so often; then the entries of a batch are lost.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const MAX_RETRIES: u32 = 20;

/// Where entries go. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Audit {
    queue: Option<mpsc::Sender<pb::AuditEntry>>,
    lost: Arc<AtomicU64>,
}

impl Audit {
    /// Keeps entries in `store`, on the runtime that this is called on.
    pub fn start(store: SharedStore) -> Self {
        let (queue, entries) = mpsc::channel(QUEUE);
        tokio::spawn(keep(store, entries));
        Self {
            queue: Some(queue),
            lost: Arc::default(),
        }
    }

    /// Keeps nothing.
    pub fn off() -> Self {
        Self {
            queue: None,
            lost: Arc::default(),
        }
    }

    async fn put(&self, entry: pb::AuditEntry) {
        if let Some(queue) = &self.queue
            && queue.send(entry).await.is_err()
        {
            self.lose();
        }
    }

    /// Without waiting.
    fn put_now(&self, entry: pb::AuditEntry) {
        if let Some(queue) = &self.queue
            && queue.try_send(entry).is_err()
        {
            self.lose();
        }
    }

    fn lose(&self) {
        let lost = self.lost.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::error!(lost, "an audit entry could not be kept");
    }
}

/// The entry of a request that is under way. Dropped before it was answered, it says that the caller
/// hung up: what was asked for may have happened.
pub(super) struct Pending {
    audit: Audit,
    entry: Option<pb::AuditEntry>,
    begun: Instant,
    noted: bool,
}

impl Pending {
    /// Not worth being kept yet.
    pub(super) fn begin(audit: &Audit, entry: pb::AuditEntry) -> Self {
        Self {
            audit: audit.clone(),
            entry: Some(entry),
            begun: Instant::now(),
            noted: false,
        }
    }

    /// It will be kept.
    pub(super) fn note(&mut self) {
        self.noted = true;
    }

    pub(super) fn caller(&mut self, caller: &Principal) {
        if let Some(entry) = &mut self.entry {
            entry.caller = caller.name.clone();
            entry.roles = caller
                .roles
                .iter()
                .map(|role| role.word().to_owned())
                .collect();
        }
    }

    pub(super) fn resource(&mut self, resource: &str) {
        if let Some(entry) = &mut self.entry {
            entry.resource = resource.to_owned();
        }
    }

    /// Keeps it with what the request was answered; `None` is success.
    pub(super) async fn answered(mut self, status: Option<&Status>) {
        let Some(mut entry) = self.finished() else {
            return;
        };
        if let Some(status) = status {
            entry.code = status.code() as i32;
            entry.reason = errors::reason(status).unwrap_or_default();
        }
        self.audit.put(entry).await;
    }

    fn finished(&mut self) -> Option<pb::AuditEntry> {
        let mut entry = self.entry.take().filter(|_| self.noted)?;
        entry.duration_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        Some(entry)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(mut entry) = self.finished() {
            entry.code = Code::Cancelled as i32;
            entry.reason = "CALLER_HUNG_UP".to_owned();
            self.audit.put_now(entry);
        }
    }
}

/// Until the gate is gone.
async fn keep(store: SharedStore, mut entries: mpsc::Receiver<pb::AuditEntry>) {
    let mut kept = None;
    let mut batch = Vec::with_capacity(BATCH);
    while entries.recv_many(&mut batch, BATCH).await > 0 {
        let count = batch.len() as u64;
        let mut transaction = Transaction::new();
        for mut entry in batch.drain(..) {
            entry.name = new_name();
            transaction = transaction.put(entry.name.clone(), entry.encode_to_vec());
        }
        commit(&store, &transaction, count).await;
        let stored = match kept {
            Some(stored) => stored + count,
            None => count_all(&store).await,
        };
        kept = Some(stored);
        if stored > MAX_ENTRIES + SLACK {
            kept = remove_oldest(&store, stored - MAX_ENTRIES)
                .await
                .map(|removed| stored - removed);
        }
    }
}

async fn commit(store: &SharedStore, transaction: &Transaction, count: u64) {
    for _ in 0..MAX_RETRIES {
        match store.commit(transaction.clone()).await {
            Ok(_) => return,
            Err(error) => {
                let error = crate::with_source(&error);
                tracing::warn!(%error, "cannot store audit entries");
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
    tracing::error!(count, "audit entries are lost: the store takes none");
}

async fn count_all(store: &SharedStore) -> u64 {
    let mut count = 0;
    let mut after = None;
    loop {
        let range = Range {
            prefix: PREFIX.to_owned(),
            after: after.take(),
            limit: 5_000,
            ..Range::default()
        };
        // One that cannot be counted now is counted with the next batch that is too many.
        let Ok(listing) = store.list(range).await else {
            return count;
        };
        count += listing.items.len() as u64;
        after = listing.items.last().map(|item| item.key.clone());
        if !listing.more || after.is_none() {
            return count;
        }
    }
}

/// How many are gone; `None` makes the next batch count again.
async fn remove_oldest(store: &SharedStore, mut surplus: u64) -> Option<u64> {
    let mut removed = 0;
    while surplus > 0 {
        let range = Range {
            prefix: PREFIX.to_owned(),
            limit: BATCH.min(surplus as usize),
            ..Range::default()
        };
        let items = store.list(range).await.ok()?.items;
        if items.is_empty() {
            return None;
        }
        let count = items.len() as u64;
        let transaction = items
            .into_iter()
            .fold(Transaction::new(), |transaction, item| {
                transaction.delete(item.key)
            });
        let done: Result<u64, StoreError> = store.commit(transaction).await;
        done.ok()?;
        removed += count;
        surplus = surplus.saturating_sub(count);
    }
    Some(removed)
}

/// Names sort by the time of their making: microseconds in hexadecimal, then chance.
fn new_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let micros = since.unwrap_or_default().as_micros();
    let chance = uuid::Uuid::new_v4().simple().to_string();
    format!("{PREFIX}{micros:015x}-{}", &chance[..8])
}
