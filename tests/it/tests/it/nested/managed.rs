//! The whole system around one real guest: controller and agent are killed, the guest runs on.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use guest::plan::{End, Job, Plan};
use serde_json::Value;

use super::CMDLINE;
use crate::guest_run::BOOT_LIMIT;
use crate::process::Process;
use crate::qemu_frontend::expect_pattern;
use crate::site;

const SEED: u64 = 0xadab7;
const LEN_BYTES: u64 = 1 << 20;

struct Fleet {
    dir: tempfile::TempDir,
    port: u16,
    controller: Process,
    controllers: u32,
}

impl Fleet {
    fn start() -> Fleet {
        let dir = tempfile::tempdir().expect("a folder");
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .port();
        let controller = Self::controller(&dir, port, 1);
        let fleet = Fleet {
            dir,
            port,
            controller,
            controllers: 1,
        };
        fleet.wait_for_host();
        fleet
    }

    fn controller(dir: &tempfile::TempDir, port: u16, number: u32) -> Process {
        Process::spawn(
            dir.path(),
            &format!("controller-{number}"),
            Command::new(site::program("controller"))
                .args(["--standalone", "--listen", &format!("127.0.0.1:{port}")])
                .arg("--state-dir")
                .arg(dir.path().join("state"))
                .arg("--run-dir")
                .arg(dir.path().join("run")),
        )
    }

    fn kill_and_restart_controller(&mut self) {
        self.controller.kill();
        self.controllers += 1;
        self.controller = Self::controller(&self.dir, self.port, self.controllers);
        self.wait_for_host();
    }

    fn vmctl(&self, arguments: &[&str]) -> Output {
        Command::new(site::program("vmctl"))
            .args(["--endpoint", &format!("http://127.0.0.1:{}", self.port)])
            .args(arguments)
            .output()
            .expect("vmctl runs")
    }

    fn done(&self, arguments: &[&str]) -> String {
        let output = self.vmctl(arguments);
        assert!(
            output.status.success(),
            "vmctl {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.controller.output()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.done(&[arguments, &["-o", "json"]].concat());
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("vmctl {arguments:?}: {error}: {text}"))
    }

    /// What a refused command prints; its exit status is 1.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.vmctl(arguments);
        assert_eq!(
            output.status.code(),
            Some(1),
            "vmctl {arguments:?}: {output:?}"
        );
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn wait_for_host(&self) {
        wait_until("a connected host", || {
            let output = self.vmctl(&["host", "list", "-o", "json"]);
            String::from_utf8_lossy(&output.stdout)
                .replace(' ', "")
                .contains("\"connected\":true")
        });
    }

