//! A virtual machine on this host: one task owns each, takes commands through a bounded queue and
//! publishes its status.
//!
//! ```text
//!                  Apply(On)              all processes up
//!   (no VM) ──▶ Rest ────────▶ Starting ─────────────────▶ Running
//!                ▲ ▲ Stopped      │ failure: all undone     │  │
//!                │ │ Failed       │                         │  │ Apply(Off)
//!                │ └──────────────┘                         │  ▼
//!                │         vmm-core ended: cleaned up       │ Stopping
//!                ├──────────────────────────────────────────┘  │
//!                └─────────────────────────────────────────────┘
//! ```
//!
//! Each edge is persisted before the next state acts, so that a new agent [`adopt`]s a VM in the
//! state its predecessor left it in. Daemons that die are restarted within Running.

mod adopt;
mod command;
mod daemon;
pub(crate) mod disk;
pub(crate) mod disks;
mod hang;
mod health;
mod incarnation;
mod leased;
mod machine;
pub(crate) mod nics;
mod outage;
mod passt;
mod ports;
mod restart;
mod spare;
mod start;
mod status;
mod stop;
pub(crate) mod upgrade;
mod vmm;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use api::node::{VmPhase, VmStatus};
use lease::Restart;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tonic::Code;

pub(crate) use self::{
    command::Refusal,
    daemon::{DaemonError, mac, with_deadline},
    hang::Watch,
    upgrade::{Done, UpgradeError, Wish},
    vmm::{devices as vmm_devices, refresh_device},
};
use self::{
    command::{Answer, Command, Commands, Order, reply},
    machine::Machine,
    restart::{Restarts, Wait},
    status::status_of,
    stop::StopHow,
};
use crate::{
    autostart::Autostart,
    faults::{Faults, Knobs},
    image::Claims,
    import::Imports,
    leases::Leases,
    network::Networks,
    process,
    promised::Promised,
    record::{Assets, DaemonKind, Failure, Record, RecordError, State, Store},
    spec::{Power, Spec},
    versions::Versions,
    volumes,
};

/// More commands than a controller sends before it reads an answer.
const COMMAND_QUEUE: usize = 16;
/// How often a running VM's health is read and its logs are bounded.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// How soon after a daemon's return it is.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(100);

/// What all VMs of the agent share.
#[derive(Debug)]
pub(crate) struct Env {
    /// Records.
    pub(crate) store: Store,
    /// Images in use.
    pub(crate) claims: Claims,
    /// RUN_DIR/vms.
    pub(crate) run_dir: PathBuf,
    /// Memory of the VMs that run.
    pub(crate) promised: Promised,
    /// Where `vmm-core` and the daemons are.
    pub(crate) bin_dir: PathBuf,
    /// Other versions of the daemons.
    pub(crate) versions: Versions,
    /// Processes stand by for the daemons of all VMs.
    pub(crate) warm_spares: bool,
    /// A daemon that does not get on for this long is killed.
    pub(crate) hang_after: Duration,
    /// What goes wrong on purpose.
    pub(crate) faults: Faults,
    /// Of that, what other parts of the agent look at.
    pub(crate) knobs: Knobs,
    /// What makes user networks, if it was named.
    pub(crate) passt: Option<PathBuf>,
    /// What NICs may be in.
    pub(crate) networks: Networks,
    /// Pool of volumes.
    pub(crate) volumes: volumes::Pool,
    /// Files that are brought here to be made into volumes.
    pub(crate) imports: Imports,
    /// This boot.
    pub(crate) boot_id: String,
    /// Until when VMs that are restarted elsewhere may run.
    pub(crate) leases: Leases,
    /// Who comes back after a boot, and when.
    pub(crate) autostart: Autostart,
    /// Every VM's changes of status.
    pub(crate) changes: broadcast::Sender<VmStatus>,
}

impl Env {
    /// Where a VM's sockets and logs are.
    pub(crate) fn vm_dir(&self, id: &str) -> PathBuf {
        self.run_dir.join(id)
    }
}

/// Handle of one VM's task. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    commands: mpsc::Sender<Order>,
    status: watch::Receiver<VmStatus>,
    spec: watch::Receiver<Arc<Spec>>,
    trace: Trace,
}

/// The trace of the request that the VM's task works for.
type Trace = Arc<Mutex<String>>;

