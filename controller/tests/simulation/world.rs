//! One world: hosts, replicas of the controller, and the network between them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::node::{RenewLeaseRequest, RenewLeaseResponse};
use controller::commands;
use controller::hosts::Hosts;
use controller::leader::{Candidate, Term};
use controller::leases::Leases;
use controller::model::{HostRecord, host_name};
use controller::plan::{Call, Observed};
use controller::reach::Reach;
use controller::reconciler::Reconciler;
use controller::store::embedded::EmbeddedStore;
use controller::store::{SharedStore, Transaction};
use lease::Terms;
use prost::Message;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;
use tonic::Status;

use crate::frozen::while_thawed;
use crate::hits::{Hit, Hits};
use crate::host::{self, Host};
use crate::linear::{self, Event};
use crate::random::Random;
use crate::server::Server;
use crate::store::FaultyStore;
use crate::{chaos, users};

pub(crate) const HOSTS: usize = 3;
pub(crate) const REPLICAS: usize = 2;
/// How long things go wrong, and how long everything then has to come right again.
const CHAOS: Duration = Duration::from_secs(60);
const CALM: Duration = Duration::from_secs(120);
const TERMS: Terms = Terms {
    lease: Duration::from_secs(6),
    grace: Duration::from_secs(1),
    settle: Duration::from_secs(2),
};
const LEADER_PERIOD: Duration = Duration::from_secs(2);
/// As the production connection's.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Revisions that the store remembers: so few that a watch that breaks may be too late, or many.
const LOG_LENS: [u64; 3] = [16, 64, 10_000];
const TICK: Duration = Duration::from_millis(250);
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
pub(crate) struct Settings {
    /// The disks' server looks at generations.
    pub(crate) fenced: bool,
    /// Devices stop at their own deadlines.
    pub(crate) deadlines: bool,
}

pub(crate) struct Outcome {
    pub(crate) violations: Vec<String>,
    pub(crate) log: Vec<String>,
    pub(crate) hits: Hits,
}

#[derive(Clone, Copy, Default)]
pub(crate) struct StoreFaults {
    pub(crate) full: bool,
    pub(crate) unreachable: bool,
    pub(crate) in_doubt: bool,
    pub(crate) watches_break: bool,
}

pub(crate) struct World {
    pub(crate) random: Random,
    pub(crate) hosts: Vec<Host>,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) store: watch::Sender<StoreFaults>,
    pub(crate) slow: watch::Sender<bool>,
    pub(crate) history: Vec<Mutex<Vec<Event>>>,
    pub(crate) hits: Hits,
    server: Server,
    /// How many faults cut a host off from a replica.
    cuts: watch::Sender<BTreeMap<(String, usize), i32>>,
    /// Of all leaders so far.
    newest_epoch: AtomicU64,
    violations: Mutex<Vec<String>>,
    log: Mutex<Vec<String>>,
    began: Instant,
}

/// A replica of the controller as the world sees it.
pub(crate) struct Replica {
    /// How many faults hold it.
    freezes: watch::Sender<u32>,
    crashed: Notify,
    /// The epoch in which it believes to lead.
    leads: Mutex<Option<u64>>,
}

impl Replica {
    fn new() -> Self {
        Self {
            freezes: watch::Sender::new(0),
            crashed: Notify::new(),
            leads: Mutex::new(None),
        }
    }

    /// Nothing gets in or out while it stands still.
    pub(crate) async fn thawed(&self) {
        let _ = self.freezes.subscribe().wait_for(|count| *count == 0).await;
    }

    /// SIGSTOP; the epoch in which it leads.
    pub(crate) fn freeze(&self) -> Option<u64> {
        self.freezes.send_modify(|count| *count += 1);
        *self.leads.lock().unwrap()
    }

    pub(crate) fn thaw(&self) {
        self.freezes.send_modify(|count| *count -= 1);
    }

    pub(crate) fn crash(&self) {
        self.crashed.notify_one();
    }
}

/// While it leads; forgotten when it no longer believes so.
struct Leading<'a>(&'a Replica);

impl<'a> Leading<'a> {
    fn new(replica: &'a Replica, epoch: u64) -> Self {
        *replica.leads.lock().unwrap() = Some(epoch);
        Self(replica)
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        *self.0.leads.lock().unwrap() = None;
    }
}

impl World {
    /// Runs a whole schedule.
    pub(crate) fn run(seed: u64, settings: Settings) -> Outcome {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let outcome = runtime.block_on(Self::live(seed, settings));
        runtime.shutdown_background();
        outcome
    }

