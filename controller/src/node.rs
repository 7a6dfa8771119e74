//! The controller's end of a host: a connection that mends itself, what was last seen there, and
//! the calls that change something.
//!
//! Seeing is level-triggered too: a message on the agent's watch only says that it is time to look;
//! what is believed always comes from one complete answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use api::device::{CaptureChunk, ListFlowsResponse};
use api::listen::Address;
use api::node::devices_client::DevicesClient;
use api::node::leases_client::LeasesClient;
use api::node::nics_client::NicsClient;
use api::node::node_agent_client::NodeAgentClient;
use api::node::*;
use api::tls;
use tokio::sync::{Mutex, watch};
use tokio_stream::StreamExt;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::leader::Epoch;
use crate::plan::Observed;

mod agents;
mod faults;

/// For one attempt to reach the agent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For a call that only begins work or only reads.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// For copying an image into a volume: 1 TiB at 150 MB/s.
const VOLUME_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// For making a network: its server has 10 s to come up, another 10 s to go.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(40);
/// Without news it is looked anyway.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// While something moves on the host that has no watch of its own.
const MOVING_INTERVAL: Duration = Duration::from_millis(300);
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// News of a host are gathered for so long: what was told to it is looked at right after that, too, and one
/// look is enough for both.
const GATHER: Duration = Duration::from_millis(10);

/// Is told what was seen.
type Listener = Box<dyn Fn(Arc<Observed>) + Send + Sync>;

/// A connection whose requests go on with the trace of whoever asks, and say in which epoch.
type Link = InterceptedService<Channel, Carry>;

/// Puts the task's trace and the epoch into each request.
#[derive(Debug, Clone)]
struct Carry(Epoch);

impl Interceptor for Carry {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        telemetry::inject(request.metadata_mut());
        self.0.call(request)
    }
}

/// Answers must be believed in the order of the questions, so there is one look at a time. Whoever asks
/// while others wait is served by the same one.
#[derive(Default)]
struct Looks {
    /// How often somebody asked.
    asked: AtomicU64,
    /// Those who asked so early have had their look: it began after they asked.
    served: Mutex<u64>,
}

/// A host's agent. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    address: Address,
    tls: Option<tls::Client>,
    observed: watch::Sender<Arc<Observed>>,
    channel: watch::Sender<Option<Channel>>,
    looks: Arc<Looks>,
    /// Told what was seen before whoever had it looked goes on.
    listener: Arc<OnceLock<Listener>>,
    /// What commands carry.
    epoch: Epoch,
}

impl Node {
    /// The agent at `address`, not connected yet; [`Node::run`] connects.
    pub fn new(address: Address) -> Self {
        Self {
            address,
            tls: None,
            observed: watch::Sender::new(Arc::default()),
            channel: watch::Sender::new(None),
            looks: Arc::default(),
            listener: Arc::default(),
            epoch: Epoch::none(),
        }
    }

    /// The same, reached by TLS if its address says so.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<tls::Client>) -> Self {
        self.tls = tls;
        self
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Asks whoever answers at an address who it is.
    ///
    /// # Errors
    /// When nobody answers, or nobody who is believed.
    pub async fn identify(
        address: &Address,
        tls: Option<&tls::Client>,
    ) -> Result<HostStatus, Status> {
        let channel = api::connect::secured(address, tls, CONNECT_TIMEOUT).await;
        let channel = channel.map_err(|error| match error.is_distrust() {
            true => Status::permission_denied(error.to_string()),
            false => Status::unavailable(error.to_string()),
        })?;
        let mut client = NodeAgentClient::new(channel);
        call("GetHost", client.get_host(GetHostRequest {})).await
    }

    /// The same host, for commands of this epoch.
    #[must_use]
    pub fn with_epoch(mut self, epoch: Epoch) -> Self {
        self.epoch = epoch;
        self
    }

