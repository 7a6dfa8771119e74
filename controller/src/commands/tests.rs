use std::sync::Arc;

use super::*;
use crate::hosts::Hosts;
use crate::store::embedded::EmbeddedStore;
use api::node;

struct Fixture {
    store: SharedStore,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(EmbeddedStore::open(&dir.path().join("s.redb")).unwrap());
    Fixture { store, _dir: dir }
}

fn web() -> Name {
    Name::vm("default", "web")
}

fn request(id: &str, body: &str) -> RequestKey {
    let message = pb::GetVmRequest { name: body.into() };
    RequestKey::new("default", id, "Test", &message)
}

fn no_id() -> RequestKey {
    request("", "")
}

async fn create(store: &SharedStore) -> pb::Operation {
    create_vm(
        store,
        &Hosts::new(),
        &web(),
        &pb::VmSpec::default(),
        &no_id(),
        false,
    )
    .await
    .unwrap()
}

fn seen(phase: node::VmPhase, generation: u64) -> Fleet {
    let status = node::VmStatus {
        id: "web".into(),
        phase: phase as i32,
        observed_generation: generation,
        ..Default::default()
    };
    let observed = Observed {
        vms: [("web".into(), status)].into(),
        connected: true,
        ..Default::default()
    };
    Fleet {
        // Nobody chose a host for what these tests make.
        hosts: [("".into(), observed.into())].into(),
    }
}

