//! A replica's way to the store: late, sometimes without an answer, sometimes full; watches break and go on
//! where they were, unless the store has forgotten what came there.

use std::sync::Arc;
use std::time::Duration;

use controller::leader;
use controller::store::{
    Change, Compare, Item, LeaseId, Listing, Range, SharedStore, Store, StoreError, Transaction,
    Watch,
};
use tokio::sync::{mpsc, watch};

use crate::hits::Hit;
use crate::world::World;

/// Changes on their way to whoever watches.
const WATCH_QUEUE: usize = 64;

/// Of one replica.
pub(crate) struct FaultyStore {
    pub(crate) store: SharedStore,
    pub(crate) world: Arc<World>,
    pub(crate) replica: usize,
}

impl FaultyStore {
    /// On the way there, and back.
    async fn travel(&self) -> Result<(), StoreError> {
        self.world.replicas[self.replica].thawed().await;
        let delay = self.world.random.millis(0, 20);
        tokio::time::sleep(delay).await;
        match self.world.store.borrow().unreachable {
            true => {
                self.world.hits.count(Hit::StoreUnreachable);
                Err(StoreError::Unavailable("a fault".into()))
            }
            false => Ok(()),
        }
    }

    async fn back(&self) {
        tokio::time::sleep(self.world.random.millis(0, 20)).await;
        self.world.replicas[self.replica].thawed().await;
    }
}

#[tonic::async_trait]
impl Store for FaultyStore {
    async fn get(&self, key: &str) -> Result<Option<Item>, StoreError> {
        self.travel().await?;
        let answer = self.store.get(key).await;
        self.back().await;
        answer
    }

    async fn list(&self, range: Range) -> Result<Listing, StoreError> {
        self.travel().await?;
        let answer = self.store.list(range).await;
        self.back().await;
        answer
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        self.travel().await?;
        let faults = *self.world.store.borrow();
        if faults.full && !transaction.writes.is_empty() {
            self.world.hits.count(Hit::StoreFull);
            return Err(StoreError::Full("a fault".into()));
        }
        if faults.in_doubt && self.world.random.one_of(4) {
            if self.world.random.one_of(2) {
                let _ = self.store.commit(transaction).await;
            }
            self.back().await;
            self.world.hits.count(Hit::StoreInDoubt);
            return Err(StoreError::InDoubt("a fault".into()));
        }
        let first = transaction.compares.first();
        let fenced = matches!(first, Some(Compare::Revision(key, _)) if key == leader::KEY);
        let answer = self.store.commit(transaction).await;
        if let Err(StoreError::Conflict { key }) = &answer
            && fenced
            && key == leader::KEY
        {
            self.world.hits.count(Hit::DeposedWrite);
        }
        self.back().await;
        answer
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        self.travel().await?;
        let changes = self.store.watch(prefix, after).await?;
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        let watching = Watching {
            store: self.store.clone(),
            world: self.world.clone(),
            replica: self.replica,
            prefix: prefix.to_owned(),
            after,
            newest: after,
            delivered: 0,
        };
        tokio::spawn(watching.run(changes, sender));
        Ok(receiver)
    }

    fn revision(&self) -> watch::Receiver<u64> {
        self.store.revision()
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.travel().await?;
        if self.world.store.borrow().full {
            self.world.hits.count(Hit::StoreFull);
            return Err(StoreError::Full("a fault".into()));
        }
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.travel().await?;
        let answer = self.store.keep_alive(lease).await;
        self.back().await;
        answer
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.travel().await?;
        self.store.revoke(lease).await
    }
}

/// A watch of a replica, over as many connections as it takes.
struct Watching {
    store: SharedStore,
    world: Arc<World>,
    replica: usize,
    prefix: String,
    /// All of this revision was delivered.
    after: u64,
    /// The revision of the last change that was delivered, and how many of its changes were.
    newest: u64,
    delivered: usize,
}

impl Watching {
    /// Until whoever watches hangs up, or what comes next is forgotten.
    async fn run(mut self, mut changes: Watch, sender: mpsc::Sender<Result<Change, StoreError>>) {
        let mut faults = self.world.store.subscribe();
        let mut known = 0;
        loop {
            tokio::select! {
                biased;
                () = sender.closed() => return,
                true = async { faults.wait_for(|faults| faults.watches_break).await.is_ok() } => {
                    let _ = faults.wait_for(|faults| !faults.watches_break).await;
                    self.world.replicas[self.replica].thawed().await;
                    match self.store.watch(&self.prefix, self.after).await {
                        Ok(again) => (changes, known) = (again, self.delivered),
                        Err(error) => return self.end(error, &sender).await,
                    }
                }
                change = changes.recv() => match change {
                    None => return,
                    Some(Err(error)) => return self.end(error, &sender).await,
                    // It came before the connection broke.
                    Some(Ok(change)) if known > 0 && change.revision == self.newest => known -= 1,
                    Some(Ok(change)) => {
                        self.world.replicas[self.replica].thawed().await;
                        self.note(change.revision);
                        if sender.send(Ok(change)).await.is_err() {
                            return;
                        }
                    }
                },
            }
        }
    }

    fn note(&mut self, revision: u64) {
        if revision > self.newest {
            (self.after, self.newest, self.delivered) = (self.newest, revision, 0);
        }
        self.delivered += 1;
    }

    async fn end(&self, error: StoreError, sender: &mpsc::Sender<Result<Change, StoreError>>) {
        if matches!(error, StoreError::Compacted { .. }) {
            self.world.hits.count(Hit::CompactedUnderWatch);
        }
        let _ = sender.send(Err(error)).await;
    }
}
