//! A host without VMs: answers as a node agent does, and changes phases at once or when told to.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use api::node::node_agent_server::{NodeAgent, NodeAgentServer};
use api::node::*;
use api::serve::{self, Services};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Cheap to clone; all clones are one host.
#[derive(Clone)]
pub(crate) struct Host {
    status: HostStatus,
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    vms: BTreeMap<String, (VmSpec, VmStatus)>,
    volumes: BTreeMap<String, VolumeStatus>,
    networks: BTreeMap<String, (NetworkSpec, NetworkStatus)>,
    network_refusal: Option<Status>,
    jobs: BTreeMap<String, (StartJobRequest, Job)>,
    keys: BTreeMap<String, Vec<u8>>,
    /// What arrived of each file.
    uploads: BTreeMap<String, (Vec<UploadFile>, Vec<Vec<u8>>)>,
    starts_are_held: bool,
    /// What wishes for VMs carried.
    traces: Vec<String>,
    applied: u64,
    refusal: Option<Status>,
}

impl Host {
    /// Serves on the Unix socket `path` for the rest of the test.
    pub(crate) fn serve(path: &Path) -> Self {
        Self::serve_beside(path, Services::new())
    }

    /// The same, with more services.
    pub(crate) fn serve_beside(path: &Path, services: Services) -> Self {
        let status = HostStatus {
            host_id: "simulated".into(),
            ..Default::default()
        };
        Self::serve_as(path, status, services)
    }

    /// A host that says this of itself.
    pub(crate) fn serve_as(path: &Path, status: HostStatus, services: Services) -> Self {
        let host = Self {
            status,
            state: Arc::default(),
            changed: watch::Sender::new(0),
        };
        let services = services.with(NodeAgentServer::new(host.clone()));
        let path = path.to_owned();
        tokio::spawn(async move {
            serve::unix(&path, services, std::future::pending())
                .await
                .unwrap();
        });
        host
    }

    /// The traces that wishes for VMs belonged to.
    pub(crate) fn traces(&self) -> Vec<String> {
        self.state.lock().unwrap().traces.clone()
    }

    /// A VM that runs here before any controller of the test is there.
    pub(crate) fn runs_already(&self, spec: VmSpec) {
        let status = VmStatus {
            id: spec.id.clone(),
            observed_generation: spec.generation,
            phase: VmPhase::Running as i32,
            ..Default::default()
        };
        self.change(|state| state.vms.insert(spec.id.clone(), (spec, status)));
    }

    /// A volume that is here before, too.
    pub(crate) fn has_already(&self, volume: VolumeStatus) {
        self.change(|state| state.volumes.insert(volume.id.clone(), volume));
    }

    /// VMs stay in STARTING until this is called with `false`.
    pub(crate) fn hold_starts(&self, held: bool) {
        self.change(|state| {
            state.starts_are_held = held;
            for (spec, status) in state.vms.values_mut() {
                if !held && status.phase() == VmPhase::Starting && spec.power() == Power::On {
                    status.phase = VmPhase::Running as i32;
                }
            }
        });
    }

    /// Every ApplyVm from now on is refused with this.
    pub(crate) fn refuse(&self, refusal: Option<Status>) {
        self.change(|state| state.refusal = refusal);
    }

    /// The guest shuts itself down.
    pub(crate) fn guest_shuts_down(&self, id: &str) {
        self.change(|state| {
            let (_, status) = state.vms.get_mut(id).expect("the VM is here");
            status.phase = VmPhase::Stopped as i32;
            status.stop_reason = "guest-shutdown".into();
        });
    }

    /// Ids of all VMs here.
    pub(crate) fn vms(&self) -> Vec<String> {
        self.state.lock().unwrap().vms.keys().cloned().collect()
    }

    /// What a VM is doing here, if it is here.
    pub(crate) fn phase(&self, id: &str) -> Option<VmPhase> {
        let state = self.state.lock().unwrap();
        state.vms.get(id).map(|(_, status)| status.phase())
    }

    /// The VM's spec as applied last.
    pub(crate) fn spec(&self, id: &str) -> VmSpec {
        self.state.lock().unwrap().vms[id].0.clone()
    }