    fn wait_for_console(&self, text: &str) {
        let deadline = Instant::now() + BOOT_LIMIT;
        let log = self.dir.path().join("console");
        let output = std::fs::File::create(&log).expect("a log");
        let mut reader = Command::new(site::program("vmctl"))
            .args([
                "--endpoint",
                &format!("http://127.0.0.1:{}", self.port),
                "vm",
                "console",
                "web",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(output)
            .spawn()
            .expect("vmctl runs");
        let seen = loop {
            let console = std::fs::read_to_string(&log).unwrap_or_default();
            if console.contains(text) || Instant::now() > deadline {
                break console;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let _ = reader.kill();
        let _ = reader.wait();
        assert!(
            seen.contains(text),
            "no {text:?} on the console:\n{seen}\n{}",
            self.controller.output()
        );
    }

    /// (name, pid) of the VM's processes.
    fn processes(&self) -> Vec<(String, u64)> {
        let vm = self.json(&["vm", "show", "web"]);
        let list = find(&vm, "processes")
            .and_then(Value::as_array)
            .expect("processes are shown");
        let mut processes: Vec<(String, u64)> = list
            .iter()
            .map(|process| {
                let name = process["name"].as_str().expect("a name").to_owned();
                (name, process["pid"].as_u64().expect("a pid"))
            })
            .collect();
        processes.sort();
        processes
    }

    fn phase(&self) -> String {
        let vm = self.json(&["vm", "show", "web"]);
        find(&vm, "phase")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_lowercase()
    }
}

impl Drop for Fleet {
    /// The agent outlives its controller by design, so it is ended here.
    fn drop(&mut self) {
        let _ = self.vmctl(&["vm", "stop", "web", "--force"]);
        if let Some(pid) = agent_pid(self.dir.path()) {
            // SAFETY: sends a signal; the pid was just seen to be this test's agent.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
    }
}

/// The node agent whose command line names this test's folder.
fn agent_pid(dir: &std::path::Path) -> Option<i32> {
    let dir = dir.to_string_lossy().into_owned();
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let cmdline = std::fs::read(entry.path().join("cmdline")).ok()?;
            let cmdline = String::from_utf8_lossy(&cmdline);
            let program = cmdline.split('\0').next()?;
            (program.ends_with("node-agent") && cmdline.contains(&dir)).then_some(pid)
        })
}

fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => fields
            .get(key)
            .or_else(|| fields.values().find_map(|field| find(field, key))),
        Value::Array(items) => items.iter().find_map(|item| find(item, key)),
        _ => None,
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_vm_runs_on_while_controller_and_agent_are_killed_and_is_adopted() {
    let mut fleet = Fleet::start();
    fleet.done(&["volume", "create", "data", "--size", "16M"]);
    let plan = Plan {
        jobs: vec![Job::Disk {
            device: "vda".into(),
            seed: SEED,
            bytes: LEN_BYTES,
        }],
        end: End::Wait,
        ..Plan::default()
    };
    let (kernel, initrd) = (site::path("GUEST_KERNEL"), site::path("GUEST_INITRD"));
    let cmdline = format!("{CMDLINE} {plan}");
    fleet.done(&[
        "vm",
        "create",
        "web",
        "--cpus",
        "1",
        "--memory",
        "256M",
        "--kernel",
        kernel.to_str().expect("UTF-8"),
        "--initramfs",
        initrd.to_str().expect("UTF-8"),
        "--cmdline",
        &cmdline,
        "--disk",
        "volume=data",
    ]);
    fleet.done(&["vm", "start", "web"]);
    let processes = fleet.processes();
    let names: Vec<&str> = processes.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["device-blk", "vmm-core"]);

    // Before the guest is done, both of its masters die and come back.
    let agent = agent_pid(fleet.dir.path()).expect("a node agent runs");
    // SAFETY: sends a signal; the pid was just seen to be this test's agent.
    unsafe { libc::kill(agent, libc::SIGKILL) };
    fleet.kill_and_restart_controller();
    wait_until("another agent", || {
        agent_pid(fleet.dir.path()).is_some_and(|pid| pid != agent)
    });
    fleet.wait_for_console("\"job\":\"done\",\"failed\":0");
    wait_until("the VM's adoption", || fleet.phase().ends_with("running"));
    assert_eq!(fleet.processes(), processes, "the same processes as before");

    let error = fleet.refused(&["vm", "delete", "web"]);
    assert!(
        error.contains("vmctl vm stop web"),
        "a remedy is named: {error}"
    );
    let error = fleet.refused(&["volume", "delete", "data"]);
    assert!(
        error.contains("web"),
        "the VM that uses it is named: {error}"
    );

    fleet.done(&["vm", "stop", "web"]);
    wait_until("the guest's shutdown", || {
        fleet.phase().ends_with("stopped")
    });
    let volume = fleet.json(&["volume", "show", "data"]);
    let image = PathBuf::from(
        find(&volume, "path")
            .and_then(Value::as_str)
            .expect("a path"),
    );
    expect_pattern(&image, SEED, LEN_BYTES);
    for (name, pid) in processes {
        assert!(
            !PathBuf::from(format!("/proc/{pid}")).exists(),
            "{name} is left over"
        );
    }
    fleet.done(&["vm", "delete", "web"]);
    fleet.done(&["volume", "delete", "data"]);
    assert!(!image.exists());
}
