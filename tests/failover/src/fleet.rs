//! The processes: a controller, the disks' server, agents.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::controller as pb;
use api::controller::hosts_client::HostsClient;
use api::controller::vms_client::VmsClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::transport::Channel;

use crate::machine::Machine;

/// A loaded machine of two cores needs a fraction of it.
pub const PATIENCE: Duration = Duration::from_secs(90);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long a host goes on by itself, and how long it then has. A loaded machine renews and kills late.
const LEASE_MS: u32 = 6_000;
const GRACE_MS: u32 = 500;
const SETTLE_MS: u32 = 8_000;
const CORE: &str = "10.77.0.1";
const AGENT_PORT: u16 = 7071;
const DISK_PORT: u16 = 10_809;

/// See the module.
pub struct Fleet {
    dir: tempfile::TempDir,
    bin_dir: PathBuf,
    /// Where the controller and the disks' server are.
    pub core: Arc<Machine>,
    /// What VMs are on.
    pub hosts: Vec<Host>,
    children: Vec<Child>,
    runtime: tokio::runtime::Runtime,
    channel: Option<Channel>,
}

/// One that VMs are on.
pub struct Host {
    /// Its network.
    pub machine: Machine,
    address: String,
    dir: PathBuf,
    port: String,
}

impl Host {
    /// Most of a VM's processes have left its network: they are confined.
    fn kill_all(&self) {
        // The agent first, for it starts daemons anew.
        self.machine.kill_all();
        for (pid, _) in processes_of(&self.dir.display().to_string()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for host in &self.hosts {
            host.kill_all();
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Fleet {
    /// Everything but VMs.
    ///
    /// # Errors
    /// When something does not come up.
    pub fn start(bin_dir: &Path, hosts: usize) -> Result<Self> {
        for program in ["controller", "node-agent", "vmm-core", "device-blk"] {
            let path = bin_dir.join(program);
            if !path.is_file() {
                bail!("{} is not there; build it: cargo build", path.display());
            }
        }
        // Sockets' paths are short.
        let dir = tempfile::Builder::new().prefix("fo").tempdir()?;
        let core = Arc::new(Machine::new()?);
        core.run("ip link add br0 type bridge")?;
        core.run("ip link set br0 up")?;
        core.run(&format!("ip address add {CORE}/24 dev br0"))?;
        let mut fleet = Self {
            bin_dir: bin_dir.to_owned(),
            core,
            hosts: Vec::new(),
            children: Vec::new(),
            runtime: tokio::runtime::Runtime::new()?,
            channel: None,
            dir,
        };
        for number in 0..hosts {
            let host = Host {
                machine: Machine::new()?,
                address: format!("10.77.0.{}", number + 2),
                dir: fleet.dir.path().join(format!("h{number}")),
                port: format!("p{number}"),
            };
            host.machine.plug(&fleet.core, &host.port, &host.address)?;
            std::fs::create_dir(&host.dir)?;
            fleet.hosts.push(host);
            fleet.start_agent(number)?;
        }
        fleet.start_controller()?;
        fleet.until("the hosts", || {
            Ok((fleet.connected()? == hosts).then_some(()))
        })?;
        Ok(fleet)
    }

    /// Where files are.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where the disks' server is.
    pub fn disk_address(&self) -> String {
        format!("{CORE}:{DISK_PORT}")
    }

    fn spawn(&mut self, mut command: Command, log: &str) -> Result<()> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(log))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let words = format!("{command:?}");
        self.children.push(command.spawn().context(words)?);
        Ok(())
    }

    /// Starts the agent of a host, or the next one.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, host: usize) -> Result<()> {
        let Host {
            machine,
            address,
            dir,
            ..
        } = &self.hosts[host];
        let mut command = machine.command(self.bin_dir.join("node-agent"))?;
        command
            .args(["--listen", &format!("{address}:{AGENT_PORT}"), "--insecure"])
            .arg("--state-dir")
            .arg(dir.join("s"))
            .arg("--run-dir")
            .arg(dir.join("r"))
            .arg("--bin-dir")
            .arg(&self.bin_dir);
        self.spawn(command, &format!("agent{host}.log"))
    }

    fn start_controller(&mut self) -> Result<()> {
        let mut command = self.core.command(self.bin_dir.join("controller"))?;
        let socket = self.dir.path().join("c.sock");
        for host in &self.hosts {
            command.args(["--node", &format!("{}:{AGENT_PORT}", host.address)]);
        }
        command
            .args([
                "--listen",
                &format!("unix:{}", socket.display()),
                "--insecure",
            ])
            .args(["--host-lease-ms", &LEASE_MS.to_string()])
            .args(["--host-grace-ms", &GRACE_MS.to_string()])
            .args(["--host-settle-ms", &SETTLE_MS.to_string()])
            .arg("--state-dir")
            .arg(self.dir.path().join("cs"))
            .arg("--run-dir")
            .arg(self.dir.path().join("cr"));
        self.spawn(command, "controller.log")?;
        let channel = self.runtime.block_on(api::connect::unix(&socket, PATIENCE));
        self.channel = Some(channel.with_context(|| self.logs())?);
        Ok(())
    }

    /// Serves an image to all hosts, to its latest owner alone.
    ///
    /// # Errors
    /// When it cannot be made or served.
    pub fn serve_disk(&mut self, image: &Path, len_bytes: u64) -> Result<()> {
        std::fs::File::create(image)?.set_len(len_bytes)?;
        let mut command = self.core.command(self.bin_dir.join("device-blk"))?;
        command
            .arg("nbd-serve")
            .arg("--image")
            .arg(image)
            .args(["--export", "disk", "--listen", &self.disk_address()])
            .arg("--generation-file")
            .arg(image.with_extension("generation"))
            .arg("--status-file")
            .arg(image.with_extension("status"));
        self.spawn(command, "disk.log")?;
        let status = image.with_extension("status");
        self.until("the disk's server", || {
            Ok(refused(&status).is_some().then_some(()))
        })
    }

    /// Pulls a host's cable, or plugs it in again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_cable(&self, host: usize, is_in: bool) -> Result<()> {
        let state = if is_in { "up" } else { "down" };
        let port = &self.hosts[host].port;
        self.core.run(&format!("ip link set {port} {state}"))
    }

