//! The faults that are armed, and those that were: each with its targets and what it did to them.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use api::device::{FaultArming, FaultHit, FaultRule};
use api::node::{
    Fault, FaultEvent, FaultEventKind, FaultProcess, FaultState, FaultStatus, FaultTarget,
    FaultTargetStatus, ProcessFault, fault, host_fault, process_fault,
};
use nix::{
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};

use super::{
    Allowed, FaultError, Knobs, MAX_EXPERIMENTS, MAX_FAULTS,
    knobs::StartFault,
    process,
    rules::{self, NotPassed, Passed, Wish},
    targets::{self, Target},
    undo::{Journal, Undo},
};
use crate::agent::Agent;

/// Hits that are told one by one.
const LAST_HITS: usize = 256;
/// Events that a watcher may lag behind.
const MAX_EVENTS: usize = 4096;

/// See the module's description.
#[derive(Debug)]
pub(super) struct State {
    experiments: BTreeMap<String, Experiment>,
    events: VecDeque<FaultEvent>,
    last_event: u64,
    journal: Journal,
}

#[derive(Debug)]
struct Experiment {
    expires: Instant,
    /// Changed since the processes were told.
    is_renewed: bool,
    faults: Vec<Armed>,
}

#[derive(Debug)]
struct Armed {
    fault: Fault,
    seed: u64,
    state: FaultState,
    armed: Instant,
    armed_at: SystemTime,
    ended_at: Option<SystemTime>,
    /// Of what is done once and for a time.
    lasts_until: Option<Instant>,
    marks: Vec<Marked>,
    undo: Vec<Undo>,
    /// Key of its knobs, and how often one was felt.
    knob: Option<(String, Arc<AtomicU64>)>,
    error: String,
}

/// A target and what was done to it.
#[derive(Debug)]
struct Marked {
    target: Target,
    passed: Option<Passed>,
    /// The process has nothing to do with such a rule.
    is_other_kind: bool,
    /// In processes that are gone.
    seen_before: u64,
    hits_before: u64,
    last_hits: VecDeque<FaultHit>,
    error: String,
}

impl State {
    pub(super) fn new(journal: Journal) -> Self {
        Self {
            experiments: BTreeMap::new(),
            events: VecDeque::new(),
            last_event: 0,
            journal,
        }
    }

    /// Whether so many faults can be remembered.
    pub(super) fn admit(&mut self, experiment: &str, faults: &[Fault]) -> Result<(), FaultError> {
        if !self.experiments.contains_key(experiment) && self.experiments.len() >= MAX_EXPERIMENTS {
            let over = self
                .experiments
                .iter()
                .find(|(_, other)| !other.faults.iter().any(Armed::is_armed))
                .map(|(id, _)| id.clone());
            let over = over.ok_or(FaultError::TooManyExperiments)?;
            self.experiments.remove(&over);
        }
        let known = self.experiments.get(experiment);
        let known = known.map_or(&[][..], |experiment| &experiment.faults);
        let new = faults
            .iter()
            .filter(|fault| !known.iter().any(|armed| armed.fault.id == fault.id));
        if known.len() + new.count() > MAX_FAULTS {
            return Err(FaultError::TooMany);
        }
        Ok(())
    }

