//! The service `Nics`: what is asked of a VM's NICs goes on to the daemon that serves them.

use std::pin::Pin;

use api::{
    device::{CaptureChunk, ListFlowsResponse},
    node::{
        CaptureNicRequest, GetNicsRequest, GetNicsResponse, ListNicFlowsRequest, NicStatus,
        VmPhase, nics_server::Nics,
    },
    validate,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::Service;
use crate::{
    spec::{Nic, Spec},
    vm::{self, DaemonError, error_chain},
};

#[tonic::async_trait]
impl Nics for Service {
    async fn get_nics(
        &self,
        request: Request<GetNicsRequest>,
    ) -> Result<Response<GetNicsResponse>, Status> {
        let id = request.into_inner().vm_id;
        validate::node_id(&id)?;
        let vm = self.agent.find(&id).await?;
        let spec = vm.spec();
        let runs = matches!(vm.status().phase(), VmPhase::Running | VmPhase::Paused);
        let mut nics = Vec::new();
        for nic in &spec.nics {
            let passt = nic.user.is_some();
            nics.push(NicStatus {
                name: nic.name.clone(),
                mac: vm::mac(&spec, nic),
                daemon: if passt { "passt" } else { "device-net" }.to_owned(),
                nic: match runs && !passt {
                    true => self.agent.env.nics(&id, nic).nic(&nic.name).await.ok(),
                    false => None,
                },
            });
        }
        Ok(Response::new(GetNicsResponse { nics }))
    }

    async fn list_flows(
        &self,
        request: Request<ListNicFlowsRequest>,
    ) -> Result<Response<ListFlowsResponse>, Status> {
        let request = request.into_inner();
        validate::node_nic_flows_request(&request)?;
        let flows = request.flows.unwrap_or_default();
        let nics = self.served(&request.vm_id, &flows.id).await?;
        let listed = nics.flows(flows).await.map_err(status)?;
        Ok(Response::new(listed))
    }

    type CaptureStream = Pin<Box<dyn Stream<Item = Result<CaptureChunk, Status>> + Send>>;

    async fn capture(
        &self,
        request: Request<CaptureNicRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let request = request.into_inner();
        validate::node_capture_nic_request(&request)?;
        let capture = request.capture.unwrap_or_default();
        let nics = self.served(&request.vm_id, &capture.id).await?;
        let nic = capture.id.clone();
        let chunks = nics.capture(capture).await.map_err(status)?;
        // What the transport says of a process that ended is no help.
        Ok(Response::new(Box::pin(chunks.map(move |chunk| {
            chunk.map_err(|_| {
                Status::unavailable(format!(
                    "the device-net that serves NIC {nic} ended; capture again"
                ))
            })
        }))))
    }
}

impl Service {
    /// The daemon that serves a NIC of a running VM.
    async fn served(&self, vm: &str, nic: &str) -> Result<vm::nics::Nics, Status> {
        let found = self.agent.find(vm).await?;
        let spec = found.spec();
        let nic = check(&spec, nic)?;
        if !matches!(
            found.status().phase(),
            VmPhase::Running | VmPhase::Paused | VmPhase::Stopping
        ) {
            let text = format!("VM {vm} does not run, so nothing passes its NICs; start it first");
            return Err(Status::failed_precondition(text));
        }
        Ok(self.agent.env.nics(vm, nic))
    }
}

fn check<'a>(spec: &'a Spec, nic: &str) -> Result<&'a Nic, Status> {
    match spec.nics.iter().find(|found| found.name == nic) {
        None => Err(Status::not_found(format!(
            "VM {} has no NIC {nic:?}",
            spec.id
        ))),
        Some(found) if found.user.is_some() => Err(Status::failed_precondition(format!(
            "NIC {nic} is served by passt, which shows no frames and no flows; look at the host's sockets instead (ss -tupn)"
        ))),
        Some(found) => Ok(found),
    }
}

fn status(error: DaemonError) -> Status {
    Status::new(error.code(), error_chain(&error))
}
