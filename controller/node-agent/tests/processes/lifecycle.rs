//! A VM from its first wish to its end.

use api::node::{Power, ResetVmRequest, VmPhase};
use tonic::Code;

use crate::{
    guest,
    harness::{Agent, disk, files, gone, kill_hard, pid, spec},
};

#[tokio::test]
async fn machine_with_a_disk_runs_and_stops_without_a_trace() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let status = agent.run(&vm).await;
    assert_eq!(status.observed_generation, 1);
    assert!(status.started_at.is_some());
    let names: Vec<&str> = status
        .processes
        .iter()
        .map(|process| process.name.as_str())
        .collect();
    assert_eq!(names, ["vmm-core", "device-blk"]);
    agent.console_until("web", b"", guest::GREETING).await;

    let healthy = |status: &api::node::VmStatus| status.devices.iter().any(|root| root.connected);
    let status = agent.until("web", "connected to its disk", healthy).await;
    assert_eq!(
        (
            status.devices[0].name.as_str(),
            status.devices[0].incarnations
        ),
        ("root", 1)
    );
    for process in &status.processes {
        assert!(process.rss_kib > 0 && process.pss_kib > 0, "{process:?}");
        assert!(
            process.rss_kib < 32 << 10,
            "guest RAM is counted: {process:?}"
        );
        assert!(
            process
                .sandbox
                .iter()
                .any(|name| name.starts_with("seccomp:")),
            "{process:?}"
        );
    }

    let metrics = agent.scrape();
    for line in [
        "mortise_vms{phase=\"running\"} 1\n",
        "mortise_device_connected{vm=\"web\",daemon=\"device-blk\",device=\"root\"} 1\n",
    ] {
        assert!(metrics.contains(line), "{line:?} is not in {metrics}");
    }

    agent.power(&mut vm, Power::Off).await;
    let status = agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(
        (status.stop_reason.as_str(), status.observed_generation),
        ("stop-request", 2)
    );
    assert!(status.processes.is_empty());
    assert_eq!(agent.processes(), [0; 0]);
    assert_eq!(
        files(&agent.vm_dir("web")),
        ["blk.log", "exit.json", "vmm.log"]
    );

    agent.delete("web").await.unwrap();
    agent.assert_nothing_left("web");
    assert!(!agent.record("web").exists());
}

#[tokio::test]
async fn guest_that_switches_itself_off_stays_off_until_wished_again() {
    let mut agent = Agent::start().await;
    let mut vm = spec("brief", &guest::quitter(agent.path()));
    agent.apply(&vm).await.unwrap();
    let off = |status: &api::node::VmStatus| status.phase() == VmPhase::Stopped;
    let status = agent.until("brief", "off", off).await;
    assert_eq!(status.stop_reason, "guest-shutdown");
    let again = agent.apply(&vm).await.unwrap();
    assert_eq!(
        again.phase(),
        VmPhase::Stopped,
        "the same generation starts nothing"
    );
    vm.kernel = guest::sleeper(agent.path()).display().to_string();
    vm.generation += 1;
    agent.run(&vm).await;
}

#[tokio::test]
async fn console_reaches_the_guest() {
    let mut agent = Agent::start().await;
    let vm = spec("talk", &guest::listener(agent.path()));
    agent.run(&vm).await;
    agent.console_until("talk", b"x", guest::GREETING).await;
    let status = agent
        .until("talk", "off", |status| status.phase() == VmPhase::Stopped)
        .await;
    assert_eq!(status.stop_reason, "guest-shutdown");
}

#[tokio::test]
async fn image_is_shared_by_readers_but_not_with_a_writer() {
    let mut agent = Agent::start().await;
    let image = agent.image("shared.raw");
    let kernel = guest::sleeper(agent.path());
    for id in ["one", "two"] {
        let mut vm = spec(id, &kernel);
        vm.disks = vec![disk("root", &image)];
        vm.disks[0].read_only = true;
        agent.run(&vm).await;
    }
    let mut writer = spec("writer", &kernel);
    writer.disks = vec![disk("root", &image)];
    agent.apply(&writer).await.unwrap();
    let status = agent
        .until("writer", "refused", |status| {
            status.phase() == VmPhase::Failed
        })
        .await;
    assert!(
        status.error.contains("in use by VM one"),
        "{}",
        status.error
    );
}

#[tokio::test]
async fn reset_boots_again_in_the_same_process() {
    let mut agent = Agent::start().await;
    let vm = spec("web", &guest::sleeper(agent.path()));
    let before = agent.run(&vm).await;
    agent.console_until("web", b"", guest::GREETING).await;
    agent
        .client
        .reset_vm(ResetVmRequest { id: "web".into() })
        .await
        .unwrap();
    let after = agent
        .until("web", "reset", |status| status.resets == 1)
        .await;
    assert_eq!(pid(&after, "vmm-core"), pid(&before, "vmm-core"));
    agent
        .console_until("web", b"", &guest::GREETING.repeat(2))
        .await;
}