    /// Arms the faults that the experiment does not have, and gives all of them `ttl`.
    #[expect(
        clippy::too_many_arguments,
        reason = "a request, and what it is done with"
    )]
    pub(super) async fn arm(
        &mut self,
        agent: &Agent,
        knobs: &Knobs,
        allowed: Allowed,
        id: &str,
        faults: Vec<Fault>,
        ttl: Duration,
        seed: u64,
    ) {
        let experiment = self
            .experiments
            .entry(id.to_owned())
            .or_insert_with(|| Experiment {
                expires: Instant::now(),
                is_renewed: false,
                faults: Vec::new(),
            });
        experiment.expires = Instant::now() + ttl;
        experiment.is_renewed = true;
        for fault in faults {
            let experiment = &self.experiments[id];
            if experiment
                .faults
                .iter()
                .any(|armed| armed.fault.id == fault.id)
            {
                continue;
            }
            let mut armed = Armed::new(fault, seed);
            self.event(id, &armed, None, FaultEventKind::Armed, "");
            let key = format!("{id}/{}", armed.fault.id);
            let done = armed
                .carry_out(agent, knobs, allowed, &key, &mut self.journal)
                .await;
            let failed = done.err();
            for mark in armed.marks.iter().filter(|mark| mark.hits_before > 0) {
                self.event_of(id, &armed, mark, mark.hits_before);
            }
            if let Some(error) = failed {
                self.event(id, &armed, None, FaultEventKind::Failed, &error);
                armed.error = error;
            }
            if let Some(experiment) = self.experiments.get_mut(id) {
                experiment.faults.push(armed);
            }
        }
    }

    /// Ends faults; those that are named are forgotten.
    pub(super) async fn disarm(
        &mut self,
        agent: &Agent,
        knobs: &Knobs,
        id: Option<&str>,
        ids: &[String],
    ) -> Vec<FaultStatus> {
        let mut statuses = Vec::new();
        let wanted = |name: &String| id.is_none_or(|id| id == name);
        let names: Vec<String> = self
            .experiments
            .keys()
            .filter(|name| wanted(name))
            .cloned()
            .collect();
        for name in names {
            let Some(mut experiment) = self.experiments.remove(&name) else {
                continue;
            };
            let now = Instant::now();
            for armed in &mut experiment.faults {
                if !ids.is_empty() && !ids.contains(&armed.fault.id) {
                    continue;
                }
                if armed.is_armed() {
                    self.end(agent, knobs, &name, armed, FaultState::Disarmed)
                        .await;
                }
                statuses.push(armed.status(&name, experiment.expires, now));
            }
            if !ids.is_empty() {
                experiment
                    .faults
                    .retain(|armed| !ids.contains(&armed.fault.id));
            }
            if !experiment.faults.is_empty() {
                self.experiments.insert(name, experiment);
            }
        }
        statuses
    }

    pub(super) fn is_any_armed(&self) -> bool {
        let mut experiments = self.experiments.values();
        experiments.any(|experiment| experiment.faults.iter().any(Armed::is_armed))
    }

    /// Ends what is over, has rules in the processes that are there now, and collects hits.
    pub(super) async fn tick(&mut self, agent: &Agent, knobs: &Knobs) {
        let names: Vec<String> = self.experiments.keys().cloned().collect();
        for name in names {
            let Some(mut experiment) = self.experiments.remove(&name) else {
                continue;
            };
            let is_renewed = std::mem::take(&mut experiment.is_renewed);
            for armed in experiment
                .faults
                .iter_mut()
                .filter(|armed| armed.is_armed())
            {
                let now = Instant::now();
                let is_over = armed.lasts_until.is_some_and(|until| until <= now);
                if is_over || experiment.expires <= now {
                    self.end(agent, knobs, &name, armed, FaultState::Expired)
                        .await;
                } else {
                    self.follow(agent, &name, armed, experiment.expires, is_renewed)
                        .await;
                }
            }
            self.experiments.insert(name, experiment);
        }
    }

    /// Keeps the rules of one fault where they belong.
    async fn follow(
        &mut self,
        agent: &Agent,
        experiment: &str,
        armed: &mut Armed,
        expires: Instant,
        is_renewed: bool,
    ) {
        self.collect_knob(experiment, armed);
        let Some(fault::Fault::Rule(rule)) = armed.fault.fault.clone() else {
            return;
        };
        let wanted = armed.fault.target.clone().unwrap_or_default();
        for target in targets::find(agent, &wanted).await {
            armed.mark(target);
        }
        let (seed, elapsed) = (armed.seed, armed.armed.elapsed());
        let left = expires.saturating_duration_since(Instant::now());
        let mut marks = std::mem::take(&mut armed.marks);
        for mark in &mut marks {
            let hits = mark.collect(&rule).await;
            if hits > 0 {
                self.event_of(experiment, armed, mark, hits);
            }
            match &mark.passed {
                Some(passed) if is_renewed => {
                    let same = rules::remaining(&rule, &mark.target.id, Duration::ZERO, 0);
                    // One that came later was given what was left then, and ends with that.
                    if let Some(same) = same.filter(|_| mark.hits_before == 0) {
                        let _ = rules::renew(&mark.target, passed, same, seed, left).await;
                    }
                }
                Some(_) => {}
                None if mark.is_other_kind || mark.target.pid == 0 => {}
                None => mark.pass_on(&rule, seed, elapsed, left).await,
            }
        }
        armed.marks = marks;
    }

    async fn end(
        &mut self,
        agent: &Agent,
        knobs: &Knobs,
        experiment: &str,
        armed: &mut Armed,
        how: FaultState,
    ) {
        self.collect_knob(experiment, armed);
        if let Some((key, _)) = armed.knob.take() {
            knobs.restore_starts(&key);
        }
        match &armed.fault.fault {
            Some(fault::Fault::Rule(rule)) => {
                let rule = rule.clone();
                let mut marks = std::mem::take(&mut armed.marks);
                for mark in &mut marks {
                    let hits = mark.end(&rule).await;
                    if hits > 0 {
                        self.event_of(experiment, armed, mark, hits);
                    }
                }
                armed.marks = marks;
            }
            Some(fault::Fault::Host(host)) => match &host.action {
                Some(host_fault::Action::StoreLoss(_)) => knobs.lose_store_until(None),
                Some(host_fault::Action::ControllerPartition(_)) => knobs.partition_until(None),
                _ => {}
            },
            _ => {}
        }
        for undo in std::mem::take(&mut armed.undo).iter().rev() {
            self.journal.undo(undo);
        }
        armed.state = how;
        armed.ended_at = Some(SystemTime::now());
        self.event(experiment, armed, None, FaultEventKind::Ended, "");
        let _ = agent;
    }

    /// Hits that other parts of the agent felt.
    fn collect_knob(&mut self, experiment: &str, armed: &mut Armed) {
        let Some((_, felt)) = &armed.knob else { return };
        let hits = felt.swap(0, Ordering::Relaxed);
        if hits == 0 {
            return;
        }
        let target = armed.fault.target.clone().unwrap_or_default();
        let index = armed.mark(Target {
            vm: target.vm_id,
            device: target.device,
            pid: 0,
            socket: None,
            id: String::new(),
        });
        for _ in 0..hits {
            armed.marks[index].count_one();
        }
        self.event_of(experiment, armed, &armed.marks[index], hits);
    }

    pub(super) fn statuses(&self, experiment: Option<&str>) -> Vec<FaultStatus> {
        let now = Instant::now();
        self.experiments
            .iter()
            .filter(|(name, _)| experiment.is_none_or(|id| id == *name))
            .flat_map(|(name, experiment)| {
                let faults = experiment.faults.iter();
                faults.map(move |armed| armed.status(name, experiment.expires, now))
            })
            .collect()
    }

    pub(super) fn events_after(&self, after: u64) -> Vec<FaultEvent> {
        let events = self.events.iter();
        events
            .filter(|event| event.number > after)
            .cloned()
            .collect()
    }

    pub(super) fn last_event(&self) -> u64 {
        self.last_event
    }

    fn event_of(&mut self, experiment: &str, armed: &Armed, mark: &Marked, hits: u64) {
        self.event(
            experiment,
            armed,
            Some((mark, hits)),
            FaultEventKind::Hit,
            "",
        );
    }

    fn event(
        &mut self,
        experiment: &str,
        armed: &Armed,
        hit: Option<(&Marked, u64)>,
        kind: FaultEventKind,
        message: &str,
    ) {
        self.last_event += 1;
        let target = hit.map(|(mark, _)| &mark.target);
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        tracing::info!(experiment, fault = armed.fault.id, ?kind, message, "fault");
        self.events.push_back(FaultEvent {
            number: self.last_event,
            time: Some(SystemTime::now().into()),
            monotonic_ns: monotonic_ns(),
            experiment_id: experiment.to_owned(),
            fault_id: armed.fault.id.clone(),
            vm_id: target.map(|target| target.vm.clone()).unwrap_or_default(),
            device: target
                .map(|target| target.device.clone())
                .unwrap_or_default(),
            kind: kind.into(),
            pid: target.map_or(0, |target| target.pid as u32),
            hits: hit.map_or(0, |(_, hits)| hits),
            message: message.to_owned(),
        });
    }
}

