//! Rolling upgrades with real agents: what works takes over under running VMs, what does not is rolled back.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use api::controller as pb;
use api::controller::host_upgrades_client::HostUpgradesClient;
use api::errors::reason;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use crate::guest;
use crate::harness::{Controller, built, create_vm_of, poll_async};

/// A controller and as many hosts on this machine as there are names. All of it ends when dropped.
struct Fleet {
    dir: tempfile::TempDir,
    agents: Vec<(String, Child)>,
    controller: Controller,
    /// Of VMs.
    pids: Vec<i32>,
}

impl Fleet {
    async fn start(names: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agents = names.iter().map(|name| {
            let child = Command::new(built("node-agent"))
                .args([
                    "--listen",
                    &format!("unix:{}", dir.path().join(name).display()),
                ])
                .arg("--state-dir")
                .arg(dir.path().join(format!("{name}.state")))
                .arg("--run-dir")
                .arg(dir.path().join(format!("{name}.run")))
                .args(["--zone", name, "--label", &format!("name={name}")])
                .env("MORTISE_LOG", "info")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(fs::File::create(dir.path().join(format!("{name}.log"))).unwrap())
                .spawn()
                .unwrap();
            ((*name).to_owned(), child)
        });
        let agents: Vec<_> = agents.collect();
        let controller = Self::controller(dir.path(), names).await;
        controller.connected(names.len()).await;
        Self {
            dir,
            agents,
            controller,
            pids: Vec::new(),
        }
    }

