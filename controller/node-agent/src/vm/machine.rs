//! The running machine: `vmm-core`, its daemons, and what they hold. Daemons that die are
//! started again, at once the first time, then after growing pauses, without limit: the guest
//! stalls on their devices and nothing else.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    pin::Pin,
    task::Poll,
    time::{Duration, Instant},
};

use api::{device::DaemonInfo, node::ProcessStatus};
use tokio::task::JoinSet;

use super::{
    Env,
    daemon::{DaemonError, Listeners, Plan, Up},
    ending, error_chain, hang,
    health::Health,
    incarnation::Standby,
    upgrade::{self, Upgraded},
    vmm,
};
use crate::{
    image::Claim,
    process::{self, Exit, Process},
    record::{Assets, DaemonKind, DaemonRecord},
    spec::Spec,
    versions::Pinned,
};

/// A daemon that served this long is started again at once; one that dies on its first request
/// would otherwise be restarted in a tight loop.
const STABLE_AFTER: Duration = Duration::from_millis(100);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Health is read between other work; a `vmm-core` that does not answer must not hold that up.
const HEALTH_DEADLINE: Duration = Duration::from_millis(500);

/// A VM's processes and what was made for them.
pub(super) struct Machine {
    pub(super) dir: PathBuf,
    pub(super) vmm: Process,
    pub(super) daemons: Vec<Daemon>,
    pub(super) taps: Vec<String>,
    pub(super) claims: Vec<Claim>,
    pub(super) health: Health,
    /// Of the daemons of third parties.
    pub(super) foreign: hang::Watch,
    pub(super) restarting: JoinSet<Restarted>,
    pub(super) upgrading: JoinSet<Upgraded>,
    /// Processes on their way to stand by.
    pub(super) sparing: JoinSet<Spared>,
    pub(super) on_their_way: BTreeSet<DaemonKind>,
    /// Versions that daemons were exchanged for, not yet in the record.
    pub(super) new_pins: Vec<(DaemonKind, Option<Pinned>)>,
    /// Who is told once they are.
    pub(super) upgrade_answers: Vec<(
        upgrade::Answer,
        Result<upgrade::Done, upgrade::UpgradeError>,
    )>,
    /// Whether processes stand by.
    pub(super) warm_spare: bool,
    /// That it stands still is an outage policy's doing; so is taken to be what an earlier agent left.
    pub(super) paused_for_outage: bool,
    /// That it stands still is the host's lease's doing.
    pub(super) suspended: bool,
    boot_id: String,
    started_at_ms: u64,
}

/// One daemon, up or being restarted.
pub(super) struct Daemon {
    pub(super) plan: Plan,
    /// `None` while it is being restarted.
    pub(super) process: Option<Process>,
    pub(super) restarts: u64,
    pub(super) listeners: Listeners,
    pub(super) info: DaemonInfo,
    pub(super) last_error: String,
    pub(super) up_since: Instant,
    pause: Duration,
    /// Limits were changed and the daemon was not told yet.
    pub(super) untold: bool,
    /// Stands by in case the process ends.
    pub(super) spare: Option<Standby>,
    /// Whoever wants to hear of the upgrade that is under way. Meanwhile nobody else restarts it.
    pub(super) upgrade: Option<upgrade::Answer>,
    /// Since when there is no process, if there is none.
    pub(super) down_since: Option<Instant>,
    /// Times it was killed because it hung.
    pub(super) hangs: u64,
    /// Why it is being killed: what goes behind the program's name.
    pub(super) killed: Option<String>,
    /// It is not what `vmm-core` wants, as far as is known.
    pub(super) is_refused: bool,
    pub(super) watch: hang::Watch,
}

pub(super) type Restarted = (DaemonKind, Result<Up, DaemonError>);
pub(super) type Spared = (DaemonKind, Result<Standby, DaemonError>);

impl Daemon {
    pub(super) fn up(plan: Plan, up: Up) -> Self {
        Self {
            plan,
            process: Some(up.process.keep()),
            restarts: 0,
            listeners: up.listeners,
            info: up.info,
            last_error: String::new(),
            up_since: Instant::now(),
            pause: Duration::ZERO,
            untold: false,
            spare: None,
            upgrade: None,
            down_since: None,
            hangs: 0,
            killed: None,
            is_refused: false,
            watch: hang::Watch::default(),
        }
    }

    /// A daemon of an earlier agent, alive or not. Its listening sockets are its own; should it
    /// die, their paths are bound anew.
    pub(super) fn adopted(
        plan: Plan,
        process: Option<Process>,
        restarts: u64,
        info: DaemonInfo,
    ) -> Self {
        Self {
            // The last agent may have ended between keeping a limit and telling it.
            untold: process.is_some(),
            down_since: process.is_none().then(Instant::now),
            plan,
            process,
            restarts,
            listeners: Listeners::new(),
            info,
            last_error: String::new(),
            up_since: Instant::now(),
            pause: Duration::ZERO,
            spare: None,
            upgrade: None,
            hangs: 0,
            killed: None,
            is_refused: false,
            watch: hang::Watch::default(),
        }
    }
}

