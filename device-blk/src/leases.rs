//! The service `Leases`: until when disks may do I/O.

use std::sync::Arc;

use api::daemon::{DeviceTable, blocking};
use api::device::leases_server::Leases;
use api::device::{AllowIoRequest, AllowIoResponse};
use api::validate;
use tonic::{Request, Response, Status};

use crate::disk::Disk;

/// See the module's description.
pub(crate) struct LeaseService(pub(crate) Arc<DeviceTable>);

#[tonic::async_trait]
impl Leases for LeaseService {
    async fn allow_io(
        &self,
        request: Request<AllowIoRequest>,
    ) -> Result<Response<AllowIoResponse>, Status> {
        let request = request.into_inner();
        validate::allow_io_request(&request)?;
        blocking(&self.0, move |table| {
            let disks = if request.ids.is_empty() {
                let mut leased = table.all_attached::<Disk>();
                leased.retain(|(_, disk)| disk.config.leased);
                leased
            } else {
                let find = |id: &String| Ok((id.clone(), table.attached::<Disk>(id)?));
                request
                    .ids
                    .iter()
                    .map(find)
                    .collect::<Result<Vec<_>, Status>>()?
            };
            for (id, disk) in &disks {
                disk.allow_io(id, request.until_boottime_ns)?;
            }
            Ok(AllowIoResponse {
                devices: disks.len() as u32,
            })
        })
        .await
    }
}
