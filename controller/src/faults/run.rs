//! One run of an experiment, from its first look to its verdict.
//!
//! ```text
//! PREPARING  look at everything; wait until the start's probes hold
//! RUNNING    begin and end faults by the schedule; look, probe, renew the time to live
//! SETTLING   all faults over; wait until the targets serve again and the end's probes hold
//! DONE       judged; or STOPPED (by a user, a probe, the switch), FAILED (the host refused)
//! ```
//!
//! The run owns its faults: whatever way it ends, it disarms them. If this process dies, the host's
//! time to live does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::controller::{
    FaultExperiment, FaultExperimentSpec, FaultExperimentState, FaultReport, FaultVerdict,
    GuestReport, OperationError, ProbeLook, StallSummary,
};
use tokio::sync::watch;
use tokio::time::Instant;

use super::guest::Listener;
use super::judge::{Evidence, judge, summarise};
use super::ledger::Ledger;
use super::observe::{Began, Observer};
use super::probes::{self, Edge, Sight};
use super::record;
use super::schedule::beginnings;
use super::scope::{Scope, Vm};
use crate::hosts::Hosts;
use crate::store::SharedStore;

mod inject;

/// Between two looks at the targets.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Others are looked at every so many looks.
const OTHERS_EVERY: u32 = 4;
/// For the probes of the start.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// What is quiet before the first fault, to compare with.
const BASELINE: Duration = Duration::from_millis(1_000);
const DEFAULT_SETTLE_MS: u32 = 30_000;
/// Between two notes of what is known so far, for the case that this process dies.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// Looks of probes that are kept.
const MAX_LOOKS: usize = 4_000;

/// What others see of a run.
#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) experiment: FaultExperiment,
    pub(crate) report: FaultReport,
}

/// Why a run ended before its time.
enum End {
    Stopped(String),
    Failed(OperationError),
}

/// An upgrade under way.
struct Upgrading {
    operation: String,
    /// Of the experiment's faults.
    fault: usize,
    vm: String,
    device: String,
}

/// A run.
pub(crate) struct Run {
    store: SharedStore,
    hosts: Hosts,
    project: String,
    spec: FaultExperimentSpec,
    /// The experiment's id on hosts.
    host_id: String,
    scope: Scope,
    began: Began,
    observer: Observer,
    listeners: BTreeMap<String, Listener>,
    ledger: Ledger,
    upgrades: Vec<Upgrading>,
    looks: Vec<ProbeLook>,
    /// Probes that did not hold when they should have, with the first words.
    broken: BTreeMap<String, String>,
    stop: watch::Receiver<Option<String>>,
    live: Arc<Mutex<Live>>,
    number_of_looks: u32,
    renewed: Instant,
    saved: Instant,
}

impl Run {
    /// Of an experiment that is stored already.
    pub(crate) fn new(
        store: SharedStore,
        hosts: Hosts,
        project: String,
        scope: Scope,
        stop: watch::Receiver<Option<String>>,
        live: Arc<Mutex<Live>>,
    ) -> Self {
        let began = Began::now();
        let experiment = live
            .lock()
            .expect("nobody panics with it")
            .experiment
            .clone();
        let spec = experiment.spec.clone().unwrap_or_default();
        Self {
            store,
            hosts,
            project,
            host_id: experiment.uid,
            began,
            observer: Observer::new(began),
            listeners: BTreeMap::new(),
            ledger: Ledger::new(&spec.faults),
            upgrades: Vec::new(),
            looks: Vec::new(),
            broken: BTreeMap::new(),
            spec,
            scope,
            stop,
            live,
            number_of_looks: 0,
            renewed: Instant::now(),
            saved: Instant::now(),
        }
    }

    /// Carries it out and stores what came of it.
    pub(crate) async fn carry_out(mut self) {
        let end = self.all_phases().await.err();
        self.disarm_all().await;
        let (state, reason) = match &end {
            None => (FaultExperimentState::Done, None),
            Some(End::Stopped(reason)) => (FaultExperimentState::Stopped, Some(reason.clone())),
            Some(End::Failed(error)) => (FaultExperimentState::Failed, Some(error.message.clone())),
        };
        self.refresh(Some(reason.as_deref()));
        let error = match end {
            Some(End::Failed(error)) => Some(error),
            _ => None,
        };
        // Others see that it is over once it is stored and no longer runs, and not before: whoever sees it
        // may begin the next one.
        let (mut experiment, report) = self.seen();
        let status = experiment.status.get_or_insert_default();
        status.state = state as i32;
        status.end_time = Some(crate::model::now());
        status.progress = reason.unwrap_or_default();
        status.error = error;
        self.save(&experiment, &report, true).await;
    }

