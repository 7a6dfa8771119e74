//! What the daemon is told, step by step.

use std::{
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
};

use super::*;
use crate::process::Process;

fn plan(nic: &str) -> PortPlan {
    PortPlan {
        vm: "web".into(),
        nic: nic.into(),
        socket: PathBuf::from("/nowhere"),
        mac: "52:54:00:00:00:01".into(),
        queue_pairs: 1,
        mtu: 0,
        track_flows: false,
        vlan: 0,
        trunk_vlans: Vec::new(),
        tuning: NicTuning::default(),
        leases: None,
    }
}

/// Ports whose daemon runs and has `served`.
fn with_daemon(served: &[&str]) -> (Ports, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ports = Ports::default();
    come_up(&ports, dir.path(), served);
    (ports, dir)
}

fn come_up(ports: &Ports, dir: &Path, served: &[&str]) {
    let log = dir.join("log");
    let sleeper = Process::spawn(Path::new("/bin/sleep"), &["60".into()], &log).unwrap();
    let served = served.iter().map(|nic| port_id("web", nic)).collect();
    // Killed with the guard; nobody looks at it here.
    let daemon = Daemon {
        process: Process::clone(&sleeper),
        sandbox: Vec::new(),
        version: String::new(),
        build: String::new(),
    };
    ports.came_up(daemon, served);
}

/// Carries out the next step, which succeeds; what it was.
fn step(ports: &Ports, dir: &Path) -> Option<&'static str> {
    match ports.next_step()? {
        Step::Detach { id } => {
            ports.detached(&id, Ok(()));
            Some("detach")
        }
        Step::Attach {
            id, serial, told, ..
        } => {
            let path = dir.join(format!("{serial}.vu"));
            let listener = Arc::new(UnixListener::bind(path).unwrap());
            ports.attached((&id, serial), told, Ok(listener));
            Some("attach")
        }
        Step::Tell { id, serial, told } => {
            ports.was_told((&id, serial), told, Ok(()));
            Some("tell")
        }
    }
}

fn steps(ports: &Ports, dir: &Path) -> Vec<&'static str> {
    std::iter::from_fn(|| step(ports, dir)).collect()
}

fn refusal(code: Code) -> DaemonError {
    DaemonError::Call {
        program: "device-net",
        call: "the NIC".into(),
        code,
        message: "no".into(),
    }
}

#[tokio::test]
async fn ports_are_attached_once_and_told_what_changes() {
    let (ports, dir) = with_daemon(&[]);
    assert!(steps(&ports, dir.path()).is_empty());
    ports.want(plan("nic0"), false);
    assert_eq!(steps(&ports, dir.path()), ["attach"]);
    let tuning = NicTuning {
        link_down: true,
        ..NicTuning::default()
    };
    ports.tune(&port_id("web", "nic0"), tuning);
    assert_eq!(steps(&ports, dir.path()), ["tell"]);
    ports.withdraw("web", Duration::ZERO).await;
    assert_eq!(steps(&ports, dir.path()), ["detach"]);
}

#[tokio::test]
async fn next_daemon_gets_all_ports_with_what_was_set_meanwhile() {
    let (ports, dir) = with_daemon(&[]);
    ports.want(plan("nic0"), false);
    ports.want(plan("nic1"), false);
    assert_eq!(steps(&ports, dir.path()).len(), 2);
    ports.went_down("killed".into());
    assert!(ports.next_step().is_none(), "nobody is there to be told");
    let tuning = NicTuning {
        link_down: true,
        ..NicTuning::default()
    };
    ports.tune(&port_id("web", "nic0"), tuning);
    come_up(&ports, dir.path(), &[]);
    let Some(Step::Attach { listener, told, .. }) = ports.next_step() else {
        panic!("it is attached");
    };
    assert!(told.tuning.link_down);
    assert!(listener.is_some(), "the socket that its vmm-core knows");
    drop(dir);
}

#[tokio::test]
async fn port_of_an_earlier_agent_stays_and_an_unwanted_one_goes() {
    let (ports, dir) = with_daemon(&["nic0", "nic1"]);
    ports.want(plan("nic0"), true);
    assert_eq!(steps(&ports, dir.path()), ["detach", "tell"]);
    assert_eq!(ports.names(), ["web/nic0"]);
}

#[tokio::test]
async fn port_of_a_vm_that_starts_anew_is_never_the_one_it_had() {
    let (ports, dir) = with_daemon(&["nic0"]);
    ports.want(plan("nic0"), false);
    assert_eq!(steps(&ports, dir.path()), ["detach", "attach"]);
    // Nor when it comes back before the daemon was asked to let go.
    ports.want(plan("nic0"), false);
    assert_eq!(steps(&ports, dir.path()), ["detach", "attach"]);
}

#[tokio::test]
async fn refusal_is_told_at_once_and_a_lost_answer_is_asked_for_again() {
    let (ports, dir) = with_daemon(&[]);
    ports.want(plan("nic0"), false);
    let Some(Step::Attach {
        id, serial, told, ..
    }) = ports.next_step()
    else {
        panic!("it is attached");
    };
    ports.attached((&id, serial), told, Err(refusal(Code::AlreadyExists)));
    let problem = ports.served(&id, Duration::from_secs(60)).await;
    assert_eq!(problem.unwrap_err().code, Code::AlreadyExists);

    ports.want(plan("nic0"), false);
    let Some(Step::Attach {
        id, serial, told, ..
    }) = ports.next_step()
    else {
        panic!("it is attached");
    };
    ports.attached((&id, serial), told, Err(refusal(Code::Unavailable)));
    let problem = ports.served(&id, Duration::from_millis(10)).await;
    assert!(problem.is_err(), "nobody knows");
    // It may have it: so it is taken away first.
    assert_eq!(step(&ports, dir.path()), Some("detach"));
    ports.went_down("killed".into());
    come_up(&ports, dir.path(), &[]);
    assert_eq!(steps(&ports, dir.path()), ["attach"]);
    assert!(ports.served(&id, Duration::ZERO).await.is_ok());
}
