//! The store of a single controller: one redb file. Beside the data it keeps the newest
//! [`LOG_LEN`] changes, so that watchers resume where they were.

use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use tokio::sync::{mpsc, watch};

use super::{Change, Compare, Item, Listing, Range, Store, StoreError, Transaction, Watch, Write};

/// Value: revision (8 bytes, little endian), then the bytes.
const DATA: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("data");
/// (revision, index within the transaction) to the key and, unless it was removed, the value.
const LOG: TableDefinition<'_, (u64, u32), LoggedChange> = TableDefinition::new("log");
type LoggedChange = (&'static str, Option<&'static [u8]>);
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const REVISION: &str = "revision";
/// Highest revision whose changes are gone from the log.
const COMPACTED: &str = "compacted";

/// Revisions in the log. An hour of a busy host; a watcher that was away longer lists again.
const LOG_LEN: u64 = 10_000;
/// Changes read for a watcher in one go, and waiting for it.
const WATCH_BATCH: usize = 64;

/// See the module.
pub struct EmbeddedStore {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    revision: watch::Sender<u64>,
    log_len: u64,
}

impl EmbeddedStore {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with_log(path, LOG_LEN)
    }

    fn open_with_log(path: &Path, log_len: u64) -> Result<Self, StoreError> {
        // It holds seeds' passwords.
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .and_then(|file| file.set_permissions(Permissions::from_mode(0o600)))
            .map_err(backend)?;
        let database = Database::create(path).map_err(backend)?;
        let transaction = database.begin_write().map_err(backend)?;
        transaction.open_table(DATA).map_err(backend)?;
        transaction.open_table(LOG).map_err(backend)?;
        let revision = {
            let meta = transaction.open_table(META).map_err(backend)?;
            meta.get(REVISION)
                .map_err(backend)?
                .map_or(0, |value| value.value())
        };
        transaction.commit().map_err(backend)?;
        let revision = watch::Sender::new(revision);
        Ok(Self {
            inner: Arc::new(Inner {
                database,
                revision,
                log_len,
            }),
        })
    }

    /// redb blocks: on locks and, when committing, on fsync.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(backend)?
    }
}

#[tonic::async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Item>, StoreError> {
        let key = key.to_owned();
        self.blocking(move |inner| inner.get(&key)).await
    }

    async fn list(&self, range: Range) -> Result<Listing, StoreError> {
        self.blocking(move |inner| inner.list(&range)).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        self.blocking(move |inner| inner.commit(&transaction)).await
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        let (sender, receiver) = mpsc::channel(WATCH_BATCH);
        let prefix = prefix.to_owned();
        let first = {
            let prefix = prefix.clone();
            self.blocking(move |inner| inner.changes(&prefix, after))
                .await?
        };
        let store = Self {
            inner: self.inner.clone(),
        };
        tokio::spawn(store.pump(prefix, first, sender));
        Ok(receiver)
    }

    fn revision(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }
}

impl EmbeddedStore {
    /// Feeds one watcher until it hangs up or falls behind the log.
    async fn pump(
        self,
        prefix: String,
        first: Batch,
        sender: mpsc::Sender<Result<Change, StoreError>>,
    ) {
        let mut revision = self.inner.revision.subscribe();
        let mut batch = first;
        loop {
            let after = batch.upto;
            for change in batch.changes {
                if sender.send(Ok(change)).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                changed = revision.wait_for(|newest| *newest > after) => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = sender.closed() => return,
            }
            let range = prefix.clone();
            batch = match self
                .blocking(move |inner| inner.changes(&range, after))
                .await
            {
                Ok(batch) => batch,
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            };
        }
    }
}

/// Changes up to and including revision `upto`.
struct Batch {
    changes: Vec<Change>,
    upto: u64,
}

impl Inner {
    fn get(&self, key: &str) -> Result<Option<Item>, StoreError> {
        let transaction = self.database.begin_read().map_err(backend)?;
        let data = transaction.open_table(DATA).map_err(backend)?;
        let value = data.get(key).map_err(backend)?;
        Ok(value.map(|value| item(key, value.value())))
    }

