//! A VM's status as the API shows it: the record's state, and what the machine adds to it.

use api::node::{VmPhase, VmStatus};

use super::machine::Machine;
use crate::record::{Record, State};

/// Of a VM as recorded, with its machine if it has one.
pub(super) fn status_of(record: &Record, machine: Option<&Machine>) -> VmStatus {
    let mut status = VmStatus {
        id: record.spec.id.clone(),
        observed_generation: record.spec.generation,
        resets: record.resets,
        first_console_byte_ms: record.first_console_byte_ms,
        ..VmStatus::default()
    };
    let mut started_at_ms = 0;
    let phase = match &record.state {
        State::Starting(_) => VmPhase::Starting,
        State::Running(assets) => {
            started_at_ms = assets.started_at_ms;
            match machine {
                Some(machine) if machine.health.paused => VmPhase::Paused,
                _ => VmPhase::Running,
            }
        }
        State::Stopping(assets) => {
            started_at_ms = assets.started_at_ms;
            VmPhase::Stopping
        }
        State::Stopped { reason } => {
            status.stop_reason = reason.clone();
            VmPhase::Stopped
        }
        State::Failed(failure) => {
            status.error_code = failure.code;
            status.error = failure.message.clone();
            status.stop_reason = failure.stop_reason.clone();
            VmPhase::Failed
        }
    };
    status.set_phase(phase);
    status.started_at = (started_at_ms > 0).then(|| prost_types::Timestamp {
        seconds: (started_at_ms / 1000) as i64,
        nanos: (started_at_ms % 1000) as i32 * 1_000_000,
    });
    if let Some(machine) = machine {
        status.processes = machine.processes();
        status.devices = machine.devices();
    }
    status
}
