//! The loop that makes hosts match the store: load what is wanted, look at what was seen, plan, act,
//! and again on every change, on every answer, and every few seconds.
//!
//! Calls to hosts run beside the loop, one at a time for each resource; what fails for now is tried
//! again after a growing pause, what is refused for good is recorded.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::controller as pb;
use api::names::{NETWORKS, Name, VMS};
use futures_util::stream::{self, StreamExt as _};
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::cache::Cache;
use crate::commands::{self, CommandError, Placing};
use crate::failover;
use crate::focus::Focus;
use crate::hosts::Hosts;
use crate::leases::Leases;
use crate::model::{
    self, HostRecord, JobRecord, NetworkRecord, SecurityGroupRecord, VmRecord, VolumeRecord, prefix,
};
use crate::moving;
use crate::plan::{self, Action, Call, Desired, Fleet, Index, Stored, plan_part};
use crate::reach::Reach;
use crate::scheduler;
use crate::store::{Item, Range, SharedStore, StoreError, Transaction};

/// Without any news the loop runs this often, and has looked at everything.
const TICK: Duration = Duration::from_secs(5);
/// Between two steps, so that what comes at about the same time is looked at together.
const GATHER: Duration = Duration::from_millis(2);
/// Transactions of one step under way at one time: as many as the store makes durable together.
const MAX_WRITES: usize = 256;
/// Records read in one go.
const PAGE: usize = 500;
/// Records removed in one transaction; etcd takes 128 operations.
const COLLECT_BATCH: usize = 50;
/// Calls to hosts at one time.
const MAX_CALLS: usize = 256;
/// Of these, to one host.
const MAX_HOST_CALLS: usize = 32;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// A failing store is given this long before the next attempt.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Done operations and events that are kept, and how often the rest goes.
const MAX_OPERATIONS: usize = 1_000;
const MAX_EVENTS: usize = 10_000;
const COLLECT_INTERVAL: Duration = Duration::from_secs(60);

/// See the module.
pub struct Reconciler {
    store: SharedStore,
    cache: Cache,
    focus: Focus,
    /// VMs that were or may have been taken from their hosts, by name, and their records' revisions then.
    taking: Mutex<HashMap<String, u64>>,
    hosts: Hosts,
    leases: Option<Leases>,
    reach: Arc<dyn Reach>,
    calls: JoinSet<(Told, Result<(), Status>)>,
    /// Resources that a call is under way for, and the hosts that are called.
    busy: HashSet<(String, String)>,
    backoff: HashMap<(String, String), Backoff>,
}

/// A call to a host.
struct Told {
    host: String,
    name: String,
    call: Call,
    /// Of the request that it is done for.
    trace_parent: String,
}

struct Backoff {
    pause: Duration,
    until: Instant,
    /// What it is about is looked at again, once.
    over: bool,
}