impl Armed {
    fn new(fault: Fault, seed: u64) -> Self {
        Self {
            fault,
            seed,
            state: FaultState::Armed,
            armed: Instant::now(),
            armed_at: SystemTime::now(),
            ended_at: None,
            lasts_until: None,
            marks: Vec::new(),
            undo: Vec::new(),
            knob: None,
            error: String::new(),
        }
    }

    fn is_armed(&self) -> bool {
        self.state == FaultState::Armed
    }

    /// The place of a target, with the process that it has now.
    fn mark(&mut self, target: Target) -> usize {
        let same =
            |mark: &Marked| mark.target.vm == target.vm && mark.target.device == target.device;
        match self.marks.iter().position(same) {
            Some(index) => {
                self.marks[index].target = target;
                index
            }
            None => {
                self.marks.push(Marked::new(target));
                self.marks.len() - 1
            }
        }
    }

    /// Does at once what is not for a process's rules.
    async fn carry_out(
        &mut self,
        agent: &Agent,
        knobs: &Knobs,
        allowed: Allowed,
        key: &str,
        journal: &mut Journal,
    ) -> Result<(), String> {
        match self.fault.fault.clone() {
            Some(fault::Fault::Process(process)) => {
                self.treat_processes(agent, knobs, key, &process, journal)
                    .await
            }
            Some(fault::Fault::Host(host)) => {
                let action = host.action.ok_or("the host fault has no action")?;
                self.treat_host(knobs, allowed, &action, journal)
            }
            Some(fault::Fault::Rule(_)) | None => Ok(()),
        }
    }

