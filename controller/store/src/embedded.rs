//! The store of a single controller: one redb file. Beside the data it keeps the newest
//! [`LOG_LEN`] changes, so that watchers resume where they were.
//!
//! ```text
//! file    the database: its blocks are allocated before they are needed, and one that failed is
//!         opened anew
//! tables  what is in it, and how it is read
//! writer  transactions that wait together become durable together
//! leases  when which lease ends; how long they last survives a restart, since when they run does not
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::{Change, Item, LeaseId, Listing, Range, Store, StoreError, Transaction, Watch};
use file::File;
use leases::LeaseClock;
use tables::Batch;
use writer::{Task, Writer};

mod file;
mod leases;
mod tables;
mod writer;

#[cfg(test)]
mod tests;

/// Revisions in the log. An hour of a busy host; a watcher that was away longer lists again.
const LOG_LEN: u64 = 10_000;
/// Changes read for a watcher in one go.
const WATCH_BATCH: usize = 512;
/// Changes that wait for it: a busy controller makes ten thousand a second.
const WATCH_QUEUE: usize = 4096;

/// See the module.
pub struct EmbeddedStore {
    inner: Arc<Inner>,
}

struct Inner {
    file: Arc<File>,
    writer: Writer,
    revision: watch::Sender<u64>,
    leases: Arc<LeaseClock>,
}

impl EmbeddedStore {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with_log(path, LOG_LEN)
    }

    /// An empty store that is gone when it is dropped, and does all its work where it is called:
    /// for simulations and tests.
    ///
    /// # Panics
    /// When there is no memory.
    pub fn in_memory() -> Self {
        Self::in_memory_with_log(LOG_LEN)
    }

    /// The same, where changes of the newest `log_len` revisions are kept: whoever watches and is late
    /// finds them gone.
    ///
    /// # Panics
    /// When there is no memory.
    pub fn in_memory_with_log(log_len: u64) -> Self {
        let file = File::in_memory().expect("memory keeps what it is given");
        Self::over(file, log_len).expect("an empty store is in order")
    }

    fn open_with_log(path: &Path, log_len: u64) -> Result<Self, StoreError> {
        Self::over(File::open(path)?, log_len)
    }

    fn over(file: File, log_len: u64) -> Result<Self, StoreError> {
        let file = Arc::new(file);
        let (revision, leases) = file.read(tables::begin)?;
        let revision = watch::Sender::new(revision);
        let writer = Writer::start(file.clone(), revision.clone(), log_len)?;
        Ok(Self {
            inner: Arc::new(Inner {
                file,
                writer,
                revision,
                leases: Arc::new(LeaseClock::new(leases)),
            }),
        })
    }

    /// redb blocks on locks and on the disk.
    async fn reading<T: Send + 'static>(
        &self,
        work: impl FnOnce(&redb::ReadTransaction) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.tend_leases();
        if self.inner.file.is_memory() {
            return self.inner.file.read(work);
        }
        let file = self.inner.file.clone();
        tokio::task::spawn_blocking(move || file.read(work))
            .await
            .map_err(|error| StoreError::Backend(Box::new(error)))?
    }

    /// Sees to it that leases end, also those of an earlier run.
    fn tend_leases(&self) {
        if self.inner.leases.must_be_tended() {
            let (clock, inner) = (self.inner.leases.clone(), Arc::downgrade(&self.inner));
            tokio::spawn(leases::end_in_time(clock, inner));
        }
    }
}

#[tonic::async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Item>, StoreError> {
        self.tend_leases();
        // A handful of pages, which the system has in memory: another thread would cost more than that.
        self.inner
            .file
            .read(|transaction| tables::get(transaction, key))
    }

    async fn list(&self, range: Range) -> Result<Listing, StoreError> {
        self.reading(move |transaction| tables::list(transaction, &range))
            .await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        self.tend_leases();
        self.inner.writer.run(Task::Commit(transaction)).await
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        let first = self.changes(prefix, after).await?;
        let store = Self {
            inner: self.inner.clone(),
        };
        tokio::spawn(store.pump(prefix.to_owned(), first, sender));
        Ok(receiver)
    }

    fn revision(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        let id = self.inner.writer.run(Task::Grant { ttl_ms }).await?;
        let lease = LeaseId(i64::try_from(id).unwrap_or(i64::MAX));
        self.inner.leases.begin(lease, ttl);
        self.tend_leases();
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.tend_leases();
        self.inner.leases.keep_alive(lease)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.leases.end(lease);
        self.inner.writer.run(Task::EndLease(lease)).await.map(drop)
    }
}

impl EmbeddedStore {
    async fn changes(&self, prefix: &str, after: u64) -> Result<Batch, StoreError> {
        let prefix = prefix.to_owned();
        self.reading(move |transaction| tables::changes(transaction, &prefix, after))
            .await
    }

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
            batch = match self.changes(&prefix, after).await {
                Ok(batch) => batch,
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            };
        }
    }
}
