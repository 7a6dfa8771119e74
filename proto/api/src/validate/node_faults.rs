//! What a host is asked to do wrong.

use tonic::Status;

use super::{absolute, fault_id, fault_rule as checked_rule, fault_ttl};
use crate::device::{FaultRule, fault_rule};
use crate::errors::Violations;
use crate::node::{self, fault, host_fault, process_fault};

/// Faults of one request.
const MAX_FAULTS: usize = 64;
/// Longest time for which a host is cut off, or loses its store.
const MAX_LOSS_MS: u64 = 600_000;
/// Longest delay of a start, and of what is done to a process for a time.
const MAX_PROCESS_MS: u64 = 600_000;
/// Half a day: enough for every time zone.
const MAX_CLOCK_STEP_MS: u64 = 43_200_000;

/// Checks which faults a host is asked to arm.
///
/// # Errors
/// As [`super::attach_request`].
pub fn node_arm_faults_request(request: &node::ArmFaultsRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    fault_id(&mut found, "experiment_id", &request.experiment_id);
    fault_ttl(&mut found, "ttl_ms", request.ttl_ms);
    let count = request.faults.len();
    found.require(count <= MAX_FAULTS, "faults", || {
        format!("must be at most {MAX_FAULTS}, not {count}")
    });
    for (index, fault) in request.faults.iter().take(MAX_FAULTS).enumerate() {
        node_fault(&mut found, &format!("faults[{index}]"), fault);
    }
    found.into_result()
}

/// Checks one fault at `field`.
pub fn node_fault(found: &mut Violations, field: &str, fault: &node::Fault) {
    fault_id(found, &format!("{field}.id"), &fault.id);
    let process = fault.target.as_ref().map_or(0, |target| target.process);
    let is_of_agent = process == node::FaultProcess::Agent as i32;
    found.require(
        node::FaultProcess::try_from(process).is_ok(),
        &format!("{field}.target.process"),
        || format!("unknown value {process}"),
    );
    match &fault.fault {
        Some(fault::Fault::Rule(rule)) => {
            if let Some(problem) = misplaced(rule, process) {
                found.add(format!("{field}.rule"), problem);
            }
            checked_rule(found, &format!("{field}.rule"), rule);
        }
        Some(fault::Fault::Process(process)) => {
            process_fault(found, &format!("{field}.process"), process, is_of_agent);
        }
        Some(fault::Fault::Host(host)) => host_fault(found, &format!("{field}.host"), host),
        None => found.add(field, "give rule, process or host"),
    }
}

/// Why a process of this kind knows no such rule, if it does not.
fn misplaced(rule: &FaultRule, process: i32) -> Option<&'static str> {
    use fault_rule::Action::{Disconnect, LateKick, LateReconnect, LateReply, LostKick};
    let action = rule.action.as_ref();
    match node::FaultProcess::try_from(process) {
        Ok(node::FaultProcess::Agent) => {
            Some("is for daemons and vmm-core; the agent knows no rules")
        }
        Ok(node::FaultProcess::Vmm) => {
            let is_known = matches!(
                action,
                Some(Disconnect(_) | LateKick(_) | LateReconnect(_) | LateReply(_) | LostKick(_))
            );
            let problem = "is for daemons; vmm-core knows lost_kick, late_kick, late_reply, disconnect and late_reconnect";
            (!is_known).then_some(problem)
        }
        _ => {
            let is_frontends = matches!(action, Some(LateKick(_) | LateReconnect(_)));
            is_frontends.then_some("is for vmm-core; choose it as the process")
        }
    }
}

/// Checks what is done to a process.
fn process_fault(
    found: &mut Violations,
    field: &str,
    fault: &node::ProcessFault,
    is_of_agent: bool,
) {
    let at = |name: &str| format!("{field}.{name}");
    let is_possible = match &fault.action {
        None => {
            found.add(field, "has no action");
            return;
        }
        Some(process_fault::Action::Kill(kill)) => {
            found.require(kill.signal <= 31, &at("kill.signal"), || {
                format!("must be at most 31, not {}", kill.signal)
            });
            true
        }
        Some(process_fault::Action::Freeze(freeze)) => {
            at_most_ms(
                found,
                &at("freeze.duration_ms"),
                freeze.duration_ms,
                MAX_PROCESS_MS,
            );
            // Nobody would let it go on.
            !is_of_agent
        }
        Some(process_fault::Action::OutOfMemory(_)) => !is_of_agent,
        Some(process_fault::Action::FdExhaustion(fault)) => {
            let field = at("fd_exhaustion.duration_ms");
            at_most_ms(found, &field, fault.duration_ms, MAX_PROCESS_MS);
            !is_of_agent
        }
        Some(process_fault::Action::SlowStart(fault)) => {
            at_most_ms(
                found,
                &at("slow_start.delay_ms"),
                fault.delay_ms,
                MAX_PROCESS_MS,
            );
            !is_of_agent
        }
        Some(process_fault::Action::VersionSkew(fault)) => {
            absolute(found, &at("version_skew.binary"), &fault.binary);
            !is_of_agent
        }
    };
    found.require(is_possible, field, || {
        "cannot be done to the agent by itself; only kill can".into()
    });
}

