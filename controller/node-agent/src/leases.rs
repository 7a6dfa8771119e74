//! This host's lease: until when VMs that are restarted elsewhere may run here.
//!
//! [`lease::HostLease`] decides; this keeps it across agents, tells everybody of its stage, and ends a
//! lapse once nothing is left of the VMs that it stopped. Each VM's task does what a stage asks of it:
//!
//! ```text
//! held until T      disks and NICs may be used and vCPUs may run until T, by their processes' own clocks
//! suspended         all of these have stopped by themselves
//! lapsed            vmm-core and the daemons are killed
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::node::{LeaseStage, RenewLeaseRequest, RenewLeaseResponse};
use lease::{HostLease, Moment, Refused, Renewal, Restart, Stage, Terms, Ticket};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, OwnedRwLockReadGuard, RwLock, watch};

use crate::{agent::Agent, spec::Power};

/// Timers stand still while the host sleeps, and the lease does not.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// While VMs are being stopped.
const SETTLE_INTERVAL: Duration = Duration::from_millis(50);
/// Raised when the file's meaning changes.
const VERSION: u32 = 1;

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Leases(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lease: Mutex<HostLease>,
    stage: watch::Sender<Stage>,
    renewed: Notify,
    /// Read by whoever begins to start a leased VM, written by the end of a lapse.
    starting: Arc<RwLock<()>>,
    file: PathBuf,
    boot_id: String,
}

/// For the next agent.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    boot_id: String,
    lease: HostLease,
}

/// A leased VM is being started: no lapse ends meanwhile.
#[derive(Debug)]
pub(crate) struct Permit {
    _starting: Option<OwnedRwLockReadGuard<()>>,
}

/// Why a VM that is restarted elsewhere is not started here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LeaseError {
    /// The controller did not renew it, or not in time.
    #[error(
        "this host holds no lease, which VMs that are restarted anywhere need; it begins with the next contact to the controller"
    )]
    NotHeld,
    /// The wish is older than the last loss of contact.
    #[error(
        "the wish belongs to session {given:?} of this host's lease, and that is over: the VM may run elsewhere by now; the present session is {present:?}"
    )]
    OtherSession {
        /// As given.
        given: String,
        /// As it is.
        present: String,
    },
}

/// There is one in an agent.
impl PartialEq for Leases {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Leases {
    /// Goes on with what an earlier agent of this boot left in `run_dir`. When there is nothing,
    /// although `has_leased_vms`, those have to go.
    pub(crate) fn open(run_dir: &Path, boot_id: &str, has_leased_vms: bool) -> Self {
        let file = run_dir.join("lease.json");
        let saved = fs::read(&file)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Saved>(&bytes).ok())
            .filter(|saved| saved.version == VERSION && saved.boot_id == boot_id);
        let mut lease = match saved {
            Some(saved) => saved.lease,
            None if has_leased_vms => HostLease::lost(new_session()),
            None => HostLease::new(new_session()),
        };
        let stage = lease.stage(now());
        Self(Arc::new(Inner {
            lease: Mutex::new(lease),
            stage: watch::Sender::new(stage),
            renewed: Notify::new(),
            starting: Arc::default(),
            file,
            boot_id: boot_id.to_owned(),
        }))
    }

    /// To await its stages.
    pub(crate) fn watch(&self) -> watch::Receiver<Stage> {
        self.0.stage.subscribe()
    }

    /// What may be done now.
    pub(crate) fn stage(&self) -> Stage {
        let stage = self.lease().stage(now());
        self.tell(stage);
        stage
    }

    /// Until when devices may do I/O and vCPUs may run; zero when they may not. Nobody is told more.
    pub(crate) fn io_until(&self) -> Moment {
        match self.stage() {
            Stage::Held { until } => until,
            Stage::Unheld | Stage::Suspended { .. } | Stage::Lapsed => Moment::default(),
        }
    }

    /// The present session.
    pub(crate) fn session(&self) -> String {
        self.lease().session().to_owned()
    }

