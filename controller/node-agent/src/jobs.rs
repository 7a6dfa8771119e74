//! Work on volumes and disks that takes a while: growing, snapshots, copies, checks. Whoever asks
//! chooses the id and may ask again; each job has one task, which nothing but the agent's end stops
//! half-way, and what it changed durably by then is settled when the volume is next used.

mod check;
mod commit;
mod copy;
mod resize;
mod snapshot;
mod upgrade;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::node::{Job, JobState, StartJobRequest, start_job_request::Work};
use tokio::sync::watch;
use tonic::Code;

use crate::{
    agent::Agent,
    versions::BinaryError,
    vm::{DaemonError, disks::Disks, error_chain},
    volumes::VolumeError,
};

/// More work at one time than disks of a large host.
const MAX_JOBS: usize = 1024;
/// Between two looks at a daemon's job.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// All jobs of this agent.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    table: Mutex<BTreeMap<String, Arc<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    request: StartJobRequest,
    state: watch::Sender<Job>,
    wish: watch::Sender<Wish>,
}

/// What is asked of a job that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    GoOn,
    Complete,
    Cancel,
}

/// Why a job did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobError {
    /// The id is in use.
    #[error("job {job_id:?} is something else; choose a new id for each job")]
    OtherWork {
        /// As given.
        job_id: String,
    },
    /// No such job.
    #[error("there is no job {job_id:?} (jobs end with the agent)")]
    NoJob {
        /// As given.
        job_id: String,
    },
    /// Too many.
    #[error("this host has {MAX_JOBS} jobs already; wait for some to end")]
    TooMany,
    /// It is not a mirror that is ready.
    #[error("job {job_id:?} is not a mirror that is ready to switch over")]
    NotReady {
        /// As given.
        job_id: String,
    },
    /// The job is not over.
    #[error("job {job_id:?} is not over; cancel it first")]
    Running {
        /// As given.
        job_id: String,
    },
    /// There is no daemon to do it.
    #[error("{what} needs a running VM that writes it; start the VM first")]
    NotServed {
        /// The volume or the disk.
        what: String,
    },
    /// The disk's VM is on its way up or down.
    #[error("VM {vm:?} is being started or stopped; try again")]
    Unsettled {
        /// The VM.
        vm: String,
    },
    /// As asked.
    #[error("cancelled; the disk goes on as before")]
    Cancelled,
    /// The daemon's job ended badly.
    #[error("{0}")]
    Failed(String),
    /// The daemon ended, and its job with it.
    #[error("device-blk was restarted meanwhile; begin again")]
    DaemonRestarted,
    /// The image has errors.
    #[error(
        "{corruptions} errors found: {findings}; restore the volume from a backup, or copy what can be read: vmctl disk mirror"
    )]
    Corrupt {
        /// How many.
        corruptions: u64,
        /// The first ones.
        findings: String,
    },
    /// It only works on volumes with such layers.
    #[error("volume {volume:?} has no snapshot to merge")]
    NoSnapshot {
        /// The volume.
        volume: String,
    },
    /// The volume refuses.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The daemon refuses.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The binary cannot be used.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// There is no such VM.
    #[error("VM {vm:?} does not exist on this host")]
    NoVm {
        /// The VM.
        vm: String,
    },
    /// There is no such device, or its daemon is none of those that are exchanged.
    #[error("{device} of VM {vm:?} {problem}")]
    NoUpgrade {
        /// The VM.
        vm: String,
        /// The device.
        device: String,
        /// Why not.
        problem: String,
    },
    /// Nothing that could be exchanged.
    #[error("no daemon that is to be upgraded runs here")]
    NothingToUpgrade,
    /// Some daemons keep their old version.
    #[error("{text}")]
    Upgrade {
        /// Of the first one.
        code: Code,
        /// Which, why, and what was and was not upgraded.
        text: String,
    },
    /// As asked, between two waves.
    #[error("cancelled: {0}")]
    UpgradeCancelled(String),
    /// The VM is not there.
    #[error("VM {vm:?} has no disk {disk:?} on this host")]
    NoDisk {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
    },
}

impl JobError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::OtherWork { .. } => Code::AlreadyExists,
            Self::NoJob { .. } | Self::NoDisk { .. } | Self::NoVm { .. } => Code::NotFound,
            Self::Binary(error) => error.code(),
            Self::NoUpgrade { .. } | Self::NothingToUpgrade => Code::FailedPrecondition,
            Self::Upgrade { code, .. } => *code,
            Self::UpgradeCancelled(_) => Code::Cancelled,
            Self::TooMany => Code::ResourceExhausted,
            Self::NotReady { .. }
            | Self::Running { .. }
            | Self::NotServed { .. }
            | Self::NoSnapshot { .. } => Code::FailedPrecondition,
            Self::Unsettled { .. } => Code::Unavailable,
            Self::Cancelled => Code::Cancelled,
            Self::Failed(_) => Code::Internal,
            Self::DaemonRestarted => Code::Aborted,
            Self::Corrupt { .. } => Code::DataLoss,
            Self::Volume(error) => error.code(),
            Self::Daemon(error) => error.code(),
        }
    }
}

