//! Where desired state, operations and events live: ordered keys, values of bytes, one revision
//! that rises with every transaction, leases that take keys with them when they end. One trait;
//! [`embedded::EmbeddedStore`] keeps everything in one file for one controller,
//! [`etcd::EtcdStore`] in an etcd cluster for several.
//!
//! Every implementation passes `conformance`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};

pub mod backup;
pub mod embedded;
#[cfg(feature = "etcd")]
pub mod etcd;
mod fenced;
pub mod leader;
pub mod schema;

pub use fenced::FencedStore;

#[cfg(test)]
mod conformance;

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
    Put {
        /// Which.
        key: String,
        /// To what.
        value: Vec<u8>,
        /// The key goes when this lease ends. Without one it stays, also when it had one before.
        lease: Option<LeaseId>,
    },
    /// Removes a key; nothing happens if it does not exist.
    Delete(String),
}

impl Write {
    /// The key it changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => key,
        }
    }
}

/// A lease of the store: it ends when nobody keeps it alive, and its keys go with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:x}", self.0)
    }
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
        self.writes.push(Write::Put {
            key: key.into(),
            value,
            lease: None,
        });
        self
    }

    /// Sets `key` for as long as `lease` lasts.
    #[must_use]
    pub fn put_leased(mut self, key: impl Into<String>, value: Vec<u8>, lease: LeaseId) -> Self {
        self.writes.push(Write::Put {
            key: key.into(),
            value,
            lease: Some(lease),
        });
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
    /// [`StoreError::Conflict`] names the first comparison that did not hold,
    /// [`StoreError::LeaseGone`] a lease that is over. After [`StoreError::InDoubt`] it may have
    /// happened or not; every other error means that it did not.
    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError>;
    /// Changes to keys that begin with `prefix`, after revision `after`, in order.
    ///
    /// [`StoreError::Compacted`] when changes after `after` are no longer kept.
    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError>;
    /// The newest revision known here; changes with each transaction. Another replica's
    /// transactions may take a moment to show.
    fn revision(&self) -> watch::Receiver<u64>;
    /// A lease that lasts `ttl` from now unless it is kept alive. A store may round up to seconds, and
    /// gives each lease its full time again when it starts anew.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;
    /// Has a lease last its time from now again; answers that time.
    ///
    /// [`StoreError::LeaseGone`] when it is over.
    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError>;
    /// Ends a lease now, and removes its keys. Fine when it is over already.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;
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
    /// Nobody kept the lease alive, or it never was.
    #[error("lease {lease} is over")]
    LeaseGone {
        /// As given.
        lease: LeaseId,
    },
    /// The transaction was that of a leader that leads no more.
    #[error("another controller leads now")]
    Deposed,
    /// The store cannot be reached or has no majority. Nothing was changed.
    #[error("the store does not answer")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The connection broke, or time ran out, while the store was at it.
    #[error(
        "the store did not confirm the change: it may have been made, or not; look before trying again"
    )]
    InDoubt(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No space is left. Nothing was changed.
    #[error(
        "the store is full: nothing can be changed until it has space again; what runs goes on"
    )]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The backend failed.
    #[error("the store failed")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    /// It and its causes, for a log line.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}
