//! The whole system around one real guest: any process is killed, the guest runs on.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use guest::exchange;
use guest::plan::{End, Job, Plan};
use guest::report::UP_LINE;
use serde_json::Value;

use super::disk_plan;
use super::fleet::{Fleet, find, free_port, kill, machine_options, pid_of, wait_until};
use crate::qemu_frontend::expect_pattern;
use crate::site;

const SEED: u64 = 0xadab7;
const LEN_BYTES: u64 = 1 << 20;

#[test]
fn a_vm_runs_on_while_controller_and_agent_are_killed_and_is_adopted() {
    let mut fleet = Fleet::start();
    fleet.done(&["volume", "create", "data", "--size", "16M"]);
    let plan = disk_plan(SEED, LEN_BYTES, End::Wait);
    fleet.create_vm(&plan, &["--disk", "volume=data"]);
    fleet.done(&["vm", "start", "web"]);
    let processes = fleet.processes();
    let names: Vec<&str> = processes.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["device-blk", "vmm-core"]);

    // Before the guest is done, both of its masters die and come back.
    let agent = pid_of("node-agent", fleet.dir.path()).expect("a node agent runs");
    kill(agent, libc::SIGKILL);
    fleet.kill_and_restart_controller();
    wait_until("another agent", || {
        pid_of("node-agent", fleet.dir.path()).is_some_and(|pid| pid != agent)
    });
    fleet.wait_for_console("\"job\":\"done\",\"failed\":0");
    wait_until("the VM's adoption", || fleet.phase().ends_with("running"));
    assert_eq!(fleet.processes(), processes, "the same processes as before");

    // A daemon that is told to end is replaced too: so it is upgraded.
    let before = fleet.pid("device-blk");
    kill(before, libc::SIGTERM);
    fleet.wait_for_successor("device-blk", before);
    let replaced = fleet.processes();

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
    for (name, pid) in processes.into_iter().chain(replaced) {
        assert!(
            !PathBuf::from(format!("/proc/{pid}")).exists(),
            "{name} is left over"
        );
    }
    fleet.done(&["vm", "delete", "web"]);
    fleet.done(&["volume", "delete", "data"]);
    assert!(!image.exists());
}

#[test]
fn a_killed_device_net_is_replaced_and_the_connection_lives() {
    // Far from over when the last kill comes, however fast guest and test are.
    const BYTES: u64 = 24 << 20;
    const KILLS: usize = 3;
    let host = "198.18.77.1";
    let fleet = Fleet::start();
    // The address comes with the tap, so wildcards it is.
    let listener = TcpListener::bind("0.0.0.0:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let plan = Plan {
        jobs: vec![
            Job::Address("198.18.77.2/24".into()),
            Job::Net {
                peer: format!("{host}:{port}").parse().expect("an address"),
                seed: SEED,
                bytes: BYTES,
            },
        ],
        end: End::PowerOff,
        ..Plan::default()
    };
    let net = format!("host-cidr={host}/24,queues=2");
    fleet.create_vm(&plan, &["--cpus=2", "--net", &net]);
    fleet.done(&["vm", "start", "web"]);

    let (stream, _) = listener.accept().expect("the guest connects");
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a socket");
    let watched = stream.try_clone().expect("a socket");
    let exchange = thread::spawn(move || exchange::as_host(stream, SEED, BYTES));
    let mut killed = Vec::new();
    for kill_number in 1..=KILLS {
        // Some more arrived than at the last kill.
        let goal = BYTES / 16 * kill_number as u64;
        wait_until("the transfer's progress", || received(&watched) >= goal);
        let pid = fleet.pid("device-net");
        assert!(!killed.contains(&pid), "each kill hits another incarnation");
        killed.push(pid);
        kill(pid, libc::SIGKILL);
        fleet.wait_for_successor("device-net", pid);
    }
    let outcome = exchange.join().expect("no panic");
    outcome.expect("both payloads arrived, over one connection");
    wait_until("the guest's shutdown", || {
        fleet.phase().ends_with("stopped")
    });
    fleet.done(&["vm", "delete", "web"]);
}

/// Bytes that arrived on a connection since its start (tcp(7): TCP_INFO).
fn received(stream: &TcpStream) -> u64 {
    // SAFETY: all zeroes is a value of this plain structure.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which is that large.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    assert_eq!(result, 0, "the socket is open");
    info.tcpi_bytes_received
}

#[test]
fn vmctl_run_starts_a_controller_prints_the_console_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = super::image(dir.path(), "disk.raw", 16 << 20);
    let plan = disk_plan(SEED, LEN_BYTES, End::PowerOff);
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    let folder = |name: &str| format!("--{name}={}", dir.path().join(name).display());
    let run = Command::new(site::program("vmctl"))
        .args(["--endpoint", &endpoint, "run", "--rm", "--name=web"])
        .args([folder("state-dir"), folder("run-dir")])
        .args(machine_options(&plan))
        .arg("--disk")
        .arg(&image)
        .output()
        .expect("vmctl runs");
    let list = Command::new(site::program("vmctl"))
        .args(["--endpoint", &endpoint, "vm", "list"])
        .output()
        .expect("vmctl runs");
    for program in ["controller", "node-agent"] {
        let pid = pid_of(program, dir.path()).expect("it runs on after vmctl run");
        kill(pid, libc::SIGTERM);
        wait_until("its end", || pid_of(program, dir.path()).is_none());
    }
    let (console, errors) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    assert!(run.status.success(), "{}\n{console}\n{errors}", run.status);
    assert!(console.contains(UP_LINE), "{console}");
    assert!(!String::from_utf8_lossy(&list.stdout).contains("web"));
    expect_pattern(&image, SEED, LEN_BYTES);
}
