//! How hosts are told something: what stands between those who decide and the connections. A simulation
//! puts hosts of its own behind it.

use api::node::{RenewLeaseRequest, RenewLeaseResponse};
use tonic::Status;

use crate::hosts::Hosts;
use crate::plan::Call;

/// Hosts by their ids.
#[tonic::async_trait]
pub trait Reach: Send + Sync + 'static {
    /// Tells a host something, and has its state looked at afterwards.
    async fn tell(&self, host: &str, call: Call) -> Result<(), Status>;
    /// Renews its lease, or asks for a ticket.
    async fn renew_lease(
        &self,
        host: &str,
        request: RenewLeaseRequest,
    ) -> Result<RenewLeaseResponse, Status>;
}

#[tonic::async_trait]
impl Reach for Hosts {
    async fn tell(&self, host: &str, call: Call) -> Result<(), Status> {
        let node = self.reach(host)?;
        match call {
            Call::ApplyVm(spec) => node.apply_vm(*spec).await,
            Call::DeleteVm(id) => node.delete_vm(id).await,
            Call::EvictVm(id) => node.evict_vm(id).await,
            Call::CreateVolume(request) => node.create_volume(*request).await,
            Call::DeleteVolume(id) => node.delete_volume(id).await,
            Call::ApplyNetwork(spec) => node.apply_network(*spec).await,
            Call::DeleteNetwork(id) => node.delete_network(id).await,
            Call::StartJob(request) => node.start_job(*request).await,
            Call::CompleteJob(id) => node.complete_job(id).await,
            Call::CancelJob(id) => node.cancel_job(id).await,
            Call::ForgetJob(id) => node.forget_job(id).await,
        }
    }

    async fn renew_lease(
        &self,
        host: &str,
        request: RenewLeaseRequest,
    ) -> Result<RenewLeaseResponse, Status> {
        self.reach(host)?.renew_lease(request).await
    }
}
