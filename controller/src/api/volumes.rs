//! The `Volumes` service.

use api::controller::volumes_server::Volumes;
use api::controller::*;
use api::names::{Name, Parent};
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, caller, command_status, reach, store_status};
use crate::commands::{self, RequestKey};
use crate::model::{self, VolumeRecord, prefix};
use crate::reconciler::decode;

#[tonic::async_trait]
impl Volumes for Api {
    async fn get_volume(
        &self,
        request: Request<GetVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let name = validate::volume_request(&request.into_inner().name, "")?;
        let stored = commands::get_volume(&self.store, &name)
            .await
            .map_err(command_status)?;
        Ok(Response::new(commands::visible_volume(
            &stored.record,
            &self.fleet(),
        )))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let prefix = match validate::list_parent(&request.parent)? {
            Parent::All => prefix::VOLUMES.to_owned(),
            Parent::Project(project) => format!("{}{project}/", prefix::VOLUMES),
        };
        let fleet = self.fleet();
        let page = self
            .list("Volume", (&prefix, false), &request, |item| {
                let record: VolumeRecord = decode(&item.key, &item.value).map_err(store_status)?;
                Ok(Some(commands::visible_volume(&record, &fleet)))
            })
            .await?;
        Ok(Response::new(ListVolumesResponse {
            volumes: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let mut request = request.into_inner();
        validate::create_volume_request(&request)?;
        let parent = validate::list_parent(&request.parent)?.project();
        let project = parent.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let name = Name::volume(&project, &request.volume_id);
        // Before the request is stored as what its id stands for.
        let volume_key = std::mem::take(&mut request.key);
        let key = RequestKey::new(&project, &request.request_id, "CreateVolume", &request);
        let spec = request
            .volume
            .and_then(|volume| volume.spec)
            .unwrap_or_default();
        reach::volume(&caller, &spec)?;
        let uid = model::new_uid();
        let host = commands::place_volume(&self.store, &self.hosts, &name, &spec).await;
        let host = host.map_err(command_status)?;
        let is_new = commands::get_volume(&self.store, &name).await.is_err();
        if is_new && !volume_key.is_empty() && !request.validate_only {
            // The host needs it as soon as it hears of the volume.
            let node_id = model::node_id(&name, &uid);
            let node = self.hosts.reach(&host)?;
            node.set_volume_key(node_id, volume_key).await?;
        }
        let operation = commands::create_volume(
            &self.store,
            &name,
            (&uid, &host),
            &spec,
            &key,
            request.validate_only,
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn update_volume(
        &self,
        request: Request<UpdateVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::update_volume_request(&request)?;
        let key = RequestKey::new(&name.project, &request.request_id, "UpdateVolume", &request);
        let volume = request.volume.unwrap_or_default();
        let operation = commands::resize_volume(
            &self.store,
            &name,
            &volume.etag,
            volume.spec.unwrap_or_default().size_bytes,
            &key,
            request.validate_only,
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn check_volume(
        &self,
        request: Request<CheckVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::volume_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(&name.project, &request.request_id, "CheckVolume", &request);
        let operation = commands::check_volume(&self.store, &name, request.repair_leaks, &key);
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn set_volume_key(
        &self,
        request: Request<SetVolumeKeyRequest>,
    ) -> Result<Response<Volume>, Status> {
        let request = request.into_inner();
        let name = validate::set_volume_key_request(&request)?;
        let stored = commands::get_volume(&self.store, &name)
            .await
            .map_err(command_status)?;
        let encrypted = stored
            .record
            .volume
            .spec
            .as_ref()
            .is_some_and(|spec| spec.encrypted);
        if !encrypted {
            return Err(api::errors::invalid_field(
                "name",
                "is not an encrypted volume, which has no key",
            ));
        }
        let node_id = stored.record.node_id.clone();
        let host = self.hosts.reach(&stored.record.host)?;
        host.set_volume_key(node_id, request.key).await?;
        Ok(Response::new(commands::visible_volume(
            &stored.record,
            &self.fleet(),
        )))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::volume_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(&name.project, &request.request_id, "DeleteVolume", &request);
        let operation = commands::delete_volume(&self.store, &name, &request.etag, &key).await;
        operation.map(Response::new).map_err(command_status)
    }
}