/// What a job's task works with.
struct Context {
    agent: Arc<Agent>,
    entry: Arc<Entry>,
}

/// A disk that a daemon serves.
struct Served {
    vm: String,
    disk: String,
    read_only: bool,
    disks: Disks,
}

impl Jobs {
    /// Begins a job, or tells how far the one of this id is.
    ///
    /// # Errors
    /// When the id is another job's, or there are too many.
    pub(crate) fn start(
        &self,
        agent: &Arc<Agent>,
        request: StartJobRequest,
    ) -> Result<Job, JobError> {
        let entry = {
            let mut table = self.lock();
            if let Some(known) = table.get(&request.job_id) {
                if known.request == request {
                    return Ok(known.state.borrow().clone());
                }
                return Err(JobError::OtherWork {
                    job_id: request.job_id,
                });
            }
            if table.len() >= MAX_JOBS {
                return Err(JobError::TooMany);
            }
            let mut job = Job {
                job_id: request.job_id.clone(),
                kind: kind(&request).to_owned(),
                ..Job::default()
            };
            job.set_state(JobState::Running);
            let entry = Arc::new(Entry {
                state: watch::Sender::new(job),
                wish: watch::Sender::new(Wish::GoOn),
                request,
            });
            table.insert(entry.request.job_id.clone(), entry.clone());
            entry
        };
        let job = entry.state.borrow().clone();
        tokio::spawn(
            Context {
                agent: agent.clone(),
                entry,
            }
            .run(),
        );
        Ok(job)
    }

    /// All jobs that were not forgotten.
    pub(crate) fn list(&self) -> Vec<Job> {
        let table = self.lock();
        table
            .values()
            .map(|entry| entry.state.borrow().clone())
            .collect()
    }

