//! The `DeviceUpgrades` service.

use api::controller::device_upgrades_server::DeviceUpgrades;
use api::controller::{Operation, UpgradeDevicesRequest};
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, caller, command_status, reach};
use crate::commands;

#[tonic::async_trait]
impl DeviceUpgrades for Api {
    async fn upgrade_devices(
        &self,
        request: Request<UpgradeDevicesRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        reach::upgrade(&caller, &request)?;
        let target = validate::upgrade_devices_request(&request)?;
        let operation = commands::upgrade_devices(&self.store, &target, &request).await;
        operation.map(Response::new).map_err(command_status)
    }
}
