//! The `Faults` service of a process: arms and lists what [`faults`] then decides by.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use faults::{ArmError, Arming, ArmingState, Faults, Hit, Op, RuleStatus, monotonic_ns};
use tonic::{Code, Request, Response, Status};

use crate::device::faults_server::{Faults as FaultsService, FaultsServer};
use crate::device::{
    ArmFaultsRequest, ArmFaultsResponse, DisarmFaultsRequest, DisarmFaultsResponse, FaultArming,
    FaultArmingState, FaultHit, FaultOp, FaultRuleStatus, ListFaultsRequest, ListFaultsResponse,
};
use crate::{errors, validate};

/// Faults are not allowed in this process.
pub const NOT_ALLOWED: &str = "FAULTS_NOT_ALLOWED";

/// The service over `faults`; without them it refuses to arm anything.
pub fn service(faults: Option<Arc<Faults>>) -> FaultsServer<Control> {
    FaultsServer::new(Control(faults))
}

/// The service. What it asks for takes no longer than a lock.
#[derive(Debug)]
pub struct Control(Option<Arc<Faults>>);

#[tonic::async_trait]
impl FaultsService for Control {
    async fn arm_faults(
        &self,
        request: Request<ArmFaultsRequest>,
    ) -> Result<Response<ArmFaultsResponse>, Status> {
        let request = request.into_inner();
        let rules = validate::arm_faults_request(&request)?;
        let Some(faults) = &self.0 else {
            return Err(errors::status(
                Code::FailedPrecondition,
                NOT_ALLOWED,
                "this process does nothing wrong on purpose; start it with --allow-faults",
                &[],
            ));
        };
        let ttl = Duration::from_millis(request.ttl_ms);
        let arming = faults
            .arm(&request.id, rules, ttl, request.seed)
            .map_err(refusal)?;
        tracing::warn!(
            id = request.id,
            rules = request.rules.len(),
            ttl_ms = request.ttl_ms,
            seed = request.seed,
            "faults are armed"
        );
        let arming = Some(describe(arming));
        Ok(Response::new(ArmFaultsResponse { arming }))
    }

    async fn disarm_faults(
        &self,
        request: Request<DisarmFaultsRequest>,
    ) -> Result<Response<DisarmFaultsResponse>, Status> {
        let id = request.into_inner().id;
        let faults = self.0.iter();
        let ended = faults.flat_map(|faults| faults.disarm(wanted(&id)));
        let armings = ended.map(describe).collect();
        tracing::info!(id, "faults are disarmed");
        Ok(Response::new(DisarmFaultsResponse { armings }))
    }

    async fn list_faults(
        &self,
        request: Request<ListFaultsRequest>,
    ) -> Result<Response<ListFaultsResponse>, Status> {
        let id = request.into_inner().id;
        let listed = self.0.iter().flat_map(|faults| faults.list());
        Ok(Response::new(ListFaultsResponse {
            allowed: self.0.is_some(),
            armings: listed
                .filter(|arming| wanted(&id).is_none_or(|id| id == arming.id))
                .map(describe)
                .collect(),
        }))
    }
}

fn wanted(id: &str) -> Option<&str> {
    (!id.is_empty()).then_some(id)
}

fn refusal(error: ArmError) -> Status {
    match &error {
        ArmError::IdTaken { .. } => Status::already_exists(error.to_string()),
        ArmError::NotHere { .. } => errors::invalid_field("rules", error.to_string()),
        ArmError::TooMany => Status::resource_exhausted(error.to_string()),
    }
}

fn describe(arming: Arming) -> FaultArming {
    let state = match arming.state {
        ArmingState::Armed => FaultArmingState::Armed,
        ArmingState::Expired => FaultArmingState::Expired,
        ArmingState::Disarmed => FaultArmingState::Disarmed,
    };
    // Clocks cannot be read together; hits of one answer are at least consistent with one another.
    let clocks = (SystemTime::now(), monotonic_ns());
    FaultArming {
        id: arming.id,
        state: state.into(),
        seed: arming.seed,
        remaining_ms: arming.remaining.as_millis() as u64,
        rules: arming
            .rules
            .into_iter()
            .map(|rule| describe_rule(rule, clocks))
            .collect(),
    }
}

