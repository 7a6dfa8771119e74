//! Fault experiments: which run, and what became of others.
//!
//! ```text
//! schedule  when faults begin, by the seed alone       scope   what they may touch
//! run       one run, with its probes                   ledger  hits and marks
//! observe   devices' figures and outages               guest   what verifiers say on consoles
//! judge     the verdict                                record  the store
//! ```
//!
//! A run lives in this process. When the process ends, hosts end its faults by themselves; the next
//! controller makes sure of that and notes that the run was cut short.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::controller::{
    CreateFaultExperimentRequest, FaultCheck, FaultExperiment, FaultExperimentSpec,
    FaultExperimentState, FaultExperimentStatus, FaultReport, FaultSwitch, FaultVerdict,
};
use api::names::Name;
use thiserror::Error;
use tokio::sync::watch;

use crate::hosts::Hosts;
use crate::model;
use crate::node::Node;
use crate::store::{SharedStore, StoreError};
use run::{Live, Run};
use scope::Scope;

mod guest;
mod judge;
mod ledger;
mod observe;
mod probes;
mod record;
mod run;
mod schedule;
mod scope;
mod series;

/// Runs at one time, of all projects.
const MAX_RUNS: usize = 8;
/// Between two attempts to tell a host that is away.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// A run that was told to stop has its host disarmed by then.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// All experiments. Cheap to clone.
#[derive(Clone)]
pub struct Experiments {
    store: SharedStore,
    hosts: Hosts,
    /// --allow-faults was given.
    allowed: bool,
    running: Arc<Mutex<BTreeMap<String, Running>>>,
}

/// A run that is not over.
struct Running {
    live: Arc<Mutex<Live>>,
    stop: watch::Sender<Option<String>>,
    over: watch::Receiver<bool>,
    vms: BTreeSet<String>,
}

impl Experiments {
    /// Experiments on `hosts`.
    pub fn new(store: SharedStore, hosts: Hosts, allowed: bool) -> Self {
        Self {
            store,
            hosts,
            allowed,
            running: Arc::default(),
        }
    }

