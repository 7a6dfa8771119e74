//! Upgrades of device daemons over gRPC: an operation, whose work is a job of the host.

use api::controller as pb;
use api::node::{self, start_job_request::Work};
use tonic::Code;

use crate::harness::{Site, poll_async, vm_name};

async fn site() -> Site {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let operation = c.start_vm("web").await;
    c.succeeded(operation).await;
    site
}

fn request(target: &str) -> pb::UpgradeDevicesRequest {
    pb::UpgradeDevicesRequest {
        target: target.into(),
        binary: "/opt/device-blk".into(),
        max_unavailable: 3,
        request_id: "once".into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrade_is_a_job_that_survives_the_controller_and_tells_its_wave() {
    let mut site = site().await;
    let target = format!("{}/devices/root", vm_name("web"));
    let c = &site.controller;
    let begun = c.upgrades().upgrade_devices(request(&target)).await;
    let begun = begun.unwrap().into_inner();
    let jobs = || async { site.host.jobs() };
    let jobs = poll_async("the job", jobs, |jobs| jobs.len() == 1).await;
    let wanted = Work::Upgrade(node::UpgradeDaemons {
        vm_ids: vec!["web".into()],
        device: "root".into(),
        binary: "/opt/device-blk".into(),
        max_unavailable: 3,
        ..Default::default()
    });
    assert_eq!(jobs[0].work, Some(wanted));

    site.kill_and_restart_controller().await;
    let c = &site.controller;
    let again = c.upgrades().upgrade_devices(request(&target)).await;
    assert_eq!(again.unwrap().into_inner().name, begun.name);
    site.host
        .set_jobs(|job| job.stage = "wave 1 of 2: device-blk of web".into());
    let progress = || async {
        let name = begun.name.clone();
        let get = pb::GetOperationRequest { name };
        let seen = c.operations().get_operation(get).await.unwrap();
        seen.into_inner().metadata.unwrap().progress
    };
    poll_async("the wave", progress, |text| text.contains("wave 1 of 2")).await;
    site.host.set_jobs(|job| {
        job.state = node::JobState::Done as i32;
        job.findings = vec!["device-blk of web: 2 in place of 1".into()];
    });
    let done = c.done(begun).await;
    assert_eq!(done.error, None);
    assert_eq!(
        done.metadata.unwrap().findings,
        ["device-blk of web: 2 in place of 1"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn roll_back_fails_the_operation_and_cancelling_ends_it() {
    let site = site().await;
    let c = &site.controller;
    let mut whole = request(&vm_name("web"));
    whole.request_id.clear();
    let begun = c.upgrades().upgrade_devices(whole.clone()).await;
    let begun = begun.unwrap().into_inner();
    let jobs = || async { site.host.jobs() };
    poll_async("the job", jobs, |jobs| jobs.len() == 1).await;
    site.host.set_jobs(|job| {
        job.state = node::JobState::Failed as i32;
        job.error_code = Code::Aborted as i32;
        job.error = "device-blk of web: rolled back".into();
    });
    let error = c.done(begun).await.error.unwrap();
    assert_eq!(error.code, Code::Aborted as i32);
    assert!(error.message.contains("rolled back"), "{}", error.message);

    let begun = c.upgrades().upgrade_devices(whole).await;
    let begun = begun.unwrap().into_inner();
    let cancel = pb::CancelOperationRequest {
        name: begun.name.clone(),
    };
    c.operations().cancel_operation(cancel).await.unwrap();
    let error = c.done(begun).await.error.unwrap();
    assert_eq!(error.reason, "CANCELLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_running_vms_and_known_hosts_are_upgraded() {
    let site = site().await;
    let c = &site.controller;
    let hosts = c.hosts().list_hosts(pb::ListHostsRequest::default()).await;
    let host = hosts.unwrap().into_inner().hosts.remove(0).name;
    let mut checked = request(&host);
    checked.validate_only = true;
    let answer = c.upgrades().upgrade_devices(checked).await.unwrap();
    assert!(answer.into_inner().done, "nothing is begun");
    assert_eq!(site.host.jobs(), []);
    c.create_vm("idle").await;
    for (target, code) in [
        (vm_name("idle"), Code::FailedPrecondition),
        (vm_name("nobody"), Code::NotFound),
        ("hosts/elsewhere".to_owned(), Code::NotFound),
        ("web".to_owned(), Code::InvalidArgument),
    ] {
        let mut wrong = request(&target);
        wrong.request_id.clear();
        let refused = c.upgrades().upgrade_devices(wrong).await.unwrap_err();
        assert_eq!(refused.code(), code, "{target}: {refused}");
    }
}
