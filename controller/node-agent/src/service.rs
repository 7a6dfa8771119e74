//! The gRPC handlers: they translate, and nothing else.

mod agents;
mod devices;
mod disks;
mod faults;
mod leases;
mod nics;
mod uploads;
mod volumes;

use std::sync::Arc;

use api::node::node_agent_server::NodeAgent;
use api::node::*;
use api::{errors::invalid_field, validate};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub(crate) use agents::AgentsService;

use crate::{
    agent::{Agent, CallError},
    console::{self, ConsoleError},
    host,
    import::ImportError,
    jobs::JobError,
    network::NetworkError,
    spec::Spec,
    usage,
    vm::{Vm, error_chain},
    volumes::{Volume, VolumeError},
};

/// Messages under way to one watcher.
const WATCH_QUEUE: usize = 64;

/// Serves an [`Agent`].
#[derive(Clone)]
pub(crate) struct Service {
    agent: Arc<Agent>,
}

impl Service {
    /// Of this agent.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }
}

#[tonic::async_trait]
impl NodeAgent for Service {
    async fn get_host(&self, _: Request<GetHostRequest>) -> Result<Response<HostStatus>, Status> {
        let running = self
            .agent
            .all()
            .await
            .iter()
            .filter(|vm| is_running(&vm.status()))
            .count();
        let host = &self.agent.host;
        let mut status = HostStatus {
            host_id: host.id.clone(),
            hostname: host.hostname.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            cpus: host.cpus,
            memory_bytes: host::memory_bytes(),
            kvm: host::kvm_kind().into(),
            problem: host::check_kvm()
                .err()
                .map(|error| error_chain(&error))
                .unwrap_or_default(),
            vms_running: running as u32,
            underlay_address: host.underlay_address.clone(),
            lease_session: self.agent.env.leases.session(),
            ..Default::default()
        };
        self.agent.inventory.add_to(&mut status);
        Ok(Response::new(status))
    }

    async fn apply_vm(
        &self,
        request: Request<ApplyVmRequest>,
    ) -> Result<Response<VmStatus>, Status> {
        let request = request.into_inner();
        validate::apply_vm_request(&request)?;
        let spec = request.spec.expect("a spec was validated");
        let session = spec.lease_session.clone();
        let spec = Spec::from_validated(&spec);
        Ok(Response::new(self.agent.apply(spec, &session).await?))
    }

