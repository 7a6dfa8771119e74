//! Exchanging a daemon's process for one of another version while the guest uses its devices.
//!
//! ```text
//! prepare: the new process is started, confined, asked who it is  ── no ──▶ it goes; nothing was touched
//!    │
//! hand over, each device at the same time:
//!    │   the old process completes what is in flight and lets go; the new one takes it.
//!    │   vmm-core has connected again meanwhile and waits in the socket's backlog
//!    │
//! gate: it answers, the devices are connected, rings advance, no request fails,
//!    │  and so it stays for a while                               ── no ──▶ back: the old process, which
//!    ▼                                                                      waited, gets its devices again
//! the old process ends
//! ```
//!
//! Whatever fails, a guest's requests wait and are served by one of the two. If neither can (the old
//! process died meanwhile), the daemon is restarted as after a crash, in its old version.

mod gate;
mod handover;

use std::time::{Duration, Instant};

use api::device::DaemonInfo;
use nix::sys::signal::Signal;
use tokio::sync::oneshot;
use tonic::Code;

use super::{
    daemon::{DaemonError, Listeners, Plan},
    disks::Disks,
    ending, error_chain,
    incarnation::{Incarnation, Standby},
    machine::Machine,
};
use crate::{
    epoch::Superseded,
    process::{Guard, Process},
    record::DaemonKind,
    spec::DiskSource,
    versions::{Binary, Pinned},
    volumes::VolumeError,
};

/// A process that serves nothing ends at once when it is asked to.
const END_WITHIN: Duration = Duration::from_secs(5);
/// A process that does not answer for so long is of no use for a roll-back.
const AWAKE_WITHIN: Duration = Duration::from_secs(1);
/// The old process is only asked whether it has work of its own.
const ASK_WITHIN: Duration = Duration::from_secs(2);

/// What is wished.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    /// Which daemon.
    pub(crate) kind: DaemonKind,
    /// Its new version; `None` for a fresh process of what it runs now.
    pub(crate) binary: Option<Binary>,
    /// What the new process must say its version is; empty for anything.
    pub(crate) version: String,
    /// How long it may take from its start to pass the gate.
    pub(crate) gate: Duration,
    /// How long it is watched while it serves.
    pub(crate) watch: Duration,
    /// How long what is in flight has to complete.
    pub(crate) drain: Duration,
}

/// An upgrade that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// Version and build before.
    pub(crate) from: String,
    /// Version and build now.
    pub(crate) to: String,
    /// From the first device's being let go of to the last one's being taken over.
    pub(crate) handed_over: Duration,
    /// For how long each device's guest was served by nobody, where vmm-core can tell.
    pub(crate) stalls: Vec<(String, Duration)>,
    /// What somebody should know.
    pub(crate) notes: Vec<String>,
}

/// Where the outcome goes.
pub(crate) type Answer = oneshot::Sender<Result<Done, UpgradeError>>;