    async fn all_phases(&mut self) -> Result<(), End> {
        self.prepare().await?;
        self.change(|status| status.state = FaultExperimentState::Running as i32);
        self.note().await;
        self.inject().await?;
        self.change(|status| status.state = FaultExperimentState::Settling as i32);
        self.disarm_all().await;
        self.settle().await
    }

    async fn prepare(&mut self) -> Result<(), End> {
        let vms: Vec<Vm> = self.scope.target_vms().cloned().collect();
        for vm in vms {
            let listener = Listener::new(self.hosts.clone(), &vm, self.began.at);
            self.listeners.insert(vm.name, listener);
        }
        // Refused here, and not at the first fault, which may come late.
        self.renew().await?;
        let deadline = Instant::now() + START_TIMEOUT;
        let quiet_until = Instant::now() + BASELINE;
        loop {
            self.look().await?;
            let problem = self.probe(Edge::Start);
            match problem {
                None if Instant::now() >= quiet_until => return Ok(()),
                Some((id, words)) if Instant::now() >= deadline => {
                    return Err(End::Stopped(format!(
                        "nothing was done: at the start, the probe {id} did not hold: {words}"
                    )));
                }
                Some((id, words)) => self.say(format!("the probe {id} does not hold yet: {words}")),
                None => {}
            }
            self.pause(Instant::now() + LOOK_INTERVAL).await?;
        }
    }

    async fn inject(&mut self) -> Result<(), End> {
        let schedule = beginnings(&self.spec);
        let started = Instant::now();
        let at = |ms: u32| started + Duration::from_millis(u64::from(ms));
        let over = at(self.spec.duration_ms);
        let mut coming = schedule.iter().peekable();
        // What is to end, by time.
        let mut ends: BTreeMap<(Instant, u64), Vec<String>> = BTreeMap::new();
        let mut ordinal = 0;
        let mut next_look = started;
        loop {
            let now = Instant::now();
            while let Some((&key, _)) = ends.first_key_value()
                && key.0 <= now
            {
                let ids = ends.remove(&key).unwrap_or_default();
                self.disarm(ids).await;
            }
            while let Some(beginning) = coming.next_if(|beginning| at(beginning.at_ms) <= now) {
                let ids = self.begin(beginning).await?;
                ordinal += 1;
                if !ids.is_empty() {
                    ends.insert((at(beginning.until_ms), ordinal), ids);
                }
            }
            if Instant::now() >= over {
                return Ok(());
            }
            if Instant::now() >= next_look {
                next_look = Instant::now() + LOOK_INTERVAL;
                self.look().await?;
                self.watch_probes()?;
                let left = over.saturating_duration_since(Instant::now());
                self.say(format!("faults for another {} s", left.as_secs()));
            }
            let wake = [
                Some(next_look),
                Some(over),
                coming.peek().map(|beginning| at(beginning.at_ms)),
                ends.first_key_value().map(|((at, _), _)| *at),
            ];
            let wake = wake.into_iter().flatten().min().unwrap_or(over);
            self.pause(wake).await?;
        }
    }

    async fn settle(&mut self) -> Result<(), End> {
        let settle_ms = match self.spec.settle_ms {
            0 => DEFAULT_SETTLE_MS,
            settle_ms => settle_ms,
        };
        let deadline = Instant::now() + Duration::from_millis(u64::from(settle_ms));
        loop {
            self.look().await?;
            let problem = self.probe(Edge::End);
            let away = match self.upgrades.first() {
                Some(upgrading) => Some(format!("the upgrade of {}", upgrading.vm)),
                None => self.away(),
            };
            let waits = match (&problem, &away) {
                (None, None) => return Ok(()),
                (Some((id, words)), _) => format!("the probe {id}: {words}"),
                (None, Some(away)) => format!("{away} to be over"),
            };
            if Instant::now() >= deadline {
                if let Some((id, words)) = problem {
                    self.broken
                        .entry(id)
                        .or_insert(format!("at the end, {words}"));
                }
                return Ok(());
            }
            self.say(format!("waits for {waits}"));
            self.pause(Instant::now() + LOOK_INTERVAL).await?;
        }
    }

