//! The `Nics` service.

use std::pin::Pin;

use api::controller::nics_server::Nics;
use api::controller::*;
use api::errors::invalid_field;
use api::names::Name;
use api::{device, node, validate};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{Api, command_status, mask::apply_limit};
use crate::commands::{self, RequestKey};
use crate::model;
use crate::node::Node;

#[tonic::async_trait]
impl Nics for Api {
    async fn get_nic(&self, request: Request<GetNicRequest>) -> Result<Response<VmNic>, Status> {
        let (vm, nic) = validate::vm_nic_request(&request.into_inner().name)?;
        self.nic_on_host(&vm, &nic).await?;
        let mut nics = self.nics(&vm).await?;
        nics.retain(|found| found.name.ends_with(&format!("/nics/{nic}")));
        nics.pop()
            .map(Response::new)
            .ok_or_else(|| Status::not_found(format!("NIC {nic} was removed meanwhile")))
    }

    async fn list_nics(
        &self,
        request: Request<ListNicsRequest>,
    ) -> Result<Response<ListNicsResponse>, Status> {
        let parent = request.into_inner().parent;
        let vm =
            Name::parse_vm(&parent).map_err(|error| invalid_field("parent", error.to_string()))?;
        let nics = self.nics(&vm).await?;
        Ok(Response::new(ListNicsResponse { nics }))
    }

