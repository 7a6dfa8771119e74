//! The one writer. Transactions that arrive while the disk is busy wait together and become durable
//! together, each at its own revision; so the disk bounds how long one takes, not how many there are.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use redb::{ReadableTable as _, Table, WriteTransaction};
use tokio::sync::{oneshot, watch};

use super::file::{File, failed};
use super::tables::{
    self, BATCH, COMPACTED, DATA, LAST_LEASE, LEASED, LEASES, LOG, LoggedChange, META, REVISION,
    item,
};
use super::{LeaseId, StoreError, Transaction};
use crate::{Compare, Write};

/// Transactions that become durable together.
const MAX_BATCH: usize = 256;
/// Transactions that wait. Whoever comes when they are this many waits to wait.
const QUEUE_LEN: usize = 1024;
const QUEUE_RETRY: Duration = Duration::from_millis(1);

/// What the writer does; answers a revision, or the lease that was granted.
pub(super) enum Task {
    Commit(Transaction),
    Grant { ttl_ms: u64 },
    EndLease(LeaseId),
}

struct Job {
    task: Task,
    answer: oneshot::Sender<Result<u64, StoreError>>,
}

/// Runs tasks. Dropping it waits for those under way.
pub(super) struct Writer {
    mode: Mode,
}

enum Mode {
    Thread {
        jobs: Option<SyncSender<Job>>,
        thread: Option<JoinHandle<()>>,
    },
    /// In memory there is nothing to wait for.
    Inline(std::sync::Mutex<Apply>),
}

impl Writer {
    pub(super) fn start(
        file: Arc<File>,
        revision: watch::Sender<u64>,
        log_len: u64,
    ) -> Result<Self, StoreError> {
        let memory = file.is_memory();
        let apply = Apply {
            file,
            revision,
            log_len,
        };
        if memory {
            let mode = Mode::Inline(std::sync::Mutex::new(apply));
            return Ok(Self { mode });
        }
        let (jobs, queue) = sync_channel(QUEUE_LEN);
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || apply.run(&queue))
            .map_err(|error| StoreError::Backend(Box::new(error)))?;
        Ok(Self {
            mode: Mode::Thread {
                jobs: Some(jobs),
                thread: Some(thread),
            },
        })
    }

    pub(super) async fn run(&self, task: Task) -> Result<u64, StoreError> {
        let jobs = match &self.mode {
            Mode::Inline(apply) => {
                let apply = apply
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                return apply.one(&task);
            }
            Mode::Thread { jobs, .. } => jobs.as_ref().ok_or_else(stopped)?,
        };
        let (answer, answered) = oneshot::channel();
        let mut job = Job { task, answer };
        loop {
            match jobs.try_send(job) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return Err(stopped()),
                Err(TrySendError::Full(refused)) => job = refused,
            }
            tokio::time::sleep(QUEUE_RETRY).await;
        }
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Mode::Thread { jobs, thread } = &mut self.mode {
            drop(jobs.take());
            if let Some(thread) = thread.take() {
                // A panic there has been reported.
                let _ = thread.join();
            }
        }
    }
}

fn stopped() -> StoreError {
    StoreError::InDoubt("the store is being closed".into())
}

struct Apply {
    file: Arc<File>,
    revision: watch::Sender<u64>,
    log_len: u64,
}

