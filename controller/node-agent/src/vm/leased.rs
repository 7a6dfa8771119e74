//! What the host's lease asks of a VM that runs under it: see [`crate::leases`].

use std::{path::Path, time::Duration};

use api::{
    connect,
    device::{AllowIoRequest, leases_client::LeasesClient},
};
use lease::{Moment, Restart, Stage};
use tonic::Code;

use super::{
    Actor, Env,
    daemon::{DaemonError, with_deadline},
    error_chain,
    machine::Machine,
    vmm::{self, VmmError},
};
use crate::spec::Spec;

/// Why a VM stopped that lost its host's lease.
pub(super) const LOST: &str = "lease-lost";
/// A process that does not answer is told with the next renewal; it stops by itself meanwhile.
const TELL_DEADLINE: Duration = Duration::from_millis(500);
/// Answered from memory.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

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
                // What the guest uses before the guest.
                machine.allow_io(until).await;
                self.allow_switched_nics(&machine.dir, until).await;
                machine.allow_run(until).await;
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

impl Actor {
    /// Those of its NICs that its networks' switches serve. One that is being attached anew is told then.
    async fn allow_switched_nics(&self, dir: &Path, until: Moment) {
        for (socket, ids) in self.env.networks.switched_nics(&self.id()) {
            // One that is not there must not keep the others from being told.
            for id in ids {
                let telling = allow_io(&socket, "device-net", vec![id], until);
                match tokio::time::timeout(TELL_DEADLINE, telling).await {
                    Ok(Err(error)) if error.is_not_found() => {}
                    told => note(dir, "a switch", told, DaemonError::code),
                }
            }
        }
    }
}

impl Machine {
    async fn allow_io(&self, until: Moment) {
        for daemon in &self.daemons {
            if daemon.process.is_none() || daemon.upgrade.is_some() {
                continue;
            }
            let told = tokio::time::timeout(TELL_DEADLINE, daemon.plan.allow_io(until)).await;
            note(
                &self.dir,
                daemon.plan.kind.program(),
                told,
                DaemonError::code,
            );
        }
    }

    /// Goes on by itself, if it paused by itself.
    async fn allow_run(&self, until: Moment) {
        let telling = vmm::allow_run(&self.dir, until);
        let told = tokio::time::timeout(TELL_DEADLINE, telling).await;
        note(&self.dir, "vmm-core", told, VmmError::code);
    }

    /// All of it has stopped by itself, unless its vmm-core knows no leases.
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

/// Lets the leased devices of a daemon be used until then: these, or all.
pub(super) async fn allow_io(
    socket: &Path,
    program: &'static str,
    ids: Vec<String>,
    until: Moment,
) -> Result<(), DaemonError> {
    let channel = connect::unix(socket, CALL_DEADLINE)
        .await
        .map_err(|source| DaemonError::Connect { program, source })?;
    let request = AllowIoRequest {
        ids,
        until_boottime_ns: until.as_nanos(),
    };
    let request = with_deadline(request, CALL_DEADLINE);
    match LeasesClient::new(channel).allow_io(request).await {
        Ok(_) => Ok(()),
        Err(status) => Err(DaemonError::Call {
            program,
            call: "AllowIo".to_owned(),
            code: status.code(),
            message: status.message().to_owned(),
        }),
    }
}

fn note<E: std::error::Error>(
    dir: &Path,
    program: &str,
    told: Result<Result<(), E>, tokio::time::error::Elapsed>,
    code: impl Fn(&E) -> Code,
) {
    let dir = dir.display();
    match told {
        Ok(Ok(())) => {}
        // An earlier version that was adopted: the agent pauses and ends it.
        Ok(Err(error))
            if matches!(code(&error), Code::Unimplemented | Code::FailedPrecondition) =>
        {
            tracing::debug!(%dir, "{program} needs no leave: {}", error_chain(&error));
        }
        Ok(Err(error)) => {
            tracing::warn!(%dir, "extending the time that {program} is allowed: {}", error_chain(&error));
        }
        Err(_) => {
            tracing::warn!(%dir, "extending the time that {program} is allowed: no answer");
        }
    }
}

/// The disks' daemon does not know leases: then nobody knows when it stops.
pub(super) fn is_ignorant(error: &DaemonError) -> bool {
    matches!(
        error,
        DaemonError::Call {
            code: Code::Unimplemented,
            ..
        }
    )
}
