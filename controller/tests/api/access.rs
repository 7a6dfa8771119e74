//! Callers with tokens, projects with quotas, the audit log, filters and watches.

use std::path::Path;

use api::controller as pb;
use api::controller::audit_log_client::AuditLogClient;
use api::controller::projects_client::ProjectsClient;
use api::controller::watch_resources_response::Change;
use api::controller::watched_resource::Resource;
use api::controller::watches_client::WatchesClient;
use sha2::{Digest as _, Sha256};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::harness::{Controller, PATIENCE, Site, create_vm, poll_async, vm_name};
use crate::simulated::Host;

/// A token, its roles, and the projects that it is for (none: all).
type Token<'a> = (&'a str, &'a [&'a str], Option<&'a [&'a str]>);

/// A controller that asks callers for tokens.
async fn guarded(dir: &Path, tokens: &[Token<'_>]) -> (Host, Controller) {
    let entries: Vec<serde_json::Value> = tokens
        .iter()
        .map(|(token, roles, projects)| {
            let digest = Sha256::digest(token.as_bytes());
            let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            serde_json::json!({"name": token, "sha256": hex, "roles": roles, "projects": projects})
        })
        .collect();
    let file = dir.join("tokens.json");
    std::fs::write(&file, serde_json::to_vec(&entries).unwrap()).unwrap();
    let socket = dir.join("agent.sock");
    let host = Host::serve(&socket);
    let node = format!("unix:{}", socket.display());
    let state = dir.join("state");
    let controller = Controller::start(&[
        "--node",
        &node,
        "--state-dir",
        state.to_str().unwrap(),
        "--tokens",
        file.to_str().unwrap(),
    ])
    .await;
    (host, controller)
}

fn by<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

fn vm_in(project: &str, id: &str) -> pb::CreateVmRequest {
    pb::CreateVmRequest {
        parent: format!("projects/{project}"),
        ..create_vm(id)
    }
}

fn reason(status: &tonic::Status) -> String {
    let info = status.get_details_error_info();
    info.map(|info| info.reason).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_do_what_their_roles_and_projects_allow() {
    let dir = tempfile::tempdir().unwrap();
    let (_host, c) = guarded(
        dir.path(),
        &[
            ("root", &["admin"], None),
            ("op", &["operator"], Some(&["web"])),
            ("look", &["viewer"], None),
        ],
    )
    .await;
    let nobody = c.vms().create_vm(create_vm("v")).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);

    // A project has to be made, by an admin.
    let early = c
        .vms()
        .create_vm(by("op", vm_in("web", "v")))
        .await
        .unwrap_err();
    assert_eq!(reason(&early), "PROJECT_NOT_FOUND", "{early}");
    let mut projects = ProjectsClient::new(c.channel.clone());
    let create = pb::CreateProjectRequest {
        project_id: "web".into(),
        ..Default::default()
    };
    let refused = projects
        .create_project(by("op", create.clone()))
        .await
        .unwrap_err();
    assert_eq!(reason(&refused), "ROLE_MISSING", "{refused}");
    projects.create_project(by("root", create)).await.unwrap();

    let made = c
        .vms()
        .create_vm(by("op", vm_in("web", "v")))
        .await
        .unwrap();
    let operation = made.into_inner().name;
    let wait = pb::WaitOperationRequest {
        name: operation.clone(),
        timeout_ms: PATIENCE.as_millis() as u32,
    };
    let done = c.operations().wait_operation(by("op", wait)).await.unwrap();
    assert!(done.into_inner().done);
    let elsewhere = c
        .vms()
        .create_vm(by("op", create_vm("v")))
        .await
        .unwrap_err();
    assert_eq!(reason(&elsewhere), "PROJECT_DENIED", "{elsewhere}");
    let look = c
        .vms()
        .create_vm(by("look", create_vm("v")))
        .await
        .unwrap_err();
    assert_eq!(reason(&look), "ROLE_MISSING", "{look}");

    // What belongs to somebody else is not there.
    c.vms()
        .create_vm(by("root", create_vm("other")))
        .await
        .unwrap();
    let all = pb::ListOperationsRequest::default();
    let listed = c.operations().list_operations(by("op", all)).await.unwrap();
    let targets: Vec<String> = listed
        .into_inner()
        .operations
        .into_iter()
        .map(|operation| operation.metadata.unwrap_or_default().target)
        .collect();
    assert_eq!(targets, ["projects/web/vms/v"]);

    let faults = pb::CreateFaultExperimentRequest {
        parent: "projects/default".into(),
        ..Default::default()
    };
    let refused = c
        .faults()
        .create_fault_experiment(by("root", faults))
        .await
        .unwrap_err();
    assert_eq!(
        reason(&refused),
        "ROLE_MISSING",
        "an admin may not break things: {refused}"
    );

    let mut audit = AuditLogClient::new(c.channel.clone());
    let denied = pb::ListAuditEntriesRequest {
        filter: "reason = PROJECT_DENIED".into(),
        ..Default::default()
    };
    let entries = || {
        let (mut audit, request) = (audit.clone(), by("root", denied.clone()));
        async move {
            audit
                .list_audit_entries(request)
                .await
                .unwrap()
                .into_inner()
                .entries
        }
    };
    let entries = poll_async("the entry", entries, |entries| !entries.is_empty()).await;
    assert_eq!(
        (entries[0].caller.as_str(), entries[0].resource.as_str()),
        ("op", "projects/default/vms/v")
    );
    let refused = audit
        .list_audit_entries(by("look", pb::ListAuditEntriesRequest::default()))
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_holds_when_many_ask_at_once() {
    let site = Site::new().await;
    let c = &site.controller;
    let mut projects = ProjectsClient::new(c.channel.clone());
    let create = pb::CreateProjectRequest {
        project_id: "small".into(),
        project: Some(pb::Project {
            quota: Some(pb::Quota {
                vms: 3,
                memory_bytes: 8 << 30,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let project = projects.create_project(create).await.unwrap().into_inner();
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..8 {
        let mut vms = c.vms();
        asked.spawn(async move { vms.create_vm(vm_in("small", &format!("v{number}"))).await });
    }
    let mut made = 0;
    while let Some(answer) = asked.join_next().await {
        match answer.unwrap() {
            Ok(operation) => {
                made += 1;
                c.succeeded(operation.into_inner()).await;
            }
            Err(status) => assert_eq!(reason(&status), "QUOTA_EXCEEDED", "{status}"),
        }
    }
    assert_eq!(made, 3);
    let get = pb::GetProjectRequest {
        name: project.name.clone(),
    };
    let usage = projects
        .get_project(get)
        .await
        .unwrap()
        .into_inner()
        .usage
        .unwrap();
    assert_eq!((usage.vms, usage.vcpus), (3, 3));

    let delete = pb::DeleteProjectRequest {
        name: project.name.clone(),
        ..Default::default()
    };
    let refused = projects.delete_project(delete.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), "PROJECT_IN_USE", "{refused}");
    let raise = pb::UpdateProjectRequest {
        project: Some(pb::Project {
            name: project.name.clone(),
            etag: "wrong-1".into(),
            quota: Some(pb::Quota {
                vms: 9,
                ..Default::default()
            }),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["quota.vms".into()],
        }),
    };
    let refused = projects.update_project(raise.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), "ETAG_MISMATCH", "{refused}");
    let mut raise = raise;
    if let Some(wanted) = &mut raise.project {
        wanted.etag = project.etag;
    }
    let raised = projects.update_project(raise).await.unwrap().into_inner();
    let quota = raised.quota.unwrap();
    assert_eq!(
        (quota.vms, quota.memory_bytes),
        (9, 8 << 30),
        "only what the mask names"
    );
    let ninth = c.vms().create_vm(vm_in("small", "one-more")).await.unwrap();
    c.succeeded(ninth.into_inner()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn list_then_watch_misses_nothing() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("a").await;
    let list = pb::ListVmsRequest {
        parent: "projects/default".into(),
        filter: "name = '*/a' OR spec.vcpus > 8".into(),
        order_by: "create_time desc".into(),
        read_mask: Some(prost_types::FieldMask {
            paths: vec!["name".into()],
        }),
        ..Default::default()
    };
    let listed = c.vms().list_vms(list.clone()).await.unwrap().into_inner();
    assert_eq!(listed.vms.len(), 1);
    assert_eq!(
        (listed.vms[0].name.clone(), &listed.vms[0].spec),
        (vm_name("a"), &None)
    );

    // Made between the list and the watch.
    c.create_vm("b").await;
    let watch = pb::WatchResourcesRequest {
        parent: "projects/default".into(),
        kind: pb::ResourceKind::Vm as i32,
        resume_token: listed.resume_token,
        filter: "name = '*/b'".into(),
        ..Default::default()
    };
    let mut stream = WatchesClient::new(c.channel.clone())
        .watch_resources(watch)
        .await
        .unwrap()
        .into_inner();
    let next = tokio::time::timeout(PATIENCE, async {
        loop {
            let message = stream.next().await.unwrap().unwrap();
            if let Some(Change::Put(put)) = message.change
                && let Some(Resource::Vm(vm)) = put.resource
            {
                return (vm.name, message.resume_token);
            }
        }
    });
    let (name, token) = next.await.unwrap();
    assert_eq!(name, vm_name("b"));
    assert!(token.parse::<u64>().is_ok(), "{token}");

    let bad = pb::ListVmsRequest {
        filter: "spec.vcpu > 8".into(),
        ..list
    };
    let refused = c.vms().list_vms(bad).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("has no field vcpu"), "{refused}");
}
