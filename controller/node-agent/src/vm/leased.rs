//! What the host's lease asks of a VM that runs under it: see [`crate::leases`].

use std::time::Duration;

use lease::{Moment, Restart, Stage};

use super::{Actor, Env, daemon::DaemonError, error_chain, machine::Machine, vmm};
use crate::{record::DaemonKind, spec::Spec};

/// Why a VM stopped that lost its host's lease.
pub(super) const LOST: &str = "lease-lost";
/// A daemon that does not answer is told with the next renewal; it stops by itself meanwhile.
const TELL_DEADLINE: Duration = Duration::from_millis(500);

/// Comes when a VM of this spec may not be started any more; never for one that needs no lease.
pub(super) async fn lapse(env: &Env, spec: &Spec) {
    if spec.restart != Restart::Anywhere {
        return std::future::pending().await;
    }
    let mut stages = env.leases.watch();
    let is_over = |stage: &Stage| matches!(stage, Stage::Unheld | Stage::Lapsed);
    if stages.wait_for(is_over).await.is_err() {
        std::future::pending().await
    }
}

impl Actor {
    /// Does what the lease's stage asks for; false when the VM has to go.
    pub(super) async fn follow_lease(&self, machine: &mut Machine) -> bool {
        match self.env.leases.stage() {
            Stage::Held { until } => {
                machine.allow_io(until).await;
                machine.end_suspension(&self.record.spec).await;
                true
            }
            Stage::Suspended { stop_at } => {
                // It is killed then, paused or not.
                let left = crate::leases::now().until(stop_at);
                if tokio::time::timeout(left, machine.suspend()).await.is_err() {
                    tracing::warn!(vm = self.id(), "pausing it takes too long");
                }
                true
            }
            Stage::Unheld | Stage::Lapsed => false,
        }
    }
}

impl Machine {
    async fn allow_io(&self, until: Moment) {
        for daemon in &self.daemons {
            let can_tell = daemon.process.is_some() && daemon.upgrade.is_none();
            if daemon.plan.kind != DaemonKind::Blk || !can_tell {
                continue;
            }
            let told = tokio::time::timeout(TELL_DEADLINE, daemon.plan.allow_io(until)).await;
            let failure = match told {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error_chain(&error),
                Err(_) => "no answer".to_owned(),
            };
            tracing::warn!(dir = %self.dir.display(), "extending the time that disks may be used: {failure}");
        }
    }

    /// The disks have stopped by themselves; the guest follows.
    async fn suspend(&mut self) {
        if self.suspended {
            return;
        }
        self.suspended = true;
        tracing::warn!(dir = %self.dir.display(), "the host lost contact: pausing the VM");
        match vmm::pause(&self.dir).await {
            Ok(()) => self.health.paused = true,
            // It is stopped soon if contact does not come back.
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), "{}", error_chain(&error));
            }
        }
    }

    async fn end_suspension(&mut self, spec: &Spec) {
        if std::mem::take(&mut self.suspended) {
            tracing::info!(dir = %self.dir.display(), "the host has contact again: the VM goes on");
            // Unless an outage policy wants otherwise.
            self.paused_for_outage = true;
            self.health.paused = true;
            self.enforce_policies(spec).await;
        }
    }
}

/// The disks' daemon does not know leases: then nobody knows when it stops.
pub(super) fn is_ignorant(error: &DaemonError) -> bool {
    matches!(
        error,
        DaemonError::Call {
            code: tonic::Code::Unimplemented,
            ..
        }
    )
}
