//! Who of several controllers acts. Any number of them serve the API on one store; one at a time, the
//! leader, runs what changes things by itself: the reconciler and its like.
//!
//! ```text
//!            leader key is there                    lease lost, key gone, work over
//! candidate ─────────────────────> follower          ┌────────────────────────────┐
//!     ^  └── key written with a lease ──> leader ────┴──> candidate               │
//!     └────── key gone, or a period over ──┘                                      v
//! ```
//!
//! A lease alone excludes nobody: a leader that was frozen believes in one that is long over. So its
//! store is fenced ([`FencedStore`]: every transaction compares the leader key's revision), and its
//! commands to hosts carry its [`Epoch`], which hosts never see go backwards.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Status;
use tonic::service::Interceptor;

use crate::backup::RESTORING_KEY;
use crate::{FencedStore, LeaseId, Range, SharedStore, StoreError, Transaction, Watch};

/// The leader's key; its value is a [`LeaderRecord`], its revision the term.
pub const KEY: &str = "leader";
/// What is added to revisions to make epochs (decimal), once the state was restored into a store whose
/// revisions began anew. Absent: nothing.
pub const EPOCH_BASE_KEY: &str = "epoch-base";
/// The metadata of a command to a host that names the epoch, in decimal.
pub const EPOCH_METADATA: &str = "mortise-epoch";

/// How long a lease lasts unless the command line says otherwise. Another leads at the latest two of
/// them after a leader died.
pub const DEFAULT_PERIOD: Duration = Duration::from_secs(5);
/// A lease is kept alive so many times in its period.
const BEATS: u32 = 4;
/// After the store failed.
const RETRY: Duration = Duration::from_millis(500);

/// Who leads.
#[derive(Clone, PartialEq, Message)]
pub struct LeaderRecord {
    /// Of this attempt to lead; never the same twice.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Where it serves the API.
    #[prost(string, tag = "2")]
    pub address: String,
    /// Its version.
    #[prost(string, tag = "3")]
    pub version: String,
    /// Since when.
    #[prost(message, optional, tag = "4")]
    pub since: Option<prost_types::Timestamp>,
}

/// What a leader works with, for as long as it leads.
#[derive(Clone)]
pub struct Term {
    /// Goes into every command to a host.
    pub epoch: Epoch,
    /// Fenced: does nothing more once somebody else leads.
    pub store: SharedStore,
}

/// What commands to hosts carry, so that those of a deposed leader are refused there.
#[derive(Clone, Debug)]
pub struct Epoch(Source);

#[derive(Clone, Debug)]
enum Source {
    None,
    Fixed(u64),
    Follow(watch::Receiver<Option<u64>>),
}

impl Epoch {
    /// None: there is one controller, whose store is its own.
    pub fn none() -> Self {
        Self(Source::None)
    }

    /// A leader's own.
    pub fn fixed(epoch: u64) -> Self {
        Self(Source::Fixed(epoch))
    }

    /// That of whoever leads, for what users ask of a host through any replica.
    pub fn follow(newest: watch::Receiver<Option<u64>>) -> Self {
        Self(Source::Follow(newest))
    }

    /// As of now.
    pub fn number(&self) -> Option<u64> {
        match &self.0 {
            Source::None => None,
            Source::Fixed(epoch) => Some(*epoch),
            Source::Follow(newest) => *newest.borrow(),
        }
    }
}

impl Interceptor for Epoch {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(epoch) = self.number() {
            request.metadata_mut().insert(EPOCH_METADATA, epoch.into());
        }
        Ok(request)
    }
}

/// One controller's part in the election.
pub struct Candidate {
    store: SharedStore,
    address: String,
    period: Duration,
    /// The store is this controller's alone.
    alone: bool,
    leader: watch::Sender<Option<Leader>>,
    epoch: watch::Sender<Option<u64>>,
}

/// Who leads, as last seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Leader {
    /// What it wrote of itself.
    pub record: LeaderRecord,
    /// Its epoch.
    pub epoch: u64,
    /// It is this controller.
    pub here: bool,
    /// Of its key.
    revision: u64,
}

