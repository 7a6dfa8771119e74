//! The `Networks` service.

use api::controller::networks_server::Networks;
use api::controller::*;
use api::errors::Violations;
use api::names::{Name, Parent};
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, caller, command_status, reach, store_status};
use crate::commands::{self, RequestKey};
use crate::model::{NetworkRecord, prefix};
use crate::plan::Layout;
use crate::reconciler::{self, decode};

#[tonic::async_trait]
impl Networks for Api {
    async fn get_network(
        &self,
        request: Request<GetNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let name = validate::network_request(&request.into_inner().name, "")?;
        let stored = commands::get_network(&self.store, &name)
            .await
            .map_err(command_status)?;
        self.network_now(stored.record).await.map(Response::new)
    }

    async fn list_networks(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        let request = request.into_inner();
        let prefix = match validate::list_parent(&request.parent)? {
            Parent::All => prefix::NETWORKS.to_owned(),
            Parent::Project(project) => format!("{}{project}/", prefix::NETWORKS),
        };
        let desired = reconciler::load(&self.store).await.map_err(store_status)?;
        let wanted = (&desired, &Layout::of(&desired));
        let fleet = self.fleet();
        let page = self
            .list("Network", (&prefix, false), &request, |item| {
                let record: NetworkRecord = decode(&item.key, &item.value).map_err(store_status)?;
                let network = commands::visible_network(&record, wanted, &fleet);
                Ok(Some(network))
            })
            .await?;
        Ok(Response::new(ListNetworksResponse {
            networks: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        validate::create_network_request(&request)?;
        let parent = validate::list_parent(&request.parent)?.project();
        let project = parent.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let name = Name::network(&project, &request.network_id);
        let key = RequestKey::new(&project, &request.request_id, "CreateNetwork", &request);
        let network = request.network.unwrap_or_default();
        let spec = network.spec.unwrap_or_default();
        reach::network(&caller, &spec)?;
        let operation =
            commands::create_network(&self.store, &name, &spec, &key, request.validate_only);
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn update_network(
        &self,
        request: Request<UpdateNetworkRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::update_network_request(&request)?;
        let key = RequestKey::new(
            &name.project,
            &request.request_id,
            "UpdateNetwork",
            &request,
        );
        let paths = request.update_mask.unwrap_or_default().paths;
        let network = request.network.unwrap_or_default();
        let given = network.spec.unwrap_or_default();
        let stored = commands::get_network(&self.store, &name)
            .await
            .map_err(command_status)?;
        let mut spec = stored.record.network.spec.unwrap_or_default();
        let has_overlay = spec.overlay.is_some();
        let wants_peers = paths.iter().any(|path| path == "spec.overlay.peers");
        change(&mut spec, &given, &paths);
        let mut found = Violations::new();
        found.require(has_overlay || !wants_peers, "network.spec.overlay", || {
            "is missing: the network was made without one".into()
        });
        validate::network_spec(&mut found, "network.spec", &spec);
        found.into_result()?;
        let operation = commands::update_network(
            &self.store,
            &name,
            &network.etag,
            &key,
            request.validate_only,
            |spec| change(spec, &given, &paths),
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::network_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(
            &name.project,
            &request.request_id,
            "DeleteNetwork",
            &request,
        );
        let operation = commands::delete_network(&self.store, &name, &request.etag, &key).await;
        operation.map(Response::new).map_err(command_status)
    }
}

/// Takes over the fields of the mask.
fn change(spec: &mut NetworkSpec, given: &NetworkSpec, paths: &[String]) {
    for path in paths {
        match path.as_str() {
            "spec.dhcp" => spec.dhcp = Some(given.dhcp()),
            "spec.dns" => spec.dns = Some(given.dns()),
            "spec.dns_servers" => spec.dns_servers.clone_from(&given.dns_servers),
            "spec.mtu" => spec.mtu = given.mtu,
            "spec.overlay.peers" => {
                if let Some(overlay) = &mut spec.overlay {
                    overlay.peers = given.overlay.clone().unwrap_or_default().peers;
                }
            }
            _ => {}
        }
    }
}

impl Api {
    /// What users see of a network.
    pub(super) async fn network_now(&self, record: NetworkRecord) -> Result<Network, Status> {
        let desired = reconciler::load(&self.store).await.map_err(store_status)?;
        let wanted = (&desired, &Layout::of(&desired));
        Ok(commands::visible_network(&record, wanted, &self.fleet()))
    }
}