    async fn treat_processes(
        &mut self,
        agent: &Agent,
        knobs: &Knobs,
        key: &str,
        fault: &ProcessFault,
        journal: &mut Journal,
    ) -> Result<(), String> {
        let action = fault
            .action
            .as_ref()
            .ok_or("the process fault has no action")?;
        let wanted = self.fault.target.clone().unwrap_or_default();
        self.lasts(duration_of(action));
        if let Some(start) = start_fault(action) {
            let felt = knobs.spoil_starts(key, &wanted.vm_id, &wanted.device, start);
            self.knob = Some((key.to_owned(), felt));
            return Ok(());
        }
        let mut treated = Vec::new();
        for target in self.processes(agent, &wanted).await {
            let index = self.mark(target.clone());
            if target.pid == 0 {
                self.marks[index].error = "no process runs".to_owned();
                continue;
            }
            // One process may serve several devices.
            let result = match treated.contains(&target.pid) {
                true => Ok(None),
                false => treat(action, target.pid, journal),
            };
            treated.push(target.pid);
            match result {
                Ok(undo) => {
                    self.undo.extend(undo);
                    self.marks[index].count_one();
                }
                Err(error) => self.marks[index].error = error.to_string(),
            }
        }
        Ok(())
    }

    async fn processes(&self, agent: &Agent, wanted: &FaultTarget) -> Vec<Target> {
        if wanted.process() != FaultProcess::Agent {
            return targets::find(agent, wanted).await;
        }
        vec![Target {
            vm: String::new(),
            device: String::new(),
            pid: std::process::id() as i32,
            socket: None,
            id: String::new(),
        }]
    }

    fn treat_host(
        &mut self,
        knobs: &Knobs,
        allowed: Allowed,
        action: &host_fault::Action,
        journal: &mut Journal,
    ) -> Result<(), String> {
        let until = |ms: u64| Instant::now() + Duration::from_millis(ms);
        match action {
            host_fault::Action::ControllerPartition(fault) => {
                let until = until(fault.duration_ms);
                self.lasts_until = Some(until);
                knobs.partition_until(Some(until));
            }
            host_fault::Action::StoreLoss(fault) => {
                let until = until(fault.duration_ms);
                self.lasts_until = Some(until);
                knobs.lose_store_until(Some(until));
            }
            host_fault::Action::ClockStep(fault) => {
                if !allowed.clock {
                    return Err(
                        "this agent does not set clocks; start it with --allow-faults=clock".into(),
                    );
                }
                let undo = Undo::Clock {
                    offset_ms: fault.offset_ms,
                };
                process::step_clock(fault.offset_ms).map_err(|error| error.to_string())?;
                journal.note(undo.clone());
                self.undo.push(undo);
                self.lasts(fault.duration_ms);
            }
        }
        let index = self.mark(Target {
            vm: String::new(),
            device: String::new(),
            pid: 0,
            socket: None,
            id: String::new(),
        });
        self.marks[index].count_one();
        Ok(())
    }

