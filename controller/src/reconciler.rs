//! The loop that makes hosts match the store: load what is wanted, look at what was seen, plan, act,
//! and again on every change, on every answer, and every few seconds.
//!
//! ```text
//! loading     everything that is wanted, read from the store
//! calls       hosts are told, beside the loop
//! acting      everything else that is to be done, one action after the other
//!   placing     hosts are chosen
//!   records     what hosts report is stored
//!   ends        records go, operations are done
//! collecting  old operations and events go
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _};
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::cache::Cache;
use crate::focus::Focus;
use crate::hosts::Hosts;
use crate::leases::Leases;
use crate::plan::{Action, Call, Desired, Fleet, Index, plan_part};
use crate::reach::Reach;
use crate::store::{SharedStore, StoreError};
use calls::{Calls, Told};
use collecting::{COLLECT_INTERVAL, collect_all};

mod acting;
mod calls;
mod collecting;
mod ends;
mod loading;
mod placing;
mod records;

pub use loading::load;

/// Without any news the loop runs this often, and has looked at everything.
const TICK: Duration = Duration::from_secs(5);
/// Between two steps, so that what comes at about the same time is looked at together.
const GATHER: Duration = Duration::from_millis(2);
/// Transactions of one step under way at one time: as many as the store makes durable together.
const MAX_WRITES: usize = 256;
/// A failing store is given this long before the next attempt.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Reconciler {
    store: SharedStore,
    cache: Cache,
    focus: Focus,
    /// VMs that were or may have been taken from their hosts, by name, and their records' revisions then.
    taking: Mutex<HashMap<String, u64>>,
    hosts: Hosts,
    leases: Option<Leases>,
    calls: Calls,
}

impl Reconciler {
    /// Ready to run.
    pub fn new(store: SharedStore, hosts: Hosts) -> Self {
        Self {
            cache: Cache::new(store.clone()),
            focus: Focus::new(TICK),
            taking: Mutex::default(),
            calls: Calls::new(store.clone(), Arc::new(hosts.clone())),
            store,
            hosts,
            leases: None,
        }
    }

    /// Takes VMs from hosts that are lost. Without, no host ever is.
    #[must_use]
    pub fn with_leases(mut self, leases: Leases) -> Self {
        self.leases = Some(leases);
        self
    }

    /// Tells hosts by another way than the connections to them.
    #[must_use]
    pub fn with_reach(mut self, reach: Arc<dyn Reach>) -> Self {
        self.calls = Calls::new(self.store.clone(), reach);
        self
    }