#[tokio::test]
async fn killed_device_blk_comes_back_under_the_running_machine() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let before = agent.run(&vm).await;
    kill_hard(pid(&before, "device-blk"));
    let after = agent
        .until("web", "connected again", |status| {
            status
                .devices
                .iter()
                .any(|root| root.connected && root.incarnations == 2)
        })
        .await;
    assert_eq!(pid(&after, "vmm-core"), pid(&before, "vmm-core"));
    assert_ne!(pid(&after, "device-blk"), pid(&before, "device-blk"));
    let blk = &after.processes[1];
    assert_eq!(blk.restarts, 1);
    assert!(blk.last_error.contains("SIGKILL"), "{}", blk.last_error);
}

#[tokio::test]
async fn device_blk_killed_again_and_again_always_comes_back() {
    const KILLS: u64 = 10;
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let mut status = agent.run(&vm).await;
    let vmm = pid(&status, "vmm-core");
    for kill in 1..=KILLS {
        kill_hard(pid(&status, "device-blk"));
        status = agent
            .until("web", "connected again", |status| {
                status.processes[1].restarts == kill
                    && status
                        .devices
                        .iter()
                        .any(|root| root.connected && root.incarnations > kill)
            })
            .await;
    }
    assert_eq!(pid(&status, "vmm-core"), vmm);
    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(agent.processes(), [0; 0]);
}

#[tokio::test]
async fn killed_vmm_core_fails_the_vm_and_takes_its_daemons_along() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let before = agent.run(&vm).await;
    kill_hard(pid(&before, "vmm-core"));
    let status = agent
        .until("web", "failed", |status| status.phase() == VmPhase::Failed)
        .await;
    assert!(
        status.error.starts_with("vmm-core was killed by SIGKILL"),
        "{}",
        status.error
    );
    assert_eq!(status.stop_reason, "killed");
    assert_eq!(agent.processes(), [0; 0]);
    vm.generation += 1;
    agent.run(&vm).await;
}

#[tokio::test]
async fn vmm_core_that_ignores_everything_is_killed() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    let before = agent.run(&vm).await;
    let vmm = nix::unistd::Pid::from_raw(pid(&before, "vmm-core"));
    nix::sys::signal::kill(vmm, nix::sys::signal::Signal::SIGSTOP).unwrap();
    agent.power(&mut vm, Power::OffNow).await;
    let status = agent
        .until("web", "killed", |status| status.phase() == VmPhase::Stopped)
        .await;
    assert_eq!(status.stop_reason, "killed");
    gone(vmm.as_raw()).await;
}

#[tokio::test]
async fn wish_to_stop_cuts_a_start_or_a_long_grace_short() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.shutdown_grace_ms = 600_000;
    agent.apply(&vm).await.unwrap();
    agent.power(&mut vm, Power::Off).await;
    agent.power(&mut vm, Power::OffNow).await;
    let status = agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(status.observed_generation, 3);
    assert_eq!(agent.processes(), [0; 0]);
}

#[tokio::test]
async fn generations_and_states_guard_a_vm() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.generation = 5;
    agent.run(&vm).await;
    let mut stale = vm.clone();
    stale.generation = 4;
    assert_eq!(agent.apply(&stale).await.unwrap_err().code(), Code::Aborted);
    let mut other = vm.clone();
    other.vcpus = 2;
    assert_eq!(
        agent.apply(&other).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    other.generation = 6;
    let refused = agent.apply(&other).await.unwrap_err();
    assert!(
        refused.message().contains("once it is stopped"),
        "{refused}"
    );
    let refused = agent.delete("web").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("stop it first"), "{refused}");
    agent.apply(&vm).await.unwrap();
    assert_eq!(agent.status("web").await.phase(), VmPhase::Running);
}

#[tokio::test]
async fn deletion_that_waits_for_a_stop_holds_up_nobody_else() {
    let mut agent = Agent::start().await;
    let mut vm = spec("slow", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let status = agent.run(&vm).await;
    // It cannot drain; the agent waits for that before it kills.
    let blk = nix::unistd::Pid::from_raw(pid(&status, "device-blk"));
    nix::sys::signal::kill(blk, nix::sys::signal::Signal::SIGSTOP).unwrap();
    agent.power(&mut vm, Power::OffNow).await;
    gone(pid(&status, "vmm-core")).await;
    let mut deleting = agent.client.clone();
    let deletion = tokio::spawn(async move {
        let request = api::node::DeleteVmRequest {
            id: "slow".into(),
            ..Default::default()
        };
        deleting.delete_vm(request).await
    });
    let asked_at = std::time::Instant::now();
    let mut listed = 0;
    while asked_at.elapsed() < std::time::Duration::from_secs(1) {
        let request = api::node::ListVmsRequest {};
        let answer = agent.client.list_vms(request);
        let answer = tokio::time::timeout(std::time::Duration::from_secs(3), answer).await;
        listed += answer
            .expect("others are answered")
            .unwrap()
            .into_inner()
            .vms
            .len();
    }
    assert!(listed > 0);
    deletion.await.unwrap().unwrap();
    agent.assert_nothing_left("slow");
}
