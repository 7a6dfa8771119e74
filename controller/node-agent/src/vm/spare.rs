//! Processes that stand by for a machine's daemons, so that a restart needs no exec: only descriptors
//! and one call.

use std::time::Duration;

use super::{daemon::DaemonError, error_chain, incarnation::Standby, machine::Machine};
use crate::record::DaemonKind;

/// The process that died goes on serving first; what stands by comes after.
const NOT_BEFORE: Duration = Duration::from_millis(500);

impl Machine {
    /// Makes it so that processes stand by, or do not.
    pub(super) fn keep_spares(&mut self, wanted: bool) {
        self.warm_spare = wanted;
        self.tend_spares();
    }

    /// Starts what should stand by and does not, and ends what should not.
    pub(super) fn tend_spares(&mut self) {
        for index in 0..self.daemons.len() {
            let daemon = &mut self.daemons[index];
            let is_gone = |spare: &Standby| spare.process.exit().is_some();
            if !self.warm_spare || daemon.spare.as_ref().is_some_and(is_gone) {
                daemon.spare = None;
            }
            self.start_spare(index);
        }
    }

    /// Has a process come up to stand by, where one should; [`Machine::daemon_event`] takes it.
    pub(super) fn start_spare(&mut self, index: usize) {
        let daemon = &self.daemons[index];
        let kind = daemon.plan.kind;
        let wanted = self.warm_spare
            && daemon.plan.can_stand_by()
            && daemon.process.is_some()
            && daemon.spare.is_none()
            && daemon.upgrade.is_none();
        if !wanted || !self.on_their_way.insert(kind) {
            return;
        }
        let plan = daemon.plan.clone();
        self.sparing.spawn(async move {
            tokio::time::sleep(NOT_BEFORE).await;
            (kind, Standby::start(&plan).await)
        });
    }

    /// A process stands by; or it could not, and is tried again with the next look.
    pub(super) fn spare_is_up(&mut self, kind: DaemonKind, outcome: Result<Standby, DaemonError>) {
        self.on_their_way.remove(&kind);
        let spare = match outcome {
            Ok(spare) => spare,
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), "a spare {}: {}", kind.program(), error_chain(&error));
                return;
            }
        };
        let wanted = self.warm_spare;
        let daemon = self.daemons.iter_mut().find(|daemon| {
            // Of the version that serves: there may have been an upgrade meanwhile.
            daemon.plan.kind == kind && daemon.plan.program() == spare.program
        });
        if let Some(daemon) = daemon.filter(|daemon| wanted && daemon.upgrade.is_none()) {
            daemon.spare = Some(spare);
        }
    }
}
