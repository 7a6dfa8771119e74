//! One controller, several hosts: what is placed where, and how everything finds its host.

use api::controller as pb;
use api::node::{HostStatus, JobState, VmPhase};
use api::serve::Services;
use tonic::Code;

use crate::harness::{Controller, create_vm, poll_async, vm_name};
use crate::simulated::Host;

const GIB: u64 = 1 << 30;

/// Hosts called a, b ... with a controller of their own.
struct Fleet {
    _dir: tempfile::TempDir,
    hosts: Vec<Host>,
    controller: Controller,
}

impl Fleet {
    async fn of(statuses: &[HostStatus]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut hosts = Vec::new();
        let mut args = vec!["--state-dir".to_owned()];
        args.push(dir.path().join("state").display().to_string());
        for status in statuses {
            let socket = dir.path().join(format!("{}.sock", status.host_id));
            hosts.push(Host::serve_as(&socket, status.clone(), Services::new()));
            args.push("--node".to_owned());
            args.push(format!("unix:{}", socket.display()));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let controller = Controller::start(&args).await;
        controller.connected(statuses.len()).await;
        Self {
            _dir: dir,
            hosts,
            controller,
        }
    }

    /// The host that a VM is on, as users see it.
    async fn host_of(&self, vm: &str) -> String {
        let status = self.controller.vm(vm).await.status.unwrap();
        status.host
    }
}

fn host(id: &str) -> HostStatus {
    HostStatus {
        host_id: id.into(),
        cpus: 4,
        memory_bytes: 8 * GIB,
        underlay_address: format!("192.0.2.{}", id.as_bytes()[0]),
        ..Default::default()
    }
}

fn pinned(id: &str, host: &str) -> pb::CreateVmRequest {
    let mut request = create_vm(id);
    let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.placement = Some(pb::Placement {
        host: format!("hosts/{host}"),
        ..Default::default()
    });
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_spread_and_each_is_where_it_is_told_to_be() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    for vm in ["one", "two"] {
        c.create_vm(vm).await;
    }
    let there: Vec<usize> = fleet.hosts.iter().map(|host| host.vms().len()).collect();
    assert_eq!(there, [1, 1], "one on each");
    let operation = c.vms().create_vm(pinned("three", "b")).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    assert_eq!(fleet.host_of("three").await, "hosts/b");
    assert!(fleet.hosts[1].vms().contains(&"three".to_owned()));
    for vm in ["one", "two", "three"] {
        let operation = c.start_vm(vm).await;
        c.succeeded(operation).await;
        let reset = pb::ResetVmRequest { name: vm_name(vm) };
        let reset = c.vms().reset_vm(reset).await.unwrap().into_inner();
        assert_eq!(reset.status.unwrap().resets, 1, "{vm}");
    }
    let reserved: u64 = c
        .connected(2)
        .await
        .iter()
        .map(|host| host.reserved.unwrap().vms)
        .sum();
    assert_eq!(reserved, 3);
    let request = pb::DeleteVmRequest {
        name: vm_name("one"),
        force: true,
        ..Default::default()
    };
    let operation = c.vms().delete_vm(request).await.unwrap().into_inner();
    c.succeeded(operation).await;
    let hosts = c.connected(2).await;
    let reserved: u64 = hosts.iter().map(|host| host.reserved.unwrap().vms).sum();
    assert_eq!(reserved, 2, "what is gone is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn host_that_there_is_not_is_refused_with_what_every_host_says() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let refused = fleet
        .controller
        .vms()
        .create_vm(pinned("web", "c"))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let words = api::errors::explain(&refused);
    assert!(
        words.contains("hosts/a") && words.contains("hosts/b"),
        "{words}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_goes_where_its_volume_is() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    let volume = pb::CreateVolumeRequest {
        parent: "projects/default".into(),
        volume_id: "data".into(),
        volume: Some(pb::Volume {
            spec: Some(pb::VolumeSpec {
                size_bytes: GIB,
                host: "hosts/b".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let operation = c.volumes().create_volume(volume).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    let mut request = create_vm("web");
    let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.disks.push(pb::Disk {
        source: Some(pb::disk::Source::Volume(
            "projects/default/volumes/data".into(),
        )),
        ..Default::default()
    });
    let operation = c.vms().create_vm(request.clone()).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    assert_eq!(fleet.host_of("web").await, "hosts/b");
    request.vm_id = "other".into();
    let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.placement = pinned("x", "a").vm.unwrap().spec.unwrap().placement;
    let refused = c.vms().create_vm(request).await.unwrap_err();
    let words = api::errors::explain(&refused);
    assert!(words.contains("volume data is on hosts/b"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn overlay_is_on_the_hosts_that_need_it_and_they_know_each_other() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    let network = pb::CreateNetworkRequest {
        parent: "projects/default".into(),
        network_id: "net".into(),
        network: Some(pb::Network {
            spec: Some(pb::NetworkSpec {
                kind: pb::NetworkKind::Isolated as i32,
                overlay: Some(pb::Overlay {
                    vni: 7,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let operation = c.networks().create_network(network).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    assert!(fleet.hosts.iter().all(|host| host.network("net").is_none()));
    for (vm, host) in [("one", "a"), ("two", "b")] {
        let mut request = pinned(vm, host);
        let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
        spec.nics.push(pb::Nic {
            network: "projects/default/networks/net".into(),
            ..Default::default()
        });
        let operation = c.vms().create_vm(request).await.unwrap().into_inner();
        c.succeeded(operation).await;
        let operation = c.start_vm(vm).await;
        c.succeeded(operation).await;
    }
    for (here, there) in [(0, "192.0.2.98"), (1, "192.0.2.97")] {
        let peers = || async {
            let network = fleet.hosts[here].network("net");
            let overlay = network.and_then(|network| network.overlay);
            overlay.map(|overlay| overlay.peers).unwrap_or_default()
        };
        let peers = poll_async("the peer", peers, |peers| peers.len() == 1).await;
        assert_eq!(peers[0].underlay_address, there);
        assert_eq!(peers[0].macs.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn console_reaches_the_host_of_its_vm() {
    use tokio_stream::StreamExt as _;
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    let operation = c.vms().create_vm(pinned("web", "b")).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    let operation = c.start_vm("web").await;
    c.succeeded(operation).await;
    assert_eq!(fleet.hosts[1].phase("web"), Some(VmPhase::Running));
    let hello = pb::ConsoleInput {
        name: vm_name("web"),
        ..Default::default()
    };
    let input = tokio_stream::once(hello).chain(tokio_stream::pending());
    let mut output = c.vms().console_vm(input).await.unwrap().into_inner();
    let first = output.message().await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&first.data), "web> ");
}

#[tokio::test(flavor = "multi_thread")]
async fn checked_vm_is_told_what_every_host_says() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    let name = "hosts/a".to_owned();
    let cordoned = c.hosts().cordon_host(pb::CordonHostRequest { name }).await;
    assert!(cordoned.unwrap().into_inner().spec.unwrap().cordoned);
    let verdicts = || async {
        let request = pb::CreateVmRequest {
            validate_only: true,
            ..create_vm("web")
        };
        let operation = c.vms().create_vm(request).await.unwrap().into_inner();
        operation.metadata.unwrap().placement
    };
    // What was decided reaches the scheduler a moment later.
    let refused = |verdicts: &Vec<pb::PlacementVerdict>| {
        verdicts.len() == 2
            && verdicts[1]
                .refusals
                .iter()
                .any(|why| why.filter == "cordoned")
    };
    let verdicts = poll_async("the refusal", verdicts, refused).await;
    assert_eq!(verdicts[0].host, "hosts/b");
    assert!(verdicts[0].refusals.is_empty());
    assert_eq!(verdicts[1].host, "hosts/a");
}

#[tokio::test(flavor = "multi_thread")]
async fn drained_host_loses_what_may_move_and_names_what_stays() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    for (vm, policy) in [
        ("stays", pb::RestartPolicy::Never),
        ("sleeps", pb::RestartPolicy::Anywhere),
    ] {
        let mut request = create_vm(vm);
        let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
        spec.set_restart_policy(policy);
        spec.placement = Some(pb::Placement {
            node_selector: [("here".to_owned(), "yes".to_owned())].into(),
            ..Default::default()
        });
        label(c, "hosts/a", Some("yes")).await;
        label(c, "hosts/b", None).await;
        let placed = || async { c.vms().create_vm(request.clone()).await };
        let begun = poll_async("a host with the label", placed, Result::is_ok).await;
        c.succeeded(begun.unwrap().into_inner()).await;
        assert_eq!(fleet.host_of(vm).await, "hosts/a");
        if vm != "sleeps" {
            let operation = c.start_vm(vm).await;
            c.succeeded(operation).await;
        }
    }
    label(c, "hosts/b", Some("yes")).await;
    let mut check = pb::CreateVmRequest {
        validate_only: true,
        ..create_vm("checked")
    };
    let spec = check.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.placement = Some(pb::Placement {
        host: "hosts/b".into(),
        node_selector: [("here".to_owned(), "yes".to_owned())].into(),
        ..Default::default()
    });
    let verdict = || async {
        let operation = c.vms().create_vm(check.clone()).await.unwrap().into_inner();
        operation.metadata.unwrap().placement.swap_remove(0)
    };
    poll_async("the label", verdict, |first| first.refusals.is_empty()).await;
    let request = pb::DrainHostRequest {
        name: "hosts/a".into(),
        ..Default::default()
    };
    let operation = c.hosts().drain_host(request).await.unwrap().into_inner();
    let operation = c.done(operation).await;
    assert_eq!(operation.error, None);
    let findings = operation.metadata.unwrap().findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].starts_with("vm stays stays: "), "{findings:?}");
    let moved = || async { fleet.hosts[1].phase("sleeps") };
    poll_async("it is there", moved, |phase| {
        *phase == Some(VmPhase::Stopped)
    })
    .await;
    let left = || async { fleet.hosts[0].vms() };
    poll_async("the rest", left, |left| left == &["stays"]).await;
    assert_eq!(fleet.hosts[0].phase("stays"), Some(VmPhase::Running));
}

/// Gives a host the label, or takes it away.
async fn label(controller: &Controller, host: &str, value: Option<&str>) {
    let labels = value.map(|value| ("here".to_owned(), value.to_owned()));
    let request = pb::UpdateHostRequest {
        host: Some(pb::Host {
            name: host.to_owned(),
            spec: Some(pb::HostSpec {
                labels: labels.into_iter().collect(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["spec.labels".into()],
        }),
    };
    controller.hosts().update_host(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_of_all_hosts_are_upgraded_one_host_after_the_other() {
    let fleet = Fleet::of(&[host("a"), host("b")]).await;
    let c = &fleet.controller;
    let request = pb::UpgradeDevicesRequest {
        target: "hosts/-".into(),
        binary: "/opt/device-blk".into(),
        ..Default::default()
    };
    let operation = c.upgrades().upgrade_devices(request).await.unwrap();
    let operation = operation.into_inner();
    for host in [0, 1] {
        let jobs = || async { fleet.hosts[host].jobs().len() };
        poll_async("the host's turn", jobs, |count| *count == 1).await;
        if host == 0 {
            assert!(fleet.hosts[1].jobs().is_empty(), "not yet");
        }
        fleet.hosts[host].set_jobs(|job| job.state = JobState::Done as i32);
    }
    c.succeeded(operation).await;
}
