//! A real agent on directories of its own, a client of it, and a look at what it leaves behind.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use api::{
    connect,
    node::{
        ApplyVmRequest, ConsoleInput, DeleteVmRequest, DiskSpec, GetVmRequest, Power, VmPhase,
        VmSpec, VmStatus, disk_spec::Source, node_agent_client::NodeAgentClient,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tonic::{Status, transport::Channel};

/// What an agent starts.
const PROGRAMS: [&str; 3] = ["vmm-core", "device-blk", "device-net"];
/// No test waits longer for anything; a loaded machine of two cores needs a fraction of it.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A console that is silent for this long has nothing more.
const CONSOLE_PAUSE: Duration = Duration::from_millis(300);
/// A guest that writes all the time is not listened to for longer.
const CONSOLE_ENOUGH: Duration = Duration::from_millis(600);

/// An agent and its directories. Everything that runs there ends with it.
pub(crate) struct Agent {
    dir: tempfile::TempDir,
    bin_dir: PathBuf,
    child: Child,
    pub(crate) client: NodeAgentClient<Channel>,
}

impl Agent {
    pub(crate) async fn start() -> Self {
        let bin_dir = built("node-agent").parent().unwrap().to_owned();
        Self::start_in(tempfile::tempdir().unwrap(), bin_dir).await
    }

    /// An agent for which `program` is this shell script instead.
    pub(crate) async fn start_with(program: &str, script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin_dir = dir.path().join("bin");
        fs::create_dir(&bin_dir).unwrap();
        for other in PROGRAMS.into_iter().filter(|other| *other != program) {
            std::os::unix::fs::symlink(built(other), bin_dir.join(other)).unwrap();
        }
        let path = bin_dir.join(program);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self::start_in(dir, bin_dir).await
    }

    /// The same, with more arguments, one a line.
    pub(crate) async fn start_with_args(program: &str, script: &str, args: &str) -> Self {
        let mut agent = Self::start_with(program, script).await;
        agent.end(Signal::SIGTERM);
        fs::write(agent.dir.path().join("agent.args"), args).unwrap();
        agent.start_again().await;
        agent
    }

    /// What the guest has written to its console from `offset` on, as far as it is still there.
    pub(crate) async fn console(&mut self, id: &str, offset: u64) -> (u64, String) {
        let first = ConsoleInput {
            vm_id: id.into(),
            data: Vec::new(),
            from_offset: offset,
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        sender.send(first).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut output = self.client.console(stream).await.unwrap().into_inner();
        let (mut end, mut seen) = (offset, Vec::new());
        // What is there comes at once; what is still to come is not waited for.
        let enough = Instant::now() + CONSOLE_ENOUGH;
        while let Ok(message) = tokio::time::timeout(CONSOLE_PAUSE, output.message()).await {
            let Some(message) = message.unwrap() else {
                break;
            };
            end = message.offset + message.data.len() as u64;
            seen.extend(message.data);
            if Instant::now() > enough {
                break;
            }
        }
        (end, String::from_utf8_lossy(&seen).into_owned())
    }

    async fn start_in(dir: tempfile::TempDir, bin_dir: PathBuf) -> Self {
        let child = spawn(dir.path(), &bin_dir);
        let client = connect_to(dir.path()).await;
        Self {
            dir,
            bin_dir,
            child,
            client,
        }
    }

    /// Ends the agent with `signal` and waits for it; its VMs stay.
    pub(crate) fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the agent does not end at {signal}"
            );
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// A new agent in place of one that ended.
    pub(crate) async fn start_again(&mut self) {
        self.child = spawn(self.dir.path(), &self.bin_dir);
        self.client = connect_to(self.dir.path()).await;
    }

    /// Of the agent's process.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn vm_dir(&self, id: &str) -> PathBuf {
        self.dir.path().join("run/vms").join(id)
    }

    pub(crate) fn record(&self, id: &str) -> PathBuf {
        self.dir.path().join("state/vms").join(format!("{id}.json"))
    }

    /// A new sparse image.
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        path
    }

    pub(crate) async fn apply(&mut self, spec: &VmSpec) -> Result<VmStatus, Status> {
        let request = ApplyVmRequest {
            spec: Some(spec.clone()),
        };
        self.client
            .apply_vm(request)
            .await
            .map(tonic::Response::into_inner)
    }

    pub(crate) async fn status(&mut self, id: &str) -> VmStatus {
        let request = GetVmRequest { id: id.into() };
        self.client.get_vm(request).await.unwrap().into_inner()
    }

    pub(crate) async fn delete(&mut self, id: &str) -> Result<(), Status> {
        self.client
            .delete_vm(DeleteVmRequest {
                id: id.into(),
                ..Default::default()
            })
            .await
            .map(drop)
    }

    /// Polls the VM until `wanted` holds.
    pub(crate) async fn until(
        &mut self,
        id: &str,
        what: &str,
        wanted: impl Fn(&VmStatus) -> bool,
    ) -> VmStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status(id).await;
            if wanted(&status) {
                return status;
            }
            if Instant::now() > deadline {
                panic!(
                    "VM {id} is not {what}: {status:#?}\n{}",
                    logs(&self.vm_dir(id))
                );
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Applies and waits for the machine to run.
    pub(crate) async fn run(&mut self, spec: &VmSpec) -> VmStatus {
        self.apply(spec).await.unwrap();
        let settled = self
            .until(&spec.id, "started", |status| {
                status.phase() != VmPhase::Starting
            })
            .await;
        assert_eq!(settled.phase(), VmPhase::Running, "{}", settled.error);
        settled
    }

    /// Applies the same machine with another power wish.
    pub(crate) async fn power(&mut self, spec: &mut VmSpec, power: Power) {
        spec.generation += 1;
        spec.set_power(power);
        self.apply(spec).await.unwrap();
    }

    /// Reads the console from its start until it ends with `text`, having sent `input` first.
    pub(crate) async fn console_until(&mut self, id: &str, input: &[u8], text: &str) {
        let first = ConsoleInput {
            vm_id: id.into(),
            data: input.to_vec(),
            from_offset: 0,
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        sender.send(first).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut output = self.client.console(stream).await.unwrap().into_inner();
        let mut seen = Vec::new();
        let reading = async {
            while let Some(message) = output.message().await.unwrap() {
                seen.extend(message.data);
                if seen.ends_with(text.as_bytes()) {
                    return true;
                }
            }
            false
        };
        let found = tokio::time::timeout(PATIENCE, reading).await;
        assert_eq!(
            found,
            Ok(true),
            "console: {:?}",
            String::from_utf8_lossy(&seen)
        );
    }

    /// What a scrape of /metrics gets.
    pub(crate) fn scrape(&self) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("metrics.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Pids of everything that serves a control socket in this agent's directories.
    pub(crate) fn processes(&self) -> Vec<i32> {
        processes_below(self.dir.path())
    }

    /// Asserts that nothing of a VM is left on the host.
    pub(crate) fn assert_nothing_left(&self, id: &str) {
        assert_eq!(self.processes(), Vec::<i32>::new(), "processes are left");
        assert!(
            !self.vm_dir(id).exists(),
            "the directory is left: {:?}",
            files(&self.vm_dir(id))
        );
        let tap = format!("/sys/class/net/mt-{id}-0");
        assert!(!Path::new(&tap).exists(), "{tap} is left");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A machine of one vCPU that boots `kernel`.
pub(crate) fn spec(id: &str, kernel: &Path) -> VmSpec {
    VmSpec {
        id: id.into(),
        generation: 1,
        power: Power::On.into(),
        vcpus: 1,
        memory_bytes: 32 << 20,
        kernel: kernel.display().to_string(),
        shutdown_grace_ms: 200,
        ..VmSpec::default()
    }
}

pub(crate) fn disk(name: &str, image: &Path) -> DiskSpec {
    DiskSpec {
        name: name.into(),
        source: Some(Source::Path(image.display().to_string())),
        ..DiskSpec::default()
    }
}

/// Pid of one of a VM's processes.
pub(crate) fn pid(status: &VmStatus, name: &str) -> i32 {
    let process = status.processes.iter().find(|process| process.name == name);
    process
        .unwrap_or_else(|| panic!("no {name} in {status:#?}"))
        .pid as i32
}

pub(crate) fn kill_hard(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Waits until a process is gone (a zombie is).
pub(crate) async fn gone(pid: i32) {
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} does not end");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Asks again until there is an answer.
pub(crate) async fn poll<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut question: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

pub(crate) fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat[stat.rfind(')').unwrap()..].starts_with(") Z"))
}

/// Whether the agent, which inherits this process's rights, may make taps: CAP_NET_ADMIN is 12.
pub(crate) fn may_make_taps() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << 12 != 0
}

pub(crate) fn files(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A program of this build.
pub(crate) fn built(program: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_node-agent")).with_file_name(program);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build` first",
        path.display()
    );
    path
}

fn spawn(dir: &Path, bin_dir: &Path) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("agent.log"))
        .unwrap();
    Command::new(env!("CARGO_BIN_EXE_node-agent"))
        .arg("--listen")
        .arg(format!("unix:{}", dir.join("agent.sock").display()))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--run-dir")
        .arg(dir.join("run"))
        .arg("--bin-dir")
        .arg(bin_dir)
        .arg("--metrics-listen")
        .arg(format!("unix:{}", dir.join("metrics.sock").display()))
        .args(
            fs::read_to_string(dir.join("agent.args"))
                .unwrap_or_default()
                .lines(),
        )
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

async fn connect_to(dir: &Path) -> NodeAgentClient<Channel> {
    let channel = connect::unix(&dir.join("agent.sock"), PATIENCE)
        .await
        .unwrap_or_else(|error| {
            let log = fs::read_to_string(dir.join("agent.log")).unwrap_or_default();
            panic!("{error}\n{log}");
        });
    NodeAgentClient::new(channel)
}

fn processes_below(dir: &Path) -> Vec<i32> {
    let dir = dir.join("run").display().to_string();
    let serves = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|cmdline| {
            let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            ["--control-socket", "--socket"]
                .iter()
                .any(|option| cmdline.contains(&format!("{option} {dir}")))
        }) && is_alive(*pid)
    };
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(serves)
        .collect()
}

fn logs(dir: &Path) -> String {
    let mut text = String::new();
    for name in files(dir).iter().filter(|name| name.ends_with(".log")) {
        text += &format!("--- {name}\n");
        text += &fs::read_to_string(dir.join(name)).unwrap_or_default();
    }
    text
}