    async fn live(seed: u64, settings: Settings) -> Outcome {
        let random = Random::new(seed);
        let clocks = |number| {
            let zero = random.millis(0, 1 << 40);
            let rate = 996 + random.below(9) as u32;
            Host::new(number, zero, rate, settings.deadlines)
        };
        let hosts = (0..HOSTS).map(clocks).collect();
        let log_len = LOG_LENS[random.below(LOG_LENS.len() as u64) as usize];
        let world = Arc::new(Self {
            hosts,
            random,
            replicas: (0..REPLICAS).map(|_| Replica::new()).collect(),
            store: watch::Sender::new(StoreFaults::default()),
            slow: watch::Sender::new(false),
            history: users::VMS.iter().map(|_| Mutex::default()).collect(),
            hits: Hits::default(),
            server: Server::new(settings.fenced),
            newest_epoch: AtomicU64::new(0),
            cuts: watch::Sender::new(BTreeMap::new()),
            violations: Mutex::default(),
            log: Mutex::default(),
            began: Instant::now(),
        });
        let store: SharedStore = Arc::new(EmbeddedStore::in_memory_with_log(log_len));
        world.clone().begin(&store).await;
        let quiet = Instant::now() + CHAOS;
        tokio::spawn(chaos::run(world.clone(), quiet));
        for vm in 0..users::VMS.len() {
            for replica in 0..REPLICAS {
                let store = world.clone().way_to(&store, replica);
                tokio::spawn(users::use_vm(world.clone(), store, vm, quiet));
            }
        }
        tokio::time::sleep_until(quiet).await;
        // Users want everything to run in the end.
        tokio::time::sleep(Duration::from_secs(25)).await;
        for vm in users::VMS {
            let on = users::power(&store, &users::name(vm), true).await;
            on.expect("nothing is broken any more");
        }
        world.await_calm(&store).await;
        for (vm, history) in users::VMS.iter().zip(&world.history) {
            let history = history.lock().unwrap();
            if !linear::is_linearizable(&history) {
                world.violation(format!("not linearizable, VM {vm}: {history:#?}"));
            }
        }
        world.outcome()
    }

    async fn begin(self: Arc<Self>, store: &SharedStore) {
        for host in &self.hosts {
            let record = HostRecord {
                name: host_name(&host.id),
                address: format!("unix:/{}", host.id),
                generation: 1,
                inventory: Some(host::inventory(&host.id)),
                ..HostRecord::default()
            };
            let transaction = Transaction::new().put(record.name.clone(), record.encode_to_vec());
            store.commit(transaction).await.expect("an empty store");
        }
        for replica in 0..REPLICAS {
            tokio::spawn(self.clone().keep_replica(store.clone(), replica));
        }
        for host in 0..HOSTS {
            tokio::spawn(self.clone().live_on(host));
        }
        let hosts = Hosts::unconnected();
        tokio::spawn(hosts.clone().run(store.clone()));
        while hosts.ids().len() < HOSTS {
            tokio::time::sleep(TICK).await;
        }
        users::begin(store, &hosts).await;
        for vm in users::VMS {
            let on = users::power(store, &users::name(vm), true).await;
            let generation = on
                .expect("nothing is broken yet")
                .metadata
                .unwrap()
                .generation;
            self.history_of(vm).lock().unwrap().push(Event {
                begun: Instant::now(),
                ended: Some(Instant::now()),
                did: linear::Did::Changed(generation),
            });
        }
        tokio::time::sleep(Duration::from_secs(12)).await;
    }

    fn history_of(&self, vm: &str) -> &Mutex<Vec<Event>> {
        let index = users::VMS.iter().position(|name| *name == vm);
        &self.history[index.expect("one of them")]
    }

    /// A process of the controller, and the next one when that crashes.
    async fn keep_replica(self: Arc<Self>, store: SharedStore, replica: usize) {
        loop {
            let living = self.clone().replicate(store.clone(), replica);
            let freezes = self.replicas[replica].freezes.subscribe();
            let mut tasks = tokio::task::JoinSet::new();
            tasks.spawn(while_thawed(living, freezes));
            self.replicas[replica].crashed.notified().await;
            tasks.shutdown().await;
            tokio::time::sleep(self.random.millis(100, 5_000)).await;
        }
    }

    fn way_to(self: Arc<Self>, store: &SharedStore, replica: usize) -> SharedStore {
        Arc::new(FaultyStore {
            store: store.clone(),
            world: self,
            replica,
        })
    }