impl Apply {
    fn run(self, queue: &Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut jobs = vec![first];
            while jobs.len() < MAX_BATCH
                && let Ok(job) = queue.try_recv()
            {
                jobs.push(job);
            }
            let tasks: Vec<&Task> = jobs.iter().map(|job| &job.task).collect();
            let results = self.batch(&tasks);
            for (job, result) in jobs.into_iter().zip(results) {
                // Whoever asked may have gone.
                let _ = job.answer.send(result);
            }
        }
    }

    fn one(&self, task: &Task) -> Result<u64, StoreError> {
        let mut results = self.batch(&[task]);
        results.pop().unwrap_or_else(|| Err(stopped()))
    }

    /// Does them in order. One that is refused leaves no trace; when the batch cannot be stored, they
    /// are tried one by one, so that what is too much does not take the rest with it. What may have been
    /// stored is not tried again.
    fn batch(&self, tasks: &[&Task]) -> Vec<Result<u64, StoreError>> {
        match self.attempt(tasks) {
            Ok(results) => results,
            Err(error) if tasks.len() == 1 => vec![Err(error)],
            Err(StoreError::InDoubt(source)) => {
                let source: Arc<dyn std::error::Error + Send + Sync> = source.into();
                let doubt = || StoreError::InDoubt(Box::new(source.clone()));
                tasks.iter().map(|_| Err(doubt())).collect()
            }
            Err(_) => tasks
                .iter()
                .map(|task| {
                    let mut results = self.attempt(&[task])?;
                    results.pop().unwrap_or_else(|| Err(stopped()))
                })
                .collect(),
        }
    }

    fn attempt(&self, tasks: &[&Task]) -> Result<Vec<Result<u64, StoreError>>, StoreError> {
        let written = self.file.with(|database| {
            let transaction = database.begin_write().map_err(failed)?;
            let written = self.write(&transaction, tasks)?;
            Ok((written, transaction.commit().map_err(failed)))
        });
        let Written {
            newest, results, ..
        } = match written {
            Ok((written, Ok(()))) => written,
            Ok((written, Err(error))) => {
                // The disk may have it all the same: what it says when it is read again counts.
                self.reopen();
                match self.file.read(tables::batch) {
                    Ok(found) if found == written.batch => written,
                    Ok(_) => return Err(error),
                    Err(_) => return Err(StoreError::InDoubt(Box::new(error))),
                }
            }
            Err(error) => {
                self.reopen();
                return Err(error);
            }
        };
        self.revision.send_if_modified(|known| {
            let newer = newest > *known;
            *known = newest.max(*known);
            newer
        });
        Ok(results)
    }

    /// After a failure the database does nothing more.
    fn reopen(&self) {
        if self.file.is_memory() {
            return;
        }
        if let Err(error) = self.file.reopen() {
            tracing::error!(
                error = %error.with_causes(),
                "the store's file cannot be opened again"
            );
        }
    }

    fn write(
        &self,
        transaction: &WriteTransaction,
        tasks: &[&Task],
    ) -> Result<Written, StoreError> {
        let mut tables = Tables {
            data: transaction.open_table(DATA).map_err(failed)?,
            log: transaction.open_table(LOG).map_err(failed)?,
            meta: transaction.open_table(META).map_err(failed)?,
            leases: transaction.open_table(LEASES).map_err(failed)?,
            leased: transaction.open_table(LEASED).map_err(failed)?,
            revision: 0,
        };
        let before = tables.number(REVISION)?;
        tables.revision = before;
        let mut results = Vec::with_capacity(tasks.len());
        for task in tasks {
            results.push(match task {
                Task::Commit(asked) => match tables.refusal(asked)? {
                    Some(refusal) => Err(refusal),
                    None => tables.commit(asked).map(Ok)?,
                },
                Task::Grant { ttl_ms } => Ok(tables.grant(*ttl_ms)?),
                Task::EndLease(lease) => Ok(tables.end_lease(*lease)?),
            });
        }
        let revision = tables.revision;
        if revision > before {
            tables.meta.insert(REVISION, revision).map_err(failed)?;
            tables.compact(revision.saturating_sub(self.log_len))?;
        }
        let batch = tables.number(BATCH)? + 1;
        tables.meta.insert(BATCH, batch).map_err(failed)?;
        Ok(Written {
            newest: revision,
            batch,
            results,
        })
    }
}

/// What a transaction of the file holds.
struct Written {
    /// The revision it is then.
    newest: u64,
    /// Its own number.
    batch: u64,
    /// Each task's answer.
    results: Vec<Result<u64, StoreError>>,
}

/// The tables, and the revision that the next change follows.
struct Tables<'t> {
    data: Table<'t, &'static str, &'static [u8]>,
    log: Table<'t, (u64, u32), LoggedChange>,
    meta: Table<'t, &'static str, u64>,
    leases: Table<'t, i64, u64>,
    leased: Table<'t, &'static str, i64>,
    revision: u64,
}