    /// The network as applied last, if it is here.
    pub(crate) fn network(&self, id: &str) -> Option<NetworkSpec> {
        let state = self.state.lock().unwrap();
        state.networks.get(id).map(|(spec, _)| spec.clone())
    }

    /// Every ApplyNetwork from now on is refused with this.
    pub(crate) fn refuse_networks(&self, refusal: Option<Status>) {
        self.change(|state| state.network_refusal = refusal);
    }

    /// The key that was handed over for a volume.
    pub(crate) fn key(&self, volume: &str) -> Option<Vec<u8>> {
        self.state.lock().unwrap().keys.get(volume).cloned()
    }

    /// What was asked for under jobs that are not forgotten.
    pub(crate) fn jobs(&self) -> Vec<StartJobRequest> {
        let state = self.state.lock().unwrap();
        state
            .jobs
            .values()
            .map(|(request, _)| request.clone())
            .collect()
    }

    /// Changes all jobs.
    pub(crate) fn set_jobs(&self, change: impl Fn(&mut Job)) {
        self.change(|state| state.jobs.values_mut().for_each(|(_, job)| change(job)));
    }

    /// Times that ApplyVm was called.
    pub(crate) fn applied(&self) -> u64 {
        self.state.lock().unwrap().applied
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock().unwrap());
        self.changed.send_modify(|count| *count += 1);
        result
    }
}

fn after_apply(spec: &VmSpec, before: Option<VmPhase>, held: bool) -> (VmPhase, &'static str) {
    match (spec.power(), before) {
        (Power::On, Some(VmPhase::Running)) => (VmPhase::Running, ""),
        (Power::On, _) if held => (VmPhase::Starting, ""),
        (Power::On, _) => (VmPhase::Running, ""),
        (_, None) => (VmPhase::Stopped, ""),
        _ => (VmPhase::Stopped, "stop-request"),
    }
}

#[tonic::async_trait]
impl NodeAgent for Host {
    async fn get_host(&self, _: Request<GetHostRequest>) -> Result<Response<HostStatus>, Status> {
        Ok(Response::new(self.status.clone()))
    }

    async fn apply_vm(
        &self,
        request: Request<ApplyVmRequest>,
    ) -> Result<Response<VmStatus>, Status> {
        let trace = request.metadata().get("traceparent");
        let trace = trace
            .and_then(|trace| trace.to_str().ok())
            .map(str::to_owned);
        let request = request.into_inner();
        api::validate::apply_vm_request(&request)?;
        let spec = request.spec.unwrap_or_default();
        self.change(|state| {
            state.traces.extend(trace);
            state.applied += 1;
            if let Some(refusal) = &state.refusal {
                return Err(refusal.clone());
            }
            let known = state.vms.get(&spec.id);
            if known.is_some_and(|(known, _)| known.generation > spec.generation) {
                return Err(Status::aborted("an older generation"));
            }
            if let Some((known, status)) = known
                && known.generation == spec.generation
            {
                return Ok(Response::new(status.clone()));
            }
            let before = known.map(|(_, status)| status.phase());
            let (phase, stop_reason) = after_apply(&spec, before, state.starts_are_held);
            let status = VmStatus {
                id: spec.id.clone(),
                observed_generation: spec.generation,
                phase: phase as i32,
                stop_reason: stop_reason.into(),
                ..Default::default()
            };
            state.vms.insert(spec.id.clone(), (spec, status.clone()));
            Ok(Response::new(status))
        })
    }

