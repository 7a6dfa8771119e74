//! A controller with its agent, and `vmctl` to talk to it.

use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use guest::plan::Plan;
use serde_json::Value;

use super::CMDLINE;
use crate::guest_run::BOOT_LIMIT;
use crate::process::Process;
use crate::site;

/// One machine's whole control plane, in a folder of its own. Its one VM is called `web`.
pub(super) struct Fleet {
    pub(super) dir: tempfile::TempDir,
    port: u16,
    /// Of the controller.
    options: Vec<String>,
    controller: Process,
    controllers: u32,
}

impl Fleet {
    pub(super) fn start() -> Fleet {
        Self::start_with(vec!["--standalone".to_owned()])
    }

    /// A controller here that manages another machine, whose node agent listens there.
    pub(super) fn start_at(agent: &str) -> Fleet {
        let options = ["--node", agent, "--insecure"];
        Self::start_with(options.map(str::to_owned).to_vec())
    }

    /// A controller with these options.
    pub(super) fn start_with(options: Vec<String>) -> Fleet {
        let dir = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let controller = Self::controller(&dir, port, &options, 1);
        let fleet = Fleet {
            dir,
            port,
            options,
            controller,
            controllers: 1,
        };
        fleet.wait_for_host();
        fleet
    }

    fn controller(dir: &tempfile::TempDir, port: u16, options: &[String], number: u32) -> Process {
        Process::spawn(
            dir.path(),
            &format!("controller-{number}"),
            Command::new(site::program("controller"))
                .args(options)
                .args(["--listen", &format!("127.0.0.1:{port}")])
                .arg("--state-dir")
                .arg(dir.path().join("state"))
                .arg("--run-dir")
                .arg(dir.path().join("run")),
        )
    }

    /// Creates the VM; `more` are further options.
    pub(super) fn create_vm(&self, plan: &Plan, more: &[&str]) {
        self.create_vm_named("web", plan, more);
    }

    /// Creates a VM that the test stops itself, unless it is `web`.
    pub(super) fn create_vm_named(&self, vm: &str, plan: &Plan, more: &[&str]) {
        let machine = machine_options(plan);
        let machine: Vec<&str> = machine.iter().map(String::as_str).collect();
        self.done(&[&["vm", "create", vm], &machine[..], more].concat());
    }

    /// Attaches to a VM's console, from its beginning; prints it to a file.
    pub(super) fn console_of(&self, vm: &str, log: &Path) -> (Child, ChildStdin) {
        let output = std::fs::File::create(log).expect("a log");
        let mut vmctl = self
            .command(&["vm", "console", vm])
            .stdin(Stdio::piped())
            .stdout(output)
            .spawn()
            .expect("vmctl runs");
        let input = vmctl.stdin.take().expect("a pipe");
        (vmctl, input)
    }

    pub(super) fn kill_and_restart_controller(&mut self) {
        self.controller.kill();
        self.controllers += 1;
        self.controller = Self::controller(&self.dir, self.port, &self.options, self.controllers);
        self.wait_for_host();
    }

    pub(super) fn vmctl(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("vmctl runs")
    }