    /// Ends what an earlier controller left behind, and tells the host how the switch is.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn recover(&self) -> Result<(), StoreError> {
        for mut experiment in record::all(&self.store).await? {
            let status = experiment.status.get_or_insert_default();
            if is_over(status) {
                continue;
            }
            status.state = FaultExperimentState::Stopped as i32;
            status.verdict = FaultVerdict::Inconclusive as i32;
            status.progress = "the controller was restarted".to_owned();
            status.end_time = Some(model::now());
            if let Ok(name) = Name::parse_fault_experiment(&experiment.name) {
                let mut report = record::report(&self.store, &name).await?;
                report.checks = vec![FaultCheck {
                    name: "complete".to_owned(),
                    verdict: FaultVerdict::Inconclusive as i32,
                    detail: "ended early: the controller was restarted".to_owned(),
                }];
                record::save(&self.store, &experiment, &report, true).await?;
            }
            let uid = experiment.uid;
            tokio::spawn(on_each(self.hosts.clone(), move |node| {
                let uid = uid.clone();
                async move { node.disarm_faults(&uid, Vec::new()).await.map(drop) }
            }));
        }
        if !record::is_on(&self.store).await? {
            self.tell_hosts(false);
        }
        Ok(())
    }

    /// Checks an experiment that was validated, and unless `validate_only` runs it.
    ///
    /// # Errors
    /// When faults are not allowed or off, something else runs on its targets, or the name is taken.
    pub async fn create(
        &self,
        name: &Name,
        request: CreateFaultExperimentRequest,
    ) -> Result<FaultExperiment, FaultError> {
        if let Some(earlier) = record::get(&self.store, name).await? {
            let same = !request.request_id.is_empty()
                && earlier.request_id == request.request_id
                && !request.validate_only;
            return match same {
                true => Ok(self.with_live(earlier)),
                false => Err(FaultError::AlreadyExists {
                    id: name.id.clone(),
                }),
            };
        }
        if !self.allowed {
            return Err(FaultError::NotAllowed);
        }
        if !record::is_on(&self.store).await? {
            return Err(FaultError::Off);
        }
        let mut spec = request
            .experiment
            .and_then(|given| given.spec)
            .unwrap_or_default();
        if spec.seed == 0 {
            spec.seed = new_seed();
        }
        let scope = self.scope(name, &spec).await?;
        let experiment = FaultExperiment {
            name: name.to_string(),
            uid: model::new_uid(),
            create_time: Some(model::now()),
            spec: Some(spec),
            status: Some(FaultExperimentStatus {
                state: FaultExperimentState::Preparing as i32,
                start_time: Some(model::now()),
                ..Default::default()
            }),
            request_id: request.request_id,
        };
        let vms: BTreeSet<String> = scope.target_vms().map(|vm| vm.name.clone()).collect();
        if request.validate_only {
            self.check_room(&self.running(), &vms)?;
            return Ok(experiment);
        }
        let (stop, stopped) = watch::channel(None);
        let (over, is_over) = watch::channel(false);
        let live = Arc::new(Mutex::new(Live {
            experiment: experiment.clone(),
            report: FaultReport::default(),
        }));
        {
            let mut running = self.running();
            self.check_room(&running, &vms)?;
            running.insert(
                name.to_string(),
                Running {
                    live: live.clone(),
                    stop,
                    over: is_over,
                    vms,
                },
            );
        }
        if let Err(error) = record::create(&self.store, name, &experiment).await {
            self.running().remove(&name.to_string());
            return Err(match error {
                StoreError::Conflict { .. } => FaultError::AlreadyExists {
                    id: name.id.clone(),
                },
                error => error.into(),
            });
        }
        let (store, hosts) = (self.store.clone(), self.hosts.clone());
        let run = Run::new(store, hosts, name.project.clone(), scope, stopped, live);
        let (all, name) = (self.clone(), name.to_string());
        tokio::spawn(async move {
            run.carry_out().await;
            all.running().remove(&name);
            over.send_replace(true);
        });
        Ok(experiment)
    }

    async fn scope(&self, name: &Name, spec: &FaultExperimentSpec) -> Result<Scope, FaultError> {
        let fleet = self.hosts.fleet();
        let scope = Scope::load(&self.store, &fleet, &name.project, spec).await?;
        let probed = spec.probes.iter().map(|probe| &probe.vm);
        let targeted = spec.faults.iter().filter_map(|fault| fault.target.as_ref());
        let mut named = probed.chain(targeted.map(|target| &target.vm));
        let known = |vm: &String| vm.is_empty() || scope.vms.iter().any(|known| known.name == *vm);
        match named.find(|vm| !known(vm)) {
            Some(vm) => Err(FaultError::NoSuchVm { vm: vm.clone() }),
            None => Ok(scope),
        }
    }

    fn check_room(
        &self,
        running: &BTreeMap<String, Running>,
        vms: &BTreeSet<String>,
    ) -> Result<(), FaultError> {
        for (name, other) in running {
            if let Some(vm) = vms.intersection(&other.vms).next() {
                return Err(FaultError::Overlap {
                    vm: vm.clone(),
                    experiment: name.clone(),
                });
            }
        }
        match running.len() < MAX_RUNS {
            true => Ok(()),
            false => Err(FaultError::TooMany),
        }
    }

    /// One experiment, as it is now.
    ///
    /// # Errors
    /// When there is none of that name.
    pub async fn get(&self, name: &Name) -> Result<FaultExperiment, FaultError> {
        let stored = record::get(&self.store, name).await?;
        stored
            .map(|stored| self.with_live(stored))
            .ok_or_else(|| FaultError::NotFound {
                id: name.id.clone(),
            })
    }

    /// What is stored, with what is known since if it runs.
    pub fn with_live(&self, stored: FaultExperiment) -> FaultExperiment {
        match self.running().get(&stored.name) {
            Some(running) => running.experiment(),
            None => stored,
        }
    }

    /// What was seen, so far.
    ///
    /// # Errors
    /// When there is no experiment of that name.
    pub async fn report(&self, name: &Name) -> Result<FaultReport, FaultError> {
        let experiment = self.get(name).await?;
        let live = self.running().get(&experiment.name).map(Running::report);
        let mut report = match live {
            Some(live) => live,
            None => record::report(&self.store, name).await?,
        };
        let seed = experiment.spec.as_ref().map_or(0, |spec| spec.seed);
        let again = format!("vmctl fault run --again {} --seed {seed}", name.id);
        report.replay = match name.project.as_str() {
            api::names::DEFAULT_PROJECT => again,
            project => format!("{again} --project {project}"),
        };
        report.experiment = Some(experiment);
        Ok(report)
    }

    /// Ends a run; answers once its faults are over.
    ///
    /// # Errors
    /// When there is no experiment of that name.
    pub async fn stop(&self, name: &Name, reason: &str) -> Result<FaultExperiment, FaultError> {
        self.get(name).await?;
        self.stop_running(&name.to_string(), reason).await;
        self.get(name).await
    }

    async fn stop_running(&self, name: &str, reason: &str) {
        let over = self.running().get(name).map(|running| {
            running.stop.send_if_modified(|stop| {
                let first = stop.is_none();
                stop.get_or_insert_with(|| reason.to_owned());
                first
            });
            running.over.clone()
        });
        if let Some(mut over) = over {
            let done = over.wait_for(|over| *over);
            if tokio::time::timeout(STOP_TIMEOUT, done).await.is_err() {
                tracing::warn!(name, "a fault experiment that was stopped is not over yet");
            }
        }
    }

    /// Removes an experiment that is over.
    ///
    /// # Errors
    /// When there is none of that name, or it runs.
    pub async fn delete(&self, name: &Name) -> Result<(), FaultError> {
        self.get(name).await?;
        if self.running().contains_key(&name.to_string()) {
            return Err(FaultError::Running {
                id: name.id.clone(),
            });
        }
        Ok(record::delete(&self.store, name).await?)
    }

    /// How the switch is.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn switch_state(&self) -> Result<FaultSwitch, FaultError> {
        Ok(FaultSwitch {
            on: self.allowed && record::is_on(&self.store).await?,
            allowed: self.allowed,
        })
    }

    /// Turns the switch; off ends everything.
    ///
    /// # Errors
    /// When faults are to be on and are not allowed.
    pub async fn set_switch(&self, on: bool) -> Result<FaultSwitch, FaultError> {
        if on && !self.allowed {
            return Err(FaultError::NotAllowed);
        }
        record::switch(&self.store, on).await?;
        if !on {
            // The hosts first: they end faults at once, whatever a run is busy with.
            let mut all_told = true;
            for (_, node) in self.hosts.all() {
                all_told &= node.set_fault_switch(false).await.is_ok();
            }
            let names: Vec<String> = self.running().keys().cloned().collect();
            for name in names {
                self.stop_running(&name, "faults were switched off").await;
            }
            if !all_told {
                self.tell_hosts(false);
            }
        } else {
            self.tell_hosts(true);
        }
        self.switch_state().await
    }

    /// As soon as each host is there, unless the switch was turned again meanwhile.
    fn tell_hosts(&self, on: bool) {
        let store = self.store.clone();
        tokio::spawn(on_each(self.hosts.clone(), move |node| {
            let store = store.clone();
            async move {
                match record::is_on(&store).await {
                    Ok(now) if now == on => node.set_fault_switch(on).await.map(drop),
                    _ => Ok(()),
                }
            }
        }));
    }

    fn running(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().expect("nobody panics with it")
    }
}