    /// Has `listener` told what is seen, at once: who had it looked finds it there. Counts once.
    pub fn tell_at_once(&self, listener: impl Fn(Arc<Observed>) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// What was seen last; changes with what is seen.
    pub fn observed(&self) -> watch::Receiver<Arc<Observed>> {
        self.observed.subscribe()
    }

    /// Keeps the connection and what was seen up to date, for ever.
    pub async fn run(self) {
        let tls = self.tls.as_ref();
        // The same reason is given once, however often it is tried.
        let mut said = String::new();
        loop {
            match api::connect::secured(&self.address, tls, CONNECT_TIMEOUT).await {
                Ok(channel) => {
                    self.channel.send_replace(Some(channel.clone()));
                    let status = self.follow(channel).await;
                    let why = tls::distrust(&status).unwrap_or_else(|| status.to_string());
                    let seen = self.observed.borrow().connected;
                    if seen || why != said {
                        tracing::warn!(node = %self.address, why, "lost the node agent");
                    }
                    said = why;
                }
                Err(error) if error.is_distrust() && said != error.to_string() => {
                    said = error.to_string();
                    tracing::warn!(node = %self.address, why = said, "the host is not believed");
                }
                Err(error) => {
                    tracing::debug!(node = %self.address, %error, "node agent does not answer");
                }
            }
            self.channel.send_replace(None);
            self.disconnected();
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Looks whenever the agent says so, until it no longer answers.
    async fn follow(&self, channel: Channel) -> Status {
        let mut client = NodeAgentClient::new(channel);
        let changes = tokio::time::timeout(CALL_TIMEOUT, client.watch_vms(WatchVmsRequest {}));
        let mut changes = match changes.await {
            Ok(Ok(changes)) => changes.into_inner(),
            Ok(Err(status)) => return status,
            Err(_) => return deadline("WatchVms"),
        };
        let mut asked = self.ask();
        loop {
            if let Err(status) = self.look_since(asked).await {
                return status;
            }
            let interval = match self.observed.borrow().is_moving() {
                true => MOVING_INTERVAL,
                false => LOOK_INTERVAL,
            };
            // Work that was begun meanwhile is looked at as often as all that moves.
            let news = async {
                let mut waited = Duration::ZERO;
                loop {
                    let pause = MOVING_INTERVAL.min(interval);
                    match tokio::time::timeout(pause, changes.next()).await {
                        Ok(change) => return Some(change),
                        Err(_) => waited += pause,
                    }
                    if waited >= interval || self.observed.borrow().is_moving() {
                        return None;
                    }
                }
            };
            match news.await.ok_or(()) {
                Err(_) | Ok(Some(Ok(_))) => {}
                Ok(Some(Err(status))) => return status,
                Ok(None) => return Status::unavailable("the agent ended the watch"),
            }
            asked = self.ask();
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Asks for everything and believes the answer.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn look(&self) -> Result<(), Status> {
        self.look_since(self.ask()).await
    }

    /// For [`Node::look_since`]: now.
    fn ask(&self) -> u64 {
        self.looks.asked.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Looks, unless that was done meanwhile.
    async fn look_since(&self, asked: u64) -> Result<(), Status> {
        let mut served = self.looks.served.lock().await;
        if *served >= asked {
            return Ok(());
        }
        let until_now = self.looks.asked.load(Ordering::SeqCst);
        self.look_now().await?;
        *served = until_now;
        Ok(())
    }

    async fn look_now(&self) -> Result<(), Status> {
        let client = || self.client();
        let (mut first, mut second, mut third) = (client()?, client()?, client()?);
        let (mut fourth, mut fifth) = (client()?, client()?);
        // Together they take one journey.
        let (host, vms, volumes, networks, jobs) = tokio::join!(
            call("GetHost", first.get_host(GetHostRequest {})),
            call("ListVms", second.list_vms(ListVmsRequest {})),
            call("ListVolumes", third.list_volumes(ListVolumesRequest {})),
            call("ListNetworks", fourth.list_networks(ListNetworksRequest {})),
            call("ListJobs", fifth.list_jobs(ListJobsRequest {})),
        );
        let (host, vms, volumes) = (host?, vms?.vms, volumes?.volumes);
        let networks = match networks {
            Ok(answer) => answer.networks,
            // An agent that was not upgraded yet has none.
            Err(status) if status.code() == Code::Unimplemented => Vec::new(),
            Err(status) => return Err(status),
        };
        let jobs = match jobs {
            Ok(answer) => answer.jobs,
            // An agent that was not upgraded yet has none.
            Err(status) if status.code() == Code::Unimplemented => Vec::new(),
            Err(status) => return Err(status),
        };
        let seen = Observed {
            host: Some(host),
            vms: vms.into_iter().map(|vm| (vm.id.clone(), vm)).collect(),
            jobs: jobs
                .into_iter()
                .map(|job| (job.job_id.clone(), job))
                .collect(),
            networks: networks
                .into_iter()
                .map(|network| (network.id.clone(), network))
                .collect(),
            volumes: volumes
                .into_iter()
                .map(|volume| (volume.id.clone(), volume))
                .collect(),
            connected: true,
            last_seen: Some(crate::model::now()),
        };
        let seen = Arc::new(seen);
        self.observed.send_replace(seen.clone());
        if let Some(listener) = self.listener.get() {
            listener(seen);
        }
        Ok(())
    }

    fn disconnected(&self) {
        self.observed.send_if_modified(|observed| {
            let was_connected = observed.connected;
            if was_connected {
                Arc::make_mut(observed).connected = false;
            }
            was_connected
        });
    }

    /// Renews the host's lease, or asks for the ticket that a renewal needs.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn renew_lease(
        &self,
        request: RenewLeaseRequest,
    ) -> Result<RenewLeaseResponse, Status> {
        let mut client = self.connected().map(LeasesClient::new)?;
        call("RenewLease", client.renew_lease(request)).await
    }

    /// Applies a whole desired state, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn apply_vm(&self, spec: VmSpec) -> Result<(), Status> {
        let mut client = self.client()?;
        let request = ApplyVmRequest { spec: Some(spec) };
        call("ApplyVm", client.apply_vm(request)).await?;
        self.look().await
    }

    /// Removes what is left of a stopped VM, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn delete_vm(&self, id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        let request = DeleteVmRequest { id, evict: false };
        found(call("DeleteVm", client.delete_vm(request)).await)?;
        self.look().await
    }

    /// Stops what a host may still have of a VM that is not its any more, at once, and removes what is
    /// left of it, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn evict_vm(&self, id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        let request = DeleteVmRequest { id, evict: true };
        found(call("DeleteVm", client.delete_vm(request)).await)?;
        self.look().await
    }

    /// Hard-resets a running VM.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn reset_vm(&self, id: String) -> Result<VmStatus, Status> {
        let mut client = self.client()?;
        let status = call("ResetVm", client.reset_vm(ResetVmRequest { id })).await?;
        self.look().await?;
        Ok(status)
    }

    /// Makes a volume and waits until it is complete, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn create_volume(&self, request: CreateVolumeRequest) -> Result<(), Status> {
        let mut client = self.client()?;
        tokio::time::timeout(VOLUME_TIMEOUT, client.create_volume(request))
            .await
            .map_err(|_| deadline("CreateVolume"))??;
        self.look().await
    }