    /// Leave to begin what the spec wishes, if it needs any.
    ///
    /// # Errors
    /// When it does and there is none.
    pub(crate) async fn permit(
        &self,
        restart: Restart,
        power: Power,
        session: &str,
    ) -> Result<Permit, LeaseError> {
        if restart != Restart::Anywhere || power != Power::On {
            return Ok(Permit { _starting: None });
        }
        let starting = self.0.starting.clone().read_owned().await;
        let stage = self.stage();
        let present = self.lease().session().to_owned();
        if session != present {
            return Err(LeaseError::OtherSession {
                given: session.to_owned(),
                present,
            });
        }
        match stage {
            Stage::Held { .. } => Ok(Permit {
                _starting: Some(starting),
            }),
            Stage::Unheld | Stage::Suspended { .. } | Stage::Lapsed => Err(LeaseError::NotHeld),
        }
    }

    /// Takes a grant in, if it is one that counts, and hands out the next ticket.
    pub(crate) fn renew(&self, request: &RenewLeaseRequest) -> RenewLeaseResponse {
        let now = now();
        let mut lease = self.lease();
        let refusal = match renewal_of(request) {
            None => None,
            Some(renewal) => lease.renew(&renewal, now).err(),
        };
        if let Some(refused) = &refusal
            && !matches!(refused, Refused::Lapsed | Refused::OldSession { .. })
        {
            tracing::warn!("a renewal of the lease does not count: {refused}");
        }
        if refusal.is_none() && !request.session.is_empty() {
            self.save(&lease);
        }
        let stage = lease.stage(now);
        let ticket = lease.ticket(now);
        drop(lease);
        self.tell(stage);
        self.0.renewed.notify_one();
        RenewLeaseResponse {
            session: ticket.session,
            ticket_boottime_ns: ticket.at.as_nanos(),
            stage: api_stage(stage).into(),
            refusal: refusal
                .map(|refused| refused.to_string())
                .unwrap_or_default(),
            remaining_ms: match stage {
                Stage::Held { until } => now.until(until).as_millis() as u64,
                _ => 0,
            },
        }
    }

    /// Notices when stages end, and ends lapses. For as long as the agent runs.
    pub(crate) async fn run(self, agent: Arc<Agent>) {
        loop {
            let stage = self.stage();
            if stage == Stage::Lapsed {
                if !self.settle(&agent).await {
                    tokio::time::sleep(SETTLE_INTERVAL).await;
                }
                continue;
            }
            let now = now();
            let left = self.lease().next_change(now).map(|at| now.until(at));
            let pause = left.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL);
            let _ = tokio::time::timeout(pause, self.0.renewed.notified()).await;
        }
    }

    /// Begins a new session if nothing runs any more that the last one let run.
    async fn settle(&self, agent: &Agent) -> bool {
        let _none_starts = self.0.starting.write().await;
        for vm in agent.all().await {
            if vm.spec().restart == Restart::Anywhere && vm.is_active() {
                return false;
            }
        }
        let session = new_session();
        tracing::warn!(session, "the lease was lost; all its VMs are stopped");
        let mut lease = self.lease();
        lease.settled(session);
        self.save(&lease);
        let stage = lease.stage(now());
        drop(lease);
        self.tell(stage);
        true
    }

    fn tell(&self, stage: Stage) {
        self.0.stage.send_if_modified(|told| {
            let before = std::mem::replace(told, stage);
            if api_stage(before) != api_stage(stage) {
                tracing::info!("the host's lease is {}", word(stage));
            }
            before != stage
        });
    }

    /// One that cannot be kept makes the next agent go by an earlier end, which is safe.
    fn save(&self, lease: &HostLease) {
        let saved = Saved {
            version: VERSION,
            boot_id: self.0.boot_id.clone(),
            lease: lease.clone(),
        };
        if let Err(error) = write(&self.0.file, &saved) {
            tracing::warn!("keeping the lease in {}: {error}", self.0.file.display());
        }
    }

    fn lease(&self) -> MutexGuard<'_, HostLease> {
        self.0.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(file: &Path, saved: &Saved) -> io::Result<()> {
    let temporary = file.with_extension("tmp");
    fs::write(&temporary, serde_json::to_vec(saved)?)?;
    fs::rename(&temporary, file)
}

