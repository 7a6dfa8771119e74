//! Agents die and end; VMs do not, and the next agent finds them as they are.

use api::node::{Power, VmPhase, VmSpec, VmStatus};
use nix::sys::signal::Signal;

use crate::{
    guest,
    harness::{Agent, disk, gone, is_alive, kill_hard, pid, spec},
};

async fn running_vm(agent: &mut Agent) -> (VmSpec, VmStatus) {
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let status = agent.run(&vm).await;
    (vm, status)
}

async fn adopted(agent: &mut Agent) -> VmStatus {
    let connected = |status: &VmStatus| {
        status.phase() == VmPhase::Running && status.devices.iter().any(|root| root.connected)
    };
    agent.until("web", "adopted", connected).await
}

#[tokio::test]
async fn killed_agent_leaves_the_vm_to_the_next_one() {
    let mut agent = Agent::start().await;
    let (mut vm, before) = running_vm(&mut agent).await;
    agent.end(Signal::SIGKILL);
    assert!(is_alive(pid(&before, "vmm-core")) && is_alive(pid(&before, "device-blk")));
    agent.start_again().await;
    let after = adopted(&mut agent).await;
    for program in ["vmm-core", "device-blk"] {
        assert_eq!(pid(&after, program), pid(&before, program), "{program}");
    }
    assert_eq!(after.started_at, before.started_at);
    assert!(
        after.processes[1]
            .sandbox
            .iter()
            .any(|name| name.contains("seccomp"))
    );
    agent.console_until("web", b"", guest::GREETING).await;

    agent.power(&mut vm, Power::Off).await;
    let status = agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(status.stop_reason, "stop-request");
    assert_eq!(agent.processes(), [0; 0]);
}

#[tokio::test]
async fn terminated_agent_ends_cleanly_and_leaves_the_vm() {
    let mut agent = Agent::start().await;
    let (_, before) = running_vm(&mut agent).await;
    assert!(agent.end(Signal::SIGTERM).success());
    assert!(is_alive(pid(&before, "vmm-core")));
    agent.start_again().await;
    assert_eq!(
        pid(&adopted(&mut agent).await, "vmm-core"),
        pid(&before, "vmm-core")
    );
}

#[tokio::test]
async fn daemon_that_dies_after_adoption_is_restarted_on_a_socket_bound_anew() {
    let mut agent = Agent::start().await;
    let (_, before) = running_vm(&mut agent).await;
    agent.end(Signal::SIGKILL);
    agent.start_again().await;
    adopted(&mut agent).await;
    kill_hard(pid(&before, "device-blk"));
    let reconnected = |status: &VmStatus| {
        status
            .devices
            .iter()
            .any(|root| root.connected && root.incarnations == 2)
    };
    let after = agent.until("web", "connected again", reconnected).await;
    assert_eq!(pid(&after, "vmm-core"), pid(&before, "vmm-core"));
}

#[tokio::test]
async fn daemon_that_died_with_the_agent_is_restarted() {
    let mut agent = Agent::start().await;
    let (_, before) = running_vm(&mut agent).await;
    agent.end(Signal::SIGKILL);
    kill_hard(pid(&before, "device-blk"));
    gone(pid(&before, "device-blk")).await;
    agent.start_again().await;
    let reconnected = |status: &VmStatus| {
        status
            .devices
            .iter()
            .any(|root| root.connected && root.incarnations == 2)
    };
    let after = agent.until("web", "connected again", reconnected).await;
    assert_eq!(pid(&after, "vmm-core"), pid(&before, "vmm-core"));
}

#[tokio::test]
async fn vmm_core_that_died_meanwhile_is_found_and_cleaned_up() {
    let mut agent = Agent::start().await;
    let (_, before) = running_vm(&mut agent).await;
    agent.end(Signal::SIGKILL);
    kill_hard(pid(&before, "vmm-core"));
    gone(pid(&before, "vmm-core")).await;
    agent.start_again().await;
    let status = agent
        .until("web", "failed", |status| status.phase() == VmPhase::Failed)
        .await;
    assert!(
        status.error.starts_with("vmm-core ended"),
        "{}",
        status.error
    );
    assert_eq!(agent.processes(), [0; 0]);
}

#[tokio::test]
async fn guest_that_shut_down_meanwhile_is_reported_as_such() {
    let mut agent = Agent::start().await;
    let before = agent.run(&spec("web", &guest::sleeper(agent.path()))).await;
    agent.end(Signal::SIGKILL);
    // What a guest's own shutdown leaves behind: an exit note and no process.
    let note = r#"{"reason":"guest-shutdown","message":""}"#;
    let vmm = pid(&before, "vmm-core");
    kill_hard(vmm);
    gone(vmm).await;
    std::fs::write(agent.vm_dir("web").join("exit.json"), note).unwrap();
    agent.start_again().await;
    let status = agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(status.stop_reason, "guest-shutdown");
}

#[tokio::test]
async fn stop_that_was_cut_short_is_finished() {
    let mut agent = Agent::start().await;
    let (mut vm, before) = running_vm(&mut agent).await;
    vm.shutdown_grace_ms = 600_000;
    agent.power(&mut vm, Power::Off).await;
    let stopping = |status: &VmStatus| status.phase() == VmPhase::Stopping;
    agent.until("web", "stopping", stopping).await;
    agent.end(Signal::SIGKILL);
    agent.start_again().await;
    let adopted = |status: &VmStatus| stopping(status) && status.processes.len() == 2;
    let after = agent.until("web", "adopted", adopted).await;
    assert_eq!(pid(&after, "vmm-core"), pid(&before, "vmm-core"));
    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(agent.processes(), [0; 0]);
}

#[tokio::test]
async fn start_that_was_cut_short_is_undone_and_begun_again() {
    let mut agent = Agent::start().await;
    let (_, before) = running_vm(&mut agent).await;
    agent.end(Signal::SIGKILL);
    // As an agent leaves it that died between two spawns: processes exist that it never noted.
    let record = agent.record("web");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    let mut assets = json["state"]["Running"].take();
    assets["vmm"] = serde_json::Value::Null;
    assets["daemons"] = serde_json::json!([]);
    json["state"] = serde_json::json!({ "Starting": assets });
    std::fs::write(&record, json.to_string()).unwrap();
    agent.start_again().await;
    let after = adopted(&mut agent).await;
    assert_ne!(pid(&after, "vmm-core"), pid(&before, "vmm-core"));
    assert!(!is_alive(pid(&before, "vmm-core")) && !is_alive(pid(&before, "device-blk")));
    assert_eq!(agent.processes().len(), 2);
}

#[tokio::test]
async fn vm_of_an_earlier_boot_is_stopped_not_adopted() {
    let mut agent = Agent::start().await;
    let (mut vm, before) = running_vm(&mut agent).await;
    agent.end(Signal::SIGKILL);
    for program in ["vmm-core", "device-blk"] {
        kill_hard(pid(&before, program));
        gone(pid(&before, program)).await;
    }
    let record = agent.record("web");
    let text = std::fs::read_to_string(&record).unwrap();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&record, text.replace(boot_id.trim(), "another-boot")).unwrap();
    agent.start_again().await;
    let status = agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(status.stop_reason, "host-reboot");
    vm.generation += 1;
    agent.run(&vm).await;
}