impl Vm {
    /// A VM nobody ever applied before.
    ///
    /// # Errors
    /// When its record cannot be kept.
    pub(crate) fn create(env: Arc<Env>, spec: Spec) -> Result<Self, RecordError> {
        let start = spec.power == Power::On;
        let mut record = Record::new(spec);
        if start {
            record.state = State::Starting(Assets::default());
        }
        env.store.save(&record)?;
        let (vm, actor) = Actor::new(env, record);
        actor.publish(None);
        tokio::spawn(actor.run(if start { Next::Start } else { Next::Rest }));
        Ok(vm)
    }

    /// A VM that an earlier agent left behind.
    pub(crate) fn adopt(env: Arc<Env>, record: Record) -> Self {
        ports::expect(&env, &record);
        let (vm, actor) = Actor::new(env, record);
        actor.publish(None);
        tokio::spawn(async move {
            let mut actor = actor;
            let next = adopt::adopt(&mut actor).await;
            actor.run(next).await;
        });
        vm
    }

    /// As last published.
    pub(crate) fn status(&self) -> VmStatus {
        self.status.borrow().clone()
    }

    /// To await changes of the status.
    pub(crate) fn watch(&self) -> watch::Receiver<VmStatus> {
        self.status.clone()
    }

    /// As last applied.
    pub(crate) fn spec(&self) -> Arc<Spec> {
        self.spec.borrow().clone()
    }

    /// Something of it runs, or may in a moment.
    pub(crate) fn is_active(&self) -> bool {
        !matches!(
            self.status.borrow().phase(),
            VmPhase::Stopped | VmPhase::Failed | VmPhase::Unspecified
        )
    }

    /// Makes `spec` the wish. Answers once that is durable.
    ///
    /// # Errors
    /// When the wish is refused.
    pub(crate) async fn apply(&self, spec: Spec) -> Result<(), Refusal> {
        self.ask(|answer| Command::Apply(Box::new(spec), answer))
            .await
    }

    /// Hard-resets the machine.
    ///
    /// # Errors
    /// When it does not run.
    pub(crate) async fn reset(&self) -> Result<(), Refusal> {
        self.ask(Command::Reset).await
    }

    /// Removes what is left of a stopped VM.
    ///
    /// # Errors
    /// When it runs.
    pub(crate) async fn delete(&self) -> Result<(), Refusal> {
        self.ask(Command::Delete).await
    }

    /// Whether both are handles of one task.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.commands.same_channel(&other.commands)
    }

    /// Exchanges a daemon for another version; answers once that is done and durable, or undone.
    ///
    /// # Errors
    /// Why the old version serves on.
    pub(crate) async fn upgrade(&self, wish: Wish) -> Result<Done, UpgradeError> {
        let vm = self.spec().id.clone();
        let (answer, answered) = oneshot::channel();
        let program = wish.kind.program();
        let command = Command::Upgrade(Box::new(wish), answer);
        self.commands
            .try_send(Order::new(command))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => UpgradeError::Busy {
                    vm: vm.clone(),
                    program,
                },
                mpsc::error::TrySendError::Closed(_) => UpgradeError::Gone { vm: vm.clone() },
            })?;
        answered.await.unwrap_or(Err(UpgradeError::Gone { vm }))
    }

    async fn ask(&self, command: impl FnOnce(Answer) -> Command) -> Result<(), Refusal> {
        *self.trace.lock().expect("nothing panics with it") = telemetry::trace_parent();
        let id = self.spec().id.clone();
        let (answer, answered) = oneshot::channel();
        self.commands
            .try_send(Order::new(command(answer)))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => Refusal::Busy { id: id.clone() },
                mpsc::error::TrySendError::Closed(_) => Refusal::Gone { id: id.clone() },
            })?;
        answered.await.unwrap_or(Err(Refusal::Gone { id }))
    }
}

/// What the task does next.
enum Next {
    Rest,
    Start,
    /// As [`Next::Start`], later.
    StartAfter(Wait),
    Run(Box<Machine>),
    Stop(Box<Machine>, StopHow),
    Gone,
}

/// Owner of one VM's state.
struct Actor {
    env: Arc<Env>,
    record: Record,
    commands: Commands,
    status: watch::Sender<VmStatus>,
    spec: watch::Sender<Arc<Spec>>,
    restarts: Restarts,
    trace: Trace,
}