/// Why a daemon has not the version that was wished.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpgradeError {
    /// There is nothing to exchange.
    #[error(
        "VM {vm} does not run; what it is started with is the version that it was upgraded to last"
    )]
    NotRunning {
        /// The VM.
        vm: String,
    },
    /// It has no such daemon.
    #[error("VM {vm} has no {program} of its own")]
    NoDaemon {
        /// The VM.
        vm: String,
        /// Its name.
        program: &'static str,
    },
    /// The network has none, or none that runs.
    #[error("network {network} has no device-net of its own that runs")]
    NoSwitch {
        /// The network.
        network: String,
    },
    /// Somebody else is at it.
    #[error("{program} of VM {vm} is being upgraded or restarted; try again")]
    Busy {
        /// The VM.
        vm: String,
        /// Its name.
        program: &'static str,
    },
    /// A job would be lost with the old process.
    #[error(
        "disk {disk} has a {job} under way, which would end with the old process; wait for it or cancel it (vmctl op list)"
    )]
    HasJob {
        /// The disk.
        disk: String,
        /// mirror, backup ...
        job: String,
    },
    /// The layers of a disk's volume are being changed.
    #[error("disk {disk}")]
    Volume {
        /// The disk.
        disk: String,
        /// Why it must be left alone.
        #[source]
        source: VolumeError,
    },
    /// The new process cannot do anything.
    #[error("the new version does not come up, the old one serves on")]
    NotUp(#[source] DaemonError),
    /// It is not what it should be.
    #[error("the new process says it is {said}, not {wanted}; the old one serves on")]
    NotAsExpected {
        /// Program and version.
        wanted: String,
        /// Program and version.
        said: String,
    },
    /// It did not take over or did not pass its gate. The old one serves again.
    #[error("rolled back: {reason}")]
    RolledBack {
        /// What it did.
        reason: String,
    },
    /// As before, but the old process was gone too.
    #[error("{reason}; the old process could not go on either, and is started again")]
    Restarted {
        /// What happened.
        reason: String,
    },
    /// A newer leader was heard meanwhile.
    #[error(transparent)]
    Superseded(#[from] Superseded),
    /// The VM ended meanwhile.
    #[error("VM {vm} was stopped meanwhile")]
    Gone {
        /// The VM.
        vm: String,
    },
}

impl UpgradeError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotRunning { .. }
            | Self::NoDaemon { .. }
            | Self::NoSwitch { .. }
            | Self::HasJob { .. } => Code::FailedPrecondition,
            Self::Busy { .. } | Self::Superseded(_) => Code::Unavailable,
            Self::Volume { source, .. } => source.code(),
            Self::NotUp(error) => error.code(),
            Self::NotAsExpected { .. } => Code::FailedPrecondition,
            Self::RolledBack { .. } | Self::Restarted { .. } | Self::Gone { .. } => Code::Aborted,
        }
    }
}

/// An upgrade that came to its end, whichever it was.
pub(super) struct Upgraded {
    kind: DaemonKind,
    listeners: Listeners,
    outcome: Outcome,
}

enum Outcome {
    New {
        process: Guard,
        info: DaemonInfo,
        /// What it was started as.
        plan: Box<Plan>,
        done: Done,
    },
    /// The old process serves as before.
    Old(UpgradeError),
    /// Neither does.
    Neither(UpgradeError),
}

impl Machine {
    /// Begins an upgrade; [`Machine::daemon_event`] takes its outcome, and then `answer` hears of it.
    pub(super) fn begin_upgrade(&mut self, vm: &str, wish: Wish, answer: Answer) {
        let (vm, program) = (vm.to_owned(), wish.kind.program());
        let daemon = self
            .daemons
            .iter_mut()
            .find(|daemon| daemon.plan.kind == wish.kind && daemon.plan.can_stand_by());
        let Some(daemon) = daemon else {
            let _ = answer.send(Err(UpgradeError::NoDaemon { vm, program }));
            return;
        };
        let Some(old) = daemon.process.clone().filter(|_| daemon.upgrade.is_none()) else {
            let _ = answer.send(Err(UpgradeError::Busy { vm, program }));
            return;
        };
        let mut new = daemon.plan.clone();
        if let Some(binary) = &wish.binary {
            new.use_version(binary.path.clone(), binary.build.clone());
        }
        daemon.upgrade = Some(answer);
        let exchange = Exchange {
            old_plan: daemon.plan.clone(),
            new_plan: new,
            old,
            from: named(&daemon.info, daemon.plan.build()),
            listeners: daemon.listeners.clone(),
            wish,
        };
        self.upgrading.spawn(exchange.run());
    }