    /// Runs for ever. What it does survives its end at any point.
    pub async fn run(mut self) {
        let mut observed = self.hosts.changed();
        let mut collect_at = Instant::now();
        let mut collecting = JoinSet::new();
        loop {
            observed.mark_unchanged();
            let seen = self.hosts.fleet();
            match self.step(&seen).await {
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(error = %with_source(&error), "cannot reconcile");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
            while collecting.try_join_next().is_some() {}
            if collecting.is_empty() && Instant::now() >= collect_at {
                collecting.spawn(collect_all(self.store.clone()));
                collect_at = Instant::now() + COLLECT_INTERVAL;
            }
            tokio::time::sleep(GATHER).await;
            let rest = self.focus.rest(self.calls.is_idle());
            let wake = self.calls.next_retry().unwrap_or(rest).min(rest);
            tokio::select! {
                _ = observed.changed() => {}
                changed = self.cache.changed(&mut self.focus) => {
                    if let Err(error) = changed {
                        tracing::error!(error = %with_source(&error), "cannot read a change");
                    }
                }
                Some(finished) = self.calls.next() => {
                    self.calls.finished(finished, &mut self.focus).await;
                }
                () = tokio::time::sleep(wake) => {}
            }
            while let Some(finished) = self.calls.try_next() {
                self.calls.finished(finished, &mut self.focus).await;
            }
        }
    }

    /// One look at what changed. What somebody else changed meanwhile is looked at again next time.
    async fn step(&mut self, seen: &Arc<Fleet>) -> Result<(), StoreError> {
        self.cache.refresh(&mut self.focus).await?;
        let mut desired = std::mem::take(self.cache.desired_mut());
        if let Some(leases) = &self.leases {
            desired.lost = leases.lost(desired.hosts.keys());
        }
        self.calls.retry(&mut self.focus);
        let index = self.cache.index();
        self.focus.see(seen, &desired.lost, index);
        let free = self.calls.free();
        let part = self.focus.next(&desired, index, free);
        let actions = self.hold_back(&desired, plan_part(&desired, seen, &part, index));
        let result = self.carry_out(&desired, actions).await;
        *self.cache.desired_mut() = desired;
        result
    }

    /// A VM that was taken from its host, or may have been, is not told to that host again before this is
    /// seen: the host may be back, and the VM elsewhere a moment later. As long as its record is as it was
    /// it is taken again, which then happens or shows that it has happened.
    fn hold_back(&self, desired: &Desired, mut actions: Vec<Action>) -> Vec<Action> {
        let mut taking = self.taking();
        taking.retain(|name, revision| {
            let stored = desired.vms.get(name);
            stored.is_some_and(|stored| stored.revision == *revision)
        });
        if taking.is_empty() {
            return actions;
        }
        actions.retain(|action| match action {
            Action::Call {
                name,
                call: Call::ApplyVm(_),
                ..
            }
            | Action::TakeVm { name, .. } => !taking.contains_key(name),
            _ => true,
        });
        let again = taking.keys().map(|name| Action::TakeVm {
            name: name.clone(),
            why: "its host is lost".to_owned(),
        });
        actions.extend(again);
        actions
    }

    fn taking(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.taking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells hosts, and stores what is to be stored: many at once, since the store takes them together.
    /// What was asked for is said to be done last, when its effect can be found.
    async fn carry_out(
        &mut self,
        desired: &Desired,
        actions: Vec<Action>,
    ) -> Result<(), StoreError> {
        let mut news = Vec::new();
        let mut finished = Vec::new();
        for action in actions {
            match action {
                Action::Call { host, name, call } => {
                    let trace_parent = trace_of(&name, desired, self.cache.index());
                    let told = Told {
                        host,
                        name,
                        call,
                        trace_parent,
                    };
                    self.calls.begin(told, &mut self.focus);
                }
                Action::FinishOperation { .. } => finished.push(action),
                other => news.push(other),
            }
        }
        for writes in [news, finished] {
            let mut writes = stream::iter(writes)
                .map(|action| async {
                    let about = action.about().map(str::to_owned);
                    (about, self.act(desired, action).await)
                })
                .buffer_unordered(MAX_WRITES);
            let mut again = Vec::new();
            let mut failed = None;
            while let Some((about, written)) = writes.next().await {
                match written {
                    Ok(()) => {}
                    Err(StoreError::Conflict { .. }) => again.extend(about),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            drop(writes);
            again.iter().for_each(|name| self.focus.again(name));
            if let Some(error) = failed {
                // What was left undone is found again.
                self.focus.everything(desired);
                return Err(error);
            }
        }
        Ok(())
    }
}

/// The trace of the request that wants something: an operation, or what one is about.
fn trace_of(name: &str, desired: &Desired, index: &Index) -> String {
    let asked = index.asked(name).last().unwrap_or(name);
    let metadata = desired.pending.get(asked);
    let metadata = metadata.and_then(|operation| operation.metadata.as_ref());
    metadata.map_or_else(String::new, |metadata| metadata.trace_parent.clone())
}

/// Decodes a stored record.
///
/// # Errors
/// When the store holds something else.
pub fn decode<T: Message + Default>(_key: &str, value: &[u8]) -> Result<T, StoreError> {
    T::decode(value).map_err(|error| StoreError::Backend(Box::new(error)))
}

/// An error and its causes, for a log line.
pub fn with_source(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
