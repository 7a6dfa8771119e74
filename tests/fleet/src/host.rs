//! A host without anything on it: the node agent's services over a table of VMs. It answers as an agent
//! does; what a VM does is said by [`Host::disturb`]. Thousands fit into one process.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use api::node::leases_server::{Leases, LeasesServer};
use api::node::node_agent_server::{NodeAgent, NodeAgentServer};
use api::node::*;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// What each host has room for; enough that none is ever full.
const CPUS: u32 = 256;
const MEMORY_BYTES: u64 = 4 << 40;

/// A simulated host. Cheap to clone; all clones are one host.
#[derive(Clone)]
pub(crate) struct Host {
    id: Arc<str>,
    vms: Arc<Mutex<BTreeMap<String, VmStatus>>>,
    changed: watch::Sender<u64>,
}

/// A host that is served; dropped, it dies without a word.
pub(crate) struct Served {
    pub(crate) host: Host,
    task: JoinHandle<()>,
    socket: PathBuf,
    /// Connections outlive the task that accepted them.
    connections: Connections,
}

type Connections = Arc<Mutex<Vec<OwnedFd>>>;

/// Where a host is reached.
pub(crate) fn socket(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("{number}.sock"))
}

impl Served {
    /// Serves a host on a socket in `dir`.
    pub(crate) fn start(dir: &Path, number: usize) -> Result<Self> {
        let host = Host {
            id: format!("h{number:05}").into(),
            vms: Arc::default(),
            changed: watch::Sender::new(0),
        };
        let socket = socket(dir, number);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let server = Server::builder()
            .add_service(NodeAgentServer::new(host.clone()))
            .add_service(LeasesServer::new(host.clone()));
        let connections = Connections::default();
        let known = connections.clone();
        let incoming = UnixListenerStream::new(listener).map(move |accepted| {
            let stream = accepted?;
            let end = stream.as_fd().try_clone_to_owned()?;
            known.lock().expect("nobody panics with it").push(end);
            Ok::<_, std::io::Error>(stream)
        });
        let task = tokio::spawn(async move {
            let _ = server.serve_with_incoming(incoming).await;
        });
        Ok(Self {
            host,
            task,
            socket,
            connections,
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
        let connections = self.connections.lock().expect("nobody panics with it");
        for connection in connections.iter() {
            let _ = shutdown(connection.as_raw_fd(), Shutdown::Both);
        }
    }
}

impl Host {
    /// `hosts/{host}`
    pub(crate) fn name(&self) -> String {
        format!("hosts/{}", self.id)
    }

    /// VMs that run here.
    pub(crate) fn running(&self) -> usize {
        let vms = self.vms.lock().expect("nobody panics with it");
        let running = vms.values().filter(|vm| vm.phase() == VmPhase::Running);
        running.count()
    }

    /// One VM, picked by `chance`, does something worth telling: its guest resets itself.
    pub(crate) fn disturb(&self, chance: usize) -> bool {
        let mut vms = self.vms.lock().expect("nobody panics with it");
        let count = vms.len().max(1);
        let Some(vm) = vms.values_mut().nth(chance % count) else {
            return false;
        };
        vm.resets += 1;
        drop(vms);
        self.changed.send_modify(|count| *count += 1);
        true
    }
}

fn elsewhere<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("a simulated host has none of this"))
}

#[tonic::async_trait]
impl NodeAgent for Host {
    async fn get_host(&self, _: Request<GetHostRequest>) -> Result<Response<HostStatus>, Status> {
        let vms = self.vms.lock().expect("nobody panics with it").len();
        Ok(Response::new(HostStatus {
            host_id: self.id.to_string(),
            hostname: self.id.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            cpus: CPUS,
            memory_bytes: MEMORY_BYTES,
            kvm: "hardware".into(),
            vms_running: vms as u32,
            pool_bytes: 1 << 44,
            pool_free_bytes: 1 << 44,
            lease_session: "1".into(),
            ..Default::default()
        }))
    }

    async fn apply_vm(
        &self,
        request: Request<ApplyVmRequest>,
    ) -> Result<Response<VmStatus>, Status> {
        let spec = request.into_inner().spec.unwrap_or_default();
        let phase = match spec.power() {
            Power::On => VmPhase::Running,
            _ => VmPhase::Stopped,
        };
        let mut vms = self.vms.lock().expect("nobody panics with it");
        let status = vms.entry(spec.id.clone()).or_insert_with(|| VmStatus {
            id: spec.id,
            ..Default::default()
        });
        status.observed_generation = spec.generation;
        status.phase = phase as i32;
        status.stop_reason = match phase {
            VmPhase::Stopped => "stop-request".into(),
            _ => String::new(),
        };
        let status = status.clone();
        drop(vms);
        self.changed.send_modify(|count| *count += 1);
        Ok(Response::new(status))
    }

