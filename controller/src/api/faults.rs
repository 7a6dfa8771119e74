//! The `FaultExperiments` service.

use api::controller::fault_experiments_server::FaultExperiments;
use api::controller::*;
use api::errors::status;
use api::names::{Name, Parent};
use api::validate;
use tonic::{Code, Request, Response, Status};

use super::{Api, store_status};
use crate::faults::FaultError;
use crate::model::prefix;
use crate::reconciler::decode;

#[tonic::async_trait]
impl FaultExperiments for Api {
    async fn create_fault_experiment(
        &self,
        request: Request<CreateFaultExperimentRequest>,
    ) -> Result<Response<FaultExperiment>, Status> {
        let request = request.into_inner();
        validate::create_fault_experiment_request(&request)?;
        let parent = validate::list_parent(&request.parent)?.project();
        let project = parent.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let name = Name::fault_experiment(&project, &request.experiment_id);
        let made = self.experiments.create(&name, request).await;
        made.map(Response::new).map_err(fault_status)
    }

    async fn get_fault_experiment(
        &self,
        request: Request<GetFaultExperimentRequest>,
    ) -> Result<Response<FaultExperiment>, Status> {
        let name = validate::fault_experiment_request(&request.into_inner().name)?;
        let found = self.experiments.get(&name).await;
        found.map(Response::new).map_err(fault_status)
    }

    async fn list_fault_experiments(
        &self,
        request: Request<ListFaultExperimentsRequest>,
    ) -> Result<Response<ListFaultExperimentsResponse>, Status> {
        let request = request.into_inner();
        let prefix = match validate::list_parent(&request.parent)? {
            Parent::All => prefix::FAULT_EXPERIMENTS.to_owned(),
            Parent::Project(project) => format!("{}{project}/", prefix::FAULT_EXPERIMENTS),
        };
        let page = self
            .list("FaultExperiment", (&prefix, false), &request, |item| {
                let stored = decode(&item.key, &item.value).map_err(store_status)?;
                Ok(Some(self.experiments.with_live(stored)))
            })
            .await?;
        Ok(Response::new(ListFaultExperimentsResponse {
            experiments: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn stop_fault_experiment(
        &self,
        request: Request<StopFaultExperimentRequest>,
    ) -> Result<Response<FaultExperiment>, Status> {
        let name = validate::fault_experiment_request(&request.into_inner().name)?;
        let stopped = self.experiments.stop(&name, "somebody stopped it").await;
        stopped.map(Response::new).map_err(fault_status)
    }

    async fn delete_fault_experiment(
        &self,
        request: Request<DeleteFaultExperimentRequest>,
    ) -> Result<Response<DeleteFaultExperimentResponse>, Status> {
        let name = validate::fault_experiment_request(&request.into_inner().name)?;
        self.experiments.delete(&name).await.map_err(fault_status)?;
        Ok(Response::new(DeleteFaultExperimentResponse {}))
    }

    async fn get_fault_report(
        &self,
        request: Request<GetFaultReportRequest>,
    ) -> Result<Response<FaultReport>, Status> {
        let name = validate::fault_experiment_request(&request.into_inner().name)?;
        let report = self.experiments.report(&name).await;
        report.map(Response::new).map_err(fault_status)
    }

    async fn get_fault_switch(
        &self,
        _request: Request<GetFaultSwitchRequest>,
    ) -> Result<Response<FaultSwitch>, Status> {
        let switch = self.experiments.switch_state().await;
        switch.map(Response::new).map_err(fault_status)
    }

    async fn set_fault_switch(
        &self,
        request: Request<SetFaultSwitchRequest>,
    ) -> Result<Response<FaultSwitch>, Status> {
        let switch = self.experiments.set_switch(request.into_inner().on).await;
        switch.map(Response::new).map_err(fault_status)
    }
}

fn fault_status(error: FaultError) -> Status {
    let message = error.to_string();
    let (code, reason) = match &error {
        FaultError::NotFound { .. } => (Code::NotFound, "NOT_FOUND"),
        FaultError::NoSuchVm { .. } => (Code::FailedPrecondition, "VM_NOT_FOUND"),
        FaultError::AlreadyExists { .. } => (Code::AlreadyExists, "ALREADY_EXISTS"),
        FaultError::Running { .. } => (Code::FailedPrecondition, "FAULTS_RUNNING"),
        FaultError::NotAllowed => (Code::PermissionDenied, "FAULTS_NOT_ALLOWED"),
        FaultError::Off => (Code::FailedPrecondition, "FAULTS_OFF"),
        FaultError::Overlap { .. } => (Code::FailedPrecondition, "FAULTS_OVERLAP"),
        FaultError::TooMany => (Code::ResourceExhausted, "TOO_MANY_EXPERIMENTS"),
        FaultError::Store(_) => match error {
            FaultError::Store(source) => return store_status(source),
            _ => unreachable!("it was just matched"),
        },
    };
    status(code, reason, message, &[])
}