impl Tables<'_> {
    fn number(&self, name: &str) -> Result<u64, StoreError> {
        let value = self.meta.get(name).map_err(failed)?;
        Ok(value.map_or(0, |value| value.value()))
    }

    /// What stands in a transaction's way. Nothing is written before this is known.
    fn refusal(&self, asked: &Transaction) -> Result<Option<StoreError>, StoreError> {
        for compare in &asked.compares {
            let (key, wanted) = match compare {
                Compare::Absent(key) => (key, None),
                Compare::Revision(key, revision) => (key, Some(*revision)),
            };
            let found = self.data.get(key.as_str()).map_err(failed)?;
            let found = found.map(|value| item(key, value.value()).revision);
            if found != wanted {
                return Ok(Some(StoreError::Conflict { key: key.clone() }));
            }
        }
        for write in &asked.writes {
            if let Write::Put {
                lease: Some(lease), ..
            } = write
                && self.leases.get(lease.0).map_err(failed)?.is_none()
            {
                return Ok(Some(StoreError::LeaseGone { lease: *lease }));
            }
        }
        Ok(None)
    }

    fn commit(&mut self, asked: &Transaction) -> Result<u64, StoreError> {
        self.revision += 1;
        for (index, write) in asked.writes.iter().enumerate() {
            let position = (self.revision, index as u32);
            match write {
                Write::Put { key, value, lease } => {
                    let mut stored = Vec::with_capacity(value.len() + 8);
                    stored.extend_from_slice(&self.revision.to_le_bytes());
                    stored.extend_from_slice(value);
                    self.data
                        .insert(key.as_str(), stored.as_slice())
                        .map_err(failed)?;
                    self.log
                        .insert(position, (key.as_str(), Some(value.as_slice())))
                        .map_err(failed)?;
                    match lease {
                        Some(lease) => {
                            self.leased.insert(key.as_str(), lease.0).map_err(failed)?;
                        }
                        None => {
                            self.leased.remove(key.as_str()).map_err(failed)?;
                        }
                    }
                }
                Write::Delete(key) => self.delete(position, key)?,
            }
        }
        Ok(self.revision)
    }

    fn delete(&mut self, position: (u64, u32), key: &str) -> Result<(), StoreError> {
        self.leased.remove(key).map_err(failed)?;
        if self.data.remove(key).map_err(failed)?.is_some() {
            self.log.insert(position, (key, None)).map_err(failed)?;
        }
        Ok(())
    }

    fn grant(&mut self, ttl_ms: u64) -> Result<u64, StoreError> {
        let lease = self.number(LAST_LEASE)? + 1;
        self.meta.insert(LAST_LEASE, lease).map_err(failed)?;
        let id = i64::try_from(lease).unwrap_or(i64::MAX);
        self.leases.insert(id, ttl_ms).map_err(failed)?;
        Ok(lease)
    }

    /// Removes it and its keys, at one revision.
    fn end_lease(&mut self, lease: LeaseId) -> Result<u64, StoreError> {
        if self.leases.remove(lease.0).map_err(failed)?.is_none() {
            return Ok(self.revision);
        }
        let mut keys = Vec::new();
        for entry in self.leased.range::<&str>(..).map_err(failed)? {
            let (key, owner) = entry.map_err(failed)?;
            if owner.value() == lease.0 {
                keys.push(key.value().to_owned());
            }
        }
        if !keys.is_empty() {
            self.revision += 1;
        }
        for (index, key) in keys.iter().enumerate() {
            self.delete((self.revision, index as u32), key)?;
        }
        Ok(self.revision)
    }

    /// Forgets changes up to and including revision `upto`.
    fn compact(&mut self, upto: u64) -> Result<(), StoreError> {
        if upto <= self.number(COMPACTED)? {
            return Ok(());
        }
        self.log
            .retain_in(..=(upto, u32::MAX), |_, _| false)
            .map_err(failed)?;
        self.meta.insert(COMPACTED, upto).map_err(failed)?;
        Ok(())
    }
}