impl Reconciler {
    /// Ready to run.
    pub fn new(store: SharedStore, hosts: Hosts) -> Self {
        Self {
            cache: Cache::new(store.clone()),
            focus: Focus::new(TICK),
            taking: Mutex::default(),
            store,
            reach: Arc::new(hosts.clone()),
            hosts,
            leases: None,
            calls: JoinSet::new(),
            busy: HashSet::new(),
            backoff: HashMap::new(),
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
        self.reach = reach;
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
            let rest = self.focus.rest(self.calls.is_empty());
            let wake = self.next_retry().unwrap_or(rest).min(rest);
            tokio::select! {
                _ = observed.changed() => {}
                changed = self.cache.changed(&mut self.focus) => {
                    if let Err(error) = changed {
                        tracing::error!(error = %with_source(&error), "cannot read a change");
                    }
                }
                Some(finished) = self.calls.join_next() => self.finished(finished).await,
                () = tokio::time::sleep(wake) => {}
            }
            while let Some(finished) = self.calls.try_join_next() {
                self.finished(finished).await;
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
        self.retry();
        let index = self.cache.index();
        self.focus.see(seen, &desired.lost, index);
        let free = MAX_CALLS.saturating_sub(self.calls.len());
        let part = self.focus.next(&desired, index, free);
        let actions = self.hold_back(&desired, plan_part(&desired, seen, &part, index));
        let result = self.carry_out(&desired, actions).await;
        *self.cache.desired_mut() = desired;
        result
    }

    /// What failed long enough ago is looked at again.
    fn retry(&mut self) {
        let now = Instant::now();
        for ((host, name), backoff) in &mut self.backoff {
            if backoff.until <= now && !backoff.over {
                backoff.over = true;
                self.focus.told(host, name);
            }
        }
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
                    self.call(Told {
                        host,
                        name,
                        call,
                        trace_parent,
                    });
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

    async fn act(&self, desired: &Desired, action: Action) -> Result<(), StoreError> {
        let store = &self.store;
        match action {
            // Hosts are told beside this.
            Action::Call { .. } => Ok(()),
            Action::PlaceVm { name, found } => {
                place_vm(store, &self.hosts, &desired.vms[&name], found).await
            }
            Action::TakeVm { name, why } => {
                let stored = &desired.vms[&name];
                self.taking().insert(name, stored.revision);
                failover::take_vm(store, stored, &why).await
            }
            Action::PlaceVolume { name, found } => {
                place_volume(store, &self.hosts, &desired.volumes[&name], found).await
            }
            Action::NoteStays { name, drain, why } => {
                moving::note_stays(store, &desired.vms[&name], &drain, &why).await
            }
            Action::StopToMove { name, drain } => {
                moving::stop_to_move(store, &self.hosts, &desired.vms[&name], &drain).await
            }
            Action::MoveVm { name, drain } => {
                moving::move_vm(store, &self.hosts, &desired.vms[&name], &drain).await
            }
            Action::AdvanceJob { name, host } => advance_job(store, &name, &host).await,
            Action::NoteEvicted { host, node_id } => {
                let key = model::eviction_key(&host, &node_id);
                store.commit(Transaction::new().delete(key)).await.map(drop)
            }
            Action::RecordHost { host, inventory } => {
                let Stored { record, revision } = desired.hosts[&host].clone();
                let record = HostRecord {
                    inventory: Some(*inventory),
                    ..record
                };
                let key = record.name.clone();
                let transaction = Transaction::new()
                    .if_unchanged(key.clone(), revision)
                    .put(key, record.encode_to_vec());
                store.commit(transaction).await.map(drop)
            }
            Action::RecordVm {
                name,
                status,
                ended,
            } => record_vm(store, &desired.vms[&name], &status, ended).await,
            Action::RecordVolume {
                name,
                status,
                based,
            } => record_volume(store, &desired.volumes[&name], &status, based).await,
            Action::RecordNetwork { name, status } => {
                record_network(store, &desired.networks[&name], &status).await
            }
            Action::NoteNetwork { name, hosts } => {
                let Stored { record, revision } = desired.networks[&name].clone();
                let key = key_of(&name);
                let transaction = Transaction::new()
                    .if_unchanged(key.clone(), revision)
                    .put(key, NetworkRecord { hosts, ..record }.encode_to_vec());
                store.commit(transaction).await.map(drop)
            }
            Action::ForgetVm { name } => {
                let Stored { record, revision } = &desired.vms[&name];
                if self.is_busy(&record.host, &name) {
                    return Ok(());
                }
                let given_back = commands::release(store, record, Transaction::new()).await?;
                let node_id = &record.node_id;
                forget(
                    store,
                    &self.asked(&name, desired),
                    &name,
                    node_id,
                    *revision,
                    given_back,
                )
                .await
            }
            Action::ForgetVolume { name } => {
                let Stored { record, revision } = &desired.volumes[&name];
                if self.is_busy(&record.host, &name) {
                    return Ok(());
                }
                let node_id = &record.node_id;
                let transaction =
                    commands::release_export(store, record, Transaction::new()).await?;
                forget(
                    store,
                    &self.asked(&name, desired),
                    &name,
                    node_id,
                    *revision,
                    transaction,
                )
                .await
            }
            Action::ForgetNetwork { name } => {
                if self.busy.iter().any(|(_, busy)| *busy == name) {
                    return Ok(());
                }
                let Stored { record, revision } = &desired.networks[&name];
                let (node_id, transaction) = (&record.node_id, Transaction::new());
                forget(
                    store,
                    &self.asked(&name, desired),
                    &name,
                    node_id,
                    *revision,
                    transaction,
                )
                .await
            }
            Action::FinishOperation {
                name,
                error,
                findings,
            } => finish(store, &name, error, &findings).await,
        }
    }

    /// Operations that are not done and whose target is `name`.
    fn asked<'a>(&self, name: &str, desired: &'a Desired) -> Vec<&'a pb::Operation> {
        let index = self.cache.index();
        let asked = index.asked(name).chain(index.others());
        let asked = asked.filter_map(|operation| desired.pending.get(operation));
        let target = |operation: &&pb::Operation| {
            let metadata = operation.metadata.as_ref();
            metadata.is_some_and(|metadata| metadata.target == name)
        };
        asked.filter(target).collect()
    }

    fn is_busy(&self, host: &str, name: &str) -> bool {
        self.busy.contains(&(host.to_owned(), name.to_owned()))
    }

    fn call(&mut self, told: Told) {
        let key = (told.host.clone(), told.name.clone());
        let waits = self
            .backoff
            .get(&key)
            .is_some_and(|backoff| backoff.until > Instant::now());
        if waits || self.busy.contains(&key) {
            return;
        }
        let of_host = || self.busy.iter().filter(|(host, _)| *host == told.host);
        if self.calls.len() >= MAX_CALLS
            || (self.busy.len() >= MAX_HOST_CALLS && of_host().count() >= MAX_HOST_CALLS)
        {
            self.focus.no_call(&told.host, &told.name);
            return;
        }
        self.busy.insert(key);
        let (store, reach) = (self.store.clone(), self.reach.clone());
        let trace_parent = told.trace_parent.clone();
        self.calls.spawn(telemetry::scope(trace_parent, async move {
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

    async fn finished(
        &mut self,
        finished: Result<(Told, Result<(), Status>), tokio::task::JoinError>,
    ) {
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
        self.focus.told(host, name);
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

    fn next_retry(&self) -> Option<Duration> {
        let now = Instant::now();
        let due = self
            .backoff
            .values()
            .map(|backoff| backoff.until)
            .filter(|until| *until > now);
        due.min()
            .map(|until| until - now + Duration::from_millis(1))
    }
}

/// Chooses a host for a VM that has none, or notes where it was found.
async fn place_vm(
    store: &SharedStore,
    hosts: &Hosts,
    stored: &Stored<VmRecord>,
    found: Option<String>,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let Ok(name) = Name::parse_vm(&record.vm.name) else {
        return Ok(());
    };
    let spec = record.vm.spec.clone().unwrap_or_default();
    let request = match commands::vm_request(store, &name, &spec).await {
        Ok(Some(request)) => request,
        Ok(None) => return unplaced(store, stored, "its volumes have no host yet").await,
        Err(CommandError::Store(error)) => return Err(error),
        Err(error) => return unplaced(store, stored, &error.to_string()).await,
    };
    let place = match found {
        Some(host) => commands::place_at(store, &host, &request).await?,
        None => match commands::place(hosts, &request).await? {
            Placing::Found(place) => *place,
            Placing::None(verdicts) => {
                return unplaced(store, stored, &scheduler::words(&verdicts)).await;
            }
        },
    };
    place.note(&mut record);
    commands::count_placements(store, &mut record).await?;
    let target = model::host_name(place.host());
    let event = model::new_event(&record.vm.name, "VM_PLACED", format!("on {target}"));
    let mut transaction = Transaction::new();
    if record.vm.desired_power() == pb::DesiredPower::On {
        transaction = match commands::attach(store, &mut record, transaction).await {
            Ok(transaction) => transaction,
            Err(CommandError::Store(error)) => return Err(error),
            Err(error) => return unplaced(store, stored, &error.to_string()).await,
        };
    }
    let transaction = transaction
        .if_unchanged(model::key(&name), stored.revision)
        .put(model::key(&name), record.encode_to_vec())
        .put(event.name.clone(), event.encode_to_vec());
    let done = store.commit(place.promise(transaction)).await;
    place.settle(store, hosts, done).await.map(drop)
}

/// Notes why no host can have a VM, if that is news.
async fn unplaced(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    words: &str,
) -> Result<(), StoreError> {
    if stored.record.unplaced == words {
        return Ok(());
    }
    let record = VmRecord {
        unplaced: words.to_owned(),
        ..stored.record.clone()
    };
    let key = key_of(&record.vm.name);
    let mut transaction = Transaction::new().if_unchanged(key.clone(), stored.revision);
    if !words.is_empty() {
        let mut event = model::new_event(&record.vm.name, "VM_NOT_PLACED", words);
        event.warning = true;
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let transaction = transaction.put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// Chooses a host for a volume that has none, or notes where it was found.
async fn place_volume(
    store: &SharedStore,
    hosts: &Hosts,
    stored: &Stored<VolumeRecord>,
    found: Option<String>,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let Ok(name) = Name::parse_volume(&record.volume.name) else {
        return Ok(());
    };
    let spec = record.volume.spec.clone().unwrap_or_default();
    let host = match found {
        Some(host) => host,
        None => match commands::place_volume(store, hosts, &name, &spec).await {
            Ok(host) => host,
            Err(CommandError::Store(error)) => return Err(error),
            Err(error) => {
                tracing::debug!(%name, %error, "no host can have a volume");
                return Ok(());
            }
        },
    };
    if host.is_empty() {
        return Ok(());
    }
    record.host = host;
    let key = model::key(&name);
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
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

/// Everything that is wanted. What changes while it is read is there as it was or as it is.
pub async fn load(store: &SharedStore) -> Result<Desired, StoreError> {
    let mut desired = Desired::default();
    let mut pages = Pages::of(store, model::HOSTS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<HostRecord>(&item)?;
            desired.hosts.insert(stored.record.id().to_owned(), stored);
        }
    }
    let mut pages = Pages::of(store, model::EVICTIONS);
    while let Some(items) = pages.next().await? {
        let evictions = items.iter().filter_map(|item| {
            let of = item.key.trim_start_matches(model::EVICTIONS);
            let (host, node_id) = of.split_once('/')?;
            Some((host.to_owned(), node_id.to_owned()))
        });
        desired.evictions.extend(evictions);
    }
    // Operations come first: each was stored together with its target, so a target that is missing
    // from what is read after it was deleted, and is not merely too new to be seen.
    let mut pages = Pages::of(store, prefix::PENDING);
    while let Some(items) = pages.next().await? {
        for item in items {
            let id = item.key.trim_start_matches(prefix::PENDING);
            let Some(item) = store.get(&format!("{}{id}", prefix::OPERATIONS)).await? else {
                continue;
            };
            let operation: pb::Operation = decode(&item.key, &item.value)?;
            if let Some(job) = store.get(&model::job_key(&operation.name)).await? {
                let record: JobRecord = decode(&job.key, &job.value)?;
                desired.jobs.insert(operation.name.clone(), record);
            }
            desired.pending.insert(operation.name.clone(), operation);
        }
    }
    let mut pages = Pages::of(store, prefix::VMS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<VmRecord>(&item)?;
            desired.vms.insert(stored.record.vm.name.clone(), stored);
        }
    }
    let mut pages = Pages::of(store, prefix::VOLUMES);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<VolumeRecord>(&item)?;
            let name = stored.record.volume.name.clone();
            desired.volumes.insert(name, stored);
        }
    }
    let mut pages = Pages::of(store, prefix::NETWORKS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<NetworkRecord>(&item)?;
            let name = stored.record.network.name.clone();
            desired.networks.insert(name, stored);
        }
    }
    let mut pages = Pages::of(store, prefix::SECURITY_GROUPS);
    while let Some(items) = pages.next().await? {
        for item in items {
            let stored = stored::<SecurityGroupRecord>(&item)?;
            let name = stored.record.group.name.clone();
            desired.security_groups.insert(name, stored);
        }
    }
    Ok(desired)
}

fn stored<T: Message + Default>(item: &Item) -> Result<Stored<T>, StoreError> {
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

async fn record_network(
    store: &SharedStore,
    stored: &Stored<NetworkRecord>,
    status: &pb::NetworkStatus,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let name = record.network.name.clone();
    let before = record.network.status.replace(status.clone());
    let mut transaction = Transaction::new();
    let (reason, words) = match &status.error {
        Some(error) => ("NETWORK_FAILED", error.message.clone()),
        None => ("NETWORK_READY", format!("on {}", status.host)),
    };
    let told = before
        .is_some_and(|before| (before.phase, before.error) == (status.phase, status.error.clone()));
    if !told {
        let mut event = model::new_event(&name, reason, words);
        event.warning = status.error.is_some();
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let key = key_of(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

async fn record_vm(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    status: &pb::VmStatus,
    ended: bool,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let before = record.status();
    let mut status = status.clone();
    // Figures that change all the time are added when somebody reads.
    status.processes.clear();
    let events = model::device_events(&record.vm.name, &before, &status);
    status.devices = status.devices.iter().map(model::noted_device).collect();
    if record.rejected_generation == record.vm.generation {
        status.error = before.error.clone();
    }
    if ended {
        record.vm.desired_power = pb::DesiredPower::Off as i32;
    }
    let name = record.vm.name.clone();
    let mut transaction = Transaction::new();
    if before.phase != status.phase || before.resets != status.resets {
        let event = phase_event(&name, &before, &status);
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    for event in events {
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    record.vm.status = Some(status);
    let key = key_of(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

fn phase_event(name: &str, before: &pb::VmStatus, status: &pb::VmStatus) -> pb::Event {
    if before.phase == status.phase {
        return model::new_event(name, "VM_RESET", format!("reset {} so far", status.resets));
    }
    let reason = status.phase().as_str_name().replace("VM_PHASE_", "VM_");
    let error = status
        .error
        .as_ref()
        .map(|error| error.message.clone())
        .unwrap_or_default();
    let message = match status.phase() {
        pb::VmPhase::Failed => error,
        pb::VmPhase::Stopped => status.stop_reason.clone(),
        pb::VmPhase::Running => format!("on {}", status.host),
        _ => String::new(),
    };
    let mut event = model::new_event(name, &reason, message);
    event.warning = status.phase() == pb::VmPhase::Failed;
    event
}

async fn record_volume(
    store: &SharedStore,
    stored: &Stored<VolumeRecord>,
    status: &pb::VolumeStatus,
    based: bool,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let name = record.volume.name.clone();
    let was_ready =
        record.volume.status.as_ref().map(pb::VolumeStatus::phase) == Some(pb::VolumePhase::Ready);
    record.volume.status = Some(pb::VolumeStatus {
        attached_to: String::new(),
        ..status.clone()
    });
    let spec = record.volume.spec.get_or_insert_default();
    if was_ready {
        // It was made larger.
        spec.size_bytes = status.size_bytes;
    }
    if !based {
        spec.base.clear();
        spec.base_snapshot.clear();
    }
    let mut transaction = Transaction::new();
    if !was_ready {
        let bytes = format!("{} bytes", status.size_bytes);
        let event = model::new_event(&name, "VOLUME_READY", bytes);
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let key = key_of(&name);
    let transaction = transaction
        .if_unchanged(key.clone(), stored.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// Removes a record that nothing stands for any more, and ends its operations in the same
/// transaction: the next thing of this name must not be taken for it.
async fn forget(
    store: &SharedStore,
    asked: &[&pb::Operation],
    name: &str,
    node_id: &str,
    revision: u64,
    transaction: Transaction,
) -> Result<(), StoreError> {
    let parsed = Name::parse_vm(name)
        .or_else(|_| Name::parse_volume(name))
        .or_else(|_| Name::parse_network(name));
    let Ok(parsed) = parsed else { return Ok(()) };
    let reason = match parsed.collection {
        VMS => "VM_DELETED",
        NETWORKS => "NETWORK_DELETED",
        _ => "VOLUME_DELETED",
    };
    let event = model::new_event(name, reason, "");
    let mut transaction = transaction
        .if_unchanged(model::key(&parsed), revision)
        .delete(model::key(&parsed))
        .delete(model::node_id_key(&parsed, node_id))
        .put(event.name.clone(), event.encode_to_vec());
    if parsed.collection == VMS {
        transaction = transaction.delete(model::seed_key(&parsed));
        // What its NICs had is free again.
        let record = store.get(&model::key(&parsed)).await?;
        let record = record.map(|item| decode::<VmRecord>(&item.key, &item.value));
        let spec = record.transpose()?.and_then(|record| record.vm.spec);
        for nic in spec.unwrap_or_default().nics {
            for claim in model::claim::all_of(&nic) {
                transaction = transaction.delete(claim);
            }
        }
    }
    for operation in asked.iter().copied() {
        let metadata = operation.metadata.clone().unwrap_or_default();
        let wanted = matches!(
            metadata.kind(),
            pb::OperationKind::DeleteVm
                | pb::OperationKind::DeleteVolume
                | pb::OperationKind::DeleteNetwork
        );
        let done = ended(operation.clone(), (!wanted).then(|| plan::gone(name)));
        transaction = transaction
            .put(done.name.clone(), done.encode_to_vec())
            .delete(model::pending_key(&done.name));
    }
    store.commit(transaction).await.map(drop)
}

fn ended(mut operation: pb::Operation, error: Option<pb::OperationError>) -> pb::Operation {
    operation.done = true;
    operation.error = error;
    operation.end_time = Some(model::now());
    operation
}

async fn finish(
    store: &SharedStore,
    name: &str,
    error: Option<pb::OperationError>,
    findings: &[String],
) -> Result<(), StoreError> {
    let Some(item) = store.get(name).await? else {
        return Ok(());
    };
    let mut operation = ended(decode(name, &item.value)?, error);
    let mut transaction = Transaction::new();
    let metadata = operation.metadata.get_or_insert_default();
    metadata.findings = findings.to_vec();
    if let Some(event) = job_event(&operation) {
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    let transaction = transaction
        .if_unchanged(name, item.revision)
        .put(name, operation.encode_to_vec())
        .delete(model::pending_key(name))
        .delete(model::job_key(name));
    store.commit(transaction).await.map(drop)
}

/// Work on disks and volumes is an event when it ends: VOLUME_RESIZED, DISK_SNAPSHOT_FAILED ...
fn job_event(operation: &pb::Operation) -> Option<pb::Event> {
    let metadata = operation.metadata.as_ref()?;
    let (stem, verb) = match metadata.kind() {
        pb::OperationKind::ResizeVolume => ("VOLUME_RESIZE", "VOLUME_RESIZED"),
        pb::OperationKind::CheckVolume => ("VOLUME_CHECK", "VOLUME_CHECKED"),
        pb::OperationKind::SnapshotDisk => ("DISK_SNAPSHOT", "DISK_SNAPSHOT_MADE"),
        pb::OperationKind::MirrorDisk => ("DISK_MIRROR", "DISK_MIRRORED"),
        pb::OperationKind::BackupDisk => ("DISK_BACKUP", "DISK_BACKED_UP"),
        pb::OperationKind::CommitDisk => ("DISK_COMMIT", "DISK_COMMITTED"),
        pb::OperationKind::UpgradeDevices => ("DEVICE_UPGRADE", "DEVICES_UPGRADED"),
        _ => return None,
    };
    let mut event = match &operation.error {
        None => model::new_event(&metadata.target, verb, metadata.findings.join("; ")),
        Some(error) => {
            let reason = format!("{stem}_FAILED");
            model::new_event(&metadata.target, &reason, error.message.clone())
        }
    };
    event.warning = operation.error.is_some();
    Some(event)
}

/// The next host does it.
async fn advance_job(store: &SharedStore, name: &str, host: &str) -> Result<(), StoreError> {
    let key = model::job_key(name);
    let Some(item) = store.get(&key).await? else {
        return Ok(());
    };
    let mut record: JobRecord = decode(&key, &item.value)?;
    if record.host != host || record.then.is_empty() {
        return Ok(());
    }
    record.host = record.then.remove(0);
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), item.revision)
        .put(key, record.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// A host will never do this: note why, and stop wanting it.
async fn record_refusal(
    store: &SharedStore,
    told: &Told,
    status: &Status,
) -> Result<(), StoreError> {
    let error = pb::OperationError {
        code: status.code() as i32,
        message: api::errors::explain(status),
        reason: api::errors::reason(status).unwrap_or_else(|| "HOST_REFUSED".to_owned()),
    };
    let name = &told.name;
    let generation = match &told.call {
        Call::StartJob(_) => return finish(store, name, Some(error), &[]).await,
        Call::ApplyVm(spec) => spec.generation,
        Call::CreateVolume(_) => 0,
        // A deletion stays wanted: what stands in its way may go.
        _ => return Ok(()),
    };
    let key = key_of(name);
    let Some(item) = store.get(&key).await? else {
        return Ok(());
    };
    let mut event = model::new_event(name, "HOST_REFUSED", error.message.clone());
    event.warning = true;
    let value = if matches!(told.call, Call::ApplyVm(_)) {
        let mut record: VmRecord = decode(&key, &item.value)?;
        if record.vm.generation != generation || record.host != told.host {
            return Ok(());
        }
        record.rejected_generation = generation;
        record.vm.desired_power = pb::DesiredPower::Off as i32;
        record.vm.status.get_or_insert_default().error = Some(error);
        record.encode_to_vec()
    } else {
        let mut record: VolumeRecord = decode(&key, &item.value)?;
        let status = record.volume.status.get_or_insert_default();
        status.phase = pb::VolumePhase::Failed as i32;
        status.error = Some(error);
        record.encode_to_vec()
    };
    let transaction = Transaction::new()
        .if_unchanged(key.clone(), item.revision)
        .put(key, value)
        .put(event.name.clone(), event.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// The trace of the request that wants something: an operation, or what one is about.
fn trace_of(name: &str, desired: &Desired, index: &Index) -> String {
    let asked = index.asked(name).last().unwrap_or(name);
    let metadata = desired.pending.get(asked);
    let metadata = metadata.and_then(|operation| operation.metadata.as_ref());
    metadata.map_or_else(String::new, |metadata| metadata.trace_parent.clone())
}

async fn collect_all(store: SharedStore) {
    if let Err(error) = collect(&store).await {
        tracing::warn!(error = %with_source(&error), "cannot remove old records");
    }
}

/// Removes the oldest done operations, with their request ids, and the oldest events.
async fn collect(store: &SharedStore) -> Result<(), StoreError> {
    remove_oldest(store, prefix::OPERATIONS, MAX_OPERATIONS, |item, keys| {
        let operation: pb::Operation = decode(&item.key, &item.value)?;
        if !operation.done {
            return Ok(());
        }
        keys.push(item.key);
        let metadata = operation.metadata.unwrap_or_default();
        let project = metadata.target.split('/').nth(1);
        if let Some(project) = project.filter(|_| !metadata.request_id.is_empty()) {
            keys.push(model::request_key(project, &metadata.request_id));
        }
        Ok(())
    })
    .await?;
    remove_oldest(store, prefix::EVENTS, MAX_EVENTS, |item, keys| {
        keys.push(item.key);
        Ok(())
    })
    .await
}

/// Removes what `keys_of` says of each of the oldest of a collection, beyond those that are kept.
async fn remove_oldest(
    store: &SharedStore,
    prefix: &str,
    kept: usize,
    keys_of: impl Fn(Item, &mut Vec<String>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut count = 0;
    let mut pages = Pages::of(store, prefix);
    while let Some(items) = pages.next().await? {
        count += items.len();
    }
    let mut surplus = count.saturating_sub(kept);
    let mut pages = Pages::of(store, prefix);
    while surplus > 0
        && let Some(items) = pages.next().await?
    {
        let mut keys = Vec::new();
        for item in items.into_iter().take(surplus) {
            surplus -= 1;
            keys_of(item, &mut keys)?;
        }
        for batch in keys.chunks(COLLECT_BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |transaction, key| {
                transaction.delete(key)
            });
            store.commit(transaction).await?;
        }
    }
    Ok(())
}

/// All of a collection, some at a time; what changes meanwhile is there as it was or as it is.
struct Pages<'a> {
    store: &'a SharedStore,
    range: Option<Range>,
}

impl<'a> Pages<'a> {
    fn of(store: &'a SharedStore, prefix: &str) -> Self {
        let range = Range {
            limit: PAGE,
            ..Range::all(prefix)
        };
        Self {
            store,
            range: Some(range),
        }
    }

    async fn next(&mut self) -> Result<Option<Vec<Item>>, StoreError> {
        let Some(range) = self.range.take() else {
            return Ok(None);
        };
        let listing = self.store.list(range.clone()).await?;
        if listing.more {
            let after = listing.items.last().map(|item| item.key.clone());
            self.range = Some(Range { after, ..range });
        }
        Ok(Some(listing.items))
    }
}

/// `projects/p/vms/v` is stored at `vms/p/v`.
fn key_of(name: &str) -> String {
    let mut parts = name.split('/').skip(1);
    let project = parts.next().unwrap_or_default();
    let collection = parts.next().unwrap_or_default();
    format!(
        "{collection}/{project}/{}",
        parts.next().unwrap_or_default()
    )
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
