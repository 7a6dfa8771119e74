//! The control socket: `mortise.vmm.v1.Vmm`, and the faults of this end of the devices, on one small
//! runtime on a thread of its own, which also turns SIGTERM into a Stop request.

mod health;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use api::listen::Listener;
use api::serve::{self, Services};
use api::vmm::vmm_server::{Vmm, VmmServer};
use api::vmm::{
    AllowRunRequest, ConsoleInput, ConsoleOutput, GetDevicesRequest, GetDevicesResponse,
    GetVmmRequest, PauseRequest, PowerButtonRequest, RefreshDeviceConfigRequest, ResetRequest,
    ResumeRequest, StartRequest, StopRequest, VmmInfo, VmmState,
};
use faults::Faults;
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{error, info};

use crate::confinement::Confinement;
use crate::console::Console;
use crate::lifecycle::{Handle, Refusal, Request as Lifecycle, State};
use crate::machine::Devices;
use crate::serial::SerialPort;

/// Longest piece of output in one message.
const CONSOLE_CHUNK_BYTES: usize = 32 << 10;
/// Messages that wait for a slow reader; beyond them the console moves on without it.
const CONSOLE_MESSAGES: usize = 4;
/// Output that arrives within this time goes out in one message.
const CONSOLE_GATHER: Duration = Duration::from_millis(3);
/// How often typed bytes are offered again to a guest whose input buffer is full.
const TYPE_IN_RETRY: Duration = Duration::from_millis(20);
/// How long a console client may take to say where it wants to start.
const FIRST_MESSAGE_PATIENCE: Duration = Duration::from_secs(10);
/// Longer than any transition with its own deadlines takes.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// How long open calls may take to end once the machine has stopped.
const END_PATIENCE: Duration = Duration::from_secs(4);

/// What the control socket needs of the machine.
#[derive(Clone)]
pub struct Controls {
    /// `--id`.
    pub id: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// To the supervisor.
    pub handle: Handle,
    /// The guest's output.
    pub console: Arc<Console>,
    /// The guest's input.
    pub serial: Arc<SerialPort>,
    /// What other processes serve.
    pub devices: Devices,
    /// What holds for this process and its threads.
    pub confinement: Confinement,
    /// What may be made to go wrong; none unless it was allowed.
    pub faults: Option<Arc<Faults>>,
}

/// The thread that serves.
pub struct ControlThread {
    stop: watch::Sender<bool>,
    ended: std::sync::mpsc::Receiver<()>,
}

impl ControlThread {
    /// Serves `controls` on `listener`, if there is one, and handles [`terminating_signals`],
    /// which the caller has blocked.
    /// `confine` runs on the new thread before it serves.
    ///
    /// # Errors
    /// The thread or its runtime could not be started, or `confine` failed.
    pub fn start(
        listener: Option<Listener>,
        controls: Controls,
        confine: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|err| format!("cannot start the control runtime: {err}"))?;
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = std::sync::mpsc::sync_channel(1);
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let thread = move || {
            let confined = confine();
            let go_on = confined.is_ok();
            // The receiver waits until it has got this.
            let _ = ready.send(confined);
            if go_on {
                runtime.block_on(run(listener, controls, stopped));
                // Nobody waits any more if this took too long.
                let _ = end.try_send(());
            }
        };
        let spawned: io::Result<_> = thread::Builder::new().name("control".into()).spawn(thread);
        spawned.map_err(|err| format!("cannot start the control thread: {err}"))?;
        is_ready
            .recv()
            .unwrap_or_else(|_| Err("the control thread ended".into()))?;
        Ok(Self { stop, ended })
    }

    /// Lets calls in progress end, and then the thread; removes the socket's file.
    pub fn finish(self) {
        self.stop.send_replace(true);
        let _ = self.ended.recv_timeout(END_PATIENCE);
    }
}

async fn run(listener: Option<Listener>, controls: Controls, mut stopped: watch::Receiver<bool>) {
    let terminated = stop_on_signal(controls.handle.clone());
    let stopped = async move {
        // The sender is dropped only when the process ends.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let served = async move {
        match listener {
            Some(listener) => {
                let faults = api::fault_control::service(controls.faults.clone());
                let services = Services::new().with(VmmServer::new(controls)).with(faults);
                if let Err(err) = serve::on(listener, services, stopped).await {
                    error!("the control socket failed: {}", crate::error::chain(&err));
                }
            }
            None => stopped.await,
        }
    };
    tokio::select! {
        () = served => {}
        () = terminated => {}
    }
}

/// Signals that end a process, which are blocked on every thread but this one: their handler makes
/// system calls that other threads may not make.
pub fn terminating_signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT])
}

async fn stop_on_signal(handle: Handle) {
    let catch = |kind| signal(kind).expect("no other handler was set");
    let (mut terminate, mut interrupt) = (
        catch(SignalKind::terminate()),
        catch(SignalKind::interrupt()),
    );
    terminating_signals()
        .thread_unblock()
        .expect("the set is valid");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping on a signal");
    handle.stop();
    std::future::pending().await
}

