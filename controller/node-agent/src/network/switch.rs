//! The device-net that is a network's switch: one process for the NICs of all VMs of this host. It
//! outlives the agent; the next one finds it by its command line and keeps it if that is what is
//! wanted. When it dies it is started again, at once the first time, then after growing pauses, and
//! its [`Ports`] are attached again. One that hangs (its control socket is silent, or one of its threads
//! does not answer) is killed, and so dies.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    os::{fd::AsFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use api::{
    connect,
    device::{
        AttachRequest, DetachRequest, FdRef, GetDaemonRequest, ListDevicesRequest,
        attach_request::{Device, Listener},
        device_daemon_client::DeviceDaemonClient,
    },
    fds, listen,
};
use nix::sys::signal::Signal;
use tonic::{Status, transport::Channel};

use super::{
    error::NetworkError,
    port::{PortPlan, Told},
    ports::{Daemon, Ports, Problem, Step},
    record::Pin,
};
use crate::{
    faults::Knobs,
    process::{self, Exit, Identity, Process},
    vm::{DaemonError, Watch, ending, error_chain, nics::Nics, with_deadline},
};

/// Name of the program.
pub(super) const PROGRAM: &str = "device-net";
/// Name of the switch within its process, which has no other.
const SWITCH: &str = "network";
/// From exec to an answering control socket.
const UP_WITHIN: Duration = Duration::from_secs(15);
/// A NIC has no requests in flight that could hold it up.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// It drains its rings first.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// One that served this long is started again at once.
const STABLE_AFTER: Duration = Duration::from_millis(100);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often it is asked whether it is there, and how long it has for an answer.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// How often its log is bounded.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// What a switch is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) network: String,
    pub(super) program: Program,
    /// Where its sockets and its log are.
    pub(super) dir: PathBuf,
    pub(super) uplink: Option<Uplink>,
    /// NICs may be in VLANs, all of which the uplink carries.
    pub(super) vlan_aware: bool,
    pub(super) knobs: Knobs,
    /// How long it may be silent.
    pub(super) hang_after: Duration,
}

/// What is executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    /// Which version's copy it is; empty for the installed one.
    pub(super) build: String,
}

/// The way from a switch to the host and the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Uplink {
    /// A tap that is in a bridge.
    Tap(String),
    /// An interface of the host, by packet sockets.
    Interface(String),
}

/// A switch that is kept running until [`Switch::stop`].
#[derive(Debug)]
pub(super) struct Switch {
    plan: Plan,
    ports: Arc<Ports>,
    keeper: tokio::task::JoinHandle<()>,
}

/// A daemon that answers.
pub(super) struct Up {
    daemon: Daemon,
    channel: Channel,
    served: BTreeSet<String>,
}

impl Program {
    /// What the switch was upgraded to, or the installed one: also when that copy is gone.
    pub(super) fn of(pin: Option<&Pin>, bin_dir: &Path) -> Self {
        match pin.filter(|pin| Path::new(&pin.path).is_file()) {
            Some(pin) => Self {
                path: PathBuf::from(&pin.path),
                build: pin.build.clone(),
            },
            None => Self {
                path: bin_dir.join(PROGRAM),
                build: String::new(),
            },
        }
    }
}

impl Up {
    /// What it says its version is.
    pub(super) fn version(&self) -> &str {
        &self.daemon.version
    }

    /// Ends it.
    pub(super) async fn end(self) {
        end(&self.daemon.process).await;
    }
}

impl Plan {
    /// Keeps what runs if it was started like this; else replaces it.
    ///
    /// # Errors
    /// When it does not come up, with its last words.
    pub(super) async fn ensure(
        self,
        current: Option<Switch>,
        ports: &Arc<Ports>,
    ) -> Result<Switch, NetworkError> {
        match current {
            Some(current) if current.plan == self => {
                return match ports.up(UP_WITHIN).await {
                    Ok(()) => Ok(current),
                    Err(problem) => {
                        let error = self.failed(problem);
                        current.stop().await;
                        Err(error)
                    }
                };
            }
            Some(current) => current.stop().await,
            None => {}
        }
        let up = match self.adopt().await {
            Some(up) => up,
            None => self.start().await.map_err(|source| NetworkError::Switch {
                id: self.network.clone(),
                code: source.code(),
                message: error_chain(&source),
            })?,
        };
        Ok(Switch::keep(self, ports, up))
    }

