//! Taps and volumes: made, used, kept from misuse, and removed.

use std::path::Path;

use api::node::{
    CreateVolumeRequest, DeleteVolumeRequest, ListVolumesRequest, NicSpec, Power, VmPhase,
    VmStatus, WatchVmsRequest, disk_spec::Source,
};
use tonic::Code;

use crate::{
    guest,
    harness::{Agent, disk, kill_hard, may_make_taps, pid, spec},
};

/// From the block that is reserved for documentation.
const HOST_CIDR: &str = "192.0.2.1/30";

fn addresses(interface: &str) -> Vec<String> {
    nix::ifaddrs::getifaddrs()
        .unwrap()
        .filter(|entry| entry.interface_name == interface)
        .filter_map(|entry| Some(entry.address?.as_sockaddr_in()?.ip().to_string()))
        .collect()
}

#[tokio::test]
async fn tap_is_made_with_its_address_outlives_device_net_and_goes_with_the_vm() {
    let mut agent = Agent::start().await;
    let mut vm = spec("tapped", &guest::sleeper(agent.path()));
    vm.nics = vec![NicSpec {
        name: "eth0".into(),
        host_cidr: HOST_CIDR.into(),
        mtu: 1400,
        ..NicSpec::default()
    }];
    agent.apply(&vm).await.unwrap();
    let settled = |status: &VmStatus| status.phase() != VmPhase::Starting;
    let status = agent.until("tapped", "started", settled).await;
    if !may_make_taps() {
        // Then that is what must be said.
        assert_eq!(
            Code::from_i32(status.error_code),
            Code::PermissionDenied,
            "{}",
            status.error
        );
        assert!(status.error.contains("CAP_NET_ADMIN"), "{}", status.error);
        agent.assert_nothing_left("tapped");
        return;
    }
    let tap = Path::new("/sys/class/net/mt-tapped-0");
    let index = std::fs::read_to_string(tap.join("ifindex")).unwrap();
    assert_eq!(
        std::fs::read_to_string(tap.join("mtu")).unwrap().trim(),
        "1400"
    );
    assert_eq!(addresses("mt-tapped-0"), ["192.0.2.1"]);

    kill_hard(pid(&status, "device-net"));
    agent
        .until("tapped", "connected again", |status| {
            status
                .devices
                .iter()
                .any(|eth0| eth0.connected && eth0.incarnations == 2)
        })
        .await;
    assert_eq!(std::fs::read_to_string(tap.join("ifindex")).unwrap(), index);

    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("tapped", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert!(!tap.exists());
}

#[tokio::test]
async fn memory_that_another_vm_was_promised_is_not_given_twice() {
    let mut agent = Agent::start().await;
    let kernel = guest::sleeper(agent.path());
    // Neither guest touches it, so that all of it stays available.
    let available = meminfo_bytes("MemAvailable");
    let most = (available / 4 * 3) >> 20 << 20;
    if 2 * most <= meminfo_bytes("MemTotal") {
        return;
    }
    let mut first = spec("first", &kernel);
    first.memory_bytes = most;
    agent.run(&first).await;
    let mut second = spec("second", &kernel);
    second.memory_bytes = most;
    agent.apply(&second).await.unwrap();
    let status = agent
        .until("second", "refused", |status| {
            status.phase() != VmPhase::Starting
        })
        .await;
    assert_eq!(
        (status.phase(), Code::from_i32(status.error_code)),
        (VmPhase::Failed, Code::ResourceExhausted),
        "{}",
        status.error
    );
    assert!(status.error.contains("promised"), "{}", status.error);
    assert!(!agent.vm_dir("second").exists());

    // Promises outlive the agent, and end with the VM.
    agent.end(nix::sys::signal::Signal::SIGKILL);
    agent.start_again().await;
    second.generation += 1;
    agent.apply(&second).await.unwrap();
    let status = agent
        .until("second", "refused again", |status| {
            status.observed_generation == second.generation && status.phase() != VmPhase::Starting
        })
        .await;
    assert!(status.error.contains("promised"), "{}", status.error);
    agent.power(&mut first, Power::OffNow).await;
    agent
        .until("first", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    second.generation += 1;
    agent.run(&second).await;
}

fn meminfo_bytes(name: &str) -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find(|line| line.starts_with(name)).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[tokio::test]
async fn volume_is_copied_attached_and_kept_while_a_vm_has_it() {
    let mut agent = Agent::start().await;
    let source = agent.image("source.raw");
    let request = CreateVolumeRequest {
        id: "data".into(),
        source_path: source.display().to_string(),
        ..CreateVolumeRequest::default()
    };
    let made = agent
        .client
        .create_volume(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((made.size_bytes, made.creating), (8 << 20, false));
    let again = agent
        .client
        .create_volume(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again, made);

    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &source)];
    vm.disks[0].source = Some(Source::Volume("data".into()));
    agent.run(&vm).await;
    let listed = agent
        .client
        .list_volumes(ListVolumesRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(listed.volumes[0].attached_to, "web");
    let delete = DeleteVolumeRequest { id: "data".into() };
    let refused = agent
        .client
        .delete_volume(delete.clone())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("\"web\""), "{refused}");

    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    agent.delete("web").await.unwrap();
    agent.client.delete_volume(delete).await.unwrap();
    assert!(!Path::new(&made.path).exists());
}

#[tokio::test]
async fn watcher_sees_what_is_there_then_every_change() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    agent.run(&vm).await;
    let mut changes = agent
        .client
        .watch_vms(WatchVmsRequest {})
        .await
        .unwrap()
        .into_inner();
    let first = changes.message().await.unwrap().unwrap();
    assert_eq!(
        (first.id.as_str(), first.phase()),
        ("web", VmPhase::Running)
    );
    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    agent.delete("web").await.unwrap();
    let mut phases = Vec::new();
    while phases.last() != Some(&VmPhase::Unspecified) {
        phases.push(changes.message().await.unwrap().unwrap().phase());
    }
    phases.dedup();
    let end = [VmPhase::Stopping, VmPhase::Stopped, VmPhase::Unspecified];
    assert!(phases.ends_with(&end), "{phases:?}");
}
