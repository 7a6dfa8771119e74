//! `vmctl` as typed, against a controller and a node agent that it starts itself, with guests of a
//! few instructions on `/dev/kvm`.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Nothing here takes this long, even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Directories, a port and guests; controller and agent end with it.
struct Home {
    dir: tempfile::TempDir,
    endpoint: String,
}

impl Home {
    fn new() -> Self {
        for program in ["controller", "node-agent", "vmm-core"] {
            let path = Path::new(env!("CARGO_BIN_EXE_vmctl")).with_file_name(program);
            assert!(
                path.is_file(),
                "{} is missing: cargo build -p {program}",
                path.display()
            );
        }
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("sleeper"),
            elf(&[greeting(), halt()].concat()),
        )
        .unwrap();
        fs::write(dir.path().join("listener"), elf(&listener())).unwrap();
        fs::write(dir.path().join("corrupt"), [0; 8192]).unwrap();
        Self {
            dir,
            endpoint: format!("http://127.0.0.1:{port}"),
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command
            .current_dir(self.dir.path())
            .env("MORTISE_ENDPOINT", &self.endpoint)
            .args(args);
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Succeeds, and this is what it printed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[args, &["-o", "json"]].concat())).unwrap()
    }

    /// `vmctl run`, with this home's directories for the controller that it may start.
    fn run(&self, args: &[&str]) -> Command {
        let mut command = self.command(&["run", "--memory", "32M"]);
        command
            .arg("--state-dir")
            .arg(self.path("s"))
            .arg("--run-dir")
            .arg(self.path("r"));
        command.args(args);
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pid(&self, file: &str) -> Option<Pid> {
        fs::read_to_string(self.path(file))
            .ok()?
            .trim()
            .parse()
            .ok()
            .map(Pid::from_raw)
    }

    fn vm_ids(&self) -> Vec<String> {
        let vms = self.json(&["vm", "list"]);
        let id = |vm: &Value| {
            vm["name"]
                .as_str()
                .unwrap()
                .rsplit('/')
                .next()
                .unwrap()
                .to_owned()
        };
        vms.as_array().unwrap().iter().map(id).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(controller) = self.pid("s/controller.lock") {
            for vm in self.vm_ids() {
                self.output(&["vm", "delete", "--force", &vm]);
            }
            let _ = kill(controller, Signal::SIGTERM);
        }
        if let Some(agent) = self.pid("r/node-agent.pid") {
            let _ = kill(agent, Signal::SIGTERM);
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn poll<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn wait(child: &mut Child) -> i32 {
    poll("the end of vmctl", || child.try_wait().unwrap())
        .code()
        .unwrap_or(-1)
}

#[test]
fn run_starts_a_controller_boots_types_and_ends_with_the_guest() {
    let home = Home::new();
    let mut child = home
        .run(&["--kernel", "listener", "--name", "echo", "--rm"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut greeting = [0; 6];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"hello\n");
    // The guest switches itself off when a key is pressed.
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(wait(&mut child), 0, "a clean shutdown is success");
    assert_eq!(home.vm_ids(), Vec::<String>::new(), "--rm deleted it");
    assert!(
        home.pid("s/controller.lock").is_some(),
        "the controller stays"
    );
}

#[test]
fn vm_is_managed_by_its_name_and_survives_the_controller() {
    let home = Home::new();
    let detached = home
        .run(&["--kernel", "sleeper", "--name", "web", "--detach"])
        .output();
    assert!(
        detached.as_ref().unwrap().status.success(),
        "{}",
        stderr(&detached.unwrap())
    );
    let shown = home.json(&["vm", "show", "web"]);
    assert_eq!(shown["status"]["phase"], "VM_PHASE_RUNNING");
    let vmm_pid = shown["status"]["processes"][0]["pid"].as_u64().unwrap();

    let refused = home.output(&["vm", "delete", "web"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("vmctl vm stop web"),
        "{}",
        stderr(&refused)
    );

    let first = home.pid("s/controller.lock").unwrap();
    kill(first, Signal::SIGKILL).unwrap();
    poll("the end of the controller", || {
        kill(first, None).is_err().then_some(())
    });
    let other = home
        .run(&["--kernel", "sleeper", "--name", "other", "--detach"])
        .output()
        .unwrap();
    assert!(other.status.success(), "{}", stderr(&other));
    let shown = home.json(&["vm", "show", "web"]);
    assert_eq!(shown["status"]["phase"], "VM_PHASE_RUNNING");
    assert_eq!(
        shown["status"]["processes"][0]["pid"].as_u64(),
        Some(vmm_pid),
        "the same process"
    );

    home.ok(&["vm", "reset", "web"]);
    home.ok(&["vm", "stop", "--force", "web"]);
    home.ok(&["vm", "delete", "web"]);
    assert_eq!(home.vm_ids(), ["other"]);
    let events = home.ok(&["events", "--vm", "web"]);
    for reason in ["VM_CREATED", "VM_RUNNING", "VM_STOPPED", "VM_DELETED"] {
        assert!(events.contains(reason), "{reason} is not in {events}");
    }
    let operations = home.json(&["op", "list"]);
    assert!(
        operations
            .as_array()
            .unwrap()
            .iter()
            .all(|operation| operation["done"] == true)
    );
}

#[test]
fn failed_start_is_one_clear_error_and_leaves_nothing() {
    let home = Home::new();
    for (args, word) in [
        (&["--kernel", "corrupt"][..], "no kernel"),
        (&["--kernel", "missing"], "missing"),
        (&["--kernel", "sleeper", "--disk", "no.raw"], "no.raw"),
    ] {
        let output = home.run(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        let errors = error
            .lines()
            .filter(|line| line.starts_with("vmctl: error:"))
            .count();
        assert!(errors == 1 && error.contains(word), "{error}");
        assert_eq!(home.vm_ids(), Vec::<String>::new());
    }
}

#[test]
fn interrupted_run_with_rm_deletes_the_vm() {
    let home = Home::new();
    let mut child = home
        .run(&["--kernel", "sleeper", "--name", "web", "--rm"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut greeting = [0; 6];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut greeting)
        .unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(wait(&mut child), 1);
    assert_eq!(home.vm_ids(), Vec::<String>::new());
}

#[test]
fn spec_file_is_what_show_prints() {
    let home = Home::new();
    let mut run = home.run(&[
        "--kernel", "sleeper", "--name", "a", "--cpus", "2", "--detach",
    ]);
    assert!(run.output().unwrap().status.success());
    let shown = home.json(&["vm", "show", "a"]);
    fs::write(home.path("spec.json"), shown["spec"].to_string()).unwrap();
    home.ok(&["vm", "create", "b", "-f", "spec.json", "--memory", "64M"]);
    let copy = home.json(&["vm", "show", "b"]);
    assert_eq!(copy["spec"]["vcpus"], 2);
    assert_eq!(copy["spec"]["memory_bytes"], 64 << 20);
    fs::write(home.path("bad.json"), r#"{"vcpu": 2}"#).unwrap();
    let bad = home.output(&["vm", "create", "c", "-f", "bad.json"]);
    assert!(stderr(&bad).contains("vcpu"), "{}", stderr(&bad));
    fs::write(home.path("many.json"), r#"{"vcpus": 99}"#).unwrap();
    let invalid = home.output(&[
        "vm",
        "create",
        "c",
        "-f",
        "many.json",
        "--kernel",
        "sleeper",
    ]);
    assert_eq!(invalid.status.code(), Some(1));
    assert!(
        stderr(&invalid).contains("vm.spec.vcpus"),
        "{}",
        stderr(&invalid)
    );
}

#[test]
fn exit_status_tells_failure_from_misuse() {
    let home = Home::new();
    let nobody = home.output(&["vm", "list"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(
        stderr(&nobody).contains("controller --standalone"),
        "{}",
        stderr(&nobody)
    );
    assert_eq!(home.output(&["vm", "frobnicate"]).status.code(), Some(2));
    assert_eq!(
        home.output(&["run", "--memory", "lots"]).status.code(),
        Some(2)
    );
    for shell in ["bash", "zsh", "fish"] {
        assert!(home.ok(&["completion", shell]).contains("vmctl"));
    }
}

fn greeting() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8 (COM1)
    for byte in b"hello\n" {
        code.extend([0xb0, *byte, 0xee]); // mov al, byte; out dx, al
    }
    code
}

fn halt() -> Vec<u8> {
    vec![0xf4, 0xeb, 0xfd] // hlt; jmp back to it
}

/// Greets, then switches itself off when a byte arrives on its console.
fn listener() -> Vec<u8> {
    let wait_for_byte = [
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd (line status)
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1 (data ready)
        0x74, 0xfb, // jz back to in
    ];
    let power_off = [
        0x66, 0xba, 0x00, 0x06, // mov dx, 0x600 (ACPI sleep control)
        0xb0, 0x34, // mov al, S5 << 2 | enable
        0xee, // out dx, al
    ];
    [
        greeting(),
        wait_for_byte.to_vec(),
        power_off.to_vec(),
        halt(),
    ]
    .concat()
}

/// A kernel: an ELF file entered in 64-bit mode at the first byte above the legacy megabyte.
fn elf(code: &[u8]) -> Vec<u8> {
    const LOAD: u64 = 0x10_0000;
    const CODE_AT: u64 = 0x1000;
    let len = code.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
    image.extend(1u32.to_le_bytes());
    image.extend([LOAD, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    image.extend(0u32.to_le_bytes());
    image.extend(
        [64u16, 56, 1, 0, 0, 0]
            .into_iter()
            .flat_map(u16::to_le_bytes),
    );
    image.extend([1u32, 5].into_iter().flat_map(u32::to_le_bytes));
    image.extend(
        [CODE_AT, LOAD, LOAD, len, len, 0x1000]
            .into_iter()
            .flat_map(u64::to_le_bytes),
    );
    image.resize(CODE_AT as usize, 0);
    image.extend(code);
    image
}
