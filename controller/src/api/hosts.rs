//! The `Hosts` service.

use api::controller::hosts_server::Hosts;
use api::controller::*;
use api::errors;
use api::validate;
use tonic::{Code, Request, Response, Status};

use super::Api;

#[tonic::async_trait]
impl Hosts for Api {
    async fn get_host(&self, request: Request<GetHostRequest>) -> Result<Response<Host>, Status> {
        let name = request.into_inner().name;
        validate::flat_name(&name, "hosts")?;
        let host = self.hosts().into_iter().find(|host| host.name == name);
        host.map(Response::new).ok_or_else(|| {
            let message = format!("{name} does not exist");
            errors::status(Code::NotFound, "NOT_FOUND", message, &[("resource", &name)])
        })
    }

    async fn list_hosts(
        &self,
        _request: Request<ListHostsRequest>,
    ) -> Result<Response<ListHostsResponse>, Status> {
        let hosts = self.hosts();
        Ok(Response::new(ListHostsResponse {
            hosts,
            next_page_token: String::new(),
        }))
    }
}

impl Api {
    /// One controller has one host so far.
    fn hosts(&self) -> Vec<Host> {
        let observed = self.observed();
        let Some(host) = &observed.host else {
            return vec![];
        };
        vec![Host {
            name: observed.host_name(),
            hostname: host.hostname.clone(),
            version: host.version.clone(),
            cpus: host.cpus,
            memory_bytes: host.memory_bytes,
            kvm: host.kvm.clone(),
            problem: host.problem.clone(),
            vms_running: host.vms_running,
            underlay_address: host.underlay_address.clone(),
            connected: observed.connected,
            last_seen: observed.last_seen,
        }]
    }
}
