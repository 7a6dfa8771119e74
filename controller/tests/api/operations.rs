//! Operations survive the controller, and end as they should.

use api::controller as pb;
use tonic::{Code, Status};

use crate::harness::{Site, poll_async, vm_name};

#[tokio::test(flavor = "multi_thread")]
async fn operation_begun_before_a_crash_ends_after_it() {
    let mut site = Site::new().await;
    site.controller.create_vm("web").await;
    site.host.hold_starts(true);
    let started = site.controller.start_vm("web").await;
    let get = || pb::GetOperationRequest {
        name: started.name.clone(),
    };
    poll_async(
        "the start",
        || site.controller.vm("web"),
        |vm| {
            vm.status
                .as_ref()
                .is_some_and(|status| status.phase() == pb::VmPhase::Starting)
        },
    )
    .await;
    site.kill_and_restart_controller().await;
    let operation = site
        .controller
        .operations()
        .get_operation(get())
        .await
        .unwrap()
        .into_inner();
    assert!(!operation.done, "{operation:?}");
    site.host.hold_starts(false);
    site.controller.succeeded(operation).await;
    assert_eq!(
        site.controller.vm("web").await.status.unwrap().phase(),
        pb::VmPhase::Running
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wish_stored_just_before_a_crash_is_fulfilled_after_it() {
    let mut site = Site::new().await;
    site.controller.create_vm("web").await;
    let started = site.controller.start_vm("web").await;
    site.kill_and_restart_controller().await;
    site.controller.succeeded(started).await;
    assert_eq!(
        site.controller.vm("web").await.status.unwrap().phase(),
        pb::VmPhase::Running
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_answers_at_its_timeout_with_what_there_is() {
    let site = Site::new().await;
    site.controller.create_vm("web").await;
    site.host.hold_starts(true);
    let started = site.controller.start_vm("web").await;
    let request = pb::WaitOperationRequest {
        name: started.name.clone(),
        timeout_ms: 50,
    };
    let operation = site
        .controller
        .operations()
        .wait_operation(request)
        .await
        .unwrap()
        .into_inner();
    assert!(!operation.done);
    assert!(
        !operation.metadata.unwrap().progress.is_empty(),
        "it says what it waits for"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_start_stops_the_vm() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    site.host.hold_starts(true);
    let started = c.start_vm("web").await;
    let request = pb::CancelOperationRequest { name: started.name };
    let operation = c
        .operations()
        .cancel_operation(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(operation.error.unwrap().code, Code::Cancelled as i32);
    poll_async(
        "the stop",
        || c.vm("web"),
        |vm| {
            vm.status
                .as_ref()
                .is_some_and(|status| status.phase() == pb::VmPhase::Stopped)
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_refusal_ends_the_operation_and_the_vm_can_be_deleted() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    site.host
        .refuse(Some(Status::failed_precondition("no /dev/kvm here")));
    let started = c.start_vm("web").await;
    let operation = c.done(started).await;
    let error = operation.error.unwrap();
    assert_eq!(error.code, Code::FailedPrecondition as i32);
    assert!(error.message.contains("no /dev/kvm here"), "{error:?}");
    let vm = c.vm("web").await;
    assert_eq!(
        vm.status.unwrap().error.unwrap().message,
        "no /dev/kvm here"
    );
    let request = pb::DeleteVmRequest {
        name: vm_name("web"),
        ..Default::default()
    };
    let deleted = c.vms().delete_vm(request).await.unwrap().into_inner();
    c.succeeded(deleted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_that_fails_for_now_is_asked_again() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    site.host.refuse(Some(Status::unavailable("busy")));
    let before = site.host.applied();
    let started = c.start_vm("web").await;
    poll_async(
        "attempts",
        || async { site.host.applied() },
        |applied| *applied > before + 1,
    )
    .await;
    site.host.refuse(None);
    c.succeeded(started).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_are_listed_newest_first_and_by_target() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("a").await;
    c.create_vm("b").await;
    let started = c.start_vm("a").await;
    c.succeeded(started.clone()).await;
    let all = c
        .operations()
        .list_operations(pb::ListOperationsRequest::default())
        .await
        .unwrap();
    let all = all.into_inner().operations;
    assert_eq!((all.len(), &all[0].name), (3, &started.name));
    let only = pb::ListOperationsRequest {
        target: vm_name("b"),
        ..Default::default()
    };
    let only = c
        .operations()
        .list_operations(only)
        .await
        .unwrap()
        .into_inner()
        .operations;
    assert_eq!(only.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_ends_even_when_the_name_is_taken_again_at_once() {
    let site = Site::new().await;
    let c = &site.controller;
    for _ in 0..10 {
        c.create_vm("web").await;
        let request = pb::DeleteVmRequest {
            name: vm_name("web"),
            ..Default::default()
        };
        let deleted = c.vms().delete_vm(request).await.unwrap().into_inner();
        let create = || async { c.vms().create_vm(crate::harness::create_vm("web")).await };
        let created = poll_async("the name", create, Result::is_ok)
            .await
            .unwrap()
            .into_inner();
        c.succeeded(deleted).await;
        c.succeeded(created).await;
        let request = pb::DeleteVmRequest {
            name: vm_name("web"),
            ..Default::default()
        };
        let deleted = c.vms().delete_vm(request).await.unwrap().into_inner();
        c.succeeded(deleted).await;
    }
}
