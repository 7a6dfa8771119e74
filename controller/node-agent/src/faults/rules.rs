//! Rules in processes: passed on, listed, ended.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use api::{
    connect,
    device::{
        ArmFaultsRequest, DisarmFaultsRequest, FaultArming, FaultRule, FaultSelector,
        ListFaultsRequest, TornEnd, fault_rule::Action, faults_client::FaultsClient,
    },
};
use tonic::{Code, Status, transport::Channel};

use super::{process, targets::Target};
use crate::{process::Identity, vm::with_deadline};

/// A process that hangs on purpose must not hold up the others for long.
const CALL_DEADLINE: Duration = Duration::from_millis(500);

/// Names rules in processes; no two agents share any that live at the same time for long.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// One rule in one process.
#[derive(Clone, Debug)]
pub(super) struct Passed {
    /// In the process.
    pub(super) id: String,
    pub(super) identity: Identity,
    pub(super) seen: u64,
    pub(super) hits: u64,
}

/// What is passed on.
pub(super) struct Wish<'a> {
    pub(super) rule: &'a FaultRule,
    pub(super) seed: u64,
    /// Since the fault was armed.
    pub(super) elapsed: Duration,
    pub(super) left: Duration,
    /// Hits in processes that are gone.
    pub(super) hits_before: u64,
}

/// Why a rule is not in a process.
#[derive(Debug)]
pub(super) enum NotPassed {
    /// Its time is over, or it has had all its hits.
    Done,
    /// The process cannot do such a thing: another kind of daemon.
    NotItsKind,
    /// Once more later.
    Failed(String),
}

/// Arms the rule in the target's process.
pub(super) async fn pass_on(target: &Target, wish: Wish<'_>) -> Result<Passed, NotPassed> {
    let Some(socket) = &target.socket else {
        return Err(NotPassed::NotItsKind);
    };
    let rule =
        remaining(wish.rule, &target.id, wish.elapsed, wish.hits_before).ok_or(NotPassed::Done)?;
    let failed = |error: &dyn std::fmt::Display| NotPassed::Failed(error.to_string());
    let identity = process::identify(target.pid).map_err(|error| failed(&error))?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let id = format!("agent{}.{number}", std::process::id());
    let request = ArmFaultsRequest {
        id: id.clone(),
        rules: vec![rule],
        ttl_ms: (wish.left.as_millis() as u64).clamp(1, api::validate::MAX_FAULT_TTL_MS),
        seed: wish.seed,
    };
    let mut client = client(socket).await.map_err(|error| failed(&error))?;
    match client
        .arm_faults(with_deadline(request, CALL_DEADLINE))
        .await
    {
        Ok(_) => Ok(Passed {
            id,
            identity,
            seen: 0,
            hits: 0,
        }),
        Err(status) if matches!(status.code(), Code::InvalidArgument | Code::Unimplemented) => {
            Err(NotPassed::NotItsKind)
        }
        Err(status) => Err(failed(&status.message())),
    }
}

/// Gives the rule more time.
pub(super) async fn renew(
    target: &Target,
    passed: &Passed,
    rule: FaultRule,
    seed: u64,
    left: Duration,
) -> Result<(), String> {
    let Some(socket) = &target.socket else {
        return Ok(());
    };
    let request = ArmFaultsRequest {
        id: passed.id.clone(),
        rules: vec![rule],
        ttl_ms: (left.as_millis() as u64).clamp(1, api::validate::MAX_FAULT_TTL_MS),
        seed,
    };
    let mut client = client(socket).await.map_err(|error| error.to_string())?;
    let renewed = client
        .arm_faults(with_deadline(request, CALL_DEADLINE))
        .await;
    renewed
        .map(drop)
        .map_err(|status| status.message().to_owned())
}

/// Everything that is armed in a process, and what ended last.
pub(super) async fn list(socket: &Path) -> Result<Vec<FaultArming>, Status> {
    let mut client = client(socket).await?;
    let request = with_deadline(ListFaultsRequest::default(), CALL_DEADLINE);
    Ok(client.list_faults(request).await?.into_inner().armings)
}

/// Ends a rule; what it had hit.
pub(super) async fn end(socket: &Path, id: &str) -> Result<Vec<FaultArming>, Status> {
    let mut client = client(socket).await?;
    let request = DisarmFaultsRequest { id: id.to_owned() };
    let answer = client
        .disarm_faults(with_deadline(request, CALL_DEADLINE))
        .await?;
    Ok(answer.into_inner().armings)
}

/// Whether a hit ends the process, so that nobody can ask it for the hit.
pub(super) fn is_deadly(rule: &FaultRule) -> bool {
    match &rule.action {
        Some(Action::Crash(_)) => true,
        Some(Action::Torn(torn)) => torn.end() == TornEnd::Crash,
        _ => false,
    }
}

/// The rule as a process that begins now gets it; None when nothing of it is left.
pub(super) fn remaining(
    rule: &FaultRule,
    device: &str,
    elapsed: Duration,
    hits_before: u64,
) -> Option<FaultRule> {
    let mut rule = rule.clone();
    let elapsed_ms = elapsed.as_millis() as u64;
    let late_ms = elapsed_ms.saturating_sub(rule.start_after_ms);
    rule.start_after_ms = rule.start_after_ms.saturating_sub(elapsed_ms);
    if rule.duration_ms > 0 {
        rule.duration_ms = rule
            .duration_ms
            .checked_sub(late_ms)
            .filter(|&left| left > 0)?;
    }
    if let Some(trigger) = &mut rule.trigger
        && trigger.max_hits > 0
    {
        trigger.max_hits = trigger
            .max_hits
            .checked_sub(hits_before)
            .filter(|&left| left > 0)?;
    }
    rule.name = String::new();
    rule.selector = Some(FaultSelector {
        device: device.to_owned(),
        ..rule.selector.unwrap_or_default()
    });
    Some(rule)
}

async fn client(socket: &Path) -> Result<FaultsClient<Channel>, Status> {
    let channel = connect::unix(socket, CALL_DEADLINE).await;
    channel
        .map(FaultsClient::new)
        .map_err(|error| Status::unavailable(error.to_string()))
}

#[cfg(test)]
mod tests {
    use api::device::{CrashFault, FaultTrigger};

    use super::*;

    fn rule() -> FaultRule {
        FaultRule {
            trigger: Some(FaultTrigger {
                max_hits: 3,
                ..FaultTrigger::default()
            }),
            start_after_ms: 100,
            duration_ms: 1000,
            action: Some(Action::Crash(CrashFault {})),
            ..FaultRule::default()
        }
    }

    #[test]
    fn process_that_begins_later_gets_what_is_left() {
        let left =
            |elapsed_ms, hits| remaining(&rule(), "root", Duration::from_millis(elapsed_ms), hits);
        let early = left(40, 0).unwrap();
        assert_eq!((early.start_after_ms, early.duration_ms), (60, 1000));
        let late = left(600, 2).unwrap();
        assert_eq!((late.start_after_ms, late.duration_ms), (0, 500));
        assert_eq!(late.trigger.unwrap().max_hits, 1);
        assert_eq!(late.selector.unwrap().device, "root");
        assert_eq!(left(1100, 0), None, "its time is over");
        assert_eq!(left(600, 3), None, "it has had its hits");
    }

    #[test]
    fn crash_is_deadly() {
        assert!(is_deadly(&rule()));
        assert!(!is_deadly(&FaultRule::default()));
    }
}