#[tokio::test]
async fn same_request_id_answers_the_same_operation() {
    let f = fixture();
    let spec = pb::VmSpec::default();
    let first = create_vm(
        &f.store,
        &Hosts::new(),
        &web(),
        &spec,
        &request("r1", "a"),
        false,
    )
    .await
    .unwrap();
    let again = create_vm(
        &f.store,
        &Hosts::new(),
        &web(),
        &spec,
        &request("r1", "a"),
        false,
    )
    .await
    .unwrap();
    assert_eq!(first, again);
    let error = create_vm(
        &f.store,
        &Hosts::new(),
        &web(),
        &spec,
        &request("r1", "b"),
        false,
    )
    .await
    .unwrap_err();
    assert!(
        matches!(error, CommandError::RequestIdReused { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn name_taken_is_refused() {
    let f = fixture();
    create(&f.store).await;
    let spec = pb::VmSpec::default();
    let error = create_vm(&f.store, &Hosts::new(), &web(), &spec, &no_id(), false)
        .await
        .unwrap_err();
    assert!(
        matches!(error, CommandError::AlreadyExists { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn validate_only_stores_nothing() {
    let f = fixture();
    let before = *f.store.revision().borrow();
    let spec = pb::VmSpec::default();
    let operation = create_vm(&f.store, &Hosts::new(), &web(), &spec, &no_id(), true)
        .await
        .unwrap();
    assert!(operation.done && operation.name.is_empty());
    assert_eq!(*f.store.revision().borrow(), before);
}

#[tokio::test]
async fn simultaneous_creates_with_one_request_id_make_one_operation() {
    let f = fixture();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let store = f.store.clone();
            tokio::spawn(async move {
                let spec = pb::VmSpec::default();
                create_vm(
                    &store,
                    &Hosts::new(),
                    &web(),
                    &spec,
                    &request("r1", "a"),
                    false,
                )
                .await
                .unwrap()
                .name
            })
        })
        .collect();
    let mut names = Vec::new();
    for task in tasks {
        names.push(task.await.unwrap());
    }
    names.dedup();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[tokio::test]
async fn power_changes_raise_the_generation_once() {
    let f = fixture();
    create(&f.store).await;
    let first = start_vm(&f.store, &web(), "", &no_id()).await.unwrap();
    let again = start_vm(&f.store, &web(), "", &no_id()).await.unwrap();
    let generation = |operation: &pb::Operation| operation.metadata.as_ref().unwrap().generation;
    assert_eq!((generation(&first), generation(&again)), (2, 2));
    assert_ne!(first.name, again.name);
    stop_vm(&f.store, &web(), "", &no_id(), true).await.unwrap();
    let gentle = stop_vm(&f.store, &web(), "", &no_id(), false)
        .await
        .unwrap();
    assert_eq!(generation(&gentle), 3, "a hard stop is not made gentle");
}

#[tokio::test]
async fn stale_etag_is_refused() {
    let f = fixture();
    create(&f.store).await;
    let vm = get_vm(&f.store, &web()).await.unwrap();
    let etag = visible_vm(&vm.record, &Fleet::default()).etag;
    start_vm(&f.store, &web(), &etag, &no_id()).await.unwrap();
    let error = stop_vm(&f.store, &web(), &etag, &no_id(), false)
        .await
        .unwrap_err();
    assert!(
        matches!(error, CommandError::EtagMismatch { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn running_vm_is_not_deleted_and_the_error_says_what_to_do() {
    let f = fixture();
    create(&f.store).await;
    let observed = seen(node::VmPhase::Stopped, 1);
    start_vm(&f.store, &web(), "", &no_id()).await.unwrap();
    for observed in [observed, seen(node::VmPhase::Running, 2)] {
        let error = delete_vm(&f.store, &observed, &web(), "", &no_id(), false)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("vmctl vm stop web"), "{error}");
    }
    stop_vm(&f.store, &web(), "", &no_id(), false)
        .await
        .unwrap();
    let observed = seen(node::VmPhase::Stopping, 3);
    let error = delete_vm(&f.store, &observed, &web(), "", &no_id(), false)
        .await
        .unwrap_err();
    assert!(matches!(error, CommandError::Running { .. }), "{error}");
    let observed = seen(node::VmPhase::Stopped, 3);
    delete_vm(&f.store, &observed, &web(), "", &no_id(), false)
        .await
        .unwrap();
    assert!(get_vm(&f.store, &web()).await.unwrap().record.vm.deleting);
    let error = start_vm(&f.store, &web(), "", &no_id()).await.unwrap_err();
    assert!(matches!(error, CommandError::Deleting { .. }), "{error}");
}

#[tokio::test]
async fn forced_deletion_wants_a_running_vm_off_at_once() {
    let f = fixture();
    create(&f.store).await;
    start_vm(&f.store, &web(), "", &no_id()).await.unwrap();
    let observed = seen(node::VmPhase::Running, 2);
    delete_vm(&f.store, &observed, &web(), "", &no_id(), true)
        .await
        .unwrap();
    let vm = get_vm(&f.store, &web()).await.unwrap().record.vm;
    assert!(vm.deleting);
    assert_eq!(vm.desired_power(), pb::DesiredPower::OffNow);
}

#[tokio::test]
async fn volume_and_vm_hold_on_to_each_other() {
    let f = fixture();
    let data = Name::volume("default", "data");
    let spec = pb::VmSpec {
        disks: vec![pb::Disk {
            source: Some(pb::disk::Source::Volume(data.to_string())),
            ..Default::default()
        }],
        ..Default::default()
    };
    let error = create_vm(&f.store, &Hosts::new(), &web(), &spec, &no_id(), false)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("vm.spec.disks[0].volume"),
        "{error}"
    );
    let size = pb::VolumeSpec {
        size_bytes: 512,
        ..Default::default()
    };
    create_volume(&f.store, &data, ("uid-of-data", ""), &size, &no_id(), false)
        .await
        .unwrap();
    create_vm(&f.store, &Hosts::new(), &web(), &spec, &no_id(), false)
        .await
        .unwrap();
    let error = delete_volume(&f.store, &data, "", &no_id())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("vm web"), "{error}");
}

#[tokio::test]
async fn cancelled_start_wants_the_vm_off() {
    let f = fixture();
    let created = create(&f.store).await;
    let error = cancel_operation(&f.store, &created.name).await.unwrap_err();
    assert!(
        matches!(error, CommandError::NotCancellable { .. }),
        "{error}"
    );
    let start = start_vm(&f.store, &web(), "", &no_id()).await.unwrap();
    let cancelled = cancel_operation(&f.store, &start.name).await.unwrap();
    assert!(cancelled.done);
    assert_eq!(cancelled.error.unwrap().reason, "CANCELLED");
    let vm = get_vm(&f.store, &web()).await.unwrap().record.vm;
    assert_eq!(vm.desired_power(), pb::DesiredPower::OffNow);
}