fn host_fault(found: &mut Violations, field: &str, fault: &node::HostFault) {
    let mut loss = |name: &str, duration_ms: u64| {
        let field = format!("{field}.{name}.duration_ms");
        found.require((1..=MAX_LOSS_MS).contains(&duration_ms), &field, || {
            format!("must be 1 to {MAX_LOSS_MS}, not {duration_ms}")
        });
    };
    match &fault.action {
        None => found.add(field, "has no action"),
        Some(host_fault::Action::ControllerPartition(fault)) => {
            loss("controller_partition", fault.duration_ms);
        }
        Some(host_fault::Action::StoreLoss(fault)) => loss("store_loss", fault.duration_ms),
        Some(host_fault::Action::ClockStep(fault)) => {
            let step_ms = fault.offset_ms.unsigned_abs();
            let at = format!("{field}.clock_step.offset_ms");
            found.require((1..=MAX_CLOCK_STEP_MS).contains(&step_ms), &at, || {
                format!("must be 1 to {MAX_CLOCK_STEP_MS} forwards or backwards")
            });
            let at = format!("{field}.clock_step.duration_ms");
            at_most_ms(found, &at, fault.duration_ms, MAX_LOSS_MS);
        }
    }
}

fn at_most_ms(found: &mut Violations, field: &str, value_ms: u64, max_ms: u64) {
    found.require(value_ms <= max_ms, field, || {
        format!("must be at most {max_ms} ms, not {value_ms}")
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{LateKickFault, LostKickFault, UsedStallFault};

    fn complaint(target: node::FaultTarget, fault: fault::Fault) -> String {
        let request = node::ArmFaultsRequest {
            experiment_id: "run-1".to_owned(),
            faults: vec![node::Fault {
                id: "kill.1".to_owned(),
                target: Some(target),
                fault: Some(fault),
            }],
            ttl_ms: 1000,
            seed: 0,
        };
        match node_arm_faults_request(&request) {
            Ok(()) => String::new(),
            Err(status) => status.message().to_owned(),
        }
    }

    fn process(action: process_fault::Action) -> fault::Fault {
        fault::Fault::Process(node::ProcessFault {
            action: Some(action),
        })
    }

    #[test]
    fn agent_can_only_be_killed() {
        let agent = || node::FaultTarget {
            process: node::FaultProcess::Agent.into(),
            ..node::FaultTarget::default()
        };
        let kill = process(process_fault::Action::Kill(node::KillFault::default()));
        assert_eq!(complaint(agent(), kill), "");
        let freeze = || process(process_fault::Action::Freeze(node::FreezeFault::default()));
        assert!(complaint(agent(), freeze()).contains("cannot be done to the agent"));
        assert_eq!(complaint(node::FaultTarget::default(), freeze()), "");
    }

    #[test]
    fn each_process_knows_its_rules() {
        let of = |process: node::FaultProcess| node::FaultTarget {
            process: process.into(),
            ..node::FaultTarget::default()
        };
        let rule = |action| {
            fault::Fault::Rule(FaultRule {
                action: Some(action),
                ..FaultRule::default()
            })
        };
        let late = || rule(fault_rule::Action::LateKick(LateKickFault { delay_ms: 1 }));
        let lost = || rule(fault_rule::Action::LostKick(LostKickFault {}));
        let stall = || {
            rule(fault_rule::Action::UsedStall(UsedStallFault {
                duration_ms: 1,
            }))
        };
        let (vmm, daemon) = (node::FaultProcess::Vmm, node::FaultProcess::Daemon);
        assert_eq!(complaint(of(vmm), late()), "");
        assert_eq!(complaint(of(vmm), lost()), "");
        assert!(complaint(of(vmm), stall()).contains("is for daemons"));
        assert_eq!(complaint(of(daemon), lost()), "");
        assert!(complaint(of(daemon), late()).contains("is for vmm-core"));
        let agent = node::FaultProcess::Agent;
        assert!(complaint(of(agent), lost()).contains("the agent knows no rules"));
    }

    #[test]
    fn losses_have_an_end() {
        let loss = fault::Fault::Host(node::HostFault {
            action: Some(host_fault::Action::StoreLoss(node::StoreLossFault {
                duration_ms: 0,
            })),
        });
        let complaint = complaint(node::FaultTarget::default(), loss);
        assert!(complaint.starts_with("faults[0].host.store_loss.duration_ms: must be 1 to"));
    }
}
