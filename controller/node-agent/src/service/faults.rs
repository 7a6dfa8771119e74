//! The faults' handlers.

use std::time::Duration;

use api::node::faults_server::Faults;
use api::node::{
    ArmFaultsRequest, ArmFaultsResponse, DisarmFaultsRequest, DisarmFaultsResponse, FaultEvent,
    FaultSwitch, GetFaultSwitchRequest, ListFaultsRequest, ListFaultsResponse,
    SetFaultSwitchRequest, WatchFaultsRequest,
};
use api::{errors, validate};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Service, WATCH_QUEUE};
use crate::faults::{self, FaultError};

#[tonic::async_trait]
impl Faults for Service {
    async fn arm_faults(
        &self,
        request: Request<ArmFaultsRequest>,
    ) -> Result<Response<ArmFaultsResponse>, Status> {
        let request = request.into_inner();
        validate::node_arm_faults_request(&request)?;
        let ttl = Duration::from_millis(request.ttl_ms);
        let (experiment, seed) = (&request.experiment_id, request.seed);
        let armed = self
            .agent
            .env
            .faults
            .arm(&self.agent, experiment, request.faults, ttl, seed);
        let faults = armed.await?;
        Ok(Response::new(ArmFaultsResponse { faults }))
    }

    async fn disarm_faults(
        &self,
        request: Request<DisarmFaultsRequest>,
    ) -> Result<Response<DisarmFaultsResponse>, Status> {
        let request = request.into_inner();
        let experiment = wanted(&request.experiment_id);
        let ended = self
            .agent
            .env
            .faults
            .disarm(&self.agent, experiment, &request.fault_ids);
        let faults = ended.await;
        Ok(Response::new(DisarmFaultsResponse { faults }))
    }

    async fn list_faults(
        &self,
        request: Request<ListFaultsRequest>,
    ) -> Result<Response<ListFaultsResponse>, Status> {
        let request = request.into_inner();
        let faults = self
            .agent
            .env
            .faults
            .list(wanted(&request.experiment_id))
            .await;
        Ok(Response::new(ListFaultsResponse { faults }))
    }

    type WatchFaultsStream = ReceiverStream<Result<FaultEvent, Status>>;

    async fn watch_faults(
        &self,
        request: Request<WatchFaultsRequest>,
    ) -> Result<Response<Self::WatchFaultsStream>, Status> {
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(forward(
            self.agent.env.faults.clone(),
            request.into_inner(),
            sender,
        ));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn set_fault_switch(
        &self,
        request: Request<SetFaultSwitchRequest>,
    ) -> Result<Response<FaultSwitch>, Status> {
        let on = request.into_inner().on;
        let switch = self.agent.env.faults.set_switch(&self.agent, on).await?;
        Ok(Response::new(switch))
    }

    async fn get_fault_switch(
        &self,
        _: Request<GetFaultSwitchRequest>,
    ) -> Result<Response<FaultSwitch>, Status> {
        Ok(Response::new(self.agent.env.faults.switch()))
    }
}

/// Until nobody listens.
async fn forward(
    faults: faults::Faults,
    request: WatchFaultsRequest,
    sender: mpsc::Sender<Result<FaultEvent, Status>>,
) {
    let mut news = faults.news();
    let mut after = request.after;
    loop {
        for event in faults.events_after(after).await {
            after = event.number;
            let is_wanted =
                wanted(&request.experiment_id).is_none_or(|id| id == event.experiment_id);
            if is_wanted && sender.send(Ok(event)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

fn wanted(id: &str) -> Option<&str> {
    (!id.is_empty()).then_some(id)
}

impl From<FaultError> for Status {
    fn from(error: FaultError) -> Self {
        let refuse =
            |reason| errors::status(Code::FailedPrecondition, reason, error.to_string(), &[]);
        match error {
            FaultError::NotAllowed => refuse(api::fault_control::NOT_ALLOWED),
            FaultError::Off => refuse("FAULTS_OFF"),
            FaultError::TooMany | FaultError::TooManyExperiments => {
                Self::resource_exhausted(error.to_string())
            }
        }
    }
}