impl Actor {
    fn new(env: Arc<Env>, record: Record) -> (Vm, Self) {
        let (command_sender, commands) = mpsc::channel(COMMAND_QUEUE);
        match &record.state {
            State::Running(assets) | State::Stopping(assets) if assets.boot_id == env.boot_id => {
                let spec = &record.spec;
                env.promised.note(&spec.id, spec.memory_bytes);
            }
            _ => {}
        }
        let (status, status_receiver) = watch::channel(VmStatus::default());
        let (spec, spec_receiver) = watch::channel(Arc::new(record.spec.clone()));
        let trace = Trace::new(Mutex::new(telemetry::trace_parent()));
        let vm = Vm {
            commands: command_sender,
            status: status_receiver,
            spec: spec_receiver,
            trace: trace.clone(),
        };
        (
            vm,
            Self {
                env,
                record,
                commands: Commands::of(commands),
                status,
                spec,
                restarts: Restarts::default(),
                trace,
            },
        )
    }

    async fn run(mut self, first: Next) {
        let mut next = first;
        loop {
            next = match next {
                Next::Rest => self.rest().await,
                Next::Start => {
                    let trace = self.trace.lock().expect("nothing panics with it").clone();
                    telemetry::scope(trace, self.start()).await
                }
                Next::StartAfter(wait) => self.await_start(wait).await,
                Next::Run(machine) => self.watch(machine).await,
                Next::Stop(machine, how) => self.stop(machine, how).await,
                Next::Gone => return,
            };
        }
    }

    /// Stopped or Failed: nothing of it runs.
    async fn rest(&mut self) -> Next {
        loop {
            match self.commands.recv().await {
                None => return Next::Gone,
                Some(Command::Apply(spec, answer)) => {
                    let newer = spec.generation > self.record.spec.generation;
                    let start = newer && spec.power == Power::On;
                    let before = self.record.state.clone();
                    if start {
                        // Durable along with the wish: a new agent must not find one without the
                        // other, and the answer must not show the outcome of an earlier run.
                        self.record.state = State::Starting(Assets::default());
                    }
                    let accepted = self.accept(*spec);
                    let start = start && accepted.is_ok();
                    if !start {
                        self.record.state = before;
                    }
                    self.publish(None);
                    reply(answer, accepted);
                    if start {
                        return Next::Start;
                    }
                }
                Some(Command::Reset(answer)) => {
                    reply(answer, Err(Refusal::NotRunning { id: self.id() }));
                }
                Some(Command::Delete(answer)) => match self.forget() {
                    Ok(()) => {
                        let deleted = VmStatus {
                            id: self.id(),
                            ..VmStatus::default()
                        };
                        let _ = self.env.changes.send(deleted);
                        reply(answer, Ok(()));
                        return Next::Gone;
                    }
                    Err(source) => {
                        reply(
                            answer,
                            Err(Refusal::Record {
                                id: self.id(),
                                source,
                            }),
                        );
                    }
                },
                Some(Command::Upgrade(_, answer)) => self.refuse_upgrade(answer),
            }
        }
    }

    /// Starting: a stop wish cancels it.
    async fn start(&mut self) -> Next {
        let env = self.env.clone();
        let spec = self.record.spec.clone();
        let mut rising = start::Rising::new(&env, &spec, &self.record.pins);
        if let Err(error) = self.enter(State::Starting(rising.planned_assets()), None) {
            return self.fail(Failure {
                code: Code::Internal as i32,
                message: error_chain(&error),
                stop_reason: String::new(),
            });
        }
        let outcome = {
            let bring_up = start::bring_up(&env, &spec, &mut rising);
            tokio::pin!(bring_up);
            let lapse = leased::lapse(&env, &spec);
            tokio::pin!(lapse);
            loop {
                tokio::select! {
                    outcome = &mut bring_up => break Some(outcome),
                    () = &mut lapse => break None,
                    command = self.commands.recv() => match command {
                        None => break None,
                        Some(command) => self.command_while_starting(command),
                    }
                }
                if self.record.spec.power != Power::On {
                    break None;
                }
            }
        };
        match outcome {
            Some(Ok(())) => {
                let mut machine = rising.into_machine();
                machine.keep_spares(self.wants_spares());
                machine.refresh().await;
                self.note_resets(&machine);
                self.restarts.is_up();
                let _ = self.enter(State::Running(machine.assets()), Some(&machine));
                Next::Run(Box::new(machine))
            }
            Some(Err(error)) => {
                rising.undo(&env).await;
                // What was wished of the host and could not be is not tried again; what it began is.
                if self.restarts.under_way()
                    && let Some(next) = self.restart(&error_chain(&error))
                {
                    return next;
                }
                self.fail(Failure {
                    code: error.code() as i32,
                    message: error_chain(&error),
                    stop_reason: String::new(),
                })
            }
            None => {
                rising.undo(&env).await;
                match self.record.spec.power {
                    Power::On => self.finish(leased::LOST),
                    Power::Off | Power::OffNow => self.finish("stop-request"),
                }
            }
        }
    }