    fn list(&self, range: &Range) -> Result<Listing, StoreError> {
        let transaction = self.database.begin_read().map_err(backend)?;
        let meta = transaction.open_table(META).map_err(backend)?;
        let revision = meta
            .get(REVISION)
            .map_err(backend)?
            .map_or(0, |value| value.value());
        let data = transaction.open_table(DATA).map_err(backend)?;
        let mut entries = data.range(range.prefix.as_str()..).map_err(backend)?;
        let mut items: Vec<Item> = Vec::new();
        let mut more = false;
        let limit = if range.limit == 0 {
            usize::MAX
        } else {
            range.limit
        };
        if range.reverse {
            // The end of a prefix has no key of its own to begin from, so this reads the whole
            // range; only the short lists of people are read backwards.
            let mut all = Vec::new();
            for entry in entries {
                let (key, value) = entry.map_err(backend)?;
                if !key.value().starts_with(&range.prefix) {
                    break;
                }
                let before = range
                    .after
                    .as_deref()
                    .is_none_or(|after| key.value() < after);
                if before {
                    all.push(item(key.value(), value.value()));
                }
            }
            more = all.len() > limit;
            items = all.into_iter().rev().take(limit).collect();
            return Ok(Listing {
                items,
                more,
                revision,
            });
        }
        if let Some(after) = range
            .after
            .as_deref()
            .filter(|after| *after > range.prefix.as_str())
        {
            entries = data.range(after..).map_err(backend)?;
        }
        for entry in entries {
            let (key, value) = entry.map_err(backend)?;
            if !key.value().starts_with(&range.prefix) {
                break;
            }
            if range
                .after
                .as_deref()
                .is_some_and(|after| key.value() <= after)
            {
                continue;
            }
            if items.len() == limit {
                more = true;
                break;
            }
            items.push(item(key.value(), value.value()));
        }
        Ok(Listing {
            items,
            more,
            revision,
        })
    }

    fn commit(&self, asked: &Transaction) -> Result<u64, StoreError> {
        // redb lets one writer in at a time, so what is compared stays so until the commit.
        let transaction = self.database.begin_write().map_err(backend)?;
        let revision = match self.write(&transaction, asked) {
            Ok(revision) => revision,
            Err(error) => {
                transaction.abort().map_err(backend)?;
                return Err(error);
            }
        };
        transaction.commit().map_err(backend)?;
        // Two commits may arrive here in either order.
        self.revision.send_if_modified(|newest| {
            let newer = revision > *newest;
            *newest = revision.max(*newest);
            newer
        });
        Ok(revision)
    }

    fn write(
        &self,
        transaction: &WriteTransaction,
        asked: &Transaction,
    ) -> Result<u64, StoreError> {
        let mut meta = transaction.open_table(META).map_err(backend)?;
        let mut data = transaction.open_table(DATA).map_err(backend)?;
        let mut log = transaction.open_table(LOG).map_err(backend)?;
        for compare in &asked.compares {
            let (key, wanted) = match compare {
                Compare::Absent(key) => (key, None),
                Compare::Revision(key, revision) => (key, Some(*revision)),
            };
            let found = data.get(key.as_str()).map_err(backend)?;
            let found = found.map(|value| item(key, value.value()).revision);
            if found != wanted {
                return Err(StoreError::Conflict { key: key.clone() });
            }
        }
        let revision = meta
            .get(REVISION)
            .map_err(backend)?
            .map_or(0, |value| value.value())
            + 1;
        for (index, write) in asked.writes.iter().enumerate() {
            let position = (revision, index as u32);
            match write {
                Write::Put(key, value) => {
                    let mut stored = revision.to_le_bytes().to_vec();
                    stored.extend_from_slice(value);
                    data.insert(key.as_str(), stored.as_slice())
                        .map_err(backend)?;
                    log.insert(position, (key.as_str(), Some(value.as_slice())))
                        .map_err(backend)?;
                }
                Write::Delete(key) => {
                    if data.remove(key.as_str()).map_err(backend)?.is_some() {
                        log.insert(position, (key.as_str(), None))
                            .map_err(backend)?;
                    }
                }
            }
        }
        if let Some(compacted) = revision.checked_sub(self.log_len) {
            log.retain_in(..=(compacted, u32::MAX), |_, _| false)
                .map_err(backend)?;
            meta.insert(COMPACTED, compacted).map_err(backend)?;
        }
        meta.insert(REVISION, revision).map_err(backend)?;
        Ok(revision)
    }

