//! Disks over gRPC: limits reach the host with the VM, and work on them is a job there.

use api::controller as pb;
use api::node::{self, start_job_request::Work};
use prost_types::FieldMask;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{Site, create_vm, poll_async, vm_name};

const VOLUME: &str = "projects/default/volumes/data";

/// A VM with one disk on a volume and one on a file.
async fn site() -> Site {
    let site = Site::new().await;
    let c = &site.controller;
    let volume = pb::CreateVolumeRequest {
        parent: "projects/default".into(),
        volume_id: "data".into(),
        volume: Some(pb::Volume {
            spec: Some(pb::VolumeSpec {
                size_bytes: 1 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let operation = c.volumes().create_volume(volume).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    let disk = |name: &str, source| pb::Disk {
        name: name.into(),
        source: Some(source),
        ..Default::default()
    };
    let mut vm = create_vm("web");
    vm.vm.as_mut().unwrap().spec.as_mut().unwrap().disks = vec![
        disk("root", pb::disk::Source::Volume(VOLUME.into())),
        disk("file", pb::disk::Source::Path("/images/a.raw".into())),
    ];
    let operation = c.vms().create_vm(vm).await.unwrap().into_inner();
    c.succeeded(operation).await;
    let operation = c.start_vm("web").await;
    c.succeeded(operation).await;
    site
}

fn disk_name(disk: &str) -> String {
    format!("{}/disks/{disk}", vm_name("web"))
}

fn update(iops: u64, paths: &[&str]) -> pb::UpdateDiskRequest {
    let limits = pb::RateLimits {
        read: Some(pb::RateLimit {
            iops,
            ..Default::default()
        }),
        ..Default::default()
    };
    pb::UpdateDiskRequest {
        disk: Some(pb::VmDisk {
            name: disk_name("root"),
            spec: Some(pb::Disk {
                limits: Some(limits),
                ..Default::default()
            }),
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_running_vm_reach_its_host() {
    let site = site().await;
    let c = &site.controller;
    let request = update(1000, &["spec.limits.read.iops"]);
    let operation = c.disks().update_disk(request).await.unwrap().into_inner();
    c.succeeded(operation).await;
    let applied = site.host.spec("web");
    assert_eq!(applied.power(), node::Power::On, "it goes on running");
    let limits = applied.disks[0].limits.unwrap();
    assert_eq!(limits.read.unwrap().iops, 1000);
    let get = pb::GetDiskRequest {
        name: disk_name("root"),
    };
    let disk = c.disks().get_disk(get).await.unwrap().into_inner();
    let status = disk.status.unwrap();
    assert_eq!((status.served, status.throttled), (true, 7));
    assert_eq!(status.limits.unwrap().read.unwrap().iops, 1000);

    let unknown = update(1, &["spec.serial"]);
    let error = c.disks().update_disk(unknown).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let mut stale = update(1, &["spec.limits"]);
    stale.disk.as_mut().unwrap().etag = "old".into();
    let error = c.disks().update_disk(stale).await.unwrap_err();
    assert_eq!(
        error.get_details_error_info().unwrap().reason,
        "ETAG_MISMATCH"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_is_a_job_that_survives_the_controller() {
    let mut site = site().await;
    let request = pb::SnapshotDiskRequest {
        name: disk_name("root"),
        snapshot_id: "monday".into(),
        request_id: "once".into(),
    };
    let c = &site.controller;
    let begun = c
        .disks()
        .snapshot_disk(request.clone())
        .await
        .unwrap()
        .into_inner();
    let jobs = || async { site.host.jobs() };
    let jobs = poll_async("the job", jobs, |jobs| jobs.len() == 1).await;
    let wanted = Work::Snapshot(node::SnapshotDisk {
        volume: "data".into(),
        snapshot: "monday".into(),
    });
    assert_eq!(jobs[0].work, Some(wanted));

    site.kill_and_restart_controller().await;
    let c = &site.controller;
    let again = c.disks().snapshot_disk(request).await.unwrap().into_inner();
    assert_eq!(again.name, begun.name);
    site.host
        .set_jobs(|job| job.state = node::JobState::Done as i32);
    c.succeeded(begun).await;
    let jobs = || async { site.host.jobs() };
    poll_async("the job to be forgotten", jobs, Vec::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mirror_waits_to_be_completed_and_says_how_far_it_is() {
    let site = site().await;
    let c = &site.controller;
    let request = pb::MirrorDiskRequest {
        name: disk_name("root"),
        format: "qcow2".into(),
        ..Default::default()
    };
    let operation = c.disks().mirror_disk(request).await.unwrap().into_inner();
    let jobs = || async { site.host.jobs() };
    poll_async("the job", jobs, |jobs| jobs.len() == 1).await;
    site.host.set_jobs(|job| {
        job.state = node::JobState::Ready as i32;
        (job.done_bytes, job.total_bytes) = (70, 70);
    });
    let get = || async {
        let name = operation.name.clone();
        let get = pb::GetOperationRequest { name };
        let seen = c
            .operations()
            .get_operation(get)
            .await
            .unwrap()
            .into_inner();
        seen.metadata.unwrap()
    };
    let seen = poll_async("readiness", get, |metadata| metadata.ready).await;
    assert_eq!((seen.done_bytes, seen.total_bytes), (70, 70));
    let complete = pb::CompleteMirrorRequest {
        operation: operation.name.clone(),
    };
    c.disks().complete_mirror(complete).await.unwrap();
    c.succeeded(operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_can_be_cancelled_and_a_failure_is_told_with_its_reason() {
    let site = site().await;
    let c = &site.controller;
    let request = pb::BackupDiskRequest {
        name: disk_name("file"),
        path: "/backup/a.raw".into(),
        ..Default::default()
    };
    let operation = c
        .disks()
        .backup_disk(request.clone())
        .await
        .unwrap()
        .into_inner();
    let cancel = pb::CancelOperationRequest {
        name: operation.name.clone(),
    };
    c.operations().cancel_operation(cancel).await.unwrap();
    let error = c.done(operation).await.error.unwrap();
    assert_eq!(error.reason, "CANCELLED");

    let operation = c.disks().backup_disk(request).await.unwrap().into_inner();
    let jobs = || async { site.host.jobs() };
    // The first one may not be forgotten yet.
    let is_second = |jobs: &Vec<node::StartJobRequest>| {
        let mut ids = jobs.iter().map(|job| job.job_id.as_str());
        ids.any(|id| operation.name.ends_with(id))
    };
    poll_async("the job", jobs, is_second).await;
    site.host.set_jobs(|job| {
        job.state = node::JobState::Failed as i32;
        job.error_code = Code::ResourceExhausted as i32;
        job.error = "the backup's disk is full".into();
    });
    let error = c.done(operation).await.error.unwrap();
    assert_eq!(error.code, Code::ResourceExhausted as i32);
    assert_eq!(error.message, "the backup's disk is full");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_volumes_can_do_is_refused_for_files() {
    let site = site().await;
    let c = &site.controller;
    let request = pb::SnapshotDiskRequest {
        name: disk_name("file"),
        snapshot_id: "monday".into(),
        ..Default::default()
    };
    let error = c.disks().snapshot_disk(request).await.unwrap_err();
    assert_eq!(
        error.get_details_error_info().unwrap().reason,
        "NOT_A_VOLUME"
    );
    let request = pb::CommitDiskRequest {
        name: disk_name("none"),
        ..Default::default()
    };
    let error = c.disks().commit_disk(request).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("root, file"), "{error}");
}