fn describe_rule(rule: RuleStatus, clocks: (SystemTime, u64)) -> FaultRuleStatus {
    FaultRuleStatus {
        name: rule.name,
        seen: rule.seen,
        hits: rule.hits,
        last_hits: rule
            .last_hits
            .into_iter()
            .map(|hit| describe_hit(hit, clocks))
            .collect(),
    }
}

fn describe_hit(hit: Hit, (now, now_ns): (SystemTime, u64)) -> FaultHit {
    let age = Duration::from_nanos(now_ns.saturating_sub(hit.at_ns));
    FaultHit {
        number: hit.number,
        time: now.checked_sub(age).map(Into::into),
        monotonic_ns: hit.at_ns,
        device: hit.device,
        queue: hit.queue.map_or(0, u32::from),
        op: hit.op.map_or(FaultOp::Unspecified, describe_op).into(),
        sector: hit.sector.unwrap_or_default(),
        message: hit.message.unwrap_or_default(),
    }
}

fn describe_op(op: Op) -> FaultOp {
    match op {
        Op::Read => FaultOp::Read,
        Op::Write => FaultOp::Write,
        Op::Flush => FaultOp::Flush,
        Op::Discard => FaultOp::Discard,
        Op::WriteZeroes => FaultOp::WriteZeroes,
        Op::Receive => FaultOp::Receive,
        Op::Transmit => FaultOp::Transmit,
    }
}

#[cfg(test)]
mod tests {
    use faults::{Event, Kind, Point};

    use super::*;
    use crate::device::{DropFault, FaultRule, fault_rule};

    fn request(action: fault_rule::Action) -> Request<ArmFaultsRequest> {
        Request::new(ArmFaultsRequest {
            id: "a".to_owned(),
            rules: vec![FaultRule {
                action: Some(action),
                ..FaultRule::default()
            }],
            ttl_ms: 60_000,
            seed: 1,
        })
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn process_that_does_not_allow_faults_refuses_and_says_so() {
        let control = Control(None);
        let refused = run(control.arm_faults(request(fault_rule::Action::Drop(DropFault {}))));
        let status = refused.unwrap_err();
        assert_eq!(errors::reason(&status).as_deref(), Some(NOT_ALLOWED));
        let listed = run(control.list_faults(Request::new(ListFaultsRequest::default()))).unwrap();
        assert!(!listed.into_inner().allowed);
    }

    #[test]
    fn hits_are_told_with_their_times() {
        let faults = Faults::start(Kind::Block).unwrap();
        let device = faults.device("root");
        let control = Control(Some(faults));
        run(control.arm_faults(request(fault_rule::Action::Drop(DropFault {})))).unwrap();
        let before = SystemTime::now();
        let event = Event {
            op: Some(Op::Flush),
            ..Event::of_queue(Point::Request, 3)
        };
        assert_eq!(device.strike(&event).len(), 1);
        let listed = run(control.list_faults(Request::new(ListFaultsRequest::default()))).unwrap();
        let arming = &listed.into_inner().armings[0];
        assert_eq!(arming.state(), FaultArmingState::Armed);
        let rule = &arming.rules[0];
        assert_eq!((rule.seen, rule.hits), (1, 1));
        let hit = &rule.last_hits[0];
        assert_eq!((hit.queue, hit.op()), (3, FaultOp::Flush));
        let time = SystemTime::try_from(hit.time.unwrap()).unwrap();
        let slack = Duration::from_secs(5);
        assert!(time >= before - slack && time <= SystemTime::now() + slack);
        let ended =
            run(control.disarm_faults(Request::new(DisarmFaultsRequest::default()))).unwrap();
        assert_eq!(
            ended.into_inner().armings[0].state(),
            FaultArmingState::Disarmed
        );
        assert!(!device.is_any_armed());
    }

    #[test]
    fn action_of_another_kind_of_process_is_an_argument_error() {
        let control = Control(Some(Faults::start(Kind::Net).unwrap()));
        let error = fault_rule::Action::Error(crate::device::ErrorFault::default());
        let status = run(control.arm_faults(request(error))).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
}