    /// Where it answers.
    pub(super) fn control_socket(dir: &Path) -> PathBuf {
        dir.join("net.sock")
    }

    /// Its stderr.
    pub(super) fn log(dir: &Path) -> PathBuf {
        dir.join("net.log")
    }

    fn fd_socket(&self) -> PathBuf {
        self.dir.join("net.fds")
    }

    fn failed(&self, problem: Problem) -> NetworkError {
        NetworkError::Switch {
            id: self.network.clone(),
            code: problem.code,
            message: problem.message,
        }
    }

    fn args(&self) -> Vec<OsString> {
        let mut args = vec![
            "--control-socket".into(),
            Self::control_socket(&self.dir).into(),
            "--fd-socket".into(),
            self.fd_socket().into(),
        ];
        args.extend(self.knobs.daemon_args().map(Into::into));
        if let Some(uplink) = &self.uplink {
            let end = match uplink {
                Uplink::Tap(name) => format!("tap={name}"),
                Uplink::Interface(name) => format!("packet={name}"),
            };
            let vlans = match self.vlan_aware {
                true => ",vlan=0,trunk=all",
                false => "",
            };
            let uplink = format!("switch={SWITCH},{end}{vlans}");
            args.extend(["--uplink".into(), uplink.into()]);
        }
        args
    }

    /// The one that an earlier agent left, if it is as it should be; any other ends.
    async fn adopt(&self) -> Option<Up> {
        let mut kept = None;
        for pid in process::pids_serving(&self.dir) {
            let Some(start_ticks) = process::start_ticks(pid) else {
                continue;
            };
            let Some(process) = Process::adopt(Identity { pid, start_ticks }) else {
                continue;
            };
            if kept.is_none() && process::args(pid).is_some_and(|args| args == self.args()) {
                match self.answering(process.clone()).await {
                    Ok(up) => {
                        tracing::info!(network = self.network, pid, "adopted its switch");
                        kept = Some(up);
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(network = self.network, pid, "{}", error_chain(&error));
                    }
                }
            }
            end(&process).await;
        }
        kept
    }

    /// NICs whose frontend is connected; `None` when the daemon does not say.
    pub(super) async fn connected(&self) -> Option<BTreeSet<String>> {
        let asking = async {
            let socket = Self::control_socket(&self.dir);
            let channel = connect::unix(&socket, ANSWER_WITHIN).await.ok()?;
            let mut client = DeviceDaemonClient::new(channel);
            let request = with_deadline(ListDevicesRequest {}, ANSWER_WITHIN);
            Some(
                client
                    .list_devices(request)
                    .await
                    .ok()?
                    .into_inner()
                    .devices,
            )
        };
        let devices = tokio::time::timeout(ANSWER_WITHIN, asking).await.ok()??;
        let connected = devices.into_iter().filter(|device| device.connected);
        Some(connected.map(|device| device.id).collect())
    }

    /// Starts a process.
    ///
    /// # Errors
    /// When it does not come up, with its last words.
    pub(super) async fn start(&self) -> Result<Up, DaemonError> {
        let log = Self::log(&self.dir);
        let _ = process::bound_log(&log);
        let process = Process::spawn(&self.program.path, &self.args(), &log)?;
        let exited = process.exited();
        let up = tokio::select! {
            exit = exited => return Err(DaemonError::Exited(ending(PROGRAM, exit, &log))),
            up = self.answering(Process::clone(&process)) => up?,
        };
        process.keep();
        Ok(up)
    }

    async fn answering(&self, process: Process) -> Result<Up, DaemonError> {
        let channel = connect::unix(&Self::control_socket(&self.dir), UP_WITHIN).await;
        let channel = channel.map_err(|source| DaemonError::Connect {
            program: PROGRAM,
            source,
        })?;
        let mut client = DeviceDaemonClient::new(channel.clone());
        let info = client
            .get_daemon(with_deadline(GetDaemonRequest {}, CALL_DEADLINE))
            .await
            .map_err(refused("GetDaemon"))?
            .into_inner();
        let listed = client
            .list_devices(with_deadline(ListDevicesRequest {}, CALL_DEADLINE))
            .await
            .map_err(refused("ListDevices"))?
            .into_inner();
        Ok(Up {
            daemon: Daemon {
                process,
                sandbox: info.sandbox,
                version: info.version,
                build: self.program.build.clone(),
            },
            channel,
            served: listed.devices.into_iter().map(|device| device.id).collect(),
        })
    }
}