    fn command_while_starting(&mut self, command: Command) {
        match command {
            Command::Apply(spec, answer) => {
                let accepted = self.accept_unchanged_machine(*spec);
                self.publish(None);
                reply(answer, accepted);
            }
            Command::Reset(answer) => reply(answer, Err(Refusal::NotRunning { id: self.id() })),
            Command::Delete(answer) => reply(answer, Err(Refusal::Running { id: self.id() })),
            Command::Upgrade(_, answer) => self.refuse_upgrade(answer),
        }
    }

    /// Running, until vmm-core ends or a stop is wished.
    async fn watch(&mut self, mut machine: Box<Machine>) -> Next {
        let mut refresh = tokio::time::interval(REFRESH_INTERVAL);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let vmm = machine.vmm.clone();
        let mut lease = self.env.leases.watch();
        lease.mark_changed();
        loop {
            tokio::select! {
                exit = vmm.exited() => return self.ended(*machine, exit).await,
                Ok(()) = lease.changed(), if self.is_leased() => {
                    if !self.follow_lease(&mut machine).await {
                        return Next::Stop(machine, StopHow::Lost);
                    }
                    self.note_health(&machine);
                }
                changed = machine.daemon_event(&self.env) => {
                    if changed {
                        self.note_pins(&mut machine);
                        let _ = self.enter(State::Running(machine.assets()), Some(&machine));
                        machine.answer_upgrades();
                        machine.enforce_policies(&self.record.spec).await;
                        // vmm-core connects within milliseconds.
                        refresh.reset_after(RECONNECT_INTERVAL);
                    }
                }
                _ = refresh.tick() => {
                    machine.refresh().await;
                    let spec = &self.record.spec;
                    let foreign = spec.vhost_user.iter().map(|device| device.name.as_str());
                    machine.watch_daemons(self.env.hang_after, foreign).await;
                    machine.enforce_policies(&self.record.spec).await;
                    machine.tend_spares();
                    self.note_health(&machine);
                }
                command = self.commands.recv() => match command {
                    None => return Next::Gone,
                    Some(Command::Apply(spec, answer)) => {
                        let accepted = self.accept_unchanged_machine(*spec);
                        if accepted.is_ok() {
                            machine.tune(&self.record.spec).await;
                            machine.keep_spares(self.wants_spares());
                            machine.enforce_policies(&self.record.spec).await;
                            self.env.networks.tune(&self.record.spec).await;
                        }
                        self.publish(Some(&machine));
                        reply(answer, accepted);
                        match self.record.spec.power {
                            Power::On => {}
                            Power::Off => return Next::Stop(machine, StopHow::Ask),
                            Power::OffNow => return Next::Stop(machine, StopHow::Now),
                        }
                    }
                    Some(Command::Reset(answer)) => {
                        let done = vmm::reset(&machine.dir).await;
                        machine.refresh().await;
                        self.note_health(&machine);
                        reply(answer, done.map_err(Refusal::from));
                    }
                    Some(Command::Delete(answer)) => {
                        reply(answer, Err(Refusal::Running { id: self.id() }));
                    }
                    Some(Command::Upgrade(wish, answer)) => {
                        machine.begin_upgrade(&self.record.spec.id, *wish, answer);
                    }
                }
            }
        }
    }

    fn is_leased(&self) -> bool {
        self.record.spec.restart == Restart::Anywhere
    }

    /// Takes a wish over if its generation allows; durable on return.
    fn accept(&mut self, spec: Spec) -> Result<(), Refusal> {
        let id = self.id();
        let known = &self.record.spec;
        if spec.generation < known.generation {
            return Err(Refusal::StaleGeneration {
                id,
                given: spec.generation,
                seen: known.generation,
            });
        }
        if spec.generation == known.generation {
            let same = *known == spec;
            return if same {
                Ok(())
            } else {
                Err(Refusal::GenerationTaken {
                    id,
                    generation: spec.generation,
                })
            };
        }
        let before = std::mem::replace(&mut self.record.spec, spec);
        if let Err(source) = self.env.store.save(&self.record) {
            self.record.spec = before;
            return Err(Refusal::Record { id, source });
        }
        self.spec.send_replace(Arc::new(self.record.spec.clone()));
        Ok(())
    }

