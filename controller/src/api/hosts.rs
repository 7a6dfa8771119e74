//! The `Hosts` service.

use api::controller::hosts_server::Hosts;
use api::controller::*;
use api::names::DEFAULT_PROJECT;
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, command_status, store_status};
use crate::commands::{self, RequestKey};
use crate::model::{self, HostRecord};
use crate::reconciler::decode;

#[tonic::async_trait]
impl Hosts for Api {
    async fn get_host(&self, request: Request<GetHostRequest>) -> Result<Response<Host>, Status> {
        let name = request.into_inner().name;
        validate::flat_name(&name, "hosts")?;
        let stored = commands::get_host(&self.store, &name).await;
        let record = stored.map_err(command_status)?.record;
        Ok(Response::new(self.visible_host(&record)))
    }

    async fn list_hosts(
        &self,
        request: Request<ListHostsRequest>,
    ) -> Result<Response<ListHostsResponse>, Status> {
        let request = request.into_inner();
        let page = self
            .list("Host", (model::HOSTS, false), &request, |item| {
                let record: HostRecord = decode(&item.key, &item.value).map_err(store_status)?;
                Ok(Some(self.visible_host(&record)))
            })
            .await?;
        Ok(Response::new(ListHostsResponse {
            hosts: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn delete_host(
        &self,
        request: Request<DeleteHostRequest>,
    ) -> Result<Response<DeleteHostResponse>, Status> {
        let request = request.into_inner();
        validate::flat_name(&request.name, "hosts")?;
        let id = model::host_id(&request.name);
        let answers = self.hosts.observed(id).connected;
        let deleted =
            commands::delete_host(&self.store, id, &request.etag, request.force, answers).await;
        deleted.map_err(command_status)?;
        Ok(Response::new(DeleteHostResponse {}))
    }

    async fn update_host(
        &self,
        request: Request<UpdateHostRequest>,
    ) -> Result<Response<Host>, Status> {
        let request = request.into_inner();
        let id = validate::update_host_request(&request)?;
        let given = request.host.unwrap_or_default();
        let wanted = given.spec.unwrap_or_default();
        let paths = request.update_mask.unwrap_or_default().paths;
        let changed = commands::update_host(&self.store, &id, &given.etag, |spec| {
            for path in &paths {
                match path.as_str() {
                    "spec.labels" => spec.labels.clone_from(&wanted.labels),
                    "spec.zone" => spec.zone.clone_from(&wanted.zone),
                    "spec.taints" => spec.taints.clone_from(&wanted.taints),
                    "spec.cpu_overcommit" => spec.cpu_overcommit = wanted.cpu_overcommit,
                    "spec.memory_overcommit" => spec.memory_overcommit = wanted.memory_overcommit,
                    _ => {}
                }
            }
        });
        let record = changed.await.map_err(command_status)?;
        Ok(Response::new(self.visible_host(&record)))
    }

    async fn cordon_host(
        &self,
        request: Request<CordonHostRequest>,
    ) -> Result<Response<Host>, Status> {
        self.cordon(&request.into_inner().name, true).await
    }

    async fn uncordon_host(
        &self,
        request: Request<UncordonHostRequest>,
    ) -> Result<Response<Host>, Status> {
        self.cordon(&request.into_inner().name, false).await
    }

    async fn drain_host(
        &self,
        request: Request<DrainHostRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        validate::flat_name(&request.name, "hosts")?;
        let key = RequestKey::new(DEFAULT_PROJECT, &request.request_id, "DrainHost", &request);
        let id = model::host_id(&request.name);
        let operation = commands::drain_host(&self.store, id, &key).await;
        operation.map(Response::new).map_err(command_status)
    }
}

impl Api {
    async fn cordon(&self, name: &str, cordoned: bool) -> Result<Response<Host>, Status> {
        validate::flat_name(name, "hosts")?;
        let id = model::host_id(name);
        let changed = commands::cordon_host(&self.store, id, cordoned).await;
        let record = changed.map_err(command_status)?;
        Ok(Response::new(self.visible_host(&record)))
    }

    fn visible_host(&self, record: &HostRecord) -> Host {
        let observed = self.hosts.observed(record.id());
        model::host(record, &self.hosts.reserved(record.id()), &observed)
    }
}