impl Switch {
    /// Keeps a daemon that runs.
    pub(super) fn keep(plan: Plan, ports: &Arc<Ports>, up: Up) -> Self {
        let channel = announce(ports, up);
        let keeper = keep_running(plan.clone(), ports.clone(), channel);
        Self {
            plan,
            ports: ports.clone(),
            keeper: tokio::spawn(keeper),
        }
    }

    /// Starts a daemon again and again until one runs; the last one did not, for this reason.
    pub(super) fn revive(plan: Plan, ports: &Arc<Ports>, error: String) -> Self {
        let keeper = {
            let (plan, ports) = (plan.clone(), ports.clone());
            async move {
                let mut pause = FIRST_PAUSE;
                let channel = start_again(&plan, &ports, error, &mut pause).await;
                keep_running(plan, ports, channel).await;
            }
        };
        Self {
            plan,
            ports: ports.clone(),
            keeper: tokio::spawn(keeper),
        }
    }

    /// What it is started with.
    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What is executed.
    pub(super) fn program(&self) -> &Program {
        &self.plan.program
    }

    /// Ends it.
    pub(super) async fn stop(self) {
        self.keeper.abort();
        // A start that is cut off here kills what it began.
        let _ = self.keeper.await;
        if let Some(process) = self.ports.daemon().process {
            end(&process).await;
        }
        self.ports.went_down(String::new());
    }
}

/// Ends whatever serves from `dir`.
pub(super) async fn stop_strays(dir: &Path) {
    for pid in process::pids_serving(dir) {
        if let Some(start_ticks) = process::start_ticks(pid)
            && let Some(process) = Process::adopt(Identity { pid, start_ticks })
        {
            end(&process).await;
        }
    }
}

fn announce(ports: &Ports, up: Up) -> Channel {
    ports.came_up(up.daemon, up.served);
    up.channel
}

async fn keep_running(plan: Plan, ports: Arc<Ports>, mut channel: Channel) {
    let mut pause = Duration::ZERO;
    loop {
        let begun = Instant::now();
        let error = serve(&plan, &ports, &channel).await;
        pause = match begun.elapsed() >= STABLE_AFTER {
            true => Duration::ZERO,
            false => next_pause(pause),
        };
        channel = start_again(&plan, &ports, error, &mut pause).await;
    }
}

/// Until one runs, after growing pauses.
async fn start_again(
    plan: &Plan,
    ports: &Ports,
    mut error: String,
    pause: &mut Duration,
) -> Channel {
    loop {
        tracing::warn!(network = plan.network, "{error}; starting it again");
        ports.went_down(error);
        tokio::time::sleep(*pause).await;
        match plan.start().await {
            Ok(up) => {
                let channel = announce(ports, up);
                ports.count_restart();
                return channel;
            }
            Err(failed) => error = error_chain(&failed),
        }
        *pause = next_pause(*pause);
    }
}

/// Keeps the daemon's ports as they are wanted until it ends, and tells how it did.
async fn serve(plan: &Plan, ports: &Ports, channel: &Channel) -> String {
    let log = Plan::log(&plan.dir);
    let Some(process) = ports.daemon().process else {
        return ending(PROGRAM, Exit::Unknown, &log);
    };
    let hangs = hangs(plan.hang_after, channel);
    tokio::pin!(hangs);
    loop {
        let work = async {
            while let Some(step) = ports.next_step() {
                take(plan, ports, channel, step).await;
            }
            let _ = tokio::time::timeout(LOOK_INTERVAL, ports.changed()).await;
        };
        tokio::select! {
            // A step that is cut off is one of a daemon that is gone.
            exit = process.exited() => return ending(PROGRAM, exit, &log),
            reason = &mut hangs => {
                process.kill().await;
                return format!("{PROGRAM} hung and was killed: {reason}");
            }
            () = work => {}
        }
        if let Err(error) = process::bound_log(&Plan::log(&plan.dir)) {
            tracing::warn!(network = plan.network, "bounding its switch's log: {error}");
        }
    }
}