    /// Removes a volume, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn delete_volume(&self, id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        found(
            call(
                "DeleteVolume",
                client.delete_volume(DeleteVolumeRequest { id }),
            )
            .await,
        )?;
        self.look().await
    }

    /// Applies a whole network, then looks: a failure, too, is seen there.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn apply_network(&self, spec: NetworkSpec) -> Result<(), Status> {
        let mut client = self.client()?;
        let request = ApplyNetworkRequest { spec: Some(spec) };
        let applied = tokio::time::timeout(NETWORK_TIMEOUT, client.apply_network(request)).await;
        self.look().await?;
        applied.map_err(|_| deadline("ApplyNetwork"))?.map(drop)
    }

    /// Removes a network, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn delete_network(&self, id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        let request = DeleteNetworkRequest { id };
        let deleted = tokio::time::timeout(NETWORK_TIMEOUT, client.delete_network(request)).await;
        found(deleted.map_err(|_| deadline("DeleteNetwork"))?)?;
        self.look().await
    }

    /// Hands a volume's key over, then looks. It is kept there alone.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn set_volume_key(&self, id: String, key: Vec<u8>) -> Result<(), Status> {
        let mut client = self.client()?;
        let request = SetVolumeKeyRequest { id, key };
        call("SetVolumeKey", client.set_volume_key(request)).await?;
        self.look().await
    }

    /// A VM's disks as they are now.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn get_disks(&self, vm_id: String) -> Result<Vec<DiskStatus>, Status> {
        let mut client = self.client()?;
        let answer = call("GetDisks", client.get_disks(GetDisksRequest { vm_id })).await?;
        Ok(answer.disks)
    }

    /// A VM's NICs as they are now.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn get_nics(&self, vm_id: String) -> Result<Vec<NicStatus>, Status> {
        let mut client = self.nics_client()?;
        let answer = call("GetNics", client.get_nics(GetNicsRequest { vm_id })).await?;
        Ok(answer.nics)
    }

    /// The devices of a VM, with as many of their last outages.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn get_devices(
        &self,
        vm_id: String,
        max_outages: u32,
    ) -> Result<GetDevicesResponse, Status> {
        let mut client = self.connected().map(DevicesClient::new)?;
        let request = GetDevicesRequest { vm_id, max_outages };
        call("GetDevices", client.get_devices(request)).await
    }

    /// The flows of a NIC.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn list_flows(
        &self,
        request: ListNicFlowsRequest,
    ) -> Result<ListFlowsResponse, Status> {
        let mut client = self.nics_client()?;
        call("ListFlows", client.list_flows(request)).await
    }

    /// Begins a capture, which ends when its stream is dropped.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn capture(
        &self,
        request: CaptureNicRequest,
    ) -> Result<tonic::Streaming<CaptureChunk>, Status> {
        let mut client = self.nics_client()?;
        call("Capture", client.capture(request)).await
    }

    /// Begins work, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn start_job(&self, request: StartJobRequest) -> Result<(), Status> {
        let mut client = self.client()?;
        call("StartJob", client.start_job(request)).await?;
        self.look().await
    }

    /// Has a mirror switch over, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn complete_job(&self, job_id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        call(
            "CompleteJob",
            client.complete_job(CompleteJobRequest { job_id }),
        )
        .await?;
        self.look().await
    }

    /// Ends work, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn cancel_job(&self, job_id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        found(call("CancelJob", client.cancel_job(CancelJobRequest { job_id })).await)?;
        self.look().await
    }

    /// Has the host forget work that is over, then looks.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn forget_job(&self, job_id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        call("ForgetJob", client.forget_job(ForgetJobRequest { job_id })).await?;
        self.look().await
    }

    /// Begins an upload, or asks how far it is.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn create_upload(&self, request: CreateUploadRequest) -> Result<Upload, Status> {
        let mut client = self.client()?;
        call("CreateUpload", client.create_upload(request)).await
    }

    /// Asks how far an upload is.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn get_upload(&self, id: String) -> Result<Upload, Status> {
        let mut client = self.client()?;
        call("GetUpload", client.get_upload(GetUploadRequest { id })).await
    }

    /// Gives an upload up.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn delete_upload(&self, id: String) -> Result<(), Status> {
        let mut client = self.client()?;
        call(
            "DeleteUpload",
            client.delete_upload(DeleteUploadRequest { id }),
        )
        .await
        .map(drop)
    }

    /// Passes content on.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn write_upload(
        &self,
        chunks: impl tokio_stream::Stream<Item = UploadChunk> + Send + 'static,
    ) -> Result<tonic::Streaming<UploadProgress>, Status> {
        let mut client = self.client()?;
        call("WriteUpload", client.write_upload(chunks)).await
    }

    /// Opens a VM's console.
    ///
    /// # Errors
    /// What the agent answered.
    pub async fn console(
        &self,
        input: impl tokio_stream::Stream<Item = ConsoleInput> + Send + 'static,
    ) -> Result<tonic::Streaming<ConsoleOutput>, Status> {
        let mut client = self.client()?;
        call("Console", client.console(input)).await
    }

    fn client(&self) -> Result<NodeAgentClient<Link>, Status> {
        self.connected().map(NodeAgentClient::new)
    }

    fn nics_client(&self) -> Result<NicsClient<Link>, Status> {
        self.connected().map(NicsClient::new)
    }

    fn connected(&self) -> Result<Link, Status> {
        let channel = self.channel.borrow().clone();
        let channel = channel.ok_or_else(|| {
            Status::unavailable(format!(
                "the node agent at {} does not answer",
                self.address
            ))
        })?;
        Ok(InterceptedService::new(channel, Carry(self.epoch.clone())))
    }
}

async fn call<T>(
    name: &str,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(CALL_TIMEOUT, answer).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(deadline(name)),
    }
}

/// What is not there needs no removing.
fn found<T>(answer: Result<T, Status>) -> Result<(), Status> {
    match answer {
        Err(status) if status.code() != Code::NotFound => Err(status),
        _ => Ok(()),
    }
}

fn deadline(call: &str) -> Status {
    Status::deadline_exceeded(format!("the node agent did not answer {call} in time"))
}