fn renewal_of(request: &RenewLeaseRequest) -> Option<Renewal> {
    let term = |term_ms: u32| Duration::from_millis(term_ms.into());
    (!request.session.is_empty()).then(|| Renewal {
        ticket: Ticket {
            session: request.session.clone(),
            at: Moment::from_nanos(request.ticket_boottime_ns),
        },
        terms: Terms {
            lease: term(request.lease_ms),
            grace: term(request.grace_ms),
            settle: term(request.settle_ms),
        },
        // Every call's epoch is looked at before it gets here.
        epoch: 0,
    })
}

fn api_stage(stage: Stage) -> LeaseStage {
    match stage {
        Stage::Unheld => LeaseStage::Unheld,
        Stage::Held { .. } => LeaseStage::Held,
        Stage::Suspended { .. } => LeaseStage::Suspended,
        Stage::Lapsed => LeaseStage::Lapsed,
    }
}

fn word(stage: Stage) -> &'static str {
    match stage {
        Stage::Unheld => "not held",
        Stage::Held { .. } => "held",
        Stage::Suspended { .. } => "over: the VMs that are restarted anywhere are paused",
        Stage::Lapsed => "lost: the VMs that are restarted anywhere are stopped",
    }
}

fn new_session() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// `CLOCK_BOOTTIME`, which goes on while the host sleeps.
pub(crate) fn now() -> Moment {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    Moment(now.map(Duration::from).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renewal(answer: &RenewLeaseResponse, lease_ms: u32) -> RenewLeaseRequest {
        RenewLeaseRequest {
            session: answer.session.clone(),
            ticket_boottime_ns: answer.ticket_boottime_ns,
            lease_ms,
            grace_ms: 1,
            settle_ms: 1,
        }
    }

    #[tokio::test]
    async fn lease_is_held_by_the_next_agent_of_this_boot_alone() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(dir.path(), "boot", false);
        let first = leases.renew(&RenewLeaseRequest::default());
        assert_eq!(first.stage(), LeaseStage::Unheld);
        let anywhere = |leases: &Leases| {
            let (leases, session) = (leases.clone(), first.session.clone());
            async move { leases.permit(Restart::Anywhere, Power::On, &session).await }
        };
        assert_eq!(anywhere(&leases).await.unwrap_err(), LeaseError::NotHeld);
        let second = leases.renew(&renewal(&first, 3_600_000));
        assert_eq!(
            (second.stage(), second.refusal.as_str()),
            (LeaseStage::Held, "")
        );
        assert!(second.remaining_ms > 3_000_000);
        drop(anywhere(&leases).await.unwrap());
        let other = leases.permit(Restart::Anywhere, Power::On, "older").await;
        assert!(matches!(other, Err(LeaseError::OtherSession { .. })));
        leases
            .permit(Restart::SameHost, Power::On, "")
            .await
            .unwrap();

        let next = Leases::open(dir.path(), "boot", true);
        drop(anywhere(&next).await.unwrap());
        let rebooted = Leases::open(dir.path(), "another boot", true);
        assert_eq!(rebooted.stage(), Stage::Lapsed);
        assert!(anywhere(&rebooted).await.is_err());
    }

    #[tokio::test]
    async fn a_lease_that_ran_out_lets_nothing_be_started() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(dir.path(), "boot", false);
        let first = leases.renew(&RenewLeaseRequest::default());
        leases.renew(&renewal(&first, 20));
        let give_up = tokio::time::Instant::now() + Duration::from_secs(10);
        while leases.stage() != Stage::Lapsed {
            assert!(tokio::time::Instant::now() < give_up);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(leases.io_until(), Moment::default());
        let refused = leases.renew(&renewal(&first, 3_600_000));
        assert_eq!(refused.stage(), LeaseStage::Lapsed);
        assert!(!refused.refusal.is_empty());
    }
}
