//! Calls to hosts: beside the loop, one at a time for each resource; what fails for now is tried again
//! after a growing pause, what is refused for good is recorded.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::ends::record_refusal;
use super::{decode, with_source};
use crate::focus::Focus;
use crate::model;
use crate::plan::Call;
use crate::reach::Reach;
use crate::store::{SharedStore, StoreError};

/// Calls to hosts at one time.
const MAX_CALLS: usize = 256;
/// Of these, to one host.
const MAX_HOST_CALLS: usize = 32;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// See the module.
pub(super) struct Calls {
    store: SharedStore,
    reach: Arc<dyn Reach>,
    under_way: JoinSet<(Told, Result<(), Status>)>,
    /// Resources that a call is under way for, and the hosts that are called.
    busy: HashSet<(String, String)>,
    backoff: HashMap<(String, String), Backoff>,
}

/// A call to a host.
pub(super) struct Told {
    pub(super) host: String,
    pub(super) name: String,
    pub(super) call: Call,
    /// Of the request that it is done for.
    pub(super) trace_parent: String,
}

struct Backoff {
    pause: Duration,
    until: Instant,
    /// What it is about is looked at again, once.
    over: bool,
}

/// A call that is over, to be noted by [`Calls::finished`].
pub(super) type Finished = Result<(Told, Result<(), Status>), JoinError>;

impl Calls {
    /// None yet.
    pub(super) fn new(store: SharedStore, reach: Arc<dyn Reach>) -> Self {
        Self {
            store,
            reach,
            under_way: JoinSet::new(),
            busy: HashSet::new(),
            backoff: HashMap::new(),
        }
    }

    /// Tells a host something, unless it is being told, or failed to do it a moment ago.
    pub(super) fn begin(&mut self, told: Told, focus: &mut Focus) {
        let key = (told.host.clone(), told.name.clone());
        let waits = self
            .backoff
            .get(&key)
            .is_some_and(|backoff| backoff.until > Instant::now());
        if waits || self.busy.contains(&key) {
            return;
        }
        let of_host = || self.busy.iter().filter(|(host, _)| *host == told.host);
        if self.under_way.len() >= MAX_CALLS
            || (self.busy.len() >= MAX_HOST_CALLS && of_host().count() >= MAX_HOST_CALLS)
        {
            focus.no_call(&told.host, &told.name);
            return;
        }
        self.busy.insert(key);
        let (store, reach) = (self.store.clone(), self.reach.clone());
        let trace_parent = told.trace_parent.clone();
        self.under_way
            .spawn(telemetry::scope(trace_parent, async move {
                let result = match told.call.clone() {
                    Call::ApplyVm(spec) => match with_seed(&store, &told.name, *spec).await {
                        Ok(spec) => reach.tell(&told.host, Call::ApplyVm(Box::new(spec))).await,
                        // The next attempt may read it.
                        Err(error) => Err(Status::unavailable(with_source(&error))),
                    },
                    call => reach.tell(&told.host, call).await,
                };
                (told, result)
            }));
    }

    /// Waits for a call's end; there is none while no call is under way.
    pub(super) async fn next(&mut self) -> Option<Finished> {
        self.under_way.join_next().await
    }

    /// A call that is over by now.
    pub(super) fn try_next(&mut self) -> Option<Finished> {
        self.under_way.try_join_next()
    }

    /// Notes how a call ended, and has what it was about looked at again.
    pub(super) async fn finished(&mut self, finished: Finished, focus: &mut Focus) {
        let (told, result) = match finished {
            Ok(finished) => finished,
            Err(error) => {
                // Whose call it was is not known; all are free to be made again.
                tracing::error!(%error, "a call to a host panicked");
                self.busy.clear();
                return;
            }
        };
        let Told { host, name, .. } = &told;
        let key = (host.clone(), name.clone());
        self.busy.remove(&key);
        focus.told(host, name);
        let Err(status) = result else {
            self.backoff.remove(&key);
            return;
        };
        tracing::warn!(%host, %name, %status, "the host did not do what was asked");
        if is_final(status.code())
            && let Err(error) = record_refusal(&self.store, &told, &status).await
        {
            tracing::warn!(%name, error = %with_source(&error), "cannot record a host's refusal");
        }
        let pause = self
            .backoff
            .get(&key)
            .map_or(FIRST_BACKOFF, |last| last.pause * 2);
        let pause = pause.min(MAX_BACKOFF);
        let until = Instant::now() + pause;
        let over = false;
        self.backoff.insert(key, Backoff { pause, until, over });
    }

    /// What failed long enough ago is looked at again.
    pub(super) fn retry(&mut self, focus: &mut Focus) {
        let now = Instant::now();
        for ((host, name), backoff) in &mut self.backoff {
            if backoff.until <= now && !backoff.over {
                backoff.over = true;
                focus.told(host, name);
            }
        }
    }

    /// When the next failure is long enough ago.
    pub(super) fn next_retry(&self) -> Option<Duration> {
        let now = Instant::now();
        let due = self
            .backoff
            .values()
            .map(|backoff| backoff.until)
            .filter(|until| *until > now);
        due.min()
            .map(|until| until - now + Duration::from_millis(1))
    }

    /// How many more may be under way.
    pub(super) fn free(&self) -> usize {
        MAX_CALLS.saturating_sub(self.under_way.len())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    /// A call about `name` to this host is under way.
    pub(super) fn is_busy(&self, host: &str, name: &str) -> bool {
        self.busy.contains(&(host.to_owned(), name.to_owned()))
    }

    /// A call about `name` to any host is under way.
    pub(super) fn is_busy_anywhere(&self, name: &str) -> bool {
        self.busy.iter().any(|(_, busy)| busy == name)
    }
}

/// Adds the content of the VM's seed, which is not in its record.
async fn with_seed(
    store: &SharedStore,
    name: &str,
    mut spec: api::node::VmSpec,
) -> Result<api::node::VmSpec, StoreError> {
    if spec.cloud_init.is_some()
        && let Ok(vm) = api::names::Name::parse_vm(name)
        && let Some(item) = store.get(&model::seed_key(&vm)).await?
    {
        spec.cloud_init = Some(decode(&item.key, &item.value)?);
    }
    Ok(spec)
}

/// Asking again will not help.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::NotFound
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unimplemented
            | Code::Aborted
    )
}
