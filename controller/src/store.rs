//! Where desired state, operations and events live: ordered keys, values of bytes, one revision
//! that rises with every transaction. One trait; [`embedded::EmbeddedStore`] keeps everything in one
//! file for one controller.
//!
//! Every implementation passes `conformance`.

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{mpsc, watch};

pub mod embedded;

#[cfg(test)]
pub mod conformance;

/// A key's value and the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub value: Vec<u8>,
    /// The revision of the transaction that put it.
    pub revision: u64,
}

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// Keys begin with this.
    pub prefix: String,
    /// Only keys past this one, in the direction of the listing.
    pub after: Option<String>,
    /// At most so many; 0 for all.
    pub limit: usize,
    /// Last key first.
    pub reverse: bool,
}

impl Range {
    /// Everything below `prefix`, in order.
    pub fn all(prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            ..Self::default()
        }
    }
}

/// Items of a range as they all were at one revision.
#[derive(Debug, Clone)]
pub struct Listing {
    /// In the order asked for.
    pub items: Vec<Item>,
    /// More follow.
    pub more: bool,
    /// The store's revision at the time: watch from here to miss nothing.
    pub revision: u64,
}

/// What must hold for a transaction to happen.
#[derive(Debug, Clone)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key was last written by this revision.
    Revision(String, u64),
}

/// What a transaction does.
#[derive(Debug, Clone)]
pub enum Write {
    /// Sets a key.
    Put(String, Vec<u8>),
    /// Removes a key; nothing happens if it does not exist.
    Delete(String),
}

/// All writes happen, at one revision, if all comparisons hold; otherwise none.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Done in order.
    pub writes: Vec<Write>,
}

impl Transaction {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires that `key` does not exist.
    #[must_use]
    pub fn if_absent(mut self, key: impl Into<String>) -> Self {
        self.compares.push(Compare::Absent(key.into()));
        self
    }

    /// Requires that nobody wrote `key` since `revision`.
    #[must_use]
    pub fn if_unchanged(mut self, key: impl Into<String>, revision: u64) -> Self {
        self.compares.push(Compare::Revision(key.into(), revision));
        self
    }

    /// Sets `key`.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>) -> Self {
        self.writes.push(Write::Put(key.into(), value));
        self
    }

    /// Removes `key`.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete(key.into()));
        self
    }
}

/// One key's change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Which key.
    pub key: String,
    /// What it is now; `None` when it was removed.
    pub value: Option<Vec<u8>>,
    /// The transaction's revision.
    pub revision: u64,
}

/// Changes as they happen. Ends with an error when the watcher fell behind what the store keeps;
/// list again then.
pub type Watch = mpsc::Receiver<Result<Change, StoreError>>;

/// The store.
#[tonic::async_trait]
pub trait Store: Send + Sync + 'static {
    /// One key.
    async fn get(&self, key: &str) -> Result<Option<Item>, StoreError>;
    /// The keys of a range, all as of one revision.
    async fn list(&self, range: Range) -> Result<Listing, StoreError>;
    /// Does all of a transaction or nothing. Durable once it answers, with the new revision.
    ///
    /// [`StoreError::Conflict`] names the first comparison that did not hold.
    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError>;
    /// Changes to keys that begin with `prefix`, after revision `after`, in order.
    ///
    /// [`StoreError::Compacted`] when changes after `after` are no longer kept.
    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError>;
    /// The newest revision; changes with each transaction.
    fn revision(&self) -> watch::Receiver<u64>;
}

/// A store that parts of the controller share.
pub type SharedStore = Arc<dyn Store>;

/// Why the store did not do what was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A comparison did not hold.
    #[error("somebody else changed {key}")]
    Conflict {
        /// Of the comparison.
        key: String,
    },
    /// The changes asked for are gone.
    #[error("changes after revision {after} are no longer kept; the oldest kept is {oldest}")]
    Compacted {
        /// As asked for.
        after: u64,
        /// Watching can begin after this one.
        oldest: u64,
    },
    /// The backend failed.
    #[error("the store failed")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}
