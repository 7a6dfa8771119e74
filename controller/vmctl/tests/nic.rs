//! `vmctl nic` as typed: a VM with a tap, on a controller and an agent that vmctl starts itself. Needs
//! CAP_NET_ADMIN for the tap.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// pcap with nanoseconds, version 2.4, Ethernet.
const HEADER_BYTES: usize = 24;
const NANOSECONDS_MAGIC: [u8; 4] = 0xa1b2_3c4d_u32.to_le_bytes();

struct Home {
    dir: tempfile::TempDir,
    endpoint: String,
}

impl Home {
    /// With a VM called `vm` that runs; `None`, with the reason printed, where taps cannot be made.
    fn with_vm(vm: &str, net: &str) -> Option<Self> {
        if !may_make_taps() {
            println!("skipped: making taps needs CAP_NET_ADMIN");
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = port.local_addr().unwrap().port();
        let home = Self {
            dir: tempfile::tempdir().unwrap(),
            endpoint: format!("http://127.0.0.1:{port}"),
        };
        fs::write(home.path("kernel"), sleeper()).unwrap();
        let (state, run) = (home.path("s"), home.path("r"));
        let dirs = [
            "--state-dir",
            state.to_str().unwrap(),
            "--run-dir",
            run.to_str().unwrap(),
        ];
        let run = [
            "run", "--detach", "--kernel", "kernel", "--memory", "32M", "--name", vm,
        ];
        home.ok(&[&run[..], &["--net", net], &dirs].concat());
        Some(home)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command
            .current_dir(self.dir.path())
            .env("MORTISE_ENDPOINT", &self.endpoint)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Fails, and this is what it said.
    fn error(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        stderr(&output)
    }

    fn nic(&self, vm: &str) -> Value {
        let text = self.ok(&["nic", "show", vm, "eth0", "-o", "json"]);
        serde_json::from_str(&text).unwrap()
    }

    fn pid(&self, file: &str) -> Option<Pid> {
        let text = fs::read_to_string(self.path(file)).ok()?;
        Some(Pid::from_raw(text.trim().parse().ok()?))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.output(&["vm", "delete", "--force", "nictest"]);
        let listed = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let dir = self.dir.path().display().to_string();
        // The controller, then what it started, each by its own directories on its command line.
        for pid in pids {
            let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&cmdline).contains(&dir) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if let Some(pid) = self.pid("r/node-agent.pid") {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

#[test]
fn limits_cable_flows_and_captures_of_a_nic_in_use() {
    let net = "name=eth0,track-flows,host-cidr=10.203.77.1/30";
    let Some(home) = Home::with_vm("nictest", net) else {
        return;
    };
    let listed = home.ok(&["nic", "list", "nictest"]);
    assert!(
        listed.contains("eth0") && listed.contains("tap"),
        "{listed}"
    );

    home.ok(&[
        "nic",
        "set-limits",
        "nictest",
        "eth0",
        "--egress-bps",
        "100M",
        "--ingress-pps",
        "7",
    ]);
    let limits = &home.nic("nictest")["status"]["limits"];
    assert_eq!(limits["egress"]["bits_per_second"], 100_000_000, "{limits}");
    assert_eq!(limits["ingress"]["packets_per_second"], 7, "{limits}");

    home.ok(&["nic", "link", "nictest", "eth0", "down"]);
    assert_eq!(home.nic("nictest")["status"]["link_up"], false);
    let daemon = home.ok(&["vm", "show", "nictest", "-o", "json"]);
    let daemon: Value = serde_json::from_str(&daemon).unwrap();
    let processes = daemon["status"]["processes"].as_array().unwrap();
    let daemon = processes
        .iter()
        .find(|process| process["name"] == "device-net");
    let daemon = Pid::from_raw(daemon.unwrap()["pid"].as_i64().unwrap() as i32);
    kill(daemon, Signal::SIGKILL).unwrap();
    poll("the next daemon has what was set", || {
        let status = home.nic("nictest")["status"].clone();
        let same = status["served"] == true
            && status["link_up"] == false
            && status["limits"]["ingress"]["packets_per_second"] == 7;
        same.then_some(())
    });
    home.ok(&["nic", "link", "nictest", "eth0", "up"]);
    assert_eq!(home.nic("nictest")["status"]["link_up"], true);

    let flows = home.ok(&["nic", "flows", "nictest", "eth0", "--filter", "tcp"]);
    assert!(flows.contains("PROTOCOL"), "{flows}");

    let mut capture = home
        .command(&["nic", "capture", "nictest", "eth0", "-w", "a.pcap"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let is_begun = || fs::metadata(home.path("a.pcap")).is_ok_and(|file| file.len() > 0);
    poll("the capture's header", || is_begun().then_some(()));
    kill(Pid::from_raw(capture.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(capture.wait().unwrap().code(), Some(0));
    let file = fs::read(home.path("a.pcap")).unwrap();
    assert_eq!(
        (&file[..4], file.len()),
        (&NANOSECONDS_MAGIC[..], HEADER_BYTES)
    );
    let to_stdout = home.output(&[
        "nic",
        "capture",
        "nictest",
        "eth0",
        "--seconds",
        "1",
        "-w",
        "-",
    ]);
    assert_eq!(to_stdout.stdout, file);

    let error = home.error(&[
        "nic",
        "capture",
        "nictest",
        "eth0",
        "-w",
        "b",
        "--filter",
        "tcp prt 1",
    ]);
    assert!(error.contains("filter"), "{error}");
    assert!(
        !home.path("b").exists(),
        "nothing is made for a capture that does not begin"
    );
    let error = home.error(&["nic", "link", "nictest", "eth9", "up"]);
    assert!(error.contains("it has eth0"), "{error}");
    home.ok(&["vm", "stop", "--force", "nictest"]);
    let error = home.error(&["nic", "capture", "nictest", "eth0", "-w", "b"]);
    assert!(error.contains("start it first"), "{error}");
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

/// CAP_NET_ADMIN is 12.
fn may_make_taps() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.unwrap().trim(), 16).unwrap();
    effective & 1 << 12 != 0 && Path::new("/dev/net/tun").exists()
}

/// An ELF kernel that sleeps for ever, entered in 64-bit mode at its one segment of hlt and jmp.
fn sleeper() -> Vec<u8> {
    const LOAD_ADDRESS: u64 = 0x10_0000;
    const HEADERS_BYTES: u64 = 64 + 56;
    let code = [0xf4, 0xeb, 0xfd];
    let len = HEADERS_BYTES + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend((LOAD_ADDRESS + HEADERS_BYTES).to_le_bytes());
    file.extend([64_u64, 0].map(u64::to_le_bytes).concat());
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let segment = [0, LOAD_ADDRESS, LOAD_ADDRESS, len, len, 0x1000];
    file.extend(segment.map(u64::to_le_bytes).concat());
    file.extend(code);
    file
}