/// Comes when the daemon hangs, with the reason.
async fn hangs(patience: Duration, channel: &Channel) -> String {
    let mut watch = Watch::default();
    loop {
        tokio::time::sleep(ASK_INTERVAL).await;
        let mut client = DeviceDaemonClient::new(channel.clone());
        let asking = client.list_devices(with_deadline(ListDevicesRequest {}, ANSWER_WITHIN));
        let answer = match tokio::time::timeout(ANSWER_WITHIN, asking).await {
            Ok(Ok(answer)) => Some(answer.into_inner().devices),
            Ok(Err(_)) | Err(_) => None,
        };
        if let Err(reason) = watch.judge(answer.as_deref(), patience, Instant::now()) {
            return reason;
        }
    }
}

async fn take(plan: &Plan, ports: &Ports, channel: &Channel, step: Step) {
    match step {
        Step::Detach { id } => {
            let request = DetachRequest {
                id: id.clone(),
                ..DetachRequest::default()
            };
            let answer = DeviceDaemonClient::new(channel.clone())
                .detach(with_deadline(request, CALL_DEADLINE))
                .await;
            ports.detached(&id, answer.map(drop).map_err(refused("to detach a NIC")));
        }
        Step::Attach {
            id,
            serial,
            listener,
            plan: port,
            told,
        } => {
            let attached = attach(plan, channel, &id, listener, &port, &told).await;
            ports.attached((&id, serial), told, attached);
        }
        Step::Tell { id, serial, told } => {
            let result = tell(&plan.dir, &id, &told).await;
            ports.was_told((&id, serial), told, result);
        }
    }
}

async fn tell(dir: &Path, id: &str, told: &Told) -> Result<(), DaemonError> {
    let nics = Nics::at(Plan::control_socket(dir));
    nics.tune(id, &told.tuning).await?;
    match &told.policy {
        Some(policy) => nics.set_policy(id, policy.clone()).await,
        // The network no longer knows the NIC, whose VM is on its way out.
        None => Ok(()),
    }
}

async fn attach(
    plan: &Plan,
    channel: &Channel,
    id: &str,
    listener: Option<Arc<UnixListener>>,
    port: &PortPlan,
    told: &Told,
) -> Result<Arc<UnixListener>, DaemonError> {
    let listener = match listener {
        Some(listener) => listener,
        None => bind(port)?,
    };
    let token = uuid::Uuid::new_v4().to_string();
    let sending = {
        let (fd_socket, token, listener) = (plan.fd_socket(), token.clone(), listener.clone());
        tokio::task::spawn_blocking(move || {
            fds::send(&fd_socket, &token, &[listener.as_fd()], SEND_DEADLINE)
        })
    };
    sending
        .await
        .unwrap_or_else(|panic| panic!("handing {id} over: {panic}"))
        .map_err(|source| DaemonError::Send {
            program: PROGRAM,
            device: port.nic.clone(),
            source,
        })?;
    let request = AttachRequest {
        id: id.to_owned(),
        listener: Some(Listener::SocketFd(FdRef { token })),
        device: Some(Device::Net(port.config(SWITCH, plan.vlan_aware, told))),
    };
    DeviceDaemonClient::new(channel.clone())
        .attach(with_deadline(request, CALL_DEADLINE))
        .await
        .map_err(refused("the NIC"))?;
    Ok(listener)
}

fn bind(port: &PortPlan) -> Result<Arc<UnixListener>, DaemonError> {
    let (listener, file) =
        listen::unix_socket(&port.socket).map_err(|source| DaemonError::Listen {
            device: port.nic.clone(),
            source,
        })?;
    // The path must outlive the agent; the VM's clean-up removes it with the directory.
    std::mem::forget(file);
    Ok(Arc::new(listener))
}

async fn end(process: &Process) {
    process.signal(Signal::SIGTERM);
    if process.exited_within(STOP_WITHIN).await.is_none() {
        process.kill().await;
    }
}

fn next_pause(pause: Duration) -> Duration {
    (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
}

fn refused(call: &'static str) -> impl FnOnce(Status) -> DaemonError {
    move |status| DaemonError::Call {
        program: PROGRAM,
        call: call.to_owned(),
        code: status.code(),
        message: status.message().to_owned(),
    }
}