impl Leader {
    /// Has somebody else lead at once, when this controller does and is about to end. Its work must have
    /// ended.
    ///
    /// # Errors
    /// When the store fails; then its lease must run out.
    pub async fn resign(&self, store: &SharedStore) -> Result<(), StoreError> {
        if !self.here {
            return Ok(());
        }
        let mine = Transaction::new().if_unchanged(KEY, self.revision);
        match store.commit(mine.delete(KEY)).await {
            Ok(_) | Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

struct Held {
    lease: LeaseId,
    leader: Leader,
    revision: u64,
    /// By this clock the lease lasts at least until then.
    until: Instant,
}

impl Candidate {
    /// Ready to [`run`](Self::run) for the controller that serves the API at `address`.
    pub fn new(store: SharedStore, address: String, period: Duration) -> Self {
        Self {
            store,
            address,
            period,
            alone: false,
            leader: watch::Sender::new(None),
            epoch: watch::Sender::new(None),
        }
    }

    /// Of a store that no other controller uses: nobody is waited for, and there are no epochs.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// For commands that users give: that of whoever leads.
    pub fn epoch(&self) -> Epoch {
        Epoch::follow(self.epoch.subscribe())
    }

    /// Who leads.
    pub fn leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.subscribe()
    }

    /// Takes part for ever, and runs `work` while this controller leads. The work is cancelled when it
    /// no longer does, and finds its store fenced by then.
    pub async fn run<F>(self, work: impl Fn(Term) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            match self.campaign().await {
                Ok((held, changes)) => {
                    let epoch = match self.alone {
                        true => Epoch::none(),
                        false => Epoch::fixed(held.leader.epoch),
                    };
                    let store = FencedStore::new(self.store.clone(), KEY, held.revision);
                    let term = Term {
                        epoch,
                        store: Arc::new(store),
                    };
                    tracing::info!(epoch = held.leader.epoch, "this controller leads");
                    let mut task = Work(tokio::spawn(work(term)));
                    let why = self.hold(&held, changes, &mut task).await;
                    task.cancel().await;
                    self.see(None);
                    tracing::warn!(
                        epoch = held.leader.epoch,
                        why,
                        "this controller leads no more"
                    );
                    // Sooner than the lease ends by itself, if it has not.
                    let revoked = self.store.revoke(held.lease);
                    let _ = tokio::time::timeout(self.period, revoked).await;
                }
                Err(error) => {
                    tracing::warn!(error = %error.with_causes(), "cannot take part in the election");
                    self.see(None);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Until this controller leads.
    async fn campaign(&self) -> Result<(Held, Watch), StoreError> {
        if self.alone && self.store.get(RESTORING_KEY).await?.is_none() {
            // What is there is of this controller's last life.
            self.store.commit(Transaction::new().delete(KEY)).await?;
        }
        loop {
            let seen = self.store.list(Range::all(KEY)).await?;
            let mut changes = self.store.watch(KEY, seen.revision).await?;
            if let Some(item) = seen.items.iter().find(|item| item.key == KEY) {
                let record = LeaderRecord::decode(item.value.as_slice()).unwrap_or_default();
                let epoch = self.epoch_of(item.revision).await?;
                self.see(Some(Leader {
                    record,
                    epoch,
                    here: false,
                    revision: item.revision,
                }));
                // A lost message costs no more than another look.
                let _ = tokio::time::timeout(self.period, changes.recv()).await;
                continue;
            }
            if let Some(held) = self.try_to_lead().await? {
                // What was written is the first change there is; the next one is the end.
                changes = self.store.watch(KEY, held.revision).await?;
                return Ok((held, changes));
            }
        }
    }

    async fn try_to_lead(&self) -> Result<Option<Held>, StoreError> {
        let begun = Instant::now();
        let lease = self.store.grant(self.period).await?;
        let record = LeaderRecord {
            id: uuid::Uuid::new_v4().to_string(),
            address: self.address.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since: Some(SystemTime::now().into()),
        };
        let transaction = Transaction::new().if_absent(KEY);
        let transaction = transaction.put_leased(KEY, record.encode_to_vec(), lease);
        let revision = match self.store.commit(transaction).await {
            Ok(revision) => Some(revision),
            Err(StoreError::Conflict { .. } | StoreError::LeaseGone { .. }) => None,
            Err(StoreError::InDoubt(_)) => {
                let found = self.store.get(KEY).await?;
                let mine = found.filter(|item| item.value == record.encode_to_vec());
                mine.map(|item| item.revision)
            }
            Err(error) => return Err(error),
        };
        let Some(revision) = revision else {
            self.store.revoke(lease).await?;
            return Ok(None);
        };
        let epoch = self.epoch_of(revision).await?;
        let leader = Leader {
            record,
            epoch,
            here: true,
            revision,
        };
        self.see(Some(leader.clone()));
        Ok(Some(Held {
            lease,
            leader,
            revision,
            until: begun + self.period,
        }))
    }

    /// Keeps the lease until it is lost, or the work is over; says why.
    async fn hold(&self, held: &Held, mut changes: Watch, task: &mut Work) -> &'static str {
        let beat = self.period / BEATS;
        let mut until = held.until;
        let mut next = Instant::now() + beat;
        loop {
            tokio::select! {
                () = task.ended() => return "its work ended",
                change = changes.recv() => match change {
                    Some(Ok(change)) if change.revision > held.revision => {
                        return "the leader key was removed or taken";
                    }
                    Some(Ok(_)) => continue,
                    Some(Err(_)) | None => match self.store.watch(KEY, held.revision).await {
                        Ok(watch) => { changes = watch; continue }
                        // The lease says what is true.
                        Err(_) => {
                            let (silent, receiver) = tokio::sync::mpsc::channel(1);
                            changes = receiver;
                            tokio::spawn(async move { silent.closed().await });
                            continue;
                        }
                    },
                },
                () = tokio::time::sleep_until(next.min(until)) => {}
            }
            let begun = Instant::now();
            if begun >= until {
                return "the store did not confirm the lease in time";
            }
            let kept = tokio::time::timeout_at(until, self.store.keep_alive(held.lease)).await;
            next = Instant::now() + beat;
            match kept {
                Ok(Ok(lasts)) => until = begun + lasts,
                Ok(Err(StoreError::LeaseGone { .. })) => return "the lease is over",
                Ok(Err(error)) => {
                    tracing::warn!(error = %error.with_causes(), "the leader's lease is not confirmed");
                    next = Instant::now() + beat.min(RETRY);
                }
                Err(_) => return "the store did not confirm the lease in time",
            }
        }
    }

    async fn epoch_of(&self, revision: u64) -> Result<u64, StoreError> {
        Ok(epoch_base(&self.store).await?.saturating_add(revision))
    }

    fn see(&self, leader: Option<Leader>) {
        if let Some(leader) = leader.as_ref().filter(|_| !self.alone) {
            // While nobody leads the last one's is the newest there is.
            self.epoch.send_if_modified(|known| {
                let newer = *known < Some(leader.epoch);
                *known = (*known).max(Some(leader.epoch));
                newer
            });
        }
        self.leader.send_if_modified(|known| {
            let changed = *known != leader;
            *known = leader;
            changed
        });
    }
}

/// What is added to revisions to make epochs.
///
/// # Errors
/// When the store fails.
pub async fn epoch_base(store: &SharedStore) -> Result<u64, StoreError> {
    let item = store.get(EPOCH_BASE_KEY).await?;
    let text = item.and_then(|item| String::from_utf8(item.value).ok());
    Ok(text.and_then(|text| text.parse().ok()).unwrap_or(0))
}

/// A task that does not outlive this.
struct Work(JoinHandle<()>);

impl Work {
    async fn ended(&mut self) {
        if let Err(error) = (&mut self.0).await {
            tracing::error!(%error, "the leader's work failed");
        }
    }

    async fn cancel(mut self) {
        self.0.abort();
        if !self.0.is_finished() {
            let _ = (&mut self.0).await;
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
