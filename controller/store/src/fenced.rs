//! The store as a leader sees it: every transaction also requires that it still leads, so that what
//! a deposed leader had under way comes to nothing, however late it arrives.

use std::time::Duration;

use tokio::sync::watch;

use super::{Item, LeaseId, Listing, Range, SharedStore, Store, StoreError, Transaction, Watch};

/// See the module. Reads pass through.
pub struct FencedStore {
    store: SharedStore,
    key: String,
    revision: u64,
}

impl FencedStore {
    /// `store`, for as long as `key` is as `revision` wrote it.
    pub fn new(store: SharedStore, key: impl Into<String>, revision: u64) -> Self {
        Self {
            store,
            key: key.into(),
            revision,
        }
    }
}

#[tonic::async_trait]
impl Store for FencedStore {
    async fn get(&self, key: &str) -> Result<Option<Item>, StoreError> {
        self.store.get(key).await
    }

    async fn list(&self, range: Range) -> Result<Listing, StoreError> {
        self.store.list(range).await
    }

    async fn commit(&self, mut transaction: Transaction) -> Result<u64, StoreError> {
        // Compared first, so that a deposed leader learns this and not a conflict it may try to mend.
        let fence = Transaction::new().if_unchanged(self.key.as_str(), self.revision);
        transaction.compares.splice(0..0, fence.compares);
        match self.store.commit(transaction).await {
            Err(StoreError::Conflict { key }) if key == self.key => Err(StoreError::Deposed),
            done => done,
        }
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        self.store.watch(prefix, after).await
    }

    fn revision(&self) -> watch::Receiver<u64> {
        self.store.revision()
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::embedded::EmbeddedStore;
    use super::*;

    #[tokio::test]
    async fn a_deposed_leader_changes_nothing() {
        let store: SharedStore = Arc::new(EmbeddedStore::in_memory());
        let put = |who: &str| Transaction::new().put("leader", who.as_bytes().to_vec());
        let first = store.commit(put("a")).await.unwrap();
        let fenced = FencedStore::new(store.clone(), "leader", first);
        let write = || Transaction::new().if_absent("x").put("x", vec![1]);
        fenced.commit(write()).await.unwrap();
        let conflict = fenced.commit(write()).await.unwrap_err();
        assert!(
            matches!(&conflict, StoreError::Conflict { key } if key == "x"),
            "{conflict}"
        );
        let second = store.commit(put("b")).await.unwrap();
        let late = Transaction::new().put("x", vec![2]);
        let error = fenced.commit(late.clone()).await.unwrap_err();
        assert!(matches!(error, StoreError::Deposed), "{error}");
        assert_eq!(store.get("x").await.unwrap().unwrap().value, [1]);
        let fenced = FencedStore::new(store, "leader", second);
        fenced.commit(late).await.unwrap();
    }
}
