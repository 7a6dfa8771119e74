//! The `Hosts` service.

use api::controller::hosts_server::Hosts;
use api::controller::*;
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, command_status, store_status};
use crate::commands;
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
}

impl Api {
    fn visible_host(&self, record: &HostRecord) -> Host {
        let observed = self.hosts.observed(record.id());
        model::host(record, &self.hosts.reserved(record.id()), &observed)
    }
}