    async fn replicate(self: Arc<Self>, store: SharedStore, replica: usize) {
        let store = self.clone().way_to(&store, replica);
        let hosts = Hosts::unconnected();
        let mut tasks = tokio::task::JoinSet::new();
        let freezes = self.replicas[replica].freezes.subscribe();
        let following = hosts.clone().run(store.clone());
        tasks.spawn(while_thawed(following, freezes.clone()));
        for host in 0..HOSTS {
            let (world, hosts) = (self.clone(), hosts.clone());
            tasks.spawn(async move {
                loop {
                    world.look(&hosts, host, replica).await;
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            });
        }
        let candidate = Candidate::new(store, format!("replica {replica}"), LEADER_PERIOD);
        let lead = |term| {
            let leading = self.clone().lead(term, hosts.clone(), replica);
            while_thawed(leading, freezes.clone())
        };
        candidate.run(lead).await;
    }

    /// What the controller's program does while it leads.
    async fn lead(self: Arc<Self>, term: Term, hosts: Hosts, replica: usize) {
        let epoch = term.epoch.number().unwrap_or_default();
        self.log(|| format!("replica {replica} leads, epoch {epoch}"));
        let _leading = Leading::new(&self.replicas[replica], epoch);
        self.newest_epoch.fetch_max(epoch, Ordering::Relaxed);
        let leases = Leases::new(TERMS);
        let reach: Arc<dyn Reach> = Arc::new(Network {
            world: self.clone(),
            hosts: hosts.clone(),
            replica,
            epoch,
        });
        let renewing = leases
            .clone()
            .run(term.store.clone(), hosts.clone(), reach.clone());
        let reconciler = Reconciler::new(term.store, hosts)
            .with_leases(leases)
            .with_reach(reach);
        tokio::join!(renewing, reconciler.run());
    }

    /// A host's processes, step by step.
    async fn live_on(self: Arc<Self>, host: usize) {
        loop {
            tokio::time::sleep(TICK + self.random.millis(0, 50)).await;
            self.hosts[host].tick();
            self.check_copies();
            for write in self.hosts[host].writes() {
                let world = self.clone();
                tokio::spawn(async move {
                    // Between its look at the clock and its way out, the host may stand still.
                    tokio::time::sleep(world.random.millis(0, 30)).await;
                    while world.hosts[host].is_frozen() {
                        tokio::time::sleep(TICK).await;
                    }
                    tokio::time::sleep(world.delay()).await;
                    let taken = world
                        .server
                        .write(&write.export, write.generation, write.copy);
                    if let Err(what) = taken {
                        world.violation(what);
                    }
                });
            }
        }
    }

    fn check_copies(&self) {
        let mut copies: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for host in &self.hosts {
            for vm in host.running() {
                copies.entry(vm).or_default().push(&host.id);
            }
        }
        for (vm, hosts) in copies.iter().filter(|(_, hosts)| hosts.len() > 1) {
            self.violation(format!(
                "two copies of {vm} run: on {}",
                hosts.join(" and ")
            ));
        }
    }

    async fn await_calm(&self, store: &SharedStore) {
        let deadline = Instant::now() + CALM;
        loop {
            let running: Vec<String> = self.hosts.iter().flat_map(Host::running).collect();
            if users::VMS
                .iter()
                .all(|vm| running.iter().any(|id| id == vm))
            {
                return;
            }
            if Instant::now() > deadline {
                for vm in users::VMS {
                    let stored = commands::get_vm(store, &users::name(vm)).await;
                    self.log(|| format!("VM {vm}: {:?}", stored.map(|stored| stored.record)));
                }
                return self.violation(format!("only {running:?} run although all are wanted"));
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Has a replica see a host as it is now.
    async fn look(&self, hosts: &Hosts, host: usize, replica: usize) {
        let id = &self.hosts[host].id;
        tokio::time::sleep(self.delay()).await;
        let seen = match self.connects(host, replica) {
            true => self.hosts[host].observed(),
            false => Observed {
                connected: false,
                ..(*hosts.observed(id)).clone()
            },
        };
        self.replicas[replica].thawed().await;
        hosts.saw(id, Arc::new(seen));
    }

    fn connects(&self, host: usize, replica: usize) -> bool {
        let key = (self.hosts[host].id.clone(), replica);
        let is_cut = self.cuts.borrow().get(&key).is_some_and(|cuts| *cuts > 0);
        !is_cut && self.hosts[host].answers()
    }

    pub(crate) fn newest_epoch(&self) -> u64 {
        self.newest_epoch.load(Ordering::Relaxed)
    }

    pub(crate) fn cut(&self, host: &str, replicas: &[usize], count: i32) {
        self.cuts.send_modify(|cuts| {
            for replica in replicas {
                *cuts.entry((host.to_owned(), *replica)).or_default() += count;
            }
        });
    }

    fn delay(&self) -> Duration {
        match *self.slow.borrow() && self.random.one_of(3) {
            true => self.random.millis(1_000, 15_000),
            false => self.random.millis(0, 30),
        }
    }

    fn violation(&self, what: String) {
        self.log(|| what.clone());
        let at = self.began.elapsed();
        self.violations
            .lock()
            .unwrap()
            .push(format!("{at:?}: {what}"));
    }

    pub(crate) fn log(&self, what: impl FnOnce() -> String) {
        let line = format!("{:?}: {}", self.began.elapsed(), what());
        self.log.lock().unwrap().push(line);
    }

    fn outcome(&self) -> Outcome {
        let hits = Hits::default();
        hits.take_in(&self.hits);
        hits.add(Hit::StaleWrite, self.server.refused());
        Outcome {
            hits,
            violations: self.violations.lock().unwrap().clone(),
            log: self.log.lock().unwrap().clone(),
        }
    }
}

/// A leader's way to the hosts.
struct Network {
    world: Arc<World>,
    hosts: Hosts,
    replica: usize,
    epoch: u64,
}

impl Network {
    /// Brings a request to a host and its answer back. What was sent arrives, even if nobody waits for
    /// it any more: cut off, it is sent again and again. Between the look at the leader's epoch and what
    /// the agent then does, anything may happen to it.
    async fn ask<T: Send + 'static>(
        &self,
        host: &str,
        act: impl FnOnce(&World, &Host) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let world = self.world.clone();
        let found = world.hosts.iter().position(|known| known.id == host);
        let index = found.ok_or_else(|| Status::not_found("no such host"))?;
        world.replicas[self.replica].thawed().await;
        let (answer, answered) = oneshot::channel();
        let (replica, epoch) = (self.replica, self.epoch);
        tokio::spawn(async move {
            tokio::time::sleep(world.delay()).await;
            while !world.connects(index, replica) {
                tokio::time::sleep(TICK).await;
            }
            let host = &world.hosts[index];
            let done = match host.admit(epoch) {
                Ok(()) => {
                    let agent = host.agent();
                    tokio::time::sleep(world.random.millis(0, 30)).await;
                    if host.agent() == agent && !host.answers() {
                        world.hits.count(Hit::CommandOverslept);
                    }
                    while host.agent() == agent && !host.answers() {
                        tokio::time::sleep(TICK).await;
                    }
                    if host.agent() != agent {
                        return world.hits.count(Hit::CommandLost);
                    }
                    act(&world, host)
                }
                Err(refused) => Err(refused),
            };
            tokio::time::sleep(world.delay()).await;
            while !world.connects(index, replica) {
                tokio::time::sleep(TICK).await;
            }
            let _ = answer.send(done);
        });
        let answer = tokio::time::timeout(CALL_TIMEOUT, answered).await;
        self.world.replicas[self.replica].thawed().await;
        match answer {
            Ok(Ok(answer)) => answer,
            _ => Err(Status::deadline_exceeded("no answer")),
        }
    }
}

#[tonic::async_trait]
impl Reach for Network {
    async fn tell(&self, host: &str, call: Call) -> Result<(), Status> {
        let words = format!("{host} is told {}", brief(&call));
        let told = self.ask(host, move |world, host| {
            let done = host.told(&call, &world.server);
            world.log(|| format!("{words}: {done:?}"));
            done
        });
        let done = told.await;
        if let Some(index) = self.world.hosts.iter().position(|known| known.id == host) {
            self.world.look(&self.hosts, index, self.replica).await;
        }
        done
    }

    async fn renew_lease(
        &self,
        host: &str,
        request: RenewLeaseRequest,
    ) -> Result<RenewLeaseResponse, Status> {
        self.ask(host, move |_, host| Ok(host.renew(&request)))
            .await
    }
}

fn brief(call: &Call) -> String {
    match call {
        Call::ApplyVm(spec) => {
            let disk = spec.disks.first().and_then(|disk| disk.nbd.as_ref());
            let attachment = disk.map_or(0, |nbd| nbd.generation);
            let power = spec.power().as_str_name();
            let (id, generation) = (&spec.id, spec.generation);
            format!("{id} {power} generation {generation} attachment {attachment}")
        }
        other => format!("{other:?}"),
    }
}