    async fn controller(dir: &Path, names: &[&str]) -> Controller {
        let mut args = vec!["--state-dir".to_owned(), text(&dir.join("state"))];
        for name in names {
            args.push("--node".to_owned());
            args.push(format!("unix:{}", dir.join(name).display()));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Controller::start(&args).await
    }

    async fn replace_controller(&mut self) {
        self.controller.signal(Signal::SIGKILL);
        self.controller.wait();
        let names = self.agents.iter().map(|(name, _)| name.as_str());
        self.controller = Self::controller(self.dir.path(), &names.collect::<Vec<_>>()).await;
    }

    /// The names of the hosts in the order of their agents.
    async fn hosts(&self) -> Vec<String> {
        let hosts = self.controller.connected(self.agents.len()).await;
        let of = |name: &String| {
            let zone = |host: &&pb::Host| host.inventory.as_ref().unwrap().zone == *name;
            hosts.iter().find(zone).expect("it is there").name.clone()
        };
        self.agents.iter().map(|(name, _)| of(name)).collect()
    }

    async fn upgrade(&self, request: pb::UpgradeHostsRequest) -> pb::Operation {
        let mut client = HostUpgradesClient::new(self.controller.channel.clone());
        client.upgrade_hosts(request).await.unwrap().into_inner()
    }

    /// What the process of an agent executes.
    fn program(&self, agent: usize) -> PathBuf {
        let pid = self.agents[agent].1.id();
        fs::read_link(format!("/proc/{pid}/exe")).unwrap()
    }

    /// A program that answers as the agent does when it is asked what it is, and then does this.
    fn broken(&self, name: &str, then: &str) -> String {
        let path = self.dir.path().join(name);
        let agent = text(&built("node-agent"));
        let script = format!(
            "#!/bin/sh\ncase \"$1\" in --version|probe) exec {agent} \"$@\";; esac\n{then}\n"
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        text(&path)
    }

    /// Another build of the agent: the same with a few bytes more.
    fn next(&self) -> PathBuf {
        let dir = self.dir.path().join("next");
        fs::create_dir(&dir).unwrap();
        let path = dir.join("node-agent");
        fs::copy(built("node-agent"), &path).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"next").unwrap();
        path
    }

    /// A VM that runs, and the pids of its processes.
    async fn running_vm(&mut self) -> Vec<(String, u32)> {
        let image = self.dir.path().join("root.raw");
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let spec = pb::VmSpec {
            kernel: text(&guest::sleeper(self.dir.path())),
            memory_bytes: 64 << 20,
            disks: vec![pb::Disk {
                name: "root".into(),
                source: Some(pb::disk::Source::Path(text(&image))),
                ..Default::default()
            }],
            ..Default::default()
        };
        let c = &self.controller;
        let made = c.vms().create_vm(create_vm_of("web", spec)).await.unwrap();
        c.succeeded(made.into_inner()).await;
        c.succeeded(c.start_vm("web").await).await;
        let processes = self.processes().await;
        self.pids = processes.iter().map(|(_, pid)| *pid as i32).collect();
        processes
    }

    async fn processes(&self) -> Vec<(String, u32)> {
        let status = self.controller.vm("web").await.status.unwrap();
        assert_eq!(status.phase(), pb::VmPhase::Running);
        let processes = status.processes.iter();
        let processes = processes.map(|process| (process.name.clone(), process.pid));
        processes.collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for (_, agent) in &mut self.agents {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        for pid in &self.pids {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_are_exchanged_in_their_place_while_a_vm_runs_and_the_controller_dies() {
    for program in ["vmm-core", "device-blk", "device-net"] {
        built(program);
    }
    let mut fleet = Fleet::start(&["a", "b"]).await;
    let hosts = fleet.hosts().await;
    let processes = fleet.running_vm().await;
    let next = fleet.next();
    let request = pb::UpgradeHostsRequest {
        hosts: vec![hosts[1].clone(), hosts[0].clone()],
        agent_binary: text(&next),
        request_id: "once".into(),
        ..Default::default()
    };
    let begun = fleet.upgrade(request.clone()).await;
    let other = pb::UpgradeHostsRequest {
        request_id: "other".into(),
        ..request.clone()
    };
    let mut client = HostUpgradesClient::new(fleet.controller.channel.clone());
    let refused = client.upgrade_hosts(other.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(reason(&refused).as_deref(), Some("UPGRADE_UNDER_WAY"));

    // The controller dies when the first has begun, and the next one goes on with it.
    let left = || async { fleet.program(1) };
    poll_async("the first exchange", left, |program| *program == next).await;
    fleet.replace_controller().await;
    let again = fleet.upgrade(request).await;
    assert_eq!(again.name, begun.name, "it is one upgrade");
    let done = fleet.controller.done(begun).await;
    assert_eq!(done.error, None);
    let findings = done.metadata.unwrap().findings;
    assert_eq!(findings.len(), 2, "{findings:?}");
    assert!(findings[0].contains(&text(&next)), "{findings:?}");
    for agent in [0, 1] {
        // The process that was started here: its pid is the same.
        assert_eq!(fleet.program(agent), next);
    }
    assert_eq!(fleet.processes().await, processes, "they were not touched");

    // What runs already is not exchanged again.
    let again = fleet.upgrade(other).await;
    fleet.controller.succeeded(again).await;
    assert_eq!(fleet.processes().await, processes);
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_ends_or_hangs_is_rolled_back_and_no_further_host_begins() {
    let fleet = Fleet::start(&["a", "b"]).await;
    let hosts = fleet.hosts().await;
    let before = fs::canonicalize(built("node-agent")).unwrap();
    let cases = [
        ("ends", "exit 3", 60_000, "ended with status 3"),
        (
            "hangs",
            "exec sleep 1000",
            2_000,
            "was not found well within 2 s",
        ),
    ];
    for (name, then, confirm_ms, why) in cases {
        let request = pb::UpgradeHostsRequest {
            hosts: hosts.clone(),
            agent_binary: fleet.broken(name, then),
            confirm_ms,
            ..Default::default()
        };
        let begun = fleet.upgrade(request).await;
        let done = fleet.controller.done(begun).await;
        let error = done.error.unwrap();
        assert_eq!(error.reason, "HOST_UPGRADE_FAILED");
        assert!(
            error.message.contains("was rolled back") && error.message.contains(why),
            "{}",
            error.message
        );
        let left = format!(
            "done: none; not begun: {}",
            hosts[1].trim_start_matches("hosts/")
        );
        assert!(error.message.contains(&left), "{}", error.message);
        // Both answer, and the process is what it was.
        assert_eq!(fleet.hosts().await, hosts);
        for agent in [0, 1] {
            assert_eq!(fleet.program(agent), before);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_agent_is_refused_before_anything_is_touched() {
    let fleet = Fleet::start(&["a"]).await;
    let broken = fleet.broken("mute", "exec sleep 1000");
    let agent = text(&built("node-agent"));
    let device_blk = text(&built("device-blk"));
    let check = |agent_binary: &str, device_blk: &str| pb::UpgradeHostsRequest {
        selector: [("name".to_owned(), "a".to_owned())].into(),
        agent_binary: agent_binary.to_owned(),
        device_blk: device_blk.to_owned(),
        validate_only: true,
        ..Default::default()
    };
    let well = fleet.upgrade(check(&agent, &device_blk)).await;
    assert!(well.done && well.error.is_none(), "{well:?}");
    let findings = well.metadata.unwrap().findings;
    assert!(findings[0].contains("would get node-agent"), "{findings:?}");
    for (request, why) in [
        (check("/bin/false", ""), "is not node-agent"),
        (check("/bin/sleep", ""), "is not node-agent"),
        (check("/nowhere", ""), "does not exist"),
        (check("", &agent), "is not device-blk"),
        (check(&broken, "/bin/false"), "is not device-blk"),
    ] {
        let refused = fleet.upgrade(request).await.error.unwrap();
        assert!(refused.message.contains(why), "{}", refused.message);
    }
    // Really asked for, it is the same.
    let request = pb::UpgradeHostsRequest {
        validate_only: false,
        ..check("/bin/false", "")
    };
    let begun = fleet.upgrade(request).await;
    let error = fleet.controller.done(begun).await.error.unwrap();
    assert!(
        error.message.contains("is not node-agent"),
        "{}",
        error.message
    );
    let before = fs::canonicalize(built("node-agent")).unwrap();
    assert_eq!(fleet.program(0), before);
}