    async fn reset_vm(&self, _: Request<ResetVmRequest>) -> Result<Response<VmStatus>, Status> {
        elsewhere()
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let id = request.into_inner().id;
        let mut vms = self.vms.lock().expect("nobody panics with it");
        let known = vms.remove(&id);
        drop(vms);
        self.changed.send_modify(|count| *count += 1);
        match known {
            Some(_) => Ok(Response::new(DeleteVmResponse {})),
            None => Err(Status::not_found("no such VM")),
        }
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<VmStatus>, Status> {
        let vms = self.vms.lock().expect("nobody panics with it");
        let found = vms.get(&request.into_inner().id).cloned();
        found
            .map(Response::new)
            .ok_or_else(|| Status::not_found("no such VM"))
    }

    async fn list_vms(
        &self,
        _: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        let vms = self.vms.lock().expect("nobody panics with it");
        let vms = vms.values().cloned().collect();
        Ok(Response::new(ListVmsResponse { vms }))
    }

    type WatchVmsStream = Pin<Box<dyn Stream<Item = Result<VmStatus, Status>> + Send>>;

    async fn watch_vms(
        &self,
        _: Request<WatchVmsRequest>,
    ) -> Result<Response<Self::WatchVmsStream>, Status> {
        let changes = WatchStream::from_changes(self.changed.subscribe());
        Ok(Response::new(Box::pin(
            changes.map(|_| Ok(VmStatus::default())),
        )))
    }

    async fn list_volumes(
        &self,
        _: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        Ok(Response::new(Default::default()))
    }

    async fn list_networks(
        &self,
        _: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        Ok(Response::new(Default::default()))
    }

    async fn list_jobs(
        &self,
        _: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        Ok(Response::new(Default::default()))
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn console(
        &self,
        _: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        elsewhere()
    }

    async fn create_volume(
        &self,
        _: Request<CreateVolumeRequest>,
    ) -> Result<Response<VolumeStatus>, Status> {
        elsewhere()
    }

    async fn delete_volume(
        &self,
        _: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        elsewhere()
    }

    async fn set_volume_key(
        &self,
        _: Request<SetVolumeKeyRequest>,
    ) -> Result<Response<SetVolumeKeyResponse>, Status> {
        elsewhere()
    }

    async fn apply_network(
        &self,
        _: Request<ApplyNetworkRequest>,
    ) -> Result<Response<NetworkStatus>, Status> {
        elsewhere()
    }

    async fn delete_network(
        &self,
        _: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        elsewhere()
    }

    async fn get_disks(
        &self,
        _: Request<GetDisksRequest>,
    ) -> Result<Response<GetDisksResponse>, Status> {
        elsewhere()
    }

    async fn start_job(&self, _: Request<StartJobRequest>) -> Result<Response<Job>, Status> {
        elsewhere()
    }

    async fn complete_job(&self, _: Request<CompleteJobRequest>) -> Result<Response<Job>, Status> {
        elsewhere()
    }

    async fn cancel_job(&self, _: Request<CancelJobRequest>) -> Result<Response<Job>, Status> {
        elsewhere()
    }

    async fn forget_job(
        &self,
        _: Request<ForgetJobRequest>,
    ) -> Result<Response<ForgetJobResponse>, Status> {
        elsewhere()
    }

    async fn create_upload(
        &self,
        _: Request<CreateUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        elsewhere()
    }

    async fn get_upload(&self, _: Request<GetUploadRequest>) -> Result<Response<Upload>, Status> {
        elsewhere()
    }

    async fn delete_upload(
        &self,
        _: Request<DeleteUploadRequest>,
    ) -> Result<Response<DeleteUploadResponse>, Status> {
        elsewhere()
    }

    type WriteUploadStream = Pin<Box<dyn Stream<Item = Result<UploadProgress, Status>> + Send>>;

    async fn write_upload(
        &self,
        _: Request<Streaming<UploadChunk>>,
    ) -> Result<Response<Self::WriteUploadStream>, Status> {
        elsewhere()
    }
}

#[tonic::async_trait]
impl Leases for Host {
    async fn renew_lease(
        &self,
        request: Request<RenewLeaseRequest>,
    ) -> Result<Response<RenewLeaseResponse>, Status> {
        let request = request.into_inner();
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .map_err(|errno| Status::internal(errno.to_string()))?;
        let ticket = std::time::Duration::from(now).as_nanos() as u64;
        Ok(Response::new(RenewLeaseResponse {
            session: "1".into(),
            ticket_boottime_ns: ticket,
            stage: LeaseStage::Held as i32,
            refusal: String::new(),
            remaining_ms: request.lease_ms.into(),
        }))
    }
}