    /// A target that no daemon serves, or whose outage lasts.
    fn away(&self) -> Option<String> {
        let reports = self.observer.reports(|_, _, _| None);
        let away = |report: &&api::controller::DeviceReport| {
            report.targeted
                && (report
                    .samples
                    .last()
                    .is_some_and(|sample| !sample.connected)
                    || report.outages.iter().any(|outage| outage.ended_ms == 0.0))
        };
        let report = reports.iter().find(away)?;
        Some(format!("the outage of {} of {}", report.device, report.vm))
    }

    /// Looks at everything that is due, and shows it to others.
    async fn look(&mut self) -> Result<(), End> {
        let renew_after = Duration::from_millis(u64::from(self.ttl_ms()) / 3);
        if self.renewed.elapsed() >= renew_after {
            self.renew().await?;
        }
        for node in self.nodes() {
            if let Ok(statuses) = node.list_faults(&self.host_id).await {
                self.ledger.update(&statuses, &self.began);
            }
        }
        self.look_at_upgrades().await;
        let others = self.number_of_looks.is_multiple_of(OTHERS_EVERY);
        self.number_of_looks += 1;
        self.observer.look(&self.hosts, &self.scope, others).await;
        self.refresh(None);
        if self.saved.elapsed() >= SAVE_INTERVAL {
            self.note().await;
        }
        Ok(())
    }

    /// The first probe of this edge that does not hold.
    fn probe(&mut self, edge: Edge) -> Option<(String, String)> {
        let mut first = None;
        for (id, problem) in self.look_at_probes(edge) {
            if let (None, Some(words)) = (&first, problem) {
                first = Some((id, words));
            }
        }
        first
    }

    /// Notes probes that do not hold while faults are there.
    ///
    /// # Errors
    /// When one of them is to stop the run.
    fn watch_probes(&mut self) -> Result<(), End> {
        let mut stop = None;
        for (id, problem) in self.look_at_probes(Edge::During) {
            let Some(words) = problem else { continue };
            let stops = self
                .spec
                .probes
                .iter()
                .any(|probe| probe.id == id && probe.stop);
            if stops && stop.is_none() {
                stop = Some(format!("the probe {id} did not hold: {words}"));
            }
            self.broken.entry(id).or_insert(words);
        }
        stop.map_or(Ok(()), |reason| Err(End::Stopped(reason)))
    }

    fn look_at_probes(&mut self, edge: Edge) -> Vec<(String, Option<String>)> {
        let fleet = self.hosts.fleet();
        let sight = Sight {
            scope: &self.scope,
            fleet: &fleet,
            observer: &self.observer,
            listeners: &self.listeners,
        };
        let at_ms = self.began.elapsed_ms();
        let mut found = Vec::new();
        for probe in &self.spec.probes {
            if !probes::is_due(probe, edge) {
                continue;
            }
            let problem = probes::problem(probe, edge, &sight);
            let look = ProbeLook {
                at_ms,
                id: probe.id.clone(),
                holds: problem.is_none(),
                detail: problem.clone().unwrap_or_default(),
            };
            // Only changes are news.
            let before = self.looks.iter().rev().find(|look| look.id == probe.id);
            if before.is_none_or(|before| before.holds != look.holds)
                && self.looks.len() < MAX_LOOKS
            {
                self.looks.push(look);
            }
            found.push((probe.id.clone(), problem));
        }
        found
    }

    /// Waits, unless somebody stops the run.
    async fn pause(&mut self, until: Instant) -> Result<(), End> {
        let reason = self.stop.borrow_and_update().clone();
        if let Some(reason) = reason {
            return Err(End::Stopped(reason));
        }
        tokio::select! {
            () = tokio::time::sleep_until(until) => Ok(()),
            changed = self.stop.changed() => {
                let reason = self.stop.borrow().clone();
                let reason = reason.unwrap_or_else(|| "the controller ends".to_owned());
                match changed {
                    Ok(()) | Err(_) => Err(End::Stopped(reason)),
                }
            }
        }
    }

    fn say(&self, progress: String) {
        self.change(|status| status.progress = progress);
    }

    fn change(&self, change: impl FnOnce(&mut api::controller::FaultExperimentStatus)) {
        let mut live = self.live.lock().expect("nobody panics with it");
        change(live.experiment.status.get_or_insert_default());
    }