    fn lasts(&mut self, duration_ms: u64) {
        if duration_ms > 0 {
            self.lasts_until = Some(Instant::now() + Duration::from_millis(duration_ms));
        }
    }

    fn status(&self, experiment: &str, expires: Instant, now: Instant) -> FaultStatus {
        let targets: Vec<_> = self
            .marks
            .iter()
            .filter(|mark| !mark.is_other_kind)
            .map(Marked::status)
            .collect();
        let remaining = expires.saturating_duration_since(now);
        FaultStatus {
            experiment_id: experiment.to_owned(),
            fault_id: self.fault.id.clone(),
            state: self.state.into(),
            seen: targets.iter().map(|target| target.seen).sum(),
            hits: targets.iter().map(|target| target.hits).sum(),
            targets,
            armed_at: Some(self.armed_at.into()),
            ended_at: self.ended_at.map(Into::into),
            remaining_ms: match self.is_armed() {
                true => remaining.as_millis() as u64,
                false => 0,
            },
            error: self.error.clone(),
        }
    }
}

impl Marked {
    fn new(target: Target) -> Self {
        Self {
            target,
            passed: None,
            is_other_kind: false,
            seen_before: 0,
            hits_before: 0,
            last_hits: VecDeque::new(),
            error: String::new(),
        }
    }

    /// Something was done to it, by this agent.
    fn count_one(&mut self) {
        self.seen_before += 1;
        self.hits_before += 1;
        let hit = FaultHit {
            number: self.hits_before,
            time: Some(SystemTime::now().into()),
            monotonic_ns: monotonic_ns(),
            device: self.target.device.clone(),
            ..FaultHit::default()
        };
        self.remember([hit]);
    }

    async fn pass_on(&mut self, rule: &FaultRule, seed: u64, elapsed: Duration, left: Duration) {
        let wish = Wish {
            rule,
            seed,
            elapsed,
            left,
            hits_before: self.hits_before,
        };
        match rules::pass_on(&self.target, wish).await {
            Ok(passed) => {
                self.passed = Some(passed);
                self.error.clear();
            }
            Err(NotPassed::Done) => {}
            Err(NotPassed::NotItsKind) => self.is_other_kind = true,
            Err(NotPassed::Failed(error)) => self.error = error,
        }
    }

    /// Takes over what the process says; how many hits are new.
    async fn collect(&mut self, rule: &FaultRule) -> u64 {
        let Some(passed) = self.passed.clone() else {
            return 0;
        };
        let is_current = passed.identity.pid == self.target.pid;
        let listed = match &self.target.socket {
            Some(socket) if is_current && process::is_alive(passed.identity) => {
                rules::list(socket).await.ok()
            }
            _ => None,
        };
        match listed {
            Some(armings) => self.take_over(&armings, &passed),
            None if process::is_alive(passed.identity) && is_current => 0,
            None => self.bury(rule),
        }
    }

    /// The process is gone, or serves no more.
    fn bury(&mut self, rule: &FaultRule) -> u64 {
        let Some(passed) = self.passed.take() else {
            return 0;
        };
        self.seen_before += passed.seen;
        self.hits_before += passed.hits;
        let died_of_it =
            rules::is_deadly(rule) && passed.hits == 0 && !process::is_alive(passed.identity);
        if died_of_it {
            self.count_one();
        }
        u64::from(died_of_it)
    }

    fn take_over(&mut self, armings: &[FaultArming], passed: &Passed) -> u64 {
        let arming = armings.iter().find(|arming| arming.id == passed.id);
        let Some(status) = arming.and_then(|arming| arming.rules.first()) else {
            return 0;
        };
        let new = status.hits.saturating_sub(passed.hits);
        let fresh = status
            .last_hits
            .iter()
            .filter(|hit| hit.number > passed.hits);
        let fresh: Vec<_> = fresh
            .cloned()
            .map(|hit| FaultHit {
                number: hit.number + self.hits_before,
                device: self.target.device.clone(),
                ..hit
            })
            .collect();
        self.remember(fresh);
        if let Some(own) = &mut self.passed {
            own.seen = status.seen;
            own.hits = status.hits;
        }
        new
    }