    async fn reset_vm(
        &self,
        request: Request<ResetVmRequest>,
    ) -> Result<Response<VmStatus>, Status> {
        let id = request.into_inner().id;
        self.change(|state| {
            let (_, status) = state
                .vms
                .get_mut(&id)
                .ok_or_else(|| Status::not_found("no such VM"))?;
            status.resets += 1;
            Ok(Response::new(status.clone()))
        })
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        let DeleteVmRequest { id, evict } = request.into_inner();
        self.change(|state| {
            match state.vms.get(&id) {
                None => return Err(Status::not_found("no such VM")),
                Some((_, status)) if status.phase() != VmPhase::Stopped && !evict => {
                    return Err(Status::failed_precondition("it runs"));
                }
                Some(_) => state.vms.remove(&id),
            };
            Ok(Response::new(DeleteVmResponse {}))
        })
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<VmStatus>, Status> {
        let id = request.into_inner().id;
        let state = self.state.lock().unwrap();
        let found = state
            .vms
            .get(&id)
            .map(|(_, status)| Response::new(status.clone()));
        found.ok_or_else(|| Status::not_found("no such VM"))
    }

    async fn list_vms(
        &self,
        _: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        let state = self.state.lock().unwrap();
        let vms = state
            .vms
            .values()
            .map(|(_, status)| status.clone())
            .collect();
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

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    /// Echoes.
    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?.unwrap_or_default();
        let hello = ConsoleOutput {
            offset: 0,
            data: format!("{}> ", first.vm_id).into_bytes(),
        };
        let echo = input.map(|message| {
            message.map(|input| ConsoleOutput {
                offset: 0,
                data: input.data,
            })
        });
        Ok(Response::new(Box::pin(
            tokio_stream::once(Ok(hello)).chain(echo),
        )))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<VolumeStatus>, Status> {
        let request = request.into_inner();
        api::validate::node_create_volume_request(&request)?;
        if request.source_path == "/missing" {
            return Err(Status::not_found("/missing does not exist"));
        }
        let status = VolumeStatus {
            id: request.id.clone(),
            size_bytes: request.size_bytes,
            path: format!("/pool/{}", request.id),
            format: request.format.clone(),
            base: request.base.clone(),
            encrypted: request.encrypted,
            ..Default::default()
        };
        self.change(|state| state.volumes.insert(request.id, status.clone()));
        Ok(Response::new(status))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = request.into_inner().id;
        self.change(|state| state.volumes.remove(&id));
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn apply_network(
        &self,
        request: Request<ApplyNetworkRequest>,
    ) -> Result<Response<NetworkStatus>, Status> {
        let request = request.into_inner();
        api::validate::apply_network_request(&request)?;
        let spec = request.spec.unwrap();
        let mut answer = Ok(());
        self.change(|state| {
            let refusal = state.network_refusal.clone();
            let status = NetworkStatus {
                id: spec.id.clone(),
                observed_revision: spec.revision.clone(),
                ready: refusal.is_none(),
                error_code: refusal.as_ref().map_or(0, |status| status.code() as i32),
                error: refusal
                    .as_ref()
                    .map(|status| status.message().to_owned())
                    .unwrap_or_default(),
                bridge: format!("mb-{}", spec.id),
                ..Default::default()
            };
            answer = refusal.map_or(Ok(()), Err);
            state.networks.insert(spec.id.clone(), (spec, status));
        });
        answer.map(|()| Response::new(NetworkStatus::default()))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        let id = request.into_inner().id;
        self.change(|state| drop(state.networks.remove(&id)));
        Ok(Response::new(DeleteNetworkResponse {}))
    }

    async fn list_networks(
        &self,
        _: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        let state = self.state.lock().unwrap();
        let networks = state.networks.values().map(|(_, status)| status.clone());
        Ok(Response::new(ListNetworksResponse {
            networks: networks.collect(),
        }))
    }

    async fn list_volumes(
        &self,
        _: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let volumes = self
            .state
            .lock()
            .unwrap()
            .volumes
            .values()
            .cloned()
            .collect();
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn set_volume_key(
        &self,
        request: Request<SetVolumeKeyRequest>,
    ) -> Result<Response<SetVolumeKeyResponse>, Status> {
        let request = request.into_inner();
        self.change(|state| state.keys.insert(request.id, request.key));
        Ok(Response::new(SetVolumeKeyResponse {}))
    }

    async fn get_disks(
        &self,
        request: Request<GetDisksRequest>,
    ) -> Result<Response<GetDisksResponse>, Status> {
        let id = request.into_inner().vm_id;
        let state = self.state.lock().unwrap();
        let (spec, _) = state
            .vms
            .get(&id)
            .ok_or_else(|| Status::not_found("no such VM"))?;
        let disks = spec.disks.iter().map(|disk| DiskStatus {
            name: disk.name.clone(),
            served: true,
            limits: disk.limits,
            throttled: 7,
            ..Default::default()
        });
        Ok(Response::new(GetDisksResponse {
            disks: disks.collect(),
        }))
    }

    async fn start_job(&self, request: Request<StartJobRequest>) -> Result<Response<Job>, Status> {
        let request = request.into_inner();
        api::validate::start_job_request(&request)?;
        let job = Job {
            job_id: request.job_id.clone(),
            state: JobState::Running as i32,
            ..Default::default()
        };
        let id = request.job_id.clone();
        self.change(|state| {
            state.jobs.entry(id).or_insert((request, job.clone()));
        });
        Ok(Response::new(job))
    }

    async fn list_jobs(
        &self,
        _: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        let state = self.state.lock().unwrap();
        let jobs = state.jobs.values().map(|(_, job)| job.clone()).collect();
        Ok(Response::new(ListJobsResponse { jobs }))
    }

    async fn complete_job(
        &self,
        request: Request<CompleteJobRequest>,
    ) -> Result<Response<Job>, Status> {
        self.end_job(&request.into_inner().job_id, JobState::Done)
    }

    async fn cancel_job(
        &self,
        request: Request<CancelJobRequest>,
    ) -> Result<Response<Job>, Status> {
        self.end_job(&request.into_inner().job_id, JobState::Cancelled)
    }

    async fn forget_job(
        &self,
        request: Request<ForgetJobRequest>,
    ) -> Result<Response<ForgetJobResponse>, Status> {
        let id = request.into_inner().job_id;
        self.change(|state| state.jobs.remove(&id));
        Ok(Response::new(ForgetJobResponse {}))
    }

    async fn create_upload(
        &self,
        request: Request<CreateUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        let CreateUploadRequest { id, files } = request.into_inner();
        self.change(|state| {
            let none = vec![Vec::new(); files.len()];
            state.uploads.entry(id.clone()).or_insert((files, none));
        });
        self.upload(&id)
    }

    async fn get_upload(
        &self,
        request: Request<GetUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        self.upload(&request.into_inner().id)
    }

    async fn delete_upload(
        &self,
        request: Request<DeleteUploadRequest>,
    ) -> Result<Response<DeleteUploadResponse>, Status> {
        let id = request.into_inner().id;
        self.change(|state| state.uploads.remove(&id));
        Ok(Response::new(DeleteUploadResponse {}))
    }

    type WriteUploadStream = Pin<Box<dyn Stream<Item = Result<UploadProgress, Status>> + Send>>;

    async fn write_upload(
        &self,
        request: Request<Streaming<UploadChunk>>,
    ) -> Result<Response<Self::WriteUploadStream>, Status> {
        let mut id = String::new();
        let host = self.clone();
        let answers = request.into_inner().map(move |chunk| {
            let chunk = chunk?;
            if !chunk.id.is_empty() {
                id = chunk.id.clone();
            }
            host.change(|state| {
                let (_, content) = state.uploads.get_mut(&id).expect("it was created");
                let file = &mut content[chunk.file as usize];
                if file.len() as u64 != chunk.offset {
                    return Err(Status::out_of_range("not where the file ends"));
                }
                file.extend(&chunk.data);
                Ok(UploadProgress {
                    file: chunk.file,
                    received_bytes: file.len() as u64,
                })
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

impl Host {
    fn end_job(&self, id: &str, end: JobState) -> Result<Response<Job>, Status> {
        self.change(|state| {
            let found = state.jobs.get_mut(id);
            let (_, job) = found.ok_or_else(|| Status::not_found("no such job"))?;
            job.state = end as i32;
            Ok(Response::new(job.clone()))
        })
    }

    fn upload(&self, id: &str) -> Result<Response<Upload>, Status> {
        let state = self.state.lock().unwrap();
        let found = state.uploads.get(id);
        let (files, content) = found.ok_or_else(|| Status::not_found("no such upload"))?;
        let files = files.iter().zip(content).map(|(file, content)| UploadFile {
            received_bytes: content.len() as u64,
            ..file.clone()
        });
        Ok(Response::new(Upload {
            id: id.to_owned(),
            files: files.collect(),
        }))
    }
}
