//! The `Vms` service.

use api::controller::vms_server::Vms;
use api::controller::*;
use api::names::{Name, Parent};
use api::validate;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, caller, command_status, console, reach, store_status};
use crate::commands::{self, CommandError, RequestKey, phase_word};
use crate::model::{VmRecord, prefix};
use crate::reconciler::decode;

#[tonic::async_trait]
impl Vms for Api {
    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<Vm>, Status> {
        let name = validate::vm_request(&request.into_inner().name, "")?;
        Ok(Response::new(self.vm(&name).await?))
    }

    async fn list_vms(
        &self,
        request: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        let request = request.into_inner();
        let prefix = match validate::list_parent(&request.parent)? {
            Parent::All => prefix::VMS.to_owned(),
            Parent::Project(project) => format!("{}{project}/", prefix::VMS),
        };
        let fleet = self.fleet();
        let page = self
            .list("Vm", (&prefix, false), &request, |item| {
                let record: VmRecord = decode(&item.key, &item.value).map_err(store_status)?;
                Ok(Some(commands::visible_vm(&record, &fleet)))
            })
            .await?;
        Ok(Response::new(ListVmsResponse {
            vms: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn create_vm(
        &self,
        request: Request<CreateVmRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        validate::create_vm_request(&request)?;
        let parent = validate::list_parent(&request.parent)?.project();
        let project = parent.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let name = Name::vm(&project, &request.vm_id);
        let key = RequestKey::new(&project, &request.request_id, "CreateVm", &request);
        let spec = request.vm.and_then(|vm| vm.spec).unwrap_or_default();
        reach::vm(&caller, &spec)?;
        let operation = commands::create_vm(
            &self.store,
            &self.hosts,
            &name,
            &spec,
            &key,
            request.validate_only,
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::vm_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(&name.project, &request.request_id, "DeleteVm", &request);
        let fleet = self.fleet();
        let operation = commands::delete_vm(
            &self.store,
            &fleet,
            &name,
            &request.etag,
            &key,
            request.force,
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn start_vm(
        &self,
        request: Request<StartVmRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::vm_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(&name.project, &request.request_id, "StartVm", &request);
        let operation = commands::start_vm(&self.store, &name, &request.etag, &key).await;
        operation.map(Response::new).map_err(command_status)
    }

    async fn stop_vm(
        &self,
        request: Request<StopVmRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::vm_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(&name.project, &request.request_id, "StopVm", &request);
        let operation =
            commands::stop_vm(&self.store, &name, &request.etag, &key, request.force).await;
        operation.map(Response::new).map_err(command_status)
    }

    async fn reset_vm(&self, request: Request<ResetVmRequest>) -> Result<Response<Vm>, Status> {
        let name = validate::vm_request(&request.into_inner().name, "")?;
        let stored = commands::get_vm(&self.store, &name)
            .await
            .map_err(command_status)?;
        let vm = self.vm(&name).await?;
        let phase = vm.status.unwrap_or_default().phase();
        if !matches!(phase, VmPhase::Running | VmPhase::Paused) {
            let phase = phase_word(phase);
            return Err(command_status(CommandError::NotRunning {
                vm: name.id,
                phase,
            }));
        }
        let host = self.hosts.reach(&stored.record.host)?;
        host.reset_vm(stored.record.node_id).await?;
        Ok(Response::new(self.vm(&name).await?))
    }

    type ConsoleVmStream = console::Output;

    async fn console_vm(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<console::Output>, Status> {
        console::open(self, request.into_inner())
            .await
            .map(Response::new)
    }
}

impl Api {
    async fn vm(&self, name: &Name) -> Result<Vm, Status> {
        let stored = commands::get_vm(&self.store, name)
            .await
            .map_err(command_status)?;
        Ok(commands::visible_vm(&stored.record, &self.fleet()))
    }
}