    async fn update_nic(
        &self,
        request: Request<UpdateNicRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::update_nic_request(&request)?;
        let project = &name.0.project;
        let key = RequestKey::new(project, &request.request_id, "UpdateNic", &request);
        let given = request.nic.unwrap_or_default();
        let wanted = given.spec.unwrap_or_default();
        let mask = request.update_mask.unwrap_or_default().paths;
        // What comes out is checked before anything is stored.
        let stored = commands::get_vm(&self.store, &name.0)
            .await
            .map_err(command_status)?;
        let spec = stored.record.vm.spec.unwrap_or_default();
        let found = commands::find_nic(&spec, &name.0, &name.1).map_err(command_status)?;
        let of_networks = ["spec.port_forwards", "spec.security_groups"];
        if found.network.is_empty() && mask.iter().any(|path| of_networks.contains(&path.as_str()))
        {
            let problem = format!(
                "{} change of NICs in networks only",
                of_networks.join(" and ")
            );
            return Err(invalid_field("update_mask", problem));
        }
        let mut changed = found.clone();
        apply_mask(&mut changed, &wanted, &mask);
        validate::updated_nic(&changed)?;
        let operation = commands::update_nic(
            &self.store,
            &name,
            &given.etag,
            &key,
            request.validate_only,
            |nic| apply_mask(nic, &wanted, &mask),
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn list_flows(
        &self,
        request: Request<ListFlowsRequest>,
    ) -> Result<Response<ListFlowsResponse>, Status> {
        let request = request.into_inner();
        let (vm, nic) = validate::vm_nic_flows_request(&request)?;
        let (host, vm_id) = self.nic_on_host(&vm, &nic).await?;
        let flows = device::ListFlowsRequest {
            id: nic,
            filter: request.filter,
            max_flows: request.max_flows,
        };
        let wanted = node::ListNicFlowsRequest {
            vm_id,
            flows: Some(flows),
        };
        let listed = host.list_flows(wanted).await?;
        Ok(Response::new(ListFlowsResponse {
            flows: listed.flows.into_iter().map(model::flow).collect(),
            truncated: listed.truncated,
        }))
    }

    type CaptureNicStream = Pin<Box<dyn Stream<Item = Result<CaptureChunk, Status>> + Send>>;

    async fn capture_nic(
        &self,
        request: Request<CaptureNicRequest>,
    ) -> Result<Response<Self::CaptureNicStream>, Status> {
        let request = request.into_inner();
        let (vm, nic) = validate::capture_nic_request(&request)?;
        let (host, vm_id) = self.nic_on_host(&vm, &nic).await?;
        let wanted = node::CaptureNicRequest {
            vm_id,
            capture: Some(model::capture(nic, &request)),
        };
        // Nothing is kept here: who reads slowly lets frames go by in the daemon, which counts them.
        let chunks = host.capture(wanted).await?;
        Ok(Response::new(Box::pin(chunks.map(|chunk| {
            chunk.map(|chunk| CaptureChunk {
                data: chunk.data,
                packets: chunk.packets,
                missed: chunk.missed,
            })
        }))))
    }
}

impl Api {
    /// The host of a NIC's VM, and the VM's id there.
    async fn nic_on_host(&self, vm: &Name, nic: &str) -> Result<(Node, String), Status> {
        let stored = commands::get_vm(&self.store, vm)
            .await
            .map_err(command_status)?;
        let spec = stored.record.vm.spec.unwrap_or_default();
        commands::find_nic(&spec, vm, nic).map_err(command_status)?;
        let host = self.hosts.reach(&stored.record.host)?;
        Ok((host, stored.record.node_id))
    }

    async fn nics(&self, vm: &Name) -> Result<Vec<VmNic>, Status> {
        let stored = commands::get_vm(&self.store, vm)
            .await
            .map_err(command_status)?;
        let record = stored.record;
        let host = self.hosts.reach(&record.host)?;
        let seen = host.get_nics(record.node_id.clone()).await?;
        let etag = model::etag(&record.vm.uid, record.vm.generation);
        let nics = record.vm.spec.unwrap_or_default().nics;
        Ok(nics
            .into_iter()
            .map(|nic| VmNic {
                name: format!("{vm}/nics/{}", nic.name),
                etag: etag.clone(),
                status: seen
                    .iter()
                    .find(|seen| seen.name == nic.name)
                    .map(model::nic_status),
                spec: Some(nic),
            })
            .collect())
    }
}

/// Copies what the mask names, whose paths were validated.
fn apply_mask(nic: &mut Nic, wanted: &Nic, mask: &[String]) {
    let limits = wanted.limits.unwrap_or_default();
    for path in mask {
        match path.as_str() {
            "spec.link_down" => nic.link_down = wanted.link_down,
            "spec.limits" => nic.limits = wanted.limits,
            "spec.port_forwards" => nic.port_forwards.clone_from(&wanted.port_forwards),
            "spec.security_groups" => nic.security_groups.clone_from(&wanted.security_groups),
            _ => {
                let own = nic.limits.get_or_insert_default();
                let path = path.strip_prefix("spec.limits.").unwrap_or_default();
                let ingress = ("ingress", &mut own.ingress, limits.ingress);
                let egress = ("egress", &mut own.egress, limits.egress);
                apply_limit(path, [ingress, egress], copy_figure);
            }
        }
    }
}

fn copy_figure(own: &mut NicLimit, wanted: &NicLimit, figure: &str) {
    match figure {
        "bits_per_second" => own.bits_per_second = wanted.bits_per_second,
        "packets_per_second" => own.packets_per_second = wanted.packets_per_second,
        "burst_bits" => own.burst_bits = wanted.burst_bits,
        "burst_packets" => own.burst_packets = wanted.burst_packets,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_changes_what_it_names_and_nothing_else() {
        let limit = |bits_per_second, packets_per_second| {
            Some(NicLimit {
                bits_per_second,
                packets_per_second,
                ..Default::default()
            })
        };
        let mut nic = Nic {
            limits: Some(NicLimits {
                ingress: limit(1, 2),
                egress: limit(3, 4),
            }),
            ..Default::default()
        };
        let wanted = Nic {
            link_down: true,
            limits: Some(NicLimits {
                ingress: limit(10, 20),
                egress: None,
            }),
            ..Default::default()
        };
        let mask = ["spec.limits.ingress.bits_per_second", "spec.limits.egress"];
        apply_mask(&mut nic, &wanted, &mask.map(str::to_owned));
        let limits = nic.limits.unwrap();
        assert_eq!((limits.ingress, limits.egress), (limit(10, 2), None));
        assert!(!nic.link_down);
    }
}