    fn accept_unchanged_machine(&mut self, spec: Spec) -> Result<(), Refusal> {
        let known = &self.record.spec;
        if spec.generation > known.generation && !known.same_machine(&spec) {
            return Err(Refusal::Fixed { id: self.id() });
        }
        self.accept(spec)
    }

    /// Persists and publishes a state.
    fn enter(&mut self, state: State, machine: Option<&Machine>) -> Result<(), RecordError> {
        if matches!(state, State::Stopped { .. } | State::Failed(_)) {
            self.env.promised.release(&self.record.spec.id);
        }
        self.record.state = state;
        let saved = self.env.store.save(&self.record);
        if let Err(error) = &saved {
            tracing::error!(
                vm = self.id(),
                "keeping the VM's state: {}",
                error_chain(error)
            );
        }
        self.publish(machine);
        saved
    }

    fn fail(&mut self, failure: Failure) -> Next {
        tracing::warn!(vm = self.id(), "failed: {}", failure.message);
        let _ = self.enter(State::Failed(failure), None);
        Next::Rest
    }

    fn finish(&mut self, reason: &str) -> Next {
        tracing::info!(vm = self.id(), reason, "stopped");
        let _ = self.enter(
            State::Stopped {
                reason: reason.to_owned(),
            },
            None,
        );
        Next::Rest
    }

    /// Resting, or started again when that was wished during a stop.
    fn rest_or_restart(&self, restart: bool) -> Next {
        if restart && self.record.spec.power == Power::On {
            Next::Start
        } else {
            Next::Rest
        }
    }

    fn note_health(&mut self, machine: &Machine) {
        self.note_resets(machine);
        self.publish(Some(machine));
    }

    fn wants_spares(&self) -> bool {
        self.env.warm_spares || self.record.spec.warm_spare
    }

    fn note_resets(&mut self, machine: &Machine) {
        self.record.resets = machine.health.resets;
        self.record.first_console_byte_ms = machine.health.first_console_byte_ms;
    }

    /// Takes over which versions daemons were exchanged for; the next `enter` keeps that.
    fn note_pins(&mut self, machine: &mut Machine) {
        for (kind, pin) in machine.new_pins.drain(..) {
            self.record.pins.retain(|known| known.kind != kind);
            self.record.pins.extend(pin);
        }
    }

    fn refuse_upgrade(&self, answer: upgrade::Answer) {
        let _ = answer.send(Err(UpgradeError::NotRunning { vm: self.id() }));
    }

    fn forget(&mut self) -> Result<(), RecordError> {
        self.env.store.remove(&self.record.spec.id)?;
        let dir = self.env.vm_dir(&self.record.spec.id);
        if let Err(error) = remove_dir(&dir) {
            tracing::warn!(vm = self.id(), "removing {}: {error}", dir.display());
        }
        Ok(())
    }

    fn publish(&self, machine: Option<&Machine>) {
        let mut status = status_of(&self.record, machine);
        if machine.is_some() {
            let switches = self.env.networks.processes_of(&status.id);
            status.processes.extend(switches);
        }
        let changed = self.status.send_if_modified(|old| {
            let changed = *old != status;
            if changed {
                *old = status.clone();
            }
            changed
        });
        if changed {
            let _ = self.env.changes.send(status);
        }
    }

    fn id(&self) -> String {
        self.record.spec.id.clone()
    }
}

/// An error and its causes, on one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The metrics of a VM's daemons, of those that answer in time.
pub(crate) async fn daemon_metrics(dir: &Path) -> Vec<String> {
    let mut texts = Vec::new();
    for kind in [DaemonKind::Blk, DaemonKind::Net] {
        if let Some(text) = daemon::metrics(dir, kind).await {
            texts.push(text);
        }
    }
    texts
}

/// Socket of `vmm-core` in a VM's directory.
pub(crate) fn vmm_socket(dir: &Path) -> PathBuf {
    dir.join("vmm.sock")
}

/// Removes a directory and what is in it; one that is not there is no error.
fn remove_dir(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// What ended a process that should run, for people.
pub(crate) fn ending(program: &str, exit: process::Exit, log: &Path) -> String {
    match process::last_line(log) {
        Some(line) => format!("{program} {exit}: {line}"),
        None => format!("{program} {exit}"),
    }
}
