//! Controller, agent and daemons are killed in many orders while VMs run. No VM notices, all comes
//! right again, and nothing is left over.
//!
//! One guest writes to its disk all the time and prints what became of each request; the others
//! sleep. Everything is in a network namespace of the test's own, so that every interface that is
//! left over shows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use api::controller as pb;
use api::node::ConsoleInput;
use api::node::node_agent_client::NodeAgentClient;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest;
use crate::harness::{Controller, PATIENCE, built, create_vm_of, poll, poll_async, vm_name};

/// Its guest writes.
const BUSY: &str = "web";
const VMS: [&str; 2] = [BUSY, "db"];
/// Made and taken away while processes die.
const PASSING: &str = "passing";
/// After so many moves all must come right.
const ROUND: u32 = 8;
const LONGEST_PAUSE_MS: u64 = 400;

/// What is done to the processes next.
#[derive(Clone, Copy, Debug)]
enum Move {
    Controller,
    Agent,
    Daemon,
    AgentThenController,
    ControllerThenAgent,
    AgentAndDaemon,
    All,
    /// A controller that has only just begun.
    YoungController,
    /// An agent that has only just begun, and with it a daemon.
    YoungAgent,
    /// A VM is made or taken away; nobody waits for it.
    Change,
}

const MOVES: [Move; 10] = [
    Move::Controller,
    Move::Agent,
    Move::Daemon,
    Move::AgentThenController,
    Move::ControllerThenAgent,
    Move::AgentAndDaemon,
    Move::All,
    Move::YoungController,
    Move::YoungAgent,
    Move::Change,
];

#[test]
fn no_order_of_kills_disturbs_a_vm_or_leaves_anything_over() {
    in_own_network(|| kill_in_order(1, ROUND));
}

#[test]
#[ignore = "long: hundreds of kills"]
fn no_order_of_hundreds_of_kills_disturbs_a_vm_or_leaves_anything_over() {
    for seed in 2..=6 {
        in_own_network(move || kill_in_order(seed, 10 * ROUND));
    }
}

/// Runs a test on a thread whose children see no interface but their own.
fn in_own_network<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let run = move || {
        if let Err(error) = leave_the_hosts_network() {
            eprintln!("skipped: no network of its own: {error}");
            return;
        }
        ip(&["link", "set", "lo", "up"]);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(test());
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// The calling thread does, with a view of /sys that shows its interfaces.
fn leave_the_hosts_network() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let sysfs = Some("sysfs");
    mount(sysfs, "/sys", sysfs, MsFlags::empty(), none)
}

async fn kill_in_order(seed: u64, moves: u32) {
    let mut scene = Scene::new(seed).await;
    let serving = scene.vmm_pids();
    assert_eq!(serving.len(), VMS.len());
    let mut trail = Vec::new();
    for number in 1..=moves {
        let next = MOVES[scene.random.below(MOVES.len() as u64) as usize];
        trail.push(next);
        scene.make(next).await;
        let pause_ms = scene.random.below(LONGEST_PAUSE_MS);
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        if number % ROUND == 0 {
            scene.comes_right(&format!("seed {seed}: {trail:?}")).await;
            assert_eq!(scene.vmm_pids(), serving, "seed {seed}: {trail:?}");
            trail.clear();
        }
    }
    scene.served_all_the_time(BUSY).await;
    scene.clear_away().await;
}

struct Scene {
    dir: tempfile::TempDir,
    controller: Controller,
    random: Random,
}

impl Scene {
    async fn new(seed: u64) -> Self {
        for program in ["node-agent", "vmm-core", "device-blk", "device-net"] {
            built(program);
        }
        let dir = tempfile::tempdir().unwrap();
        let controller = start(dir.path()).await;
        let scene = Self {
            dir,
            controller,
            random: Random(seed),
        };
        for (index, vm) in (1..).zip(VMS) {
            let request = scene.wanted(vm, index);
            let made = scene.controller.vms().create_vm(request).await.unwrap();
            scene.controller.succeeded(made.into_inner()).await;
            let started = scene.controller.start_vm(vm).await;
            scene.controller.succeeded(started).await;
        }
        scene.comes_right("at the start").await;
        scene
    }

