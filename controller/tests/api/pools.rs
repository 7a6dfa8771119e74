//! Pools that hosts share, over gRPC.

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::controller::pools_client::PoolsClient;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{Site, create_vm_of, vm_name};

const VOLUME: &str = "projects/default/volumes/data";

fn create_pool(kind: Kind) -> pb::CreatePoolRequest {
    pb::CreatePoolRequest {
        pool_id: "fast".into(),
        pool: Some(pb::Pool {
            spec: Some(pb::PoolSpec { kind: Some(kind) }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn volume(id: &str, export: &str) -> pb::CreateVolumeRequest {
    pb::CreateVolumeRequest {
        parent: "projects/default".into(),
        volume_id: id.into(),
        volume: Some(pb::Volume {
            spec: Some(pb::VolumeSpec {
                size_bytes: 1 << 20,
                pool: "pools/fast".into(),
                export: export.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn create_volume(site: &Site) {
    let c = &site.controller;
    let operation = c.volumes().create_volume(volume("data", "")).await.unwrap();
    c.succeeded(operation.into_inner()).await;
}

async fn create_vm(site: &Site, id: &str) {
    let spec = pb::VmSpec {
        kernel: "/boot/vmlinuz".into(),
        disks: vec![pb::Disk {
            source: Some(pb::disk::Source::Volume(VOLUME.into())),
            ..Default::default()
        }],
        ..Default::default()
    };
    let c = &site.controller;
    let operation = c.vms().create_vm(create_vm_of(id, spec)).await.unwrap();
    c.succeeded(operation.into_inner()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_start_counts_one_more_owner_of_a_served_volume() {
    let site = Site::new().await;
    let c = &site.controller;
    let mut pools = PoolsClient::new(c.channel.clone());
    let served = Kind::Nbd(pb::NbdPool {
        address: "10.0.0.9:10809".into(),
        ..Default::default()
    });
    let pool = pools.create_pool(create_pool(served)).await.unwrap();
    assert!(pool.into_inner().fenced);
    create_volume(&site).await;
    create_vm(&site, "a").await;
    create_vm(&site, "b").await;
    for (owner, vm) in (1..).zip(["a", "b", "a"]) {
        let started = c.start_vm(vm).await;
        c.succeeded(started).await;
        let disk = site.host.spec(vm).disks.remove(0);
        let nbd = disk.nbd.expect("it is reached through its server");
        assert_eq!((nbd.export.as_str(), nbd.generation), ("data", owner));
        assert_eq!(disk.source, None);
        let stopped = c.stop_vm(vm).await;
        c.succeeded(stopped).await;
    }
    let name = "pools/fast".to_owned();
    let delete = pb::DeletePoolRequest {
        name,
        ..Default::default()
    };
    let refused = pools.delete_pool(delete).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(reason(&refused), "POOL_IN_USE");
}

#[tokio::test(flavor = "multi_thread")]
async fn place_in_a_pool_is_one_volumes_and_one_running_vms() {
    let site = Site::new().await;
    let c = &site.controller;
    let mut pools = PoolsClient::new(c.channel.clone());
    let served = Kind::Nbd(pb::NbdPool {
        address: "10.0.0.9:10809".into(),
        ..Default::default()
    });
    pools.create_pool(create_pool(served)).await.unwrap();
    create_volume(&site).await;
    let taken = c.volumes().create_volume(volume("alias", "data")).await;
    assert_eq!(reason(&taken.unwrap_err()), "EXPORT_TAKEN");

    create_vm(&site, "a").await;
    create_vm(&site, "b").await;
    let started = c.start_vm("a").await;
    c.succeeded(started).await;
    let start = pb::StartVmRequest {
        name: vm_name("b"),
        ..Default::default()
    };
    let held = c.vms().start_vm(start).await.unwrap_err();
    assert_eq!(reason(&held), "VOLUME_HELD");
    let stopped = c.stop_vm("a").await;
    c.succeeded(stopped).await;
    for id in ["a", "b"] {
        let delete = pb::DeleteVmRequest {
            name: vm_name(id),
            ..Default::default()
        };
        let operation = c.vms().delete_vm(delete).await.unwrap();
        c.succeeded(operation.into_inner()).await;
    }

    // The server remembers how many owners there were, whatever the volume is called.
    let delete = pb::DeleteVolumeRequest {
        name: VOLUME.into(),
        ..Default::default()
    };
    let operation = c.volumes().delete_volume(delete).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    create_volume(&site).await;
    create_vm(&site, "c").await;
    let started = c.start_vm("c").await;
    c.succeeded(started).await;
    let disk = site.host.spec("c").disks.remove(0);
    assert_eq!(disk.nbd.unwrap().generation, 2);
}

fn reason(refused: &tonic::Status) -> String {
    let details = refused.get_error_details();
    let info = details.error_info().expect("it says why");
    info.reason.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn volume_of_a_plain_directory_is_told_as_not_fenced() {
    let site = Site::new().await;
    let c = &site.controller;
    let mut pools = PoolsClient::new(c.channel.clone());
    let directory = Kind::SharedDirectory(pb::SharedDirectory {
        path: "/srv/volumes".into(),
    });
    let pool = pools.create_pool(create_pool(directory)).await.unwrap();
    assert!(!pool.into_inner().fenced);
    create_volume(&site).await;
    let get = pb::GetVolumeRequest {
        name: VOLUME.into(),
    };
    let volume = c.volumes().get_volume(get).await.unwrap().into_inner();
    let status = volume.status.unwrap();
    assert_eq!(status.path, "/srv/volumes/data");
    assert!(!status.fenced);
    create_vm(&site, "a").await;
    let started = c.start_vm("a").await;
    c.succeeded(started).await;
    let disk = site.host.spec("a").disks.remove(0);
    let path = api::node::disk_spec::Source::Path("/srv/volumes/data".into());
    assert_eq!(disk.source, Some(path));
    let delete = pb::DeleteVolumeRequest {
        name: VOLUME.into(),
        ..Default::default()
    };
    let refused = c.volumes().delete_volume(delete).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
}
