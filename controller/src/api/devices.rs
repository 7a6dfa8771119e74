//! The `Devices` service.

use api::controller::devices_server::Devices;
use api::controller::*;
use api::errors::invalid_field;
use api::names::Name;
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, command_status};
use crate::commands::{self, RequestKey};
use crate::model;

/// All that hosts keep.
const ALL_OUTAGES: u32 = 256;

#[tonic::async_trait]
impl Devices for Api {
    async fn get_device(
        &self,
        request: Request<GetDeviceRequest>,
    ) -> Result<Response<Device>, Status> {
        let (vm, device) = validate::vm_device_request(&request.into_inner().name)?;
        let stored = commands::get_vm(&self.store, &vm).await;
        let spec = stored.map_err(command_status)?.record.vm.spec;
        commands::check_device(&spec.unwrap_or_default(), &vm, &device).map_err(command_status)?;
        let mut devices = self.devices(&vm, ALL_OUTAGES).await?;
        devices.retain(|found| found.name.ends_with(&format!("/devices/{device}")));
        devices
            .pop()
            .map(Response::new)
            .ok_or_else(|| Status::not_found(format!("device {device} was removed meanwhile")))
    }

    async fn list_devices(
        &self,
        request: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        let request = request.into_inner();
        let vm = Name::parse_vm(&request.parent)
            .map_err(|error| invalid_field("parent", error.to_string()))?;
        let devices = self.devices(&vm, request.max_outages).await?;
        Ok(Response::new(ListDevicesResponse { devices }))
    }

    async fn update_device(
        &self,
        request: Request<UpdateDeviceRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::update_device_request(&request)?;
        let project = &name.0.project;
        let key = RequestKey::new(project, &request.request_id, "UpdateDevice", &request);
        let given = request.device.unwrap_or_default();
        let policy = given.outage_policy.unwrap_or_default();
        let stored = commands::get_vm(&self.store, &name.0).await;
        let spec = stored.map_err(command_status)?.record.vm.spec;
        let is_disk = commands::check_device(&spec.unwrap_or_default(), &name.0, &name.1)
            .map_err(command_status)?;
        validate::outage_policy(&policy, is_disk)?;
        let operation = commands::update_device(
            &self.store,
            &name,
            &given.etag,
            &key,
            request.validate_only,
            policy,
        );
        operation.await.map(Response::new).map_err(command_status)
    }
}

impl Api {
    /// As the host sees them, or, when it does not answer or has none of it, as the spec says.
    async fn devices(&self, vm: &Name, max_outages: u32) -> Result<Vec<Device>, Status> {
        let stored = commands::get_vm(&self.store, vm)
            .await
            .map_err(command_status)?;
        let record = stored.record;
        let seen = match self.hosts.get(&record.host) {
            Some(host) => host.get_devices(record.node_id.clone(), max_outages).await,
            None => Ok(Default::default()),
        };
        let seen = seen.unwrap_or_default();
        let etag = model::etag(&record.vm.uid, record.vm.generation);
        let spec = record.vm.spec.unwrap_or_default();
        Ok(commands::devices(&spec)
            .map(|(name, kind)| {
                let details = seen.devices.iter().find(|details| details.name == name);
                Device {
                    name: format!("{vm}/devices/{name}"),
                    etag: etag.clone(),
                    outage_policy: Some(commands::outage_policy(&spec, name)),
                    ..model::device(details, kind, seen.paused_by_policy)
                }
            })
            .collect())
    }
}
