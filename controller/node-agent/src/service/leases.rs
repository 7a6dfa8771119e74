//! The service `Leases`.

use api::node::leases_server::Leases;
use api::node::{RenewLeaseRequest, RenewLeaseResponse};
use api::validate;
use tonic::{Request, Response, Status};

use super::Service;

#[tonic::async_trait]
impl Leases for Service {
    async fn renew_lease(
        &self,
        request: Request<RenewLeaseRequest>,
    ) -> Result<Response<RenewLeaseResponse>, Status> {
        let request = request.into_inner();
        validate::renew_lease_request(&request)?;
        Ok(Response::new(self.agent.env.leases.renew(&request)))
    }
}
