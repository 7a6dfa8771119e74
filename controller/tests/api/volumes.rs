//! Volumes over gRPC.

use api::controller as pb;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{Site, create_vm};

fn create_volume(id: &str, spec: pb::VolumeSpec) -> pb::CreateVolumeRequest {
    pb::CreateVolumeRequest {
        parent: "projects/default".into(),
        volume_id: id.into(),
        volume: Some(pb::Volume {
            spec: Some(spec),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volume_outlives_vms_and_is_held_by_them() {
    let site = Site::new().await;
    let c = &site.controller;
    let spec = pb::VolumeSpec {
        size_bytes: 1 << 20,
        ..Default::default()
    };
    let operation = c
        .volumes()
        .create_volume(create_volume("data", spec))
        .await
        .unwrap();
    c.succeeded(operation.into_inner()).await;
    let name = "projects/default/volumes/data".to_owned();
    let get = pb::GetVolumeRequest { name: name.clone() };
    let status = c
        .volumes()
        .get_volume(get)
        .await
        .unwrap()
        .into_inner()
        .status
        .unwrap();
    assert_eq!(status.phase(), pb::VolumePhase::Ready);
    assert_eq!(
        (status.size_bytes, status.path.as_str()),
        (1 << 20, "/pool/data")
    );

    let mut vm = create_vm("web");
    vm.vm.as_mut().unwrap().spec.as_mut().unwrap().disks = vec![pb::Disk {
        source: Some(pb::disk::Source::Volume(name.clone())),
        ..Default::default()
    }];
    let operation = c.vms().create_vm(vm).await.unwrap().into_inner();
    c.succeeded(operation).await;
    let delete = pb::DeleteVolumeRequest {
        name: name.clone(),
        ..Default::default()
    };
    let error = c.volumes().delete_volume(delete.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("vm web"), "{error}");

    let request = pb::DeleteVmRequest {
        name: crate::harness::vm_name("web"),
        ..Default::default()
    };
    let operation = c.vms().delete_vm(request).await.unwrap().into_inner();
    c.succeeded(operation).await;
    let operation = c
        .volumes()
        .delete_volume(delete)
        .await
        .unwrap()
        .into_inner();
    c.succeeded(operation).await;
    let list = pb::ListVolumesRequest {
        parent: "projects/default".into(),
        ..Default::default()
    };
    assert_eq!(
        c.volumes()
            .list_volumes(list)
            .await
            .unwrap()
            .into_inner()
            .volumes,
        []
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn volume_that_the_host_refuses_fails_with_its_reason() {
    let site = Site::new().await;
    let c = &site.controller;
    let spec = pb::VolumeSpec {
        source_path: "/missing".into(),
        ..Default::default()
    };
    let operation = c
        .volumes()
        .create_volume(create_volume("data", spec))
        .await
        .unwrap();
    let operation = c.done(operation.into_inner()).await;
    let error = operation.error.unwrap();
    assert_eq!(error.code, Code::NotFound as i32);
    assert!(error.message.contains("/missing"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_with_a_volume_that_is_not_there_is_refused() {
    let site = Site::new().await;
    let mut vm = create_vm("web");
    vm.vm.as_mut().unwrap().spec.as_mut().unwrap().disks = vec![pb::Disk {
        source: Some(pb::disk::Source::Volume(
            "projects/default/volumes/none".into(),
        )),
        ..Default::default()
    }];
    let error = site.controller.vms().create_vm(vm).await.unwrap_err();
    assert_eq!(
        error.get_details_error_info().unwrap().reason,
        "VOLUME_NOT_FOUND"
    );
    assert!(
        error.message().contains("vmctl volume create none"),
        "{error}"
    );
}