    /// `vmctl`, to be started by the caller.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(site::program("vmctl"));
        command
            .args(["--endpoint", &format!("http://127.0.0.1:{}", self.port)])
            .args(arguments);
        command
    }

    pub(super) fn done(&self, arguments: &[&str]) -> String {
        let output = self.vmctl(arguments);
        assert!(
            output.status.success(),
            "vmctl {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.controller.output()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub(super) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.done(&[arguments, &["-o", "json"]].concat());
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("vmctl {arguments:?}: {error}: {text}"))
    }

    /// What a refused command prints; its exit status is 1.
    pub(super) fn refused(&self, arguments: &[&str]) -> String {
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

    pub(super) fn wait_for_console(&self, text: &str) {
        let deadline = Instant::now() + BOOT_LIMIT;
        let log = self.dir.path().join("console");
        let (mut reader, _input) = self.console_of("web", &log);
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
    pub(super) fn processes(&self) -> Vec<(String, u64)> {
        self.processes_of("web")
    }

    /// The same of a VM of another name.
    pub(super) fn processes_of(&self, vm: &str) -> Vec<(String, u64)> {
        let vm = self.json(&["vm", "show", vm]);
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

    pub(super) fn pid(&self, name: &str) -> i32 {
        let processes = self.processes();
        let found = processes.iter().find(|(process, _)| process == name);
        found.expect("the process runs").1 as i32
    }

    /// Waits until another process of that name runs than the one with `pid`.
    pub(super) fn wait_for_successor(&self, name: &str, pid: i32) {
        wait_until("its successor", || {
            let processes = self.processes();
            let is_other =
                |(process, other): &(String, u64)| process == name && *other != pid as u64;
            processes.iter().any(is_other)
        });
    }

    pub(super) fn phase(&self) -> String {
        self.phase_of("web")
    }

    pub(super) fn wait_until_stopped(&self, vm: &str) {
        wait_until("the guest's shutdown", || {
            self.phase_of(vm).ends_with("stopped")
        });
    }

    /// The same of a VM of another name.
    pub(super) fn phase_of(&self, vm: &str) -> String {
        let vm = self.json(&["vm", "show", vm]);
        find(&vm, "phase")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_lowercase()
    }
}

/// What makes a test guest: for `vmctl vm create` and `vmctl run`.
pub(super) fn machine_options(plan: &Plan) -> Vec<String> {
    let path = |variable| site::path(variable).to_str().expect("UTF-8").to_owned();
    vec![
        "--memory=256M".into(),
        format!("--kernel={}", path("GUEST_KERNEL")),
        format!("--initramfs={}", path("GUEST_INITRD")),
        format!("--cmdline={CMDLINE} {plan}"),
    ]
}

pub(super) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0");
    let address = listener.and_then(|listener| listener.local_addr());
    address.expect("a free port").port()
}

/// Signals a process that was just seen to be this test's.
pub(super) fn kill(pid: i32, signal: i32) {
    // SAFETY: sends a signal; no memory is involved.
    unsafe { libc::kill(pid, signal) };
}

impl Drop for Fleet {
    /// The agent outlives its controller by design, so it is ended here.
    fn drop(&mut self) {
        print_logs_of_failure(self.dir.path());
        let _ = self.vmctl(&["vm", "stop", "web", "--force"]);
        if let Some(pid) = pid_of("node-agent", self.dir.path()) {
            kill(pid, libc::SIGTERM);
        }
    }
}

/// Prints the logs of processes below a folder as it goes out of scope, if the test failed.
pub(super) struct LogsOfFailure<'a>(pub(super) &'a Path);

impl Drop for LogsOfFailure<'_> {
    fn drop(&mut self) {
        print_logs_of_failure(self.0);
    }
}

fn print_logs_of_failure(dir: &Path) {
    if std::thread::panicking() {
        print_logs(dir);
    }
}

/// Repeats what each process said last, in folders below `dir`.
fn print_logs(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            print_logs(&path);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            eprintln!("{}:\n{}", path.display(), last_lines(&text, 8));
        }
    }
}

/// What is read of a failure is its end, so nothing may be long.
pub(super) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The process of that program whose command line names this test's folder.
pub(super) fn pid_of(program: &str, dir: &Path) -> Option<i32> {
    let dir = dir.to_string_lossy().into_owned();
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let cmdline = std::fs::read(entry.path().join("cmdline")).ok()?;
            let cmdline = String::from_utf8_lossy(&cmdline);
            let running = Path::new(cmdline.split('\0').next()?).file_name()?;
            (running == program && cmdline.contains(&dir)).then_some(pid)
        })
}

pub(super) fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => fields
            .get(key)
            .or_else(|| fields.values().find_map(|field| find(field, key))),
        Value::Array(items) => items.iter().find_map(|item| find(item, key)),
        _ => None,
    }
}

pub(super) fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_until_within(what, Duration::from_secs(60), condition);
}

pub(super) fn wait_until_within(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