    /// Makes a VM that may run anywhere, and starts it.
    ///
    /// # Errors
    /// When the controller refuses.
    pub fn run_vm(&self, id: &str, kernel: &Path, disk: Option<pb::Disk>) -> Result<()> {
        let mut spec = pb::VmSpec {
            vcpus: 1,
            memory_bytes: 32 << 20,
            kernel: kernel.display().to_string(),
            shutdown_grace_ms: 200,
            disks: disk.into_iter().collect(),
            ..pb::VmSpec::default()
        };
        spec.set_restart_policy(pb::RestartPolicy::Anywhere);
        let create = pb::CreateVmRequest {
            parent: "projects/default".to_owned(),
            vm_id: id.to_owned(),
            vm: Some(pb::Vm {
                spec: Some(spec),
                ..pb::Vm::default()
            }),
            ..pb::CreateVmRequest::default()
        };
        let start = pb::StartVmRequest {
            name: name(id),
            ..pb::StartVmRequest::default()
        };
        let mut vms = self.vms()?;
        self.runtime.block_on(async {
            vms.create_vm(create).await?;
            vms.start_vm(start).await
        })?;
        Ok(())
    }

    /// How many hosts answer the controller.
    fn connected(&self) -> Result<usize> {
        let channel = self.channel.clone().context("the controller is not up")?;
        let request = pb::ListHostsRequest::default();
        let listed = self
            .runtime
            .block_on(HostsClient::new(channel).list_hosts(request))?;
        let hosts = listed.into_inner().hosts;
        Ok(hosts.iter().filter(|host| host.connected).count())
    }

    fn vms(&self) -> Result<VmsClient<Channel>> {
        let channel = self.channel.clone().context("the controller is not up")?;
        Ok(VmsClient::new(channel))
    }

    /// A VM as the controller knows it.
    ///
    /// # Errors
    /// When the controller does not answer.
    pub fn status(&self, id: &str) -> Result<pb::VmStatus> {
        let mut vms = self.vms()?;
        let request = pb::GetVmRequest { name: name(id) };
        let vm = self.runtime.block_on(vms.get_vm(request))?.into_inner();
        Ok(vm.status.unwrap_or_default())
    }

    /// Whether a VM's `vmm-core` lives on a host.
    pub fn has_copy(&self, host: usize, id: &str) -> bool {
        let dir = self.hosts[host].dir.join("r/vms").join(id);
        let of_vm = processes_of(&dir.display().to_string());
        of_vm
            .iter()
            .any(|(_, command)| command.contains("vmm-core\0"))
    }

    /// Ends everything on a host, at once.
    pub fn kill_host(&self, host: usize) {
        self.hosts[host].kill_all();
    }

    /// Asks again until there is an answer.
    ///
    /// # Errors
    /// When none comes.
    pub fn until<T>(&self, what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                bail!("{what} did not come\n{}", self.logs());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// What the processes said last.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = std::fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let last = &lines[lines.len().saturating_sub(40)..];
                text += &format!("--- {}\n{}\n", path.display(), last.join("\n"));
            }
        }
        text
    }
}

/// Processes that live and whose command lines name something in a directory, with these.
fn processes_of(dir: &str) -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            // A zombie has none.
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).into_owned();
            command.contains(dir).then_some((pid, command))
        })
        .collect()
}

fn name(id: &str) -> String {
    format!("projects/default/vms/{id}")
}

/// What a disk's server refused: clients and writes. `None` while it does not say.
pub fn refused(status: &Path) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(status).ok()?;
    let value: serde_json::Value = serde_json::from_str(text.trim()).ok()?;
    Some((
        value["refused_clients"].as_u64()?,
        value["refused_writes"].as_u64()?,
    ))
}