impl Running {
    fn experiment(&self) -> FaultExperiment {
        let live = self.live.lock().expect("nobody panics with it");
        live.experiment.clone()
    }

    fn report(&self) -> FaultReport {
        let live = self.live.lock().expect("nobody panics with it");
        live.report.clone()
    }
}

/// Whether nothing more will become of a run.
pub fn is_over(status: &FaultExperimentStatus) -> bool {
    matches!(
        status.state(),
        FaultExperimentState::Done | FaultExperimentState::Stopped | FaultExperimentState::Failed
    )
}

/// Calls all hosts, each again until it answers or is forgotten; one that knows no faults has answered.
async fn on_each<F>(hosts: Hosts, call: impl Fn(Node) -> F)
where
    F: Future<Output = Result<(), tonic::Status>>,
{
    let mut answered: BTreeSet<String> = BTreeSet::new();
    loop {
        let all = hosts.all();
        let waits = all.iter().filter(|(id, _)| !answered.contains(id));
        let waits: Vec<(String, Node)> = waits.cloned().collect();
        // At the start of this process none may be known yet.
        if waits.is_empty() && !all.is_empty() {
            return;
        }
        for (id, node) in waits {
            match call(node).await {
                Err(status) if status.code() != tonic::Code::Unimplemented => {}
                _ => drop(answered.insert(id)),
            }
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Small enough to be typed, and exact in JSON.
fn new_seed() -> u64 {
    let random = uuid::Uuid::new_v4().as_u128() as u64;
    random % 1_000_000_000 + 1
}

/// Why an experiment is not run, or not found.
#[derive(Debug, Error)]
pub enum FaultError {
    /// No such experiment.
    #[error("fault experiment {id} does not exist; see `vmctl fault list`")]
    NotFound {
        /// Its id.
        id: String,
    },
    /// The name is taken.
    #[error(
        "fault experiment {id} exists already; choose another name with --name, or delete it with `vmctl fault delete {id}`"
    )]
    AlreadyExists {
        /// Its id.
        id: String,
    },
    /// It runs.
    #[error("fault experiment {id} runs; stop it first with `vmctl fault stop {id}`")]
    Running {
        /// Its id.
        id: String,
    },
    /// The installation does not allow it, whoever asks.
    #[error(
        "this controller does no faults: start it with --allow-faults, where nothing of value runs"
    )]
    NotAllowed,
    /// The switch is off.
    #[error("faults are switched off; switch them on with `vmctl fault switch on`")]
    Off,
    /// Two runs could not be told apart.
    #[error(
        "{experiment} runs on {vm}: nobody could say whose outage it was; wait for its end or stop it"
    )]
    Overlap {
        /// Of both.
        vm: String,
        /// The one that runs.
        experiment: String,
    },
    /// Too much at once.
    #[error("{MAX_RUNS} fault experiments run already; wait for the end of one")]
    TooMany,
    /// A target or a probe names nothing.
    #[error("{vm} does not exist; see `vmctl vm list`")]
    NoSuchVm {
        /// As named.
        vm: String,
    },
    /// The store failed.
    #[error("cannot read or write fault experiments")]
    Store(#[from] StoreError),
}
