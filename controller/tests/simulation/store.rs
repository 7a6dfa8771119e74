//! A replica's way to the store: late, sometimes without an answer, sometimes full.

use std::sync::Arc;
use std::time::Duration;

use controller::store::{
    Item, LeaseId, Listing, Range, SharedStore, Store, StoreError, Transaction, Watch,
};
use tokio::sync::{mpsc, watch};

use crate::world::World;

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
            true => Err(StoreError::Unavailable("a fault".into())),
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
            return Err(StoreError::Full("a fault".into()));
        }
        if faults.in_doubt && self.world.random.one_of(4) {
            if self.world.random.one_of(2) {
                let _ = self.store.commit(transaction).await;
            }
            self.back().await;
            return Err(StoreError::InDoubt("a fault".into()));
        }
        let answer = self.store.commit(transaction).await;
        self.back().await;
        answer
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        self.travel().await?;
        let mut changes = self.store.watch(prefix, after).await?;
        let (sender, receiver) = mpsc::channel(64);
        let (world, replica) = (self.world.clone(), self.replica);
        let mut faults = self.world.store.subscribe();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    change = changes.recv() => {
                        let Some(change) = change else { return };
                        world.replicas[replica].thawed().await;
                        if sender.send(change).await.is_err() {
                            return;
                        }
                    }
                    // The store forgot what came before: whoever watches has to list again.
                    true = async { faults.wait_for(|faults| faults.compacted).await.is_ok() } => {
                        let compacted = StoreError::Compacted { after, oldest: after + 1 };
                        let _ = sender.send(Err(compacted)).await;
                        return;
                    }
                    () = sender.closed() => return,
                }
            }
        });
        Ok(receiver)
    }

    fn revision(&self) -> watch::Receiver<u64> {
        self.store.revision()
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.travel().await?;
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