    /// Takes an upgrade's outcome over.
    pub(super) fn upgrade_ended(&mut self, upgraded: Upgraded) {
        let Upgraded {
            kind,
            listeners,
            outcome,
        } = upgraded;
        let found = self
            .daemons
            .iter()
            .position(|daemon| daemon.plan.kind == kind);
        let Some(index) = found else {
            return;
        };
        let daemon = &mut self.daemons[index];
        daemon.listeners = listeners;
        // Limits may have been changed while nobody could be told.
        daemon.untold = true;
        let answer = daemon.upgrade.take();
        let told = match outcome {
            Outcome::New {
                process,
                info,
                plan,
                done,
            } => {
                tracing::info!(dir = %self.dir.display(), "{}: {} in place of {}", kind.program(), done.to, done.from);
                daemon.process = Some(process.keep());
                daemon.info = info;
                daemon.up_since = Instant::now();
                daemon.last_error.clear();
                daemon.spare = None;
                daemon
                    .plan
                    .use_version(plan.program().to_owned(), plan.build().to_owned());
                self.new_pins.push((
                    kind,
                    (!plan.build().is_empty()).then(|| Pinned {
                        kind,
                        path: plan.program().to_owned(),
                        build: plan.build().to_owned(),
                    }),
                ));
                self.start_spare(index);
                Ok(done)
            }
            Outcome::Old(error) => {
                tracing::warn!(dir = %self.dir.display(), "upgrading {}: {}", kind.program(), error_chain(&error));
                Err(error)
            }
            Outcome::Neither(error) => {
                tracing::warn!(dir = %self.dir.display(), "upgrading {}: {}", kind.program(), error_chain(&error));
                daemon.process = None;
                daemon.last_error = error_chain(&error);
                self.restart(index);
                Err(error)
            }
        };
        if let Some(answer) = answer {
            self.upgrade_answers.push((answer, told));
        }
    }

    /// Tells those who wished for upgrades; once the record says what came of them.
    pub(super) fn answer_upgrades(&mut self) {
        for (answer, told) in self.upgrade_answers.drain(..) {
            // Whoever asked may have given up.
            let _ = answer.send(told);
        }
    }
}

/// One upgrade under way.
struct Exchange {
    old_plan: Plan,
    new_plan: Plan,
    old: Process,
    from: String,
    listeners: Listeners,
    wish: Wish,
}

impl Exchange {
    async fn run(mut self) -> Upgraded {
        let outcome = match self.prepare().await {
            Ok((standby, old)) => {
                let outcome = self.exchange(standby, old).await;
                self.settle(outcome).await
            }
            Err(error) => self.as_before(error),
        };
        Upgraded {
            kind: self.old_plan.kind,
            listeners: self.listeners,
            outcome,
        }
    }

    /// Everything that can be done while the old process serves.
    async fn prepare(&mut self) -> Result<(Standby, Option<Incarnation>), UpgradeError> {
        // One that does not answer is killed when its devices are taken.
        let old = match Incarnation::usual(&self.old_plan, AWAKE_WITHIN).await {
            Ok(old) => old.info(AWAKE_WITHIN).await.is_ok().then_some(old),
            Err(_) => None,
        };
        self.refuse_jobs().await?;
        let standby = tokio::time::timeout(self.wish.gate, Standby::start(&self.new_plan));
        let standby = match standby.await {
            Ok(standby) => standby.map_err(UpgradeError::NotUp)?,
            Err(_) => {
                return Err(UpgradeError::NotUp(DaemonError::Mute {
                    program: self.wish.kind.program(),
                    call: "its start".to_owned(),
                    within: self.wish.gate,
                }));
            }
        };
        let (info, program) = (&standby.info, self.wish.kind.program());
        let version = match self.wish.version.as_str() {
            "" => &info.version,
            wanted => wanted,
        };
        if (info.name.as_str(), &info.version) != (program, &version.to_owned()) {
            let error = UpgradeError::NotAsExpected {
                wanted: format!("{program} {version}"),
                said: format!("{} {}", info.name, info.version),
            };
            standby.process.kill().await;
            return Err(error);
        }
        match self.new_plan.bind_beside(self.listeners.clone()) {
            Ok(listeners) => self.listeners = listeners,
            Err(error) => return Err(UpgradeError::NotUp(error)),
        }
        Ok((standby, old))
    }

    /// Jobs live in the process that goes.
    async fn refuse_jobs(&self) -> Result<(), UpgradeError> {
        if self.old_plan.kind != DaemonKind::Blk {
            return Ok(());
        }
        let disks = Disks::of(self.old_plan.dir());
        for disk in self.old_plan.disks() {
            let asked = tokio::time::timeout(ASK_WITHIN, disks.jobs_under_way(&disk.name)).await;
            // One that does not answer has no job that would go on.
            if let Ok(Ok(jobs)) = asked
                && let Some(job) = jobs.into_iter().next()
            {
                return Err(UpgradeError::HasJob {
                    disk: disk.name.clone(),
                    job: job.kind,
                });
            }
        }
        Ok(())
    }