impl Machine {
    pub(super) fn new(
        dir: PathBuf,
        vmm: Process,
        daemons: Vec<Daemon>,
        taps: Vec<String>,
        claims: Vec<Claim>,
        boot_id: String,
        started_at_ms: u64,
    ) -> Self {
        Self {
            dir,
            vmm,
            daemons,
            taps,
            claims,
            health: Health::default(),
            foreign: hang::Watch::default(),
            restarting: JoinSet::new(),
            upgrading: JoinSet::new(),
            sparing: JoinSet::new(),
            on_their_way: BTreeSet::new(),
            new_pins: Vec::new(),
            upgrade_answers: Vec::new(),
            warm_spare: false,
            paused_for_outage: true,
            suspended: false,
            boot_id,
            started_at_ms,
        }
    }

    /// For the record.
    pub(super) fn assets(&self) -> Assets {
        Assets {
            boot_id: self.boot_id.clone(),
            vmm: Some(self.vmm.identity()),
            daemons: self
                .daemons
                .iter()
                .map(|daemon| DaemonRecord {
                    kind: daemon.plan.kind,
                    process: daemon.process.as_ref().map(Process::identity),
                    restarts: daemon.restarts,
                })
                .collect(),
            taps: self.taps.clone(),
            started_at_ms: self.started_at_ms,
        }
    }

    /// Waits until a daemon dies or comes back; true when that is worth a record. For ever while
    /// nothing happens; dropping the future loses nothing.
    pub(super) async fn daemon_event(&mut self, env: &Env) -> bool {
        tokio::select! {
            (index, exit) = first_exit(&self.daemons) => {
                self.daemon_died(index, exit);
                true
            }
            Some(joined) = self.upgrading.join_next(), if !self.upgrading.is_empty() => {
                match joined {
                    Ok(upgraded) => self.upgrade_ended(upgraded),
                    Err(error) => tracing::error!(dir = %self.dir.display(), "upgrading a daemon: {error}"),
                }
                true
            }
            Some(joined) = self.sparing.join_next(), if !self.sparing.is_empty() => {
                match joined {
                    Ok((kind, outcome)) => self.spare_is_up(kind, outcome),
                    Err(error) => tracing::error!(dir = %self.dir.display(), "starting a spare: {error}"),
                }
                false
            }
            Some(joined) = self.restarting.join_next(), if !self.restarting.is_empty() => {
                match joined {
                    Ok((kind, outcome)) => self.restart_ended(kind, outcome),
                    Err(error) => {
                        tracing::error!(dir = %self.dir.display(), run = %env.run_dir.display(), "restarting a daemon: {error}");
                        false
                    }
                }
            }
        }
    }

    fn daemon_died(&mut self, index: usize, exit: Exit) {
        let daemon = &mut self.daemons[index];
        daemon.process = None;
        let program = daemon.plan.kind.program();
        daemon.last_error = match daemon.killed.take() {
            Some(reason) => format!("{program} {reason}"),
            None => ending(program, exit, &daemon.plan.log()),
        };
        daemon.down_since.get_or_insert_with(Instant::now);
        daemon.pause = match daemon.up_since.elapsed() >= STABLE_AFTER {
            // Meanwhile a stand-in has the disk.
            _ if daemon.is_refused => LONGEST_PAUSE,
            true => Duration::ZERO,
            false => next_pause(daemon.pause),
        };
        tracing::warn!(dir = %self.dir.display(), "{}; restarting it", daemon.last_error);
        self.restart(index);
    }

    fn restart_ended(&mut self, kind: DaemonKind, outcome: Result<Up, DaemonError>) -> bool {
        let Some(index) = self
            .daemons
            .iter()
            .position(|daemon| daemon.plan.kind == kind)
        else {
            return false;
        };
        let daemon = &mut self.daemons[index];
        match outcome {
            Ok(up) => {
                daemon.process = Some(up.process.keep());
                daemon.listeners = up.listeners;
                daemon.info = up.info;
                daemon.restarts += 1;
                // They may have been changed while it was on its way.
                daemon.untold = true;
                daemon.up_since = Instant::now();
                daemon.down_since = None;
                self.start_spare(index);
                true
            }
            Err(error) => {
                daemon.last_error = error_chain(&error);
                daemon.pause = next_pause(daemon.pause);
                tracing::warn!(dir = %self.dir.display(), "restarting {}: {}", kind.program(), daemon.last_error);
                self.restart(index);
                false
            }
        }
    }

