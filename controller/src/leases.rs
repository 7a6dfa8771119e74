//! The leader's end of hosts' leases: it renews them, and knows which hosts are lost.
//!
//! ```text
//! round:  prove to lead ──▶ renew what was heard before that ──▶ hear the next tickets
//!         (a transaction)
//! ```
//!
//! See [`lease`] for why that is safe. What a lost host ran is taken from it by [`crate::failover`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::node::{RenewLeaseRequest, RenewLeaseResponse};
use lease::{Keeper, Moment, Renewal, Terms, Ticket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::hosts::Hosts;
use crate::reach::Reach;
use crate::reconciler::with_source;
use crate::store::{SharedStore, StoreError, Transaction};

/// How long, in milliseconds, the longest lease that any leader granted took to be surely over.
const LONGEST: &str = "lease-terms";

/// Which hosts are lost. Cheap to clone.
#[derive(Clone)]
pub struct Leases(Arc<Inner>);

struct Inner {
    terms: Terms,
    /// Zero of the leader's clock.
    zero: Instant,
    /// Of the present leadership; there is none before one was won.
    keeper: Mutex<Option<Keeper>>,
    /// Rises when a host may have become lost.
    rounds: watch::Sender<u64>,
}

impl Leases {
    /// Nobody is lost while this controller does not lead.
    pub fn new(terms: Terms) -> Self {
        Self(Arc::new(Inner {
            terms,
            zero: Instant::now(),
            keeper: Mutex::default(),
            rounds: watch::Sender::new(0),
        }))
    }

    /// Which of these hosts run nothing any more that needs a lease.
    pub fn lost<'a>(&self, hosts: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
        let now = self.now();
        let keeper = self.keeper();
        let Some(keeper) = keeper.as_ref() else {
            return BTreeSet::new();
        };
        keeper.lost(hosts, now).cloned().collect()
    }

    /// Changes with every round of renewals.
    pub fn rounds(&self) -> watch::Receiver<u64> {
        self.0.rounds.subscribe()
    }

    /// Renews leases for as long as this controller leads. `store` refuses transactions of a leadership
    /// that is over.
    pub async fn run(self, store: SharedStore, hosts: Hosts, reach: Arc<dyn Reach>) {
        let longest = loop {
            match note_longest(&store, self.0.terms.surely_over()).await {
                Ok(longest) => break longest,
                Err(StoreError::Deposed) => return,
                Err(error) => {
                    tracing::warn!(error = %with_source(&error), "cannot note the terms of leases");
                }
            }
            tokio::time::sleep(self.0.terms.renew_every()).await;
        };
        let keeper = Keeper::new(self.0.terms, 0, self.now());
        *self.keeper() = Some(keeper.after_leases_of(longest));
        let _over = Over(&self);
        let mut heard: BTreeMap<String, Renewal> = BTreeMap::new();
        loop {
            let round_ends = Instant::now() + self.0.terms.renew_every();
            match prove(&store, &heard).await {
                Ok(()) => {}
                Err(StoreError::Deposed) => return,
                Err(error) => {
                    // What was heard stays unanswered; new tickets are as good.
                    tracing::warn!(error = %with_source(&error), "cannot renew hosts' leases");
                    heard.clear();
                }
            }
            heard = self.round(&hosts.ids(), &reach, heard, round_ends).await;
            self.0.rounds.send_modify(|rounds| *rounds += 1);
            tokio::time::sleep_until(round_ends).await;
        }
    }

    /// Sends every host what was granted to it, or only asks for a ticket; answers with the tickets
    /// that came in time.
    async fn round(
        &self,
        hosts: &[String],
        reach: &Arc<dyn Reach>,
        mut granted: BTreeMap<String, Renewal>,
        until: Instant,
    ) -> BTreeMap<String, Renewal> {
        let mut calls = JoinSet::new();
        for host in hosts {
            let request = granted.remove(host).map(request).unwrap_or_default();
            let (host, reach) = (host.clone(), reach.clone());
            calls.spawn(async move {
                let answer = reach.renew_lease(&host, request).await;
                (host, answer)
            });
        }
        let mut heard = BTreeMap::new();
        while let Ok(Some(call)) = tokio::time::timeout_at(until, calls.join_next()).await {
            match call {
                Ok((host, Ok(answer))) => {
                    if !answer.refusal.is_empty() {
                        tracing::info!(host, "a lease was not renewed: {}", answer.refusal);
                    }
                    let now = self.now();
                    if let Some(keeper) = self.keeper().as_mut() {
                        let renewal = keeper.heard(&host, ticket(answer), now);
                        heard.insert(host, renewal);
                    }
                }
                Ok((host, Err(status))) => {
                    tracing::debug!(host, %status, "the host's lease was not renewed");
                }
                Err(error) => tracing::error!(%error, "renewing a lease"),
            }
        }
        heard
    }

    fn now(&self) -> Moment {
        Moment(self.0.zero.elapsed())
    }

    fn keeper(&self) -> MutexGuard<'_, Option<Keeper>> {
        self.0.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The leadership ends with the loop.
struct Over<'a>(&'a Leases);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        *self.0.keeper() = None;
    }
}

/// The longest that any leader granted, `own` included, which is noted before it is granted: the next
/// leader may have other terms.
async fn note_longest(store: &SharedStore, own: Duration) -> Result<Duration, StoreError> {
    let noted = store.get(LONGEST).await?;
    let longest = noted.as_ref().and_then(|item| {
        let text = std::str::from_utf8(&item.value).ok()?;
        text.parse().ok().map(Duration::from_millis)
    });
    let longest = longest.unwrap_or_default();
    if own <= longest {
        return Ok(longest);
    }
    let millis = own.as_millis().saturating_add(1).to_string();
    let transaction = match noted {
        Some(item) => Transaction::new().if_unchanged(LONGEST, item.revision),
        None => Transaction::new().if_absent(LONGEST),
    };
    let transaction = transaction.put(LONGEST, millis.into_bytes());
    store.commit(transaction).await?;
    Ok(own)
}

/// Returns once it is known that this controller led after `heard` was heard.
async fn prove(store: &SharedStore, heard: &BTreeMap<String, Renewal>) -> Result<(), StoreError> {
    if heard.is_empty() {
        return Ok(());
    }
    store.commit(Transaction::new()).await.map(drop)
}

fn request(granted: Renewal) -> RenewLeaseRequest {
    let millis = |term: Duration| u32::try_from(term.as_millis()).unwrap_or(u32::MAX);
    RenewLeaseRequest {
        session: granted.ticket.session,
        ticket_boottime_ns: granted.ticket.at.as_nanos(),
        lease_ms: millis(granted.terms.lease),
        grace_ms: millis(granted.terms.grace),
        settle_ms: millis(granted.terms.settle),
    }
}

fn ticket(answer: RenewLeaseResponse) -> Ticket {
    Ticket {
        session: answer.session,
        at: Moment::from_nanos(answer.ticket_boottime_ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::embedded::EmbeddedStore;

    #[tokio::test]
    async fn longest_terms_that_were_ever_granted_are_kept() {
        let store: SharedStore = Arc::new(EmbeddedStore::in_memory());
        let term = Duration::from_secs;
        assert_eq!(note_longest(&store, term(45)).await.unwrap(), term(45));
        let kept = note_longest(&store, term(10)).await.unwrap();
        assert!(
            kept >= term(45),
            "shorter terms do not shorten what was granted"
        );
        assert_eq!(note_longest(&store, term(90)).await.unwrap(), term(90));
        assert!(note_longest(&store, term(45)).await.unwrap() >= term(90));
    }
}
