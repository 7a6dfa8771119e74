//! The store of several controllers: an etcd cluster, or a part of one below a key prefix.
//!
//! ```text
//! members   which member is asked, how long, and what its errors mean
//! watching  watches that outlive connections and members
//! ```
//!
//! A read is tried on one member after the other until its deadline. A transaction is tried again only
//! where it certainly did not reach the cluster; otherwise it ends in [`StoreError::InDoubt`].
//!
//! etcd forgets history when it is told to (`--auto-compaction-retention`); watchers that ask for
//! what is gone hear [`StoreError::Compacted`].

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Compare as EtcdCompare, CompareOp, GetOptions, GetResponse, KeyValue, PutOptions, SortOrder,
    SortTarget, Txn, TxnOp, TxnOpResponse,
};
use tokio::sync::watch;

use crate::{Compare, Item, LeaseId, Listing, Range, Store, StoreError, Transaction, Watch, Write};
use members::{Failure, Members, roomy};

mod members;
mod watching;

#[cfg(test)]
mod tests;

/// Items read in one go; a listing is made of as many as it needs, all at one revision.
const PAGE: usize = 500;
/// How often a listing is begun anew because etcd forgot its revision meanwhile.
const LIST_ATTEMPTS: usize = 3;

/// Where the cluster is and how it is reached.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// `http://` or `https://` addresses of members; those that are left out are not asked.
    pub endpoints: Vec<String>,
    /// All keys begin with this.
    pub prefix: String,
    /// For `https://`.
    pub tls: TlsFiles,
    /// Name and password, where the cluster asks for them.
    pub user: Option<(String, String)>,
}

/// PEM files.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Whom the members' certificates must be signed by.
    pub ca: Option<PathBuf>,
    /// The certificate and key that this controller shows.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct EtcdStore {
    inner: Arc<Inner>,
}

struct Inner {
    members: Members,
    prefix: String,
    revision: watch::Sender<u64>,
}

impl EtcdStore {
    /// Connects, and follows the cluster's revision from then on.
    ///
    /// # Errors
    /// When the options are wrong, or no member answers in time.
    pub async fn connect(options: &EtcdOptions) -> Result<Self, StoreError> {
        let inner = Arc::new(Inner {
            members: Members::new(options)?,
            prefix: options.prefix.clone(),
            revision: watch::Sender::new(0),
        });
        let store = Self { inner };
        let revision = store.newest().await?;
        store.saw(revision);
        tokio::spawn(watching::follow_revision(
            Arc::downgrade(&store.inner),
            revision,
        ));
        Ok(store)
    }

    /// The revision as of now, by a majority.
    async fn newest(&self) -> Result<u64, StoreError> {
        let key = self.key("");
        let options = GetOptions::new().with_count_only();
        let answer = self
            .range(key, options)
            .await
            .map_err(Failure::into_error)?;
        Ok(revision_of(&answer))
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.inner.prefix)
    }

    fn saw(&self, revision: u64) {
        self.inner.saw(revision);
    }

    async fn range(&self, key: String, options: GetOptions) -> Result<GetResponse, Failure> {
        let answer = self.inner.members.read(|client| {
            let (key, options) = (key.clone(), options.clone());
            async move { roomy(&client).0.get(key, Some(options)).await }
        });
        answer.await
    }

    /// One attempt at a listing, in pages of one revision.
    async fn list_once(&self, range: &Range) -> Result<Listing, Failure> {
        let mut listing = Listing {
            items: Vec::new(),
            more: false,
            revision: 0,
        };
        let mut after = range.after.clone();
        loop {
            let left = match range.limit {
                0 => PAGE,
                limit => (limit - listing.items.len()).min(PAGE),
            };
            let (start, end) = self.bounds(range, after.as_deref());
            if start >= end {
                if listing.revision == 0 {
                    listing.revision = revision_of(
                        &self
                            .range(self.key(""), GetOptions::new().with_count_only())
                            .await?,
                    );
                }
                return Ok(listing);
            }
            let mut options = GetOptions::new().with_range(end).with_limit(left as i64);
            if range.reverse {
                options = options.with_sort(SortTarget::Key, SortOrder::Descend);
            }
            if listing.revision > 0 {
                options = options.with_revision(listing.revision as i64);
            }
            let mut answer = self.range(start, options).await?;
            if listing.revision == 0 {
                listing.revision = revision_of(&answer);
            }
            let more = answer.more();
            for found in answer.take_kvs() {
                listing.items.push(self.item(found)?);
            }
            let full = range.limit > 0 && listing.items.len() >= range.limit;
            if full || !more {
                listing.more = more;
                return Ok(listing);
            }
            after = listing.items.last().map(|item| item.key.clone());
        }
    }

    /// The first key of a range and the first one past it.
    fn bounds(&self, range: &Range, after: Option<&str>) -> (String, String) {
        let (mut start, mut end) = (self.key(&range.prefix), self.key(&range.prefix));
        // No key has this character.
        end.push(char::MAX);
        if let Some(after) = after {
            let after = self.key(after);
            if range.reverse {
                end = end.min(after);
            } else {
                start = start.max(format!("{after}\0"));
            }
        }
        (start, end)
    }

    fn item(&self, found: KeyValue) -> Result<Item, Failure> {
        let revision = found.mod_revision().unsigned_abs();
        let (key, value) = found.into_key_value();
        Ok(Item {
            key: self.inner.own_key(&key)?,
            value,
            revision,
        })
    }

    /// Why a transaction did not happen: what its comparisons found.
    fn conflict(transaction: &Transaction, found: &[TxnOpResponse]) -> StoreError {
        for (compare, found) in transaction.compares.iter().zip(found) {
            let TxnOpResponse::Get(found) = found else {
                continue;
            };
            let found = found.kvs().first().map(KeyValue::mod_revision);
            let (key, wanted) = match compare {
                Compare::Absent(key) => (key, None),
                Compare::Revision(key, revision) => (key, Some(*revision as i64)),
            };
            if found != wanted {
                return StoreError::Conflict { key: key.clone() };
            }
        }
        StoreError::Backend("etcd refused a transaction whose comparisons hold".into())
    }

    fn to_etcd(&self, transaction: &Transaction) -> Txn {
        let compares = transaction.compares.iter().map(|compare| {
            let (key, revision) = match compare {
                Compare::Absent(key) => (key, 0),
                Compare::Revision(key, revision) => (key, *revision as i64),
            };
            EtcdCompare::mod_revision(self.key(key), CompareOp::Equal, revision)
        });
        let looks = transaction.compares.iter().map(|compare| {
            let (Compare::Absent(key) | Compare::Revision(key, _)) = compare;
            TxnOp::get(self.key(key), Some(GetOptions::new().with_keys_only()))
        });
        // etcd takes one write of each key; the last one is what counts.
        let writes = transaction.writes.iter().enumerate();
        let last: HashMap<&str, usize> = writes
            .clone()
            .map(|(index, write)| (write.key(), index))
            .collect();
        let writes = writes.filter(|(index, write)| last[write.key()] == *index);
        let writes = writes.map(|(_, write)| match write {
            Write::Put { key, value, lease } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                TxnOp::put(self.key(key), value.clone(), options)
            }
            Write::Delete(key) => TxnOp::delete(self.key(key), None),
        });
        Txn::new()
            .when(compares.collect::<Vec<_>>())
            .and_then(writes.collect::<Vec<_>>())
            .or_else(looks.collect::<Vec<_>>())
    }
}

