//! A real controller process and clients of it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use api::controller as pb;
use api::controller::device_upgrades_client::DeviceUpgradesClient;
use api::controller::disks_client::DisksClient;
use api::controller::events_client::EventsClient;
use api::controller::fault_experiments_client::FaultExperimentsClient;
use api::controller::hosts_client::HostsClient;
use api::controller::networks_client::NetworksClient;
use api::controller::operations_client::OperationsClient;
use api::controller::security_groups_client::SecurityGroupsClient;
use api::controller::uploads_client::UploadsClient;
use api::controller::vms_client::VmsClient;
use api::controller::volumes_client::VolumesClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::transport::Channel;

use crate::simulated::Host;

/// Nothing here takes this long, even on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A running controller; killed when dropped.
pub(crate) struct Controller {
    child: Child,
    pub(crate) address: String,
    pub(crate) channel: Channel,
}

impl Controller {
    /// Starts one with these arguments, on a port of its own.
    pub(crate) async fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_controller"))
            .args(["--listen", "127.0.0.1:0"])
            .args(args)
            .env("MORTISE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on ")
            .expect(&line)
            .to_owned();
        let channel = api::connect::tcp(&address, PATIENCE).await.unwrap();
        Self {
            child,
            address,
            channel,
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        poll("the controller's end", || self.child.try_wait().unwrap())
    }

    pub(crate) fn vms(&self) -> VmsClient<Channel> {
        VmsClient::new(self.channel.clone())
    }
    pub(crate) fn volumes(&self) -> VolumesClient<Channel> {
        VolumesClient::new(self.channel.clone())
    }
    pub(crate) fn networks(&self) -> NetworksClient<Channel> {
        NetworksClient::new(self.channel.clone())
    }
    pub(crate) fn security_groups(&self) -> SecurityGroupsClient<Channel> {
        SecurityGroupsClient::new(self.channel.clone())
    }
    pub(crate) fn disks(&self) -> DisksClient<Channel> {
        DisksClient::new(self.channel.clone())
    }
    pub(crate) fn upgrades(&self) -> DeviceUpgradesClient<Channel> {
        DeviceUpgradesClient::new(self.channel.clone())
    }
    pub(crate) fn uploads(&self) -> UploadsClient<Channel> {
        UploadsClient::new(self.channel.clone())
    }
    pub(crate) fn hosts(&self) -> HostsClient<Channel> {
        HostsClient::new(self.channel.clone())
    }
    pub(crate) fn faults(&self) -> FaultExperimentsClient<Channel> {
        FaultExperimentsClient::new(self.channel.clone())
    }
    pub(crate) fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel.clone())
    }
    pub(crate) fn events(&self) -> EventsClient<Channel> {
        EventsClient::new(self.channel.clone())
    }

    /// Waits until so many hosts answer.
    pub(crate) async fn connected(&self, count: usize) -> Vec<pb::Host> {
        let hosts = || async {
            let mut client = self.hosts();
            let answer = client.list_hosts(pb::ListHostsRequest::default());
            let hosts = answer.await.unwrap().into_inner().hosts;
            let connected = hosts.into_iter().filter(|host| host.connected);
            connected.collect::<Vec<_>>()
        };
        poll_async("the hosts", hosts, |hosts| hosts.len() == count).await
    }

    /// Waits until an operation is done.
    pub(crate) async fn done(&self, operation: pb::Operation) -> pb::Operation {
        let timeout_ms = PATIENCE.as_millis() as u32;
        let request = pb::WaitOperationRequest {
            name: operation.name,
            timeout_ms,
        };
        let operation = self
            .operations()
            .wait_operation(request)
            .await
            .unwrap()
            .into_inner();
        assert!(operation.done, "{operation:?}");
        operation
    }

    /// As [`Controller::done`], and it succeeded.
    pub(crate) async fn succeeded(&self, operation: pb::Operation) {
        let operation = self.done(operation).await;
        assert_eq!(operation.error, None);
    }

    pub(crate) async fn vm(&self, id: &str) -> pb::Vm {
        let request = pb::GetVmRequest { name: vm_name(id) };
        self.vms().get_vm(request).await.unwrap().into_inner()
    }

    pub(crate) async fn create_vm(&self, id: &str) {
        let operation = self
            .vms()
            .create_vm(create_vm(id))
            .await
            .unwrap()
            .into_inner();
        self.succeeded(operation).await;
    }

    pub(crate) async fn start_vm(&self, id: &str) -> pb::Operation {
        let request = pb::StartVmRequest {
            name: vm_name(id),
            ..Default::default()
        };
        self.vms().start_vm(request).await.unwrap().into_inner()
    }

    pub(crate) async fn stop_vm(&self, id: &str) -> pb::Operation {
        let request = pb::StopVmRequest {
            name: vm_name(id),
            ..Default::default()
        };
        self.vms().stop_vm(request).await.unwrap().into_inner()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A controller whose host is simulated.
pub(crate) struct Site {
    dir: tempfile::TempDir,
    pub(crate) host: Host,
    pub(crate) controller: Controller,
}

impl Site {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::serve(&dir.path().join("agent.sock"));
        let controller = start_in(dir.path()).await;
        Self {
            dir,
            host,
            controller,
        }
    }

    /// Where the controller keeps what is wanted.
    pub(crate) fn store_file(&self) -> PathBuf {
        self.dir.path().join("state/controller.redb")
    }

    /// The controller dies without a chance to say goodbye, and another takes its place.
    pub(crate) async fn kill_and_restart_controller(&mut self) {
        self.controller.signal(Signal::SIGKILL);
        self.controller.wait();
        self.controller = start_in(self.dir.path()).await;
    }
}

async fn start_in(dir: &Path) -> Controller {
    let node = format!("unix:{}", dir.join("agent.sock").display());
    let state_dir = dir.join("state");
    let args = ["--node", &node, "--state-dir", state_dir.to_str().unwrap()];
    let controller = Controller::start(&args).await;
    controller.connected(1).await;
    controller
}

pub(crate) fn vm_name(id: &str) -> String {
    format!("projects/default/vms/{id}")
}

pub(crate) fn create_vm(id: &str) -> pb::CreateVmRequest {
    create_vm_of(
        id,
        pb::VmSpec {
            kernel: "/boot/vmlinuz".into(),
            ..Default::default()
        },
    )
}

pub(crate) fn create_vm_of(id: &str, spec: pb::VmSpec) -> pb::CreateVmRequest {
    pb::CreateVmRequest {
        parent: "projects/default".into(),
        vm_id: id.into(),
        vm: Some(pb::Vm {
            spec: Some(spec),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Asks again until there is an answer.
pub(crate) fn poll<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Asks again until the answer satisfies.
pub(crate) async fn poll_async<T, F: Future<Output = T>>(
    what: &str,
    mut question: impl FnMut() -> F,
    satisfies: impl Fn(&T) -> bool,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = question().await;
        if satisfies(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A program of this workspace, beside the controller.
pub(crate) fn built(program: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_controller")).with_file_name(program);
    assert!(
        path.is_file(),
        "{} is missing: cargo build -p {program}",
        path.display()
    );
    path
}