    async fn end(&mut self, rule: &FaultRule) -> u64 {
        let Some(passed) = self.passed.clone() else {
            return 0;
        };
        let socket: Option<PathBuf> = self.target.socket.clone();
        let ended = match socket {
            Some(socket) if process::is_alive(passed.identity) => {
                rules::end(&socket, &passed.id).await
            }
            _ => return self.bury(rule),
        };
        let new = match ended {
            Ok(armings) => self.take_over(&armings, &passed),
            Err(status) => {
                self.error = format!(
                    "not disarmed, ends by itself at the end of its time to live: {}",
                    status.message()
                );
                0
            }
        };
        if let Some(passed) = self.passed.take() {
            self.seen_before += passed.seen;
            self.hits_before += passed.hits;
        }
        new
    }

    fn remember(&mut self, hits: impl IntoIterator<Item = FaultHit>) {
        for hit in hits {
            if self.last_hits.len() == LAST_HITS {
                self.last_hits.pop_front();
            }
            self.last_hits.push_back(hit);
        }
    }

    fn status(&self) -> FaultTargetStatus {
        let (seen, hits) = self
            .passed
            .as_ref()
            .map_or((0, 0), |passed| (passed.seen, passed.hits));
        FaultTargetStatus {
            vm_id: self.target.vm.clone(),
            device: self.target.device.clone(),
            pid: self.target.pid as u32,
            seen: self.seen_before + seen,
            hits: self.hits_before + hits,
            last_hits: self.last_hits.iter().cloned().collect(),
            armed: self.passed.is_some(),
            error: self.error.clone(),
        }
    }
}

/// What is done once to a process; what undoes it.
fn treat(
    action: &process_fault::Action,
    pid: i32,
    journal: &mut Journal,
) -> std::io::Result<Option<Undo>> {
    let identity = process::identify(pid)?;
    let undo = match action {
        process_fault::Action::Kill(kill) => {
            let signal = match kill.signal {
                0 => Signal::SIGKILL,
                number => Signal::try_from(number as i32)?,
            };
            process::signal(identity, signal)?;
            return Ok(None);
        }
        process_fault::Action::Freeze(_) => Undo::Continue(identity),
        process_fault::Action::OutOfMemory(_) => Undo::Cgroup(process::memory_cgroup(identity)?),
        process_fault::Action::FdExhaustion(_) => {
            let (soft, hard) = process::open_files_limit(identity)?;
            Undo::OpenFiles {
                process: identity,
                soft,
                hard,
            }
        }
        process_fault::Action::SlowStart(_) | process_fault::Action::VersionSkew(_) => {
            return Ok(None);
        }
    };
    journal.note(undo.clone());
    let done = match (&undo, action) {
        (Undo::Continue(_), _) => process::signal(identity, Signal::SIGSTOP),
        (Undo::Cgroup(path), process_fault::Action::OutOfMemory(fault)) => {
            process::starve(identity, path, fault.limit_bytes)
        }
        (Undo::OpenFiles { hard, .. }, _) => {
            process::limit_open_files(identity, 0, *hard).map(drop)
        }
        _ => Ok(()),
    };
    if let Err(error) = done {
        journal.undo(&undo);
        return Err(error);
    }
    Ok(Some(undo))
}

fn duration_of(action: &process_fault::Action) -> u64 {
    match action {
        process_fault::Action::Freeze(freeze) => freeze.duration_ms,
        process_fault::Action::FdExhaustion(exhaustion) => exhaustion.duration_ms,
        _ => 0,
    }
}

fn start_fault(action: &process_fault::Action) -> Option<StartFault> {
    match action {
        process_fault::Action::SlowStart(slow) => Some(StartFault {
            delay: Duration::from_millis(slow.delay_ms),
            program: None,
        }),
        process_fault::Action::VersionSkew(skew) => Some(StartFault {
            delay: Duration::ZERO,
            program: Some(PathBuf::from(&skew.binary)),
        }),
        _ => None,
    }
}

fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
        .unwrap_or_default()
}