    async fn reset_vm(
        &self,
        request: Request<ResetVmRequest>,
    ) -> Result<Response<VmStatus>, Status> {
        Ok(Response::new(
            self.agent.reset(&request.into_inner().id).await?,
        ))
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let DeleteVmRequest { id, evict } = request.into_inner();
        match evict {
            true => self.agent.evict(&id).await?,
            false => self.agent.delete(&id).await?,
        }
        Ok(Response::new(DeleteVmResponse {}))
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<VmStatus>, Status> {
        let vm = self.agent.find(&request.into_inner().id).await?;
        Ok(Response::new(measured(vec![vm.status()]).await.remove(0)))
    }

    async fn list_vms(
        &self,
        _: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        let statuses = self.agent.all().await.iter().map(Vm::status).collect();
        Ok(Response::new(ListVmsResponse {
            vms: measured(statuses).await,
        }))
    }

    type WatchVmsStream = ReceiverStream<Result<VmStatus, Status>>;

    async fn watch_vms(
        &self,
        _: Request<WatchVmsRequest>,
    ) -> Result<Response<Self::WatchVmsStream>, Status> {
        // Subscribed before the first listing, so that no change falls between.
        let changes = self.agent.env.changes.subscribe();
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(forward_changes(self.agent.clone(), changes, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type ConsoleStream = console::Output;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input
            .message()
            .await?
            .ok_or_else(|| invalid_field("vm_id", "the first message must name the VM"))?;
        validate::node_id(&first.vm_id)?;
        let vm = self.agent.find(&first.vm_id).await?;
        let dir = self.agent.env.vm_dir(&first.vm_id);
        Ok(Response::new(console::open(&vm, &dir, first, input).await?))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<VolumeStatus>, Status> {
        let request = request.into_inner();
        validate::node_create_volume_request(&request)?;
        let pool = &self.agent.env.volumes;
        let volume = pool
            .create(volumes::request_from_validated(request))
            .await?;
        Ok(Response::new(self.volume_status(volume).await))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = request.into_inner().id;
        validate::node_id(&id)?;
        if let Some(vm) = self.agent.holder_of(&id).await {
            return Err(VolumeError::Attached { id, vm }.into());
        }
        let pool = self.agent.env.volumes.clone();
        // Waits for locks of other processes.
        blocking(move || pool.delete(&id)).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn list_volumes(
        &self,
        _: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let pool = self.agent.env.volumes.clone();
        let listed = blocking(move || pool.list()).await?;
        let mut volumes = Vec::new();
        for volume in listed {
            volumes.push(self.volume_status(volume).await);
        }
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn set_volume_key(
        &self,
        request: Request<SetVolumeKeyRequest>,
    ) -> Result<Response<SetVolumeKeyResponse>, Status> {
        let request = request.into_inner();
        validate::node_set_volume_key_request(&request)?;
        let keys = self.agent.env.volumes.keys();
        let done = match request.key.is_empty() {
            true => keys.forget(&request.id),
            false => keys.set(&request.id, &request.key),
        };
        done.map_err(volumes::key_error(&request.id))?;
        Ok(Response::new(SetVolumeKeyResponse {}))
    }

    async fn apply_network(
        &self,
        request: Request<ApplyNetworkRequest>,
    ) -> Result<Response<NetworkStatus>, Status> {
        let request = request.into_inner();
        validate::apply_network_request(&request)?;
        let spec = request.spec.expect("a spec was validated");
        Ok(Response::new(self.agent.env.networks.apply(spec).await?))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        let id = request.into_inner().id;
        validate::node_id(&id)?;
        self.agent.env.networks.delete(&id).await?;
        Ok(Response::new(DeleteNetworkResponse {}))
    }

    async fn list_networks(
        &self,
        _: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        let networks = self.agent.env.networks.list();
        Ok(Response::new(ListNetworksResponse { networks }))
    }

    async fn get_disks(
        &self,
        request: Request<GetDisksRequest>,
    ) -> Result<Response<GetDisksResponse>, Status> {
        let id = request.into_inner().vm_id;
        validate::node_id(&id)?;
        let vm = self.agent.find(&id).await?;
        let disks = disks::describe(&self.agent, &vm).await;
        Ok(Response::new(GetDisksResponse { disks }))
    }

    async fn start_job(&self, request: Request<StartJobRequest>) -> Result<Response<Job>, Status> {
        let request = request.into_inner();
        validate::start_job_request(&request)?;
        Ok(Response::new(self.agent.jobs.start(&self.agent, request)?))
    }

    async fn list_jobs(
        &self,
        _: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        let jobs = self.agent.jobs.list();
        Ok(Response::new(ListJobsResponse { jobs }))
    }

    async fn complete_job(
        &self,
        request: Request<CompleteJobRequest>,
    ) -> Result<Response<Job>, Status> {
        let id = request.into_inner().job_id;
        Ok(Response::new(self.agent.jobs.complete(&id)?))
    }

    async fn cancel_job(
        &self,
        request: Request<CancelJobRequest>,
    ) -> Result<Response<Job>, Status> {
        let id = request.into_inner().job_id;
        Ok(Response::new(self.agent.jobs.cancel(&id)?))
    }

    async fn forget_job(
        &self,
        request: Request<ForgetJobRequest>,
    ) -> Result<Response<ForgetJobResponse>, Status> {
        self.agent.jobs.forget(&request.into_inner().job_id)?;
        Ok(Response::new(ForgetJobResponse {}))
    }

    async fn create_upload(
        &self,
        request: Request<CreateUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        let request = request.into_inner();
        validate::node_create_upload_request(&request)?;
        let imports = self.agent.env.imports.clone();
        let files = uploads::files(request.files);
        let upload = blocking(move || imports.create(&request.id, files)).await?;
        Ok(Response::new(uploads::answer(upload)))
    }

    async fn get_upload(
        &self,
        request: Request<GetUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        let id = request.into_inner().id;
        validate::node_id(&id)?;
        let imports = self.agent.env.imports.clone();
        let upload = blocking(move || imports.get(&id)).await?;
        Ok(Response::new(uploads::answer(upload)))
    }

    async fn delete_upload(
        &self,
        request: Request<DeleteUploadRequest>,
    ) -> Result<Response<DeleteUploadResponse>, Status> {
        let id = request.into_inner().id;
        validate::node_id(&id)?;
        let imports = self.agent.env.imports.clone();
        blocking(move || imports.delete(&id)).await?;
        Ok(Response::new(DeleteUploadResponse {}))
    }

    type WriteUploadStream = ReceiverStream<Result<UploadProgress, Status>>;

    async fn write_upload(
        &self,
        request: Request<Streaming<UploadChunk>>,
    ) -> Result<Response<Self::WriteUploadStream>, Status> {
        let imports = self.agent.env.imports.clone();
        uploads::receive(imports, request.into_inner())
            .await
            .map(Response::new)
    }
}

impl Service {
    async fn volume_status(&self, volume: Volume) -> VolumeStatus {
        let attached_to = self.agent.holder_of(&volume.id).await.unwrap_or_default();
        volumes::status(volume, attached_to)
    }
}

/// Runs what waits for files beside the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|panic| panic!("working on files: {panic}"))
}

/// First all states, then changes; all states again after falling behind.
async fn forward_changes(
    agent: Arc<Agent>,
    mut changes: broadcast::Receiver<VmStatus>,
    sender: mpsc::Sender<Result<VmStatus, Status>>,
) {
    let mut behind = true;
    loop {
        if std::mem::take(&mut behind) {
            for vm in agent.all().await {
                if sender.send(Ok(vm.status())).await.is_err() {
                    return;
                }
            }
        }
        let change = tokio::select! {
            change = changes.recv() => change,
            () = sender.closed() => return,
        };
        match change {
            Ok(status) => {
                if sender.send(Ok(status)).await.is_err() {
                    return;
                }
            }
            Err(broadcast::error::RecvError::Lagged(_)) => behind = true,
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Adds memory use, which takes the kernel a walk over each process's page tables.
async fn measured(mut statuses: Vec<VmStatus>) -> Vec<VmStatus> {
    let measuring = tokio::task::spawn_blocking(move || {
        for process in statuses.iter_mut().flat_map(|status| &mut status.processes) {
            if process.pid != 0 {
                let usage = usage::of(process.pid as i32);
                process.rss_kib = usage.rss_kib;
                process.pss_kib = usage.pss_kib;
            }
        }
        statuses
    });
    measuring
        .await
        .unwrap_or_else(|panic| panic!("measuring processes: {panic}"))
}

fn is_running(status: &VmStatus) -> bool {
    matches!(
        status.phase(),
        VmPhase::Running | VmPhase::Paused | VmPhase::Stopping
    )
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}

impl From<VolumeError> for Status {
    fn from(error: VolumeError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}

impl From<NetworkError> for Status {
    fn from(error: NetworkError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}

impl From<ConsoleError> for Status {
    fn from(error: ConsoleError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}

impl From<JobError> for Status {
    fn from(error: JobError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}

impl From<ImportError> for Status {
    fn from(error: ImportError) -> Self {
        Self::new(error.code(), error_chain(&error))
    }
}