    /// Brings what others see up to date; `over` has the reason of an early end, and asks for a verdict.
    fn refresh(&mut self, over: Option<Option<&str>>) {
        let guests = self.guests();
        let devices = self
            .observer
            .reports(|vm, device, at_ms| self.ledger.cause(vm, device, at_ms));
        let hits = self.ledger.hits();
        let (stalls, recoveries, stalls_from) = times(&devices, &guests, self.guest_stalls());
        let (checks, verdict) = match over {
            None => (Vec::new(), FaultVerdict::Unspecified),
            Some(stopped) => {
                let broken: Vec<(String, String)> = self.broken.clone().into_iter().collect();
                let targets = self.scope.target_vms();
                let troubles: Vec<String> = targets
                    .filter_map(|vm| {
                        let trouble = self.observer.vm_trouble(&vm.name)?;
                        Some(format!("{}: {trouble}", vm.name))
                    })
                    .collect();
                judge(&Evidence {
                    spec: &self.spec,
                    hits: &hits,
                    devices: &devices,
                    guests: &guests,
                    stalls: &stalls,
                    recoveries: &recoveries,
                    broken_probes: &broken,
                    vm_troubles: &troubles,
                    stopped,
                    target_vms: self.scope.target_vms().count(),
                })
            }
        };
        let mut live = self.live.lock().expect("nobody panics with it");
        let status = live.experiment.status.get_or_insert_default();
        status.hits = hits;
        status.verdict = verdict as i32;
        status.elapsed_ms = self.began.elapsed_ms() as u32;
        live.report = FaultReport {
            experiment: None,
            replay: String::new(),
            checks,
            marks: self.ledger.marks(),
            devices,
            guests,
            stalls: Some(stalls),
            recoveries: Some(recoveries),
            stalls_from: stalls_from.to_owned(),
            controller_version: env!("CARGO_PKG_VERSION").to_owned(),
            probes: self.looks.clone(),
        };
    }

    fn guest_stalls(&self) -> Vec<f64> {
        let stalls = self.listeners.values().flat_map(Listener::stalls_ms);
        stalls.collect()
    }

    fn guests(&self) -> Vec<GuestReport> {
        self.listeners
            .values()
            .flat_map(Listener::reports)
            .collect()
    }

    fn seen(&self) -> (FaultExperiment, FaultReport) {
        let live = self.live.lock().expect("nobody panics with it");
        (live.experiment.clone(), live.report.clone())
    }

    /// Notes what is known so far.
    async fn note(&mut self) {
        let (experiment, report) = self.seen();
        self.save(&experiment, &report, false).await;
    }

    async fn save(&mut self, experiment: &FaultExperiment, report: &FaultReport, over: bool) {
        self.saved = Instant::now();
        if let Err(error) = record::save(&self.store, experiment, report, over).await {
            let error = crate::reconciler::with_source(&error);
            tracing::error!(%error, "cannot store a fault report");
        }
    }
}

/// Stalls, recoveries, and who told of the stalls.
fn times(
    devices: &[api::controller::DeviceReport],
    guests: &[GuestReport],
    guest_stalls_ms: Vec<f64>,
) -> (StallSummary, StallSummary, &'static str) {
    let targets = devices.iter().filter(|device| device.targeted);
    let outages: Vec<_> = targets.flat_map(|device| &device.outages).collect();
    let ended = outages.iter().filter(|outage| outage.ended_ms > 0.0);
    let stalls = ended.map(|outage| outage.ended_ms - outage.began_ms);
    let mut stalls = summarise(stalls.collect());
    let replayed = outages.iter().filter(|outage| outage.replayed_ms > 0.0);
    let recoveries = replayed.map(|outage| outage.replayed_ms - outage.began_ms);
    let recoveries = summarise(recoveries.collect());
    // Nobody knows better than who had to wait.
    if !guest_stalls_ms.is_empty() {
        return (summarise(guest_stalls_ms), recoveries, "guest");
    }
    let slowest = guests.iter().filter_map(|guest| guest.latency.as_ref());
    let slowest = slowest.max_by(|one, other| one.max_ms.total_cmp(&other.max_ms));
    let from = match slowest {
        // Without an outage, its slowest requests are all that a guest saw.
        Some(latency) if stalls.count == 0 => {
            stalls = latency.clone();
            "guest"
        }
        // A guest may have waited longer than any daemon was away.
        Some(latency) if latency.max_ms > stalls.max_ms => {
            stalls.max_ms = latency.max_ms;
            "devices, max by guest"
        }
        _ => "devices",
    };
    (stalls, recoveries, from)
}