    /// Has a mirror that is ready switch over.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn complete(&self, job_id: &str) -> Result<Job, JobError> {
        let entry = self.find(job_id)?;
        let job = entry.state.borrow().clone();
        match job.state() {
            JobState::Ready => entry.wish.send_replace(Wish::Complete),
            JobState::Done => return Ok(job),
            _ => {
                return Err(JobError::NotReady {
                    job_id: job_id.to_owned(),
                });
            }
        };
        Ok(job)
    }

    /// Has a job end soon.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn cancel(&self, job_id: &str) -> Result<Job, JobError> {
        let entry = self.find(job_id)?;
        entry.wish.send_replace(Wish::Cancel);
        Ok(entry.state.borrow().clone())
    }

    /// Forgets a job that is over. One that is not known is no error.
    ///
    /// # Errors
    /// When it runs.
    pub(crate) fn forget(&self, job_id: &str) -> Result<(), JobError> {
        let mut table = self.lock();
        let over = table
            .get(job_id)
            .is_none_or(|entry| is_over(entry.state.borrow().state()));
        if !over {
            return Err(JobError::Running {
                job_id: job_id.to_owned(),
            });
        }
        table.remove(job_id);
        Ok(())
    }

    fn find(&self, job_id: &str) -> Result<Arc<Entry>, JobError> {
        self.lock()
            .get(job_id)
            .cloned()
            .ok_or_else(|| JobError::NoJob {
                job_id: job_id.to_owned(),
            })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Entry>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Context {
    async fn run(self) {
        let outcome = match self.entry.request.work.clone() {
            Some(Work::Resize(work)) => self.resize(work).await,
            Some(Work::Snapshot(work)) => self.snapshot(work).await,
            Some(Work::Mirror(work)) => self.mirror(work).await,
            Some(Work::Backup(work)) => self.backup(work).await,
            Some(Work::Commit(work)) => self.commit(work).await,
            Some(Work::Check(work)) => self.check(work).await,
            Some(Work::Upgrade(work)) => self.upgrade(work).await,
            None => Ok(Vec::new()),
        };
        let id = &self.entry.request.job_id;
        self.entry.state.send_modify(|job| match outcome {
            Ok(findings) => {
                job.findings = findings;
                job.done_bytes = job.total_bytes;
                job.set_state(JobState::Done);
                tracing::info!(job = id, kind = job.kind, "done");
            }
            Err(error) => {
                job.error = error_chain(&error);
                job.error_code = error.code() as i32;
                job.set_state(match error {
                    JobError::Cancelled | JobError::UpgradeCancelled(_) => JobState::Cancelled,
                    _ => JobState::Failed,
                });
                tracing::warn!(job = id, kind = job.kind, "{}", job.error);
            }
        });
    }

    /// The daemon that serves a volume; `None` when its VM is off, or it has none.
    async fn served(&self, volume: &str) -> Result<Option<Served>, JobError> {
        let Some((vm, disk)) = self.agent.attachment(volume).await else {
            return Ok(None);
        };
        let served = self.served_disk(&vm, disk)?;
        Ok(served)
    }

    /// As [`Self::served`], of a disk of a VM.
    fn served_disk(&self, vm: &crate::vm::Vm, disk: String) -> Result<Option<Served>, JobError> {
        use api::node::VmPhase;
        let spec = vm.spec();
        match vm.status().phase() {
            VmPhase::Running | VmPhase::Paused => Ok(Some(Served {
                disks: Disks::of(&self.agent.env.vm_dir(&spec.id)),
                read_only: spec
                    .disks
                    .iter()
                    .any(|known| known.name == disk && known.read_only),
                vm: spec.id.clone(),
                disk,
            })),
            VmPhase::Starting | VmPhase::Stopping => Err(JobError::Unsettled {
                vm: spec.id.clone(),
            }),
            VmPhase::Stopped | VmPhase::Failed | VmPhase::Unspecified => Ok(None),
        }
    }

    /// Follows a daemon's job until it is over, passing on what is wished of it. `ready` is called
    /// before a mirror's switch.
    async fn follow(
        &self,
        served: &Served,
        mut on_switch: impl FnMut() -> Result<(), JobError>,
    ) -> Result<api::device::Job, JobError> {
        use api::device::JobState as DeviceState;
        let id = &self.daemon_job();
        let mut wish = self.entry.wish.subscribe();
        let mut completing = false;
        loop {
            // A daemon that is on its way up again knows nothing of the job.
            let job = served
                .disks
                .job(&served.disk, id)
                .await?
                .ok_or(JobError::DaemonRestarted)?;
            self.entry.state.send_modify(|own| {
                own.done_bytes = job.done_bytes;
                own.total_bytes = job.total_bytes;
                let ready = job.state() == DeviceState::Ready && !completing;
                own.set_state(if ready {
                    JobState::Ready
                } else {
                    JobState::Running
                });
            });
            match job.state() {
                DeviceState::Done => {
                    served.disks.cancel(&served.disk, id).await.ok();
                    return Ok(job);
                }
                DeviceState::Failed => {
                    served.disks.cancel(&served.disk, id).await.ok();
                    return Err(JobError::Failed(job.error));
                }
                DeviceState::Cancelled => {
                    served.disks.cancel(&served.disk, id).await.ok();
                    return Err(JobError::Cancelled);
                }
                DeviceState::Unspecified | DeviceState::Running | DeviceState::Ready => {}
            }
            let wished = *wish.borrow_and_update();
            match wished {
                Wish::Cancel if !completing => {
                    served.disks.cancel(&served.disk, id).await?;
                }
                Wish::Complete if job.state() == DeviceState::Ready && !completing => {
                    on_switch()?;
                    completing = true;
                    served.disks.complete(&served.disk, id).await?;
                }
                _ => {}
            }
            let _ = tokio::time::timeout(POLL_INTERVAL, wish.changed()).await;
        }
    }

    /// The job's id at the daemon, where ids begin with a letter.
    fn daemon_job(&self) -> String {
        format!("job-{}", self.entry.request.job_id)
    }

    /// Runs blocking work on files.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Agent) -> T + Send + 'static,
    ) -> T {
        let agent = self.agent.clone();
        tokio::task::spawn_blocking(move || work(&agent))
            .await
            .unwrap_or_else(|panic| panic!("working on a volume: {panic}"))
    }
}

fn kind(request: &StartJobRequest) -> &'static str {
    match &request.work {
        Some(Work::Resize(_)) => "resize",
        Some(Work::Snapshot(_)) => "snapshot",
        Some(Work::Mirror(_)) => "mirror",
        Some(Work::Backup(_)) => "backup",
        Some(Work::Commit(_)) => "commit",
        Some(Work::Check(_)) => "check",
        Some(Work::Upgrade(_)) => "upgrade",
        None => "",
    }
}

fn is_over(state: JobState) -> bool {
    matches!(
        state,
        JobState::Done | JobState::Failed | JobState::Cancelled
    )
}