    /// From the first device to the gate; whatever happens, all devices are with one process or with none.
    async fn exchange(&mut self, standby: Standby, old: Option<Incarnation>) -> Outcome {
        // Nobody changes the layers of a volume while one process lets go of it and another opens it.
        let mut changing = Vec::new();
        for disk in self.old_plan.disks() {
            let DiskSource::Volume(id) = &disk.source else {
                continue;
            };
            match self.old_plan.volumes().change(id) {
                Ok(right) => changing.push(right),
                Err(source) => {
                    standby.process.kill().await;
                    return self.as_before(UpgradeError::Volume {
                        disk: disk.name.clone(),
                        source,
                    });
                }
            }
        }
        let mut notes = self.lost_bitmaps().await;
        let before = gate::Before::look(&self.old_plan).await;
        let began = Instant::now();
        let mut handover = handover::Handover::new(&self.old_plan, &self.new_plan, &self.listeners)
            .from(old, &self.old)
            .to(&standby);
        let taken = handover.take(self.wish.drain).await;
        let handed_over = began.elapsed();
        let passed = match taken {
            Ok(delayed) => {
                notes.extend(delayed);
                let exited = standby.process.exited();
                tokio::select! {
                    exit = exited => Err(ending(
                        self.wish.kind.program(),
                        exit,
                        &self.new_plan.log(),
                    )),
                    passed = before.gate(&standby.incarnation, &self.new_plan, &self.wish) => passed,
                }
            }
            Err(error) => Err(format!(
                "the new version did not take over: {}",
                error_chain(&error)
            )),
        };
        if let Err(reason) = passed {
            let reason = format!("{} is as it was: {reason}", self.from);
            let back = handover.give_back(&standby).await;
            standby.process.kill().await;
            return match back {
                Ok(()) => Outcome::Old(UpgradeError::RolledBack { reason }),
                Err(error) => Outcome::Neither(UpgradeError::Restarted {
                    reason: format!("{reason}: {}", error_chain(&error)),
                }),
            };
        }
        standby.incarnation.become_usual(&self.new_plan);
        Outcome::New {
            done: Done {
                from: self.from.clone(),
                to: named(&standby.info, self.new_plan.build()),
                handed_over,
                stalls: before.stalls(&self.new_plan).await,
                notes,
            },
            process: standby.process,
            info: standby.info,
            plan: Box::new(self.new_plan.clone()),
        }
    }

    /// Ends what is not needed any more. The guest does not wait for this.
    async fn settle(&self, outcome: Outcome) -> Outcome {
        if !matches!(outcome, Outcome::Old(_)) {
            self.old.signal(Signal::SIGTERM);
            if self.old.exited_within(END_WITHIN).await.is_none() {
                self.old.kill().await;
            }
        }
        outcome
    }

    /// The old process was not touched; it may have ended by itself.
    fn as_before(&self, error: UpgradeError) -> Outcome {
        match self.old.exit() {
            None => Outcome::Old(error),
            Some(exit) => Outcome::Neither(UpgradeError::Restarted {
                reason: format!(
                    "{}; then {}",
                    error_chain(&error),
                    ending(self.wish.kind.program(), exit, &self.old_plan.log())
                ),
            }),
        }
    }

    /// What is noted of writes for incremental backups is in the old process.
    async fn lost_bitmaps(&self) -> Vec<String> {
        let disks = Disks::of(self.old_plan.dir());
        let mut notes = Vec::new();
        for disk in self.old_plan.disks() {
            let asked = tokio::time::timeout(ASK_WITHIN, disks.bitmaps(&disk.name)).await;
            for bitmap in asked.ok().and_then(Result::ok).unwrap_or_default() {
                notes.push(format!(
                    "disk {}: bitmap {} is gone; the next backup with it must be a whole one",
                    disk.name, bitmap.bitmap
                ));
            }
        }
        notes
    }
}

/// How a version is told to people.
fn named(info: &DaemonInfo, build: &str) -> String {
    match build {
        "" => format!("{} {}", info.name, info.version),
        build => format!("{} {} ({build})", info.name, info.version),
    }
}