    fn changes(&self, prefix: &str, after: u64) -> Result<Batch, StoreError> {
        let transaction = self.database.begin_read().map_err(backend)?;
        let meta = transaction.open_table(META).map_err(backend)?;
        let newest = meta
            .get(REVISION)
            .map_err(backend)?
            .map_or(0, |value| value.value());
        let oldest = meta
            .get(COMPACTED)
            .map_err(backend)?
            .map_or(0, |value| value.value());
        if after < oldest {
            return Err(StoreError::Compacted { after, oldest });
        }
        let log = transaction.open_table(LOG).map_err(backend)?;
        let mut batch = Batch {
            changes: Vec::new(),
            upto: newest,
        };
        for entry in log.range((after.saturating_add(1), 0)..).map_err(backend)? {
            let (position, change) = entry.map_err(backend)?;
            let (revision, _) = position.value();
            // A transaction is never torn apart.
            if batch.changes.len() >= WATCH_BATCH
                && batch
                    .changes
                    .last()
                    .is_some_and(|last| last.revision < revision)
            {
                batch.upto = revision - 1;
                break;
            }
            let (key, value) = change.value();
            if key.starts_with(prefix) {
                let (key, value) = (key.to_owned(), value.map(<[u8]>::to_vec));
                batch.changes.push(Change {
                    key,
                    value,
                    revision,
                });
            }
        }
        Ok(batch)
    }
}

fn item(key: &str, stored: &[u8]) -> Item {
    let (revision, value) = stored.split_at_checked(8).unwrap_or((&[0; 8], stored));
    let revision = u64::from_le_bytes(revision.try_into().expect("eight bytes were split off"));
    Item {
        key: key.to_owned(),
        value: value.to_vec(),
        revision,
    }
}

fn backend(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Backend(Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn embedded_store_conforms() {
        let dir = tempfile::tempdir().unwrap();
        let mut count = 0;
        conformance::run_all(|| {
            count += 1;
            Arc::new(EmbeddedStore::open(&dir.path().join(format!("{count}.redb"))).unwrap())
        })
        .await;
    }

    #[tokio::test]
    async fn everything_survives_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        let revision = {
            let store = EmbeddedStore::open(&path).unwrap();
            store
                .commit(Transaction::new().put("a", b"1".to_vec()))
                .await
                .unwrap()
        };
        let store = EmbeddedStore::open(&path).unwrap();
        assert_eq!(*store.revision().borrow(), revision);
        assert_eq!(store.get("a").await.unwrap().unwrap().value, b"1");
        let mut watch = store.watch("", 0).await.unwrap();
        assert_eq!(watch.recv().await.unwrap().unwrap().key, "a");
    }

    #[tokio::test]
    async fn log_is_bounded_and_late_watchers_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open_with_log(&dir.path().join("s.redb"), 3).unwrap();
        for n in 0..5u8 {
            store
                .commit(Transaction::new().put("k", vec![n]))
                .await
                .unwrap();
        }
        let error = store.watch("", 1).await.unwrap_err();
        assert!(
            matches!(
                error,
                StoreError::Compacted {
                    after: 1,
                    oldest: 2
                }
            ),
            "{error}"
        );
        let mut watch = store.watch("", 2).await.unwrap();
        for n in 2..5u8 {
            assert_eq!(watch.recv().await.unwrap().unwrap().value, Some(vec![n]));
        }
    }

    #[tokio::test]
    async fn second_opener_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        let _first = EmbeddedStore::open(&path).unwrap();
        assert!(EmbeddedStore::open(&path).is_err());
    }
}