    /// Begins to restart a daemon; [`Self::daemon_event`] tells the outcome.
    pub(super) fn restart(&mut self, index: usize) {
        let daemon = &mut self.daemons[index];
        // A stand-in needs them, too. What cannot be bound now is an error of the process to be.
        if daemon.plan.can_stand_by()
            && let Ok(listeners) = daemon.plan.bind_missing(daemon.listeners.clone())
        {
            daemon.listeners = listeners;
        }
        let (plan, listeners, pause) =
            (daemon.plan.clone(), daemon.listeners.clone(), daemon.pause);
        let spare = daemon.spare.take();
        self.restarting.spawn(async move {
            tokio::time::sleep(pause).await;
            (plan.kind, plan.bring_up(listeners, spare).await)
        });
    }

    /// Takes over what may change of disks and NICs while the VM runs, and tells the daemon.
    pub(super) async fn tune(&mut self, spec: &Spec) {
        for daemon in &mut self.daemons {
            daemon.untold |= daemon.plan.tune(spec);
        }
        self.tell_tuning().await;
    }

    /// Tells daemons what they were not told yet; what fails is tried again with the next look.
    async fn tell_tuning(&mut self) {
        for daemon in &mut self.daemons {
            if !daemon.untold || daemon.process.is_none() || daemon.upgrade.is_some() {
                continue;
            }
            let told = tokio::time::timeout(HEALTH_DEADLINE, daemon.plan.push_tuning()).await;
            match told {
                Ok(Ok(())) => daemon.untold = false,
                Ok(Err(error)) => {
                    tracing::warn!(dir = %self.dir.display(), "setting limits: {}", error_chain(&error));
                }
                Err(_) => {
                    tracing::warn!(dir = %self.dir.display(), "{} does not answer; its limits are set later", daemon.plan.kind.program());
                }
            }
        }
    }

    /// Reads the machine's health and bounds the logs.
    pub(super) async fn refresh(&mut self) {
        for log in self
            .daemons
            .iter()
            .map(|daemon| daemon.plan.log())
            .chain([vmm::log(&self.dir)])
        {
            if let Err(error) = process::bound_log(&log) {
                tracing::warn!("bounding {}: {error}", log.display());
            }
        }
        self.tell_tuning().await;
        if let Ok(Ok(info)) = tokio::time::timeout(HEALTH_DEADLINE, vmm::info(&self.dir)).await {
            self.health = Health::from_info(info);
        }
    }

    /// For the status; memory use is added when somebody asks.
    pub(super) fn processes(&self) -> Vec<ProcessStatus> {
        let vmm = ProcessStatus {
            name: "vmm-core".into(),
            pid: self.vmm.pid() as u32,
            sandbox: self.health.sandbox.clone(),
            log: vmm::log(&self.dir).display().to_string(),
            ..ProcessStatus::default()
        };
        let daemons = self.daemons.iter().map(|daemon| ProcessStatus {
            name: daemon.plan.kind.program().into(),
            pid: daemon
                .process
                .as_ref()
                .map_or(0, |process| process.pid() as u32),
            devices: daemon
                .plan
                .devices
                .iter()
                .map(|device| device.name.clone())
                .collect(),
            restarts: daemon.restarts,
            sandbox: daemon.info.sandbox.clone(),
            version: daemon.info.version.clone(),
            build: daemon.plan.build().to_owned(),
            spare_pid: daemon
                .spare
                .as_ref()
                .map_or(0, |spare| spare.process.pid() as u32),
            last_error: daemon.last_error.clone(),
            hangs: daemon.hangs,
            log: daemon.plan.log().display().to_string(),
            ..ProcessStatus::default()
        });
        std::iter::once(vmm).chain(daemons).collect()
    }
}

fn next_pause(pause: Duration) -> Duration {
    (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
}

/// The first daemon to end; pending while none does.
async fn first_exit(daemons: &[Daemon]) -> (usize, Exit) {
    type Ending<'a> = Pin<Box<dyn Future<Output = Exit> + Send + 'a>>;
    let mut endings: Vec<(usize, Ending<'_>)> = daemons
        .iter()
        .enumerate()
        .filter(|(_, daemon)| daemon.upgrade.is_none())
        .filter_map(|(index, daemon)| Some((index, daemon.process.as_ref()?)))
        .map(|(index, process)| (index, Box::pin(process.exited()) as Ending<'_>))
        .collect();
    std::future::poll_fn(move |context| {
        for (index, ending) in &mut endings {
            if let Poll::Ready(exit) = ending.as_mut().poll(context) {
                return Poll::Ready((*index, exit));
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let mut pause = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pause = next_pause(pause);
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }
}