impl Controls {
    fn info(&self) -> VmmInfo {
        let status = self.handle.status();
        let first_byte = self.console.first_byte_after();
        VmmInfo {
            id: self.id.clone(),
            state: proto_state(status.state()).into(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            resets: status.resets(),
            devices: health::devices(&self.devices, 0),
            // A console that spoke within the first millisecond has spoken.
            first_console_byte_ms: first_byte.map_or(0, |after| (after.as_millis() as u64).max(1)),
            exits: status.exits(),
            sandbox: self.confinement.names(),
            lease_ended: status.lease_ended(),
        }
    }

    async fn perform(&self, request: Lifecycle) -> Result<Response<VmmInfo>, Status> {
        self.answer(self.handle.request(request)).await
    }

    async fn answer(
        &self,
        request: impl Future<Output = Result<(), Refusal>> + Send,
    ) -> Result<Response<VmmInfo>, Status> {
        match tokio::time::timeout(REQUEST_DEADLINE, request).await {
            Ok(Ok(())) => Ok(Response::new(self.info())),
            Ok(Err(refusal)) => Err(refusal_status(&refusal)),
            Err(_) => Err(api::errors::status(
                Code::DeadlineExceeded,
                "MACHINE_SLOW",
                "the machine did not answer in time: look at its log, then try again or stop it",
                &[],
            )),
        }
    }
}

#[tonic::async_trait]
impl Vmm for Controls {
    async fn get_vmm(&self, _: Request<GetVmmRequest>) -> Result<Response<VmmInfo>, Status> {
        Ok(Response::new(self.info()))
    }

    async fn get_devices(
        &self,
        request: Request<GetDevicesRequest>,
    ) -> Result<Response<GetDevicesResponse>, Status> {
        let max_outages = request.into_inner().max_outages as usize;
        Ok(Response::new(GetDevicesResponse {
            devices: health::devices(&self.devices, max_outages),
            state: proto_state(self.handle.status().state()).into(),
        }))
    }

    async fn start(&self, _: Request<StartRequest>) -> Result<Response<VmmInfo>, Status> {
        self.perform(Lifecycle::Start).await
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<VmmInfo>, Status> {
        self.perform(Lifecycle::Pause).await
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<VmmInfo>, Status> {
        self.perform(Lifecycle::Resume).await
    }

    async fn allow_run(
        &self,
        request: Request<AllowRunRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let until_ns = request.into_inner().until_boottime_ns;
        self.answer(self.handle.allow_run(until_ns)).await
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<VmmInfo>, Status> {
        self.perform(Lifecycle::Reset).await
    }

    async fn power_button(
        &self,
        _: Request<PowerButtonRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        self.perform(Lifecycle::PowerButton).await
    }

    async fn stop(&self, _: Request<StopRequest>) -> Result<Response<VmmInfo>, Status> {
        self.perform(Lifecycle::Stop).await
    }

    async fn refresh_device_config(
        &self,
        request: Request<RefreshDeviceConfigRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        let tag = request.into_inner().tag;
        if self.devices.refresh_config(&tag) {
            return Ok(Response::new(self.info()));
        }
        Err(api::errors::status(
            Code::NotFound,
            "NO_SUCH_DEVICE",
            format!("no device has the tag {tag:?}: GetVmm lists those there are"),
            &[],
        ))
    }

    type ConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE_PATIENCE, input.message()).await;
        let first = first
            .map_err(|_| Status::deadline_exceeded("send a first message, which may be empty"))??;
        let first = first.unwrap_or_default();
        let (output, receiver) = mpsc::channel(CONSOLE_MESSAGES);
        let typing = type_in(self.serial.clone(), first.data, input);
        let output = stream_out(self.console.clone(), first.from_offset, output);
        // Whoever keeps its side open to type must not keep the call, and thereby a machine that
        // has stopped, from ending.
        tokio::spawn(async {
            tokio::select! {
                () = output => {}
                () = async { typing.await; std::future::pending().await } => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Sends the console's output from `offset` on, until the reader goes or the machine stops.
async fn stream_out(
    console: Arc<Console>,
    mut offset: u64,
    output: mpsc::Sender<Result<ConsoleOutput, Status>>,
) {
    let mut grown = console.watch();
    loop {
        grown.mark_unchanged();
        let Some(mut chunk) = console.read(offset) else {
            return;
        };
        chunk.data.truncate(CONSOLE_CHUNK_BYTES);
        offset = chunk.end();
        if chunk.data.is_empty() {
            tokio::select! {
                _ = grown.changed() => tokio::time::sleep(CONSOLE_GATHER).await,
                () = output.closed() => return,
            }
            continue;
        }
        let message = ConsoleOutput {
            offset: chunk.offset,
            data: chunk.data,
        };
        if output.send(Ok(message)).await.is_err() {
            return;
        }
    }
}

/// Types what the client sends, as fast as the guest reads it, until the client goes.
async fn type_in(serial: Arc<SerialPort>, first: Vec<u8>, mut input: Streaming<ConsoleInput>) {
    let mut data = first;
    loop {
        let mut rest = data.as_slice();
        while !rest.is_empty() {
            rest = &rest[serial.type_in(rest)..];
            if !rest.is_empty() {
                tokio::time::sleep(TYPE_IN_RETRY).await;
            }
        }
        match input.message().await {
            Ok(Some(message)) => data = message.data,
            // A client that only reads closes its side; its output goes on.
            Ok(None) | Err(_) => return,
        }
    }
}

fn refusal_status(refusal: &Refusal) -> Status {
    let (code, reason) = match refusal {
        Refusal::State { .. } => (Code::FailedPrecondition, "WRONG_STATE"),
        Refusal::NotLeased => (Code::FailedPrecondition, "NOT_LEASED"),
        Refusal::Busy => (Code::ResourceExhausted, "TOO_MANY_REQUESTS"),
        Refusal::Failed(_) => (Code::Internal, "MACHINE_FAILED"),
        Refusal::Gone => (Code::Unavailable, "MACHINE_GONE"),
    };
    api::errors::status(code, reason, refusal.to_string(), &[])
}

fn proto_state(state: State) -> VmmState {
    match state {
        State::Created => VmmState::Created,
        State::Running => VmmState::Running,
        State::Paused => VmmState::Paused,
        State::Stopped => VmmState::Stopped,
    }
}
