//! VMs over gRPC: life, names, paging, idempotency, etags, refusals.

use api::controller as pb;
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{Site, create_vm, poll_async, vm_name};

#[tokio::test(flavor = "multi_thread")]
async fn vm_is_created_started_stopped_and_deleted() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let vm = c.vm("web").await;
    assert_eq!(vm.status.unwrap().phase(), pb::VmPhase::Stopped);
    assert_eq!(vm.spec.unwrap().vcpus, 1, "what was left out is filled in");

    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    let status = c.vm("web").await.status.unwrap();
    assert_eq!(status.phase(), pb::VmPhase::Running);
    assert_eq!(status.host, "hosts/simulated");

    let reset = pb::ResetVmRequest {
        name: vm_name("web"),
    };
    let vm = c.vms().reset_vm(reset.clone()).await.unwrap().into_inner();
    assert_eq!(vm.status.unwrap().resets, 1);

    let stopped = c.stop_vm("web").await;
    c.succeeded(stopped).await;
    let error = c.vms().reset_vm(reset).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("vmctl vm start web"), "{error}");

    let request = pb::DeleteVmRequest {
        name: vm_name("web"),
        ..Default::default()
    };
    let deleted = c.vms().delete_vm(request).await.unwrap().into_inner();
    c.succeeded(deleted).await;
    let gone = c
        .vms()
        .get_vm(pb::GetVmRequest {
            name: vm_name("web"),
        })
        .await
        .unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert!(
        site.host.vms().is_empty(),
        "the host has nothing left of it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn running_vm_is_not_deleted_unless_forced() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    let request = pb::DeleteVmRequest {
        name: vm_name("web"),
        ..Default::default()
    };
    let error = c.vms().delete_vm(request.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(
        error.message().contains("stop it first: vmctl vm stop web"),
        "{error}"
    );
    assert_eq!(error.get_details_error_info().unwrap().reason, "VM_RUNNING");
    assert_eq!(site.host.vms(), ["web"]);

    let forced = pb::DeleteVmRequest {
        force: true,
        ..request
    };
    let deleted = c.vms().delete_vm(forced).await.unwrap().into_inner();
    c.succeeded(deleted).await;
    assert!(site.host.vms().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_cover_all_vms_once() {
    let site = Site::new().await;
    let c = &site.controller;
    for n in 0..7 {
        c.create_vm(&format!("vm{n}")).await;
    }
    let mut other = create_vm("elsewhere");
    other.parent = "projects/other".into();
    let operation = c.vms().create_vm(other).await.unwrap().into_inner();
    c.succeeded(operation).await;

    let mut names = Vec::new();
    let mut sizes = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVmsRequest {
            parent: "projects/default".into(),
            page_size: 3,
            page_token,
            ..Default::default()
        };
        let page = c.vms().list_vms(request).await.unwrap().into_inner();
        sizes.push(page.vms.len());
        names.extend(page.vms.into_iter().map(|vm| vm.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let expected: Vec<String> = (0..7).map(|n| vm_name(&format!("vm{n}"))).collect();
    assert_eq!((names, sizes), (expected, vec![3, 3, 1]));

    let all = pb::ListVmsRequest {
        parent: "projects/-".into(),
        ..Default::default()
    };
    assert_eq!(
        c.vms().list_vms(all).await.unwrap().into_inner().vms.len(),
        8
    );
    let bad = pb::ListVmsRequest {
        parent: "projects/default".into(),
        page_token: "volumes/x".into(),
        ..Default::default()
    };
    assert_eq!(
        c.vms().list_vms(bad).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_request_id_answers_the_same_operation_even_after_a_crash() {
    let mut site = Site::new().await;
    let request = pb::CreateVmRequest {
        request_id: "once".into(),
        ..create_vm("web")
    };
    let first = site
        .controller
        .vms()
        .create_vm(request.clone())
        .await
        .unwrap()
        .into_inner();
    site.kill_and_restart_controller().await;
    let again = site
        .controller
        .vms()
        .create_vm(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.name, again.name);

    let different = pb::CreateVmRequest {
        vm_id: "other".into(),
        ..request
    };
    let error = site
        .controller
        .vms()
        .create_vm(different)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    assert_eq!(
        error.get_details_error_info().unwrap().reason,
        "REQUEST_ID_REUSED"
    );
    let taken = site
        .controller
        .vms()
        .create_vm(create_vm("web"))
        .await
        .unwrap_err();
    assert_eq!(
        taken.get_details_error_info().unwrap().reason,
        "ALREADY_EXISTS"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_etag_is_aborted() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let etag = c.vm("web").await.etag;
    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    let request = pb::StopVmRequest {
        name: vm_name("web"),
        etag: etag.clone(),
        ..Default::default()
    };
    let error = c.vms().stop_vm(request.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::Aborted);
    assert_eq!(
        error.get_details_error_info().unwrap().reason,
        "ETAG_MISMATCH"
    );
    let etag = c.vm("web").await.etag;
    let stopped = c
        .vms()
        .stop_vm(pb::StopVmRequest { etag, ..request })
        .await
        .unwrap();
    c.succeeded(stopped.into_inner()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_name_every_field() {
    let site = Site::new().await;
    let mut request = create_vm("Web");
    request.vm.as_mut().unwrap().spec.as_mut().unwrap().disks = vec![pb::Disk::default()];
    let error = site.controller.vms().create_vm(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let fields: Vec<String> = error
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|violation| violation.field)
        .collect();
    assert_eq!(fields, ["vm_id", "vm.spec.disks[0]"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn validate_only_creates_nothing() {
    let site = Site::new().await;
    let request = pb::CreateVmRequest {
        validate_only: true,
        ..create_vm("web")
    };
    let operation = site
        .controller
        .vms()
        .create_vm(request)
        .await
        .unwrap()
        .into_inner();
    assert!(operation.done && operation.name.is_empty(), "{operation:?}");
    let all = pb::ListVmsRequest {
        parent: "projects/-".into(),
        ..Default::default()
    };
    let vms = site
        .controller
        .vms()
        .list_vms(all)
        .await
        .unwrap()
        .into_inner()
        .vms;
    assert_eq!(vms, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_own_shutdown_is_kept_and_not_undone() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    site.host.guest_shuts_down("web");
    let vm = poll_async(
        "the recorded shutdown",
        || c.vm("web"),
        |vm| vm.desired_power() == pb::DesiredPower::Off,
    )
    .await;
    let status = vm.status.unwrap();
    assert_eq!(status.phase(), pb::VmPhase::Stopped);
    assert_eq!(status.stop_reason, "guest-shutdown");
    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    assert_eq!(
        c.vm("web").await.status.unwrap().phase(),
        pb::VmPhase::Running
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn settled_vm_is_not_applied_again_and_again() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    let applied = site.host.applied();
    // Every look from here on would repeat it.
    for n in 0..3 {
        c.create_vm(&format!("other{n}")).await;
    }
    assert_eq!(site.host.applied(), applied + 3, "one for each new VM");
}

#[tokio::test(flavor = "multi_thread")]
async fn console_passes_bytes_both_ways() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let hello = pb::ConsoleInput {
        name: vm_name("web"),
        ..Default::default()
    };
    sender.send(hello).await.unwrap();
    let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut output = c.vms().console_vm(input).await.unwrap().into_inner();
    assert_eq!(output.next().await.unwrap().unwrap().data, b"web> ");
    let typed = pb::ConsoleInput {
        data: b"ls\r".to_vec(),
        ..Default::default()
    };
    sender.send(typed).await.unwrap();
    assert_eq!(output.next().await.unwrap().unwrap().data, b"ls\r");
}
