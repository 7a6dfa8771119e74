//! One controller, several hosts: what is placed where, and how everything finds its host.

use api::controller as pb;
use api::node::{HostStatus, VmPhase};
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
