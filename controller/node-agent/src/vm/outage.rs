//! What outage policies ask for while a daemon is not there.
//!
//! ```text
//! stall        nothing: vmm-core keeps trying, the guest's requests wait
//! error-after  T later a stand-in takes the disk: device-blk, told to fail every request. It opens and locks the
//!              image as ever, so nothing fails before the dead process' I/O is over. The real daemon's next
//!              process ends it right before it takes the disk itself. A daemon that is there and that vmm-core
//!              refuses is ended for that, and the next one is tried after a pause.
//! pause-vm     the vCPUs stand still until vmm-core has a daemon again
//! ```
//!
//! Policies change at any time; what they ask for is brought about with the next look.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use api::{device::attach_request, vmm::DeviceConnection};
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;

use super::{
    daemon::{DaemonError, Listeners, Plan},
    error_chain,
    health::Health,
    incarnation::Standby,
    machine::{Daemon, Machine},
    vmm,
};
use crate::{
    record::DaemonKind,
    spec::{OutagePolicy, Spec},
};

/// What the next process has to be accepted by `vmm-core`, once one was refused.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(1);

/// What fails requests in place of a daemon, if anything does. A plan's clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct StandIn(Arc<Mutex<Option<Standing>>>);

/// A stand-in on its way or at work.
#[derive(Debug)]
struct Standing {
    devices: BTreeSet<String>,
    /// It fails their requests.
    is_up: Arc<AtomicBool>,
    /// Owns the process, which ends with it.
    task: JoinHandle<()>,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl StandIn {
    /// Whether it fails requests of `device`.
    pub(super) fn fails(&self, device: &str) -> bool {
        let is_up = |standing: &Standing| standing.is_up.load(Ordering::SeqCst);
        self.lock()
            .as_ref()
            .is_some_and(|standing| is_up(standing) && standing.devices.contains(device))
    }

    /// Ends it: somebody takes the disks who can serve them.
    pub(super) async fn dismiss(&self) {
        let standing = self.lock().take();
        if let Some(mut standing) = standing {
            standing.task.abort();
            // Its process is killed when its task is gone; aborting is what makes an error of this.
            let _ = (&mut standing.task).await;
        }
    }

    /// Makes it one for these devices, or none.
    fn keep(&self, devices: BTreeSet<String>, plan: &Plan, listeners: &Listeners) {
        let mut standing = self.lock();
        let is_right = standing
            .as_ref()
            .is_some_and(|standing| standing.devices == devices && !standing.task.is_finished());
        if is_right || (devices.is_empty() && standing.is_none()) {
            return;
        }
        *standing = None;
        if devices.is_empty() {
            return;
        }
        let is_up = Arc::default();
        let task = tokio::spawn(stand_in(
            plan.without_stand_in(),
            listeners.clone(),
            devices.clone(),
            Arc::clone(&is_up),
        ));
        *standing = Some(Standing {
            devices,
            is_up,
            task,
        });
    }

    fn lock(&self) -> MutexGuard<'_, Option<Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fails the requests of `devices` until it is aborted or its process ends.
async fn stand_in(
    plan: Plan,
    listeners: Listeners,
    devices: BTreeSet<String>,
    is_up: Arc<AtomicBool>,
) {
    let standby = match take_disks(&plan, &listeners, &devices).await {
        Ok(standby) => standby,
        Err(error) => {
            let dir = plan.dir().display();
            tracing::warn!(%dir, ?devices, "requests wait on, for they cannot be failed yet: {}", error_chain(&error));
            return;
        }
    };
    is_up.store(true, Ordering::SeqCst);
    tracing::warn!(dir = %plan.dir().display(), ?devices, pid = standby.process.pid(), "failing requests by outage policy");
    standby.process.exited().await;
    is_up.store(false, Ordering::SeqCst);
}

async fn take_disks(
    plan: &Plan,
    listeners: &Listeners,
    devices: &BTreeSet<String>,
) -> Result<Standby, DaemonError> {
    let standby = Standby::start(plan).await?;
    for device in plan
        .devices
        .iter()
        .filter(|device| devices.contains(&device.name))
    {
        let Some(listener) = listeners.get(&device.name) else {
            continue;
        };
        let fds = &standby.incarnation.sockets.fds;
        let sent = plan.send_descriptors(fds, device.clone(), listener.clone());
        let mut request = sent.await?;
        if let Some(attach_request::Device::Blk(blk)) = &mut request.device {
            blk.fail_requests = true;
        }
        standby.incarnation.attach_sent(request).await?;
    }
    Ok(standby)
}

impl Daemon {
    /// How long there has been none.
    fn down_for(&self) -> Option<Duration> {
        self.down_since
            .filter(|_| self.process.is_none() && self.upgrade.is_none())
            .map(|since| since.elapsed())
    }

    /// Disks whose requests are to fail now.
    fn to_fail(&self, spec: &Spec) -> BTreeSet<String> {
        let Some(down_for) = self
            .down_for()
            .filter(|_| self.plan.kind == DaemonKind::Blk)
        else {
            return BTreeSet::new();
        };
        let is_due = |name: &String| match spec.outage_policy(name) {
            OutagePolicy::ErrorAfter(after) => down_for >= after,
            OutagePolicy::Stall | OutagePolicy::PauseVm => false,
        };
        let names = self.plan.devices.iter().map(|device| device.name.clone());
        names.filter(is_due).collect()
    }

    /// The disk whose requests are to fail because `vmm-core` refuses this process, and why.
    fn refusal(&self, spec: &Spec, health: &Health) -> Option<(Duration, String)> {
        if self.plan.kind != DaemonKind::Blk || self.process.is_none() || self.upgrade.is_some() {
            return None;
        }
        self.plan.devices.iter().find_map(|device| {
            let OutagePolicy::ErrorAfter(after) = spec.outage_policy(&device.name) else {
                return None;
            };
            let seen = health.device(&device.name)?;
            let stalled = SystemTime::try_from(seen.stalled_since?).ok()?;
            let stalled = stalled.elapsed().unwrap_or_default();
            let patience = if self.is_refused {
                ACCEPTED_WITHIN
            } else {
                after
            };
            let is_due = stalled >= patience && self.up_since.elapsed() >= patience;
            is_due.then(|| (after, seen.last_error.clone()))
        })
    }

    fn is_accepted(&self, health: &Health) -> bool {
        let accepted = |name: &str| {
            let device = health.device(name);
            device.is_some_and(|device| device.connection() == DeviceConnection::Connected)
        };
        let mut devices = self.plan.devices.iter();
        self.process.is_some()
            && self.up_since.elapsed() >= ACCEPTED_WITHIN
            && devices.all(|device| accepted(&device.name))
    }

    fn serves(&self, device: &str) -> bool {
        self.plan.devices.iter().any(|own| own.name == device)
    }
}

impl Machine {
    /// Whether requests of `device` fail by its outage policy.
    pub(super) fn is_failing(&self, device: &str) -> bool {
        self.daemons
            .iter()
            .any(|daemon| daemon.plan.stand_in().fails(device))
    }

    /// Brings about what outage policies ask for now.
    pub(super) async fn enforce_policies(&mut self, spec: &Spec) {
        self.end_refused(spec);
        for daemon in &self.daemons {
            let devices = daemon.to_fail(spec);
            let stand_in = daemon.plan.stand_in();
            stand_in.keep(devices, &daemon.plan, &daemon.listeners);
        }
        self.pause_or_resume(spec).await;
    }

    /// Their ends are noticed as any are.
    fn end_refused(&mut self, spec: &Spec) {
        for daemon in &mut self.daemons {
            if daemon.is_accepted(&self.health) {
                daemon.is_refused = false;
            }
            let (Some((after, why)), Some(process)) =
                (daemon.refusal(spec, &self.health), &daemon.process)
            else {
                continue;
            };
            let reason = format!("was refused by vmm-core and is ended: {why}");
            tracing::warn!(dir = %self.dir.display(), pid = process.pid(), "{} {reason}", daemon.plan.kind.program());
            process.signal(Signal::SIGKILL);
            daemon.killed = Some(reason);
            daemon.is_refused = true;
            // Requests have waited for so long already.
            daemon.down_since = Instant::now().checked_sub(after);
        }
    }

    async fn pause_or_resume(&mut self, spec: &Spec) {
        let outage = spec
            .outage_policies
            .iter()
            .find(|(device, policy)| **policy == OutagePolicy::PauseVm && self.is_out(device));
        let outcome = match (outage, self.health.paused) {
            (Some((device, _)), false) => {
                tracing::warn!(dir = %self.dir.display(), device, "pausing the VM by outage policy");
                self.paused_for_outage = true;
                vmm::pause(&self.dir).await.map(|()| true)
            }
            (None, true) if self.paused_for_outage && !self.suspended => {
                tracing::info!(dir = %self.dir.display(), "its devices are back: the VM goes on");
                vmm::resume(&self.dir).await.map(|()| false)
            }
            (None, false) => {
                self.paused_for_outage = false;
                return;
            }
            _ => return,
        };
        match outcome {
            Ok(paused) => self.health.paused = paused,
            // Tried again with the next look.
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), "{}", error_chain(&error));
            }
        }
    }

    /// Whether nobody serves `device`.
    fn is_out(&self, device: &str) -> bool {
        let mut daemons = self.daemons.iter();
        let is_down = daemons.any(|daemon| daemon.serves(device) && daemon.process.is_none());
        let health = self.health.device(device);
        is_down || health.is_some_and(|health| health.connection() != DeviceConnection::Connected)
    }
}