    fn wanted(&self, vm: &str, index: u8) -> pb::CreateVmRequest {
        let image = self.dir.path().join(format!("{vm}.raw"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(1 << 20).unwrap();
        let kernel = match vm {
            BUSY => guest::disk_writer(self.dir.path()),
            _ => guest::sleeper(self.dir.path()),
        };
        let spec = pb::VmSpec {
            kernel: text(&kernel),
            memory_bytes: 64 << 20,
            disks: vec![pb::Disk {
                name: "root".into(),
                source: Some(pb::disk::Source::Path(text(&image))),
                ..Default::default()
            }],
            nics: vec![pb::Nic {
                name: "lan".into(),
                host_cidr: format!("198.18.{index}.1/24"),
                ..Default::default()
            }],
            ..Default::default()
        };
        create_vm_of(vm, spec)
    }

    async fn make(&mut self, next: Move) {
        match next {
            Move::Controller => self.replace_controller().await,
            Move::Agent => self.kill("node-agent"),
            Move::Daemon => self.kill_daemon(),
            Move::AgentThenController => {
                self.kill("node-agent");
                self.replace_controller().await;
            }
            Move::ControllerThenAgent => {
                self.controller.signal(Signal::SIGKILL);
                self.kill("node-agent");
                self.replace_controller().await;
            }
            Move::AgentAndDaemon => {
                self.kill("node-agent");
                self.kill_daemon();
            }
            Move::All => {
                self.controller.signal(Signal::SIGKILL);
                for program in ["node-agent", "device-blk", "device-net"] {
                    self.kill(program);
                }
                self.replace_controller().await;
            }
            Move::YoungController => {
                self.controller.signal(Signal::SIGKILL);
                self.controller.wait();
                let young = Command::new(built("controller"))
                    .args(["--listen", "127.0.0.1:0"])
                    .args(options(self.dir.path()))
                    .spawn();
                let mut young = young.unwrap();
                let age_ms = self.random.below(150);
                tokio::time::sleep(Duration::from_millis(age_ms)).await;
                let _ = young.kill();
                let _ = young.wait();
                self.replace_controller().await;
            }
            Move::YoungAgent => {
                let before = self.pids("node-agent");
                self.kill("node-agent");
                // A new controller does not wait before it starts one.
                self.replace_controller().await;
                poll("another agent", || {
                    let now = self.pids("node-agent");
                    (!now.is_empty() && now != before).then_some(())
                });
                let age_ms = self.random.below(100);
                tokio::time::sleep(Duration::from_millis(age_ms)).await;
                self.kill("node-agent");
                self.kill_daemon();
            }
            Move::Change => self.change().await,
        }
    }

    async fn replace_controller(&mut self) {
        // It may be dead already.
        let _ = kill(self.controller.pid(), Signal::SIGKILL);
        self.controller.wait();
        self.controller = start(self.dir.path()).await;
    }

    fn kill(&self, program: &str) {
        for pid in self.pids(program) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    fn kill_daemon(&mut self) {
        let program = ["device-blk", "device-net"][self.random.below(2) as usize];
        let pids = self.pids(program);
        if pids.is_empty() {
            return;
        }
        let pid = pids[self.random.below(pids.len() as u64) as usize];
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }

    /// What is refused because of what happens at the same time stays undone.
    async fn change(&mut self) {
        let mut vms = self.controller.vms();
        let name = vm_name(PASSING);
        let get = pb::GetVmRequest { name: name.clone() };
        match vms.get_vm(get).await {
            Err(_) => {
                let _ = vms.create_vm(self.wanted(PASSING, 3)).await;
                let request = pb::StartVmRequest {
                    name,
                    ..Default::default()
                };
                let _ = vms.start_vm(request).await;
            }
            Ok(_) => {
                let _ = vms.stop_vm(forced_stop(PASSING)).await;
                let request = pb::DeleteVmRequest {
                    name,
                    ..Default::default()
                };
                let _ = vms.delete_vm(request).await;
            }
        }
    }

    /// Waits until every VM that is to run does, with all its devices, and exactly the processes
    /// run that this takes.
    async fn comes_right(&self, after: &str) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let wrong = match self.wrong().await {
                None => return,
                Some(wrong) => wrong,
            };
            assert!(
                tokio::time::Instant::now() < deadline,
                "{after}: {wrong}\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn wrong(&self) -> Option<String> {
        let request = pb::ListVmsRequest {
            parent: "projects/default".into(),
            ..Default::default()
        };
        let vms = match self.controller.vms().list_vms(request).await {
            Ok(listed) => listed.into_inner().vms,
            Err(status) => return Some(format!("{status}")),
        };
        let operations = pb::ListOperationsRequest::default();
        let mut client = self.controller.operations();
        let operations = client.list_operations(operations);
        let under_way = operations.await.unwrap().into_inner().operations;
        if let Some(operation) = under_way.iter().find(|operation| !operation.done) {
            return Some(format!("{operation:?}"));
        }
        let mut wanted = BTreeMap::from([("controller", 1), ("node-agent", 1)]);
        for vm in vms {
            let status = vm.status.unwrap_or_default();
            let is_passing = vm.name == vm_name(PASSING);
            if status.phase() != pb::VmPhase::Running {
                // A start that was killed may have failed; then nothing runs of it.
                let is_at_rest = matches!(
                    status.phase(),
                    pb::VmPhase::Pending | pb::VmPhase::Stopped | pb::VmPhase::Failed
                );
                if is_passing && is_at_rest {
                    continue;
                }
                return Some(format!("{}: {status:?}", vm.name));
            }
            let is_served =
                status.devices.len() == 2 && status.devices.iter().all(|device| device.connected);
            if status.stale || !is_served || status.resets > 0 {
                return Some(format!("{}: {status:?}", vm.name));
            }
            for program in ["vmm-core", "device-blk", "device-net"] {
                *wanted.entry(program).or_default() += 1;
            }
        }
        let running = self.running();
        let counted = running
            .iter()
            .map(|(name, pids)| (name.as_str(), pids.len()));
        let counted: BTreeMap<&str, usize> = counted.collect();
        (counted != wanted).then(|| format!("processes {running:?}, not {wanted:?}"))
    }

    /// By the names of their programs.
    fn running(&self) -> BTreeMap<String, Vec<i32>> {
        let ours = text(self.dir.path());
        let mut found: BTreeMap<String, Vec<i32>> = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline);
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let program = cmdline.split('\0').next().map(Path::new);
            let name = program.and_then(Path::file_name);
            if let (Some(pid), Some(name), true) = (pid, name, cmdline.contains(&ours)) {
                let name = name.to_string_lossy().into_owned();
                found.entry(name).or_default().push(pid);
            }
        }
        found.values_mut().for_each(|pids| pids.sort_unstable());
        found
    }

    fn pids(&self, program: &str) -> Vec<i32> {
        self.running().remove(program).unwrap_or_default()
    }

    /// Of the VMs that stay.
    fn vmm_pids(&self) -> Vec<i32> {
        let stays = |pid: &i32| {
            let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            !String::from_utf8_lossy(&cmdline).contains(PASSING)
        };
        self.pids("vmm-core").into_iter().filter(stays).collect()
    }

    /// The guest prints a `0` for each request that was done, and a `1` for one that failed.
    async fn served_all_the_time(&self, vm: &str) {
        let mut printed = self.printed(vm, 0).await;
        assert!(
            printed.text.starts_with(guest::GREETING),
            "{vm} printed more"
        );
        let results = &printed.text[guest::GREETING.len()..];
        let is_sound = results.bytes().all(|result| result == b'0');
        assert!(is_sound, "{vm}: a request failed: {results}");
        let before = printed.end;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while printed.end == before {
            assert!(tokio::time::Instant::now() < deadline, "{vm} stands still");
            printed = self.printed(vm, before).await;
        }
    }

    async fn printed(&self, vm: &str, offset: u64) -> Printed {
        let socket = self.dir.path().join("r/node-agent.sock");
        let channel = api::connect::unix(&socket, PATIENCE).await.unwrap();
        let first = ConsoleInput {
            vm_id: self.node_id(vm).await,
            data: Vec::new(),
            from_offset: offset,
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        sender.send(first).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut agent = NodeAgentClient::new(channel);
        let mut output = agent.console(stream).await.unwrap().into_inner();
        let mut printed = Printed {
            end: offset,
            text: String::new(),
        };
        // What is there comes at once; a guest that writes all the time is not listened to for ever.
        let enough = tokio::time::Instant::now() + Duration::from_secs(2);
        while let Ok(message) = tokio::time::timeout_at(enough, output.message()).await {
            let Some(message) = message.unwrap() else {
                break;
            };
            assert_eq!(message.offset, printed.end, "nothing is missing");
            printed.end += message.data.len() as u64;
            printed.text += &String::from_utf8_lossy(&message.data);
        }
        printed
    }

    /// What the agent calls a VM.
    async fn node_id(&self, vm: &str) -> String {
        let dirs = std::fs::read_dir(self.dir.path().join("r/vms")).unwrap();
        let mut names = dirs.map(|dir| dir.unwrap().file_name().into_string().unwrap());
        names.find(|name| name.contains(vm)).unwrap()
    }

    /// Ends everything in the orderly way, and looks at what is left.
    async fn clear_away(mut self) {
        for vm in VMS.into_iter().chain([PASSING]) {
            let get = pb::GetVmRequest { name: vm_name(vm) };
            if self.controller.vms().get_vm(get).await.is_err() {
                continue;
            }
            let stopped = self.controller.vms().stop_vm(forced_stop(vm)).await;
            self.controller
                .succeeded(stopped.unwrap().into_inner())
                .await;
            let request = pb::DeleteVmRequest {
                name: vm_name(vm),
                ..Default::default()
            };
            let deleted = self.controller.vms().delete_vm(request).await.unwrap();
            self.controller.succeeded(deleted.into_inner()).await;
        }
        let left = || async { self.running().into_keys().collect::<Vec<_>>() };
        poll_async("the end of all that served VMs", left, |left| {
            *left == ["controller", "node-agent"]
        })
        .await;
        assert_eq!(interfaces(), ["lo"]);
        self.controller.signal(Signal::SIGTERM);
        assert!(self.controller.wait().success());
        for pid in self.pids("node-agent") {
            kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        }
        poll("the agent's end", || {
            self.running().is_empty().then_some(())
        });
        assert_eq!(
            sockets_below(&self.dir.path().join("r")),
            Vec::<PathBuf>::new()
        );
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("s/node-agent.log"));
        let log = log.unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Scene {
    /// VMs and their agent outlive the controller, also that of a test that failed.
    fn drop(&mut self) {
        let _ = kill(self.controller.pid(), Signal::SIGKILL);
        for (_, pids) in self.running() {
            for pid in pids {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

struct Printed {
    text: String,
    end: u64,
}

fn options(dir: &Path) -> [String; 5] {
    [
        "--standalone".into(),
        "--state-dir".into(),
        text(&dir.join("s")),
        "--run-dir".into(),
        text(&dir.join("r")),
    ]
}

async fn start(dir: &Path) -> Controller {
    let options = options(dir);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    Controller::start(&options).await
}

fn forced_stop(vm: &str) -> pb::StopVmRequest {
    pb::StopVmRequest {
        name: vm_name(vm),
        force: true,
        ..Default::default()
    }
}

/// Of this thread's network namespace.
fn interfaces() -> Vec<String> {
    let listed = ip(&["-o", "link", "show"]);
    let names = listed.lines().filter_map(|line| line.split(": ").nth(1));
    names.map(str::to_owned).collect()
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn sockets_below(dir: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(sockets_below(&entry.path()));
        } else if kind.is_socket() {
            found.push(entry.path());
        }
    }
    found
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Xorshift: the same order again for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