#[tonic::async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Item>, StoreError> {
        let answer = self.range(self.key(key), GetOptions::new()).await;
        let found = answer.map_err(Failure::into_error)?.take_kvs().pop();
        let item = found.map(|found| self.item(found)).transpose();
        item.map_err(Failure::into_error)
    }

    async fn list(&self, range: Range) -> Result<Listing, StoreError> {
        for _ in 1..LIST_ATTEMPTS {
            match self.list_once(&range).await {
                Err(Failure::Compacted) => {}
                done => return done.map_err(Failure::into_error),
            }
        }
        self.list_once(&range).await.map_err(Failure::into_error)
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        let txn = self.to_etcd(&transaction);
        let done = self.inner.members.write(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        let answer = match done.await {
            Err(Failure::NoLease) => {
                let lease = transaction.writes.iter().find_map(|write| match write {
                    Write::Put { lease, .. } => *lease,
                    Write::Delete(_) => None,
                });
                let lease = lease.unwrap_or(LeaseId(0));
                return Err(StoreError::LeaseGone { lease });
            }
            done => done.map_err(Failure::into_error)?,
        };
        if !answer.succeeded() {
            return Err(Self::conflict(&transaction, &answer.op_responses()));
        }
        let revision = answer.header().map_or(0, |header| header.revision());
        let revision = revision.unsigned_abs();
        self.saw(revision);
        Ok(revision)
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        watching::watch(&self.inner, self.key(prefix), after).await
    }

    fn revision(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX).max(1);
        // One that was granted and not heard of ends by itself.
        let granted = self.inner.members.read(|mut client| async move {
            let granted = client.lease_grant(seconds, None).await?;
            Ok(LeaseId(granted.id()))
        });
        granted.await.map_err(Failure::into_error)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let kept = self.inner.members.read(|mut client| async move {
            // The first answer is taken by the client, which does not tell for how long.
            let (mut keeper, mut answers) = client.lease_keep_alive(lease.0).await?;
            keeper.keep_alive().await?;
            Ok(answers.message().await?.map_or(0, |answer| answer.ttl()))
        });
        match kept.await {
            Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds.unsigned_abs())),
            Ok(_) | Err(Failure::NoLease) => Err(StoreError::LeaseGone { lease }),
            Err(failure) => Err(failure.into_error()),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let revoked = self
            .inner
            .members
            .read(|mut client| async move { client.lease_revoke(lease.0).await.map(drop) });
        match revoked.await {
            Ok(()) | Err(Failure::NoLease) => Ok(()),
            Err(failure) => Err(failure.into_error()),
        }
    }
}

impl Inner {
    fn saw(&self, revision: u64) {
        self.revision.send_if_modified(|newest| {
            let newer = revision > *newest;
            *newest = revision.max(*newest);
            newer
        });
    }

    /// Without the prefix.
    fn own_key(&self, key: &[u8]) -> Result<String, Failure> {
        let own = std::str::from_utf8(key).ok();
        let own = own.and_then(|key| key.strip_prefix(&self.prefix));
        own.map(str::to_owned).ok_or_else(|| {
            Failure::Other("etcd answered with a key that is not of this store".into())
        })
    }
}

fn revision_of(answer: &GetResponse) -> u64 {
    let revision = answer.header().map_or(0, |header| header.revision());
    revision.unsigned_abs()
}
