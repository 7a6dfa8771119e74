use super::*;
use api::names::Name;

const VM: &str = "projects/default/vms/web";
const VOLUME: &str = "projects/default/volumes/data";

fn vm(generation: u64, power: pb::DesiredPower) -> VmRecord {
    VmRecord {
        vm: pb::Vm {
            name: VM.into(),
            generation,
            desired_power: power as i32,
            spec: Some(pb::VmSpec::default()),
            status: Some(pb::VmStatus::default()),
            ..Default::default()
        },
        node_id: "web".into(),
        rejected_generation: 0,
    }
}

fn volume(phase: pb::VolumePhase) -> VolumeRecord {
    VolumeRecord {
        volume: pb::Volume {
            name: VOLUME.into(),
            status: Some(pb::VolumeStatus {
                phase: phase as i32,
                ..Default::default()
            }),
            ..Default::default()
        },
        node_id: "data".into(),
    }
}

fn desired(vms: Vec<VmRecord>, volumes: Vec<VolumeRecord>) -> Desired {
    Desired {
        vms: vms
            .into_iter()
            .map(|record| {
                (
                    record.vm.name.clone(),
                    Stored {
                        record,
                        revision: 1,
                    },
                )
            })
            .collect(),
        volumes: volumes
            .into_iter()
            .map(|record| {
                (
                    record.volume.name.clone(),
                    Stored {
                        record,
                        revision: 1,
                    },
                )
            })
            .collect(),
        jobs: BTreeMap::new(),
        pending: vec![],
        ..Default::default()
    }
}

fn nothing_seen() -> Observed {
    let host = node::HostStatus {
        host_id: "h".into(),
        ..Default::default()
    };
    Observed {
        host: Some(host),
        connected: true,
        ..Default::default()
    }
}

fn seen(generation: u64, phase: node::VmPhase) -> Observed {
    let status = node::VmStatus {
        id: "web".into(),
        observed_generation: generation,
        phase: phase as i32,
        ..Default::default()
    };
    Observed {
        vms: [("web".to_owned(), status)].into(),
        ..nothing_seen()
    }
}

fn operation(kind: pb::OperationKind, target: &str, generation: u64) -> pb::Operation {
    let name = if target == VM {
        Name::vm("default", "web")
    } else {
        Name::volume("default", "data")
    };
    crate::model::new_operation(kind, &name, generation)
}

/// The record as it is once the controller stored what was seen.
fn recorded(mut record: VmRecord, observed: &Observed) -> VmRecord {
    record.vm.status = Some(vm_status(&observed.vms["web"], &observed.host_name()));
    record
}

fn only_outcome(desired: &Desired, observed: &Observed) -> Option<Option<pb::OperationError>> {
    plan(desired, observed)
        .into_iter()
        .find_map(|action| match action {
            Action::FinishOperation { error, .. } => Some(error),
            _ => None,
        })
}

#[test]
fn unknown_vm_is_applied_with_its_generation() {
    let actions = plan(
        &desired(vec![vm(3, pb::DesiredPower::On)], vec![]),
        &nothing_seen(),
    );
    let [Action::ApplyVm { name, spec }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(
        (name.as_str(), spec.generation, spec.power()),
        (VM, 3, node::Power::On)
    );
}

#[test]
fn settled_vm_needs_nothing() {
    let observed = seen(3, node::VmPhase::Running);
    let record = recorded(vm(3, pb::DesiredPower::On), &observed);
    assert_eq!(plan(&desired(vec![record], vec![]), &observed), []);
}

#[test]
fn host_that_does_not_answer_is_left_alone() {
    let observed = Observed {
        connected: false,
        ..seen(1, node::VmPhase::Running)
    };
    let mut wanted = desired(
        vec![vm(3, pb::DesiredPower::Off)],
        vec![volume(Default::default())],
    );
    wanted.pending = vec![operation(pb::OperationKind::StopVm, VM, 3)];
    assert_eq!(plan(&wanted, &observed), []);
}

#[test]
fn older_generation_on_the_host_is_replaced() {
    let observed = seen(2, node::VmPhase::Running);
    let record = recorded(vm(3, pb::DesiredPower::Off), &observed);
    let actions = plan(&desired(vec![record], vec![]), &observed);
    assert!(
        matches!(&actions[..], [Action::ApplyVm { .. }]),
        "{actions:?}"
    );
}

#[test]
fn refused_generation_is_not_tried_again_but_the_next_one_is() {
    let mut record = vm(3, pb::DesiredPower::Off);
    record.rejected_generation = 3;
    assert_eq!(
        plan(&desired(vec![record.clone()], vec![]), &nothing_seen()),
        []
    );
    record.vm.generation = 4;
    let actions = plan(&desired(vec![record], vec![]), &nothing_seen());
    assert!(
        matches!(&actions[..], [Action::ApplyVm { .. }]),
        "{actions:?}"
    );
}

#[test]
fn guests_own_shutdown_is_recorded_and_not_undone() {
    let observed = seen(3, node::VmPhase::Stopped);
    let actions = plan(
        &desired(vec![vm(3, pb::DesiredPower::On)], vec![]),
        &observed,
    );
    let [Action::RecordVm { ended, status, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert!(ended);
    assert_eq!(status.phase(), pb::VmPhase::Stopped);
    let record = recorded(vm(3, pb::DesiredPower::Off), &observed);
    assert_eq!(
        plan(&desired(vec![record], vec![]), &observed),
        [],
        "and then nothing more"
    );
}

#[test]
fn stopped_state_of_an_older_generation_is_not_taken_for_a_shutdown() {
    let observed = seen(2, node::VmPhase::Stopped);
    let actions = plan(
        &desired(vec![vm(3, pb::DesiredPower::On)], vec![]),
        &observed,
    );
    assert!(
        actions
            .iter()
            .all(|action| !matches!(action, Action::RecordVm { ended: true, .. })),
        "{actions:?}"
    );
    assert!(
        actions
            .iter()
            .any(|action| matches!(action, Action::ApplyVm { .. }))
    );
}

#[test]
fn changing_figures_are_no_news() {
    let mut observed = seen(3, node::VmPhase::Running);
    let record = recorded(vm(3, pb::DesiredPower::On), &observed);
    let status = observed.vms.get_mut("web").unwrap();
    status.processes = vec![node::ProcessStatus {
        rss_kib: 5,
        ..Default::default()
    }];
    assert_eq!(plan(&desired(vec![record], vec![]), &observed), []);
}

#[test]
fn deleting_goes_from_running_to_stopped_to_forgotten() {
    let mut record = vm(4, pb::DesiredPower::OffNow);
    record.vm.deleting = true;
    let cases = [
        (seen(3, node::VmPhase::Running), "apply"),
        (seen(4, node::VmPhase::Stopping), "wait"),
        (seen(4, node::VmPhase::Stopped), "delete"),
        (seen(3, node::VmPhase::Failed), "delete"),
        (nothing_seen(), "forget"),
    ];
    for (observed, expected) in cases {
        let record = match observed.vms.is_empty() {
            true => record.clone(),
            false => recorded(record.clone(), &observed),
        };
        let actions = plan(&desired(vec![record], vec![]), &observed);
        let did = match &actions[..] {
            [] => "wait",
            [Action::ApplyVm { spec, .. }] if spec.power() == node::Power::OffNow => "apply",
            [Action::DeleteVm { node_id, .. }] if node_id == "web" => "delete",
            [Action::ForgetVm { .. }] => "forget",
            other => panic!("{other:?}"),
        };
        assert_eq!(did, expected, "{observed:?}");
    }
}

#[test]
fn operations_end_as_the_vm_does() {
    use node::VmPhase::*;
    use pb::DesiredPower::{Off, On};
    use pb::OperationKind::*;
    // operation and its generation, wanted, seen, outcome: None goes on, Some("") succeeds.
    let cases = [
        (CreateVm, 1, vm(1, Off), nothing_seen(), None),
        (CreateVm, 1, vm(1, Off), seen(1, Stopped), Some("")),
        (CreateVm, 1, vm(2, On), seen(2, Starting), Some("")),
        (StartVm, 2, vm(2, On), seen(1, Stopped), None),
        (StartVm, 2, vm(2, On), seen(2, Starting), None),
        (StartVm, 2, vm(2, On), seen(2, Running), Some("")),
        (StartVm, 2, vm(2, On), seen(2, Stopped), Some("")),
        (
            StartVm,
            2,
            vm(2, On),
            seen(2, Failed),
            Some("VM_START_FAILED"),
        ),
        (StartVm, 2, vm(3, Off), seen(2, Running), Some("SUPERSEDED")),
        (StopVm, 3, vm(3, Off), seen(2, Running), None),
        (StopVm, 3, vm(3, Off), seen(3, Stopping), None),
        (StopVm, 3, vm(3, Off), seen(3, Stopped), Some("")),
        (StopVm, 3, vm(3, Off), seen(3, Failed), Some("")),
        (StopVm, 3, vm(4, On), seen(3, Stopping), Some("SUPERSEDED")),
    ];
    for (kind, generation, record, observed, expected) in cases {
        let mut wanted = desired(vec![record.clone()], vec![]);
        wanted.pending = vec![operation(kind, VM, generation)];
        let outcome = only_outcome(&wanted, &observed)
            .map(|error| error.map(|error| error.reason).unwrap_or_default());
        assert_eq!(
            outcome.as_deref(),
            expected,
            "{kind:?} {record:?} {observed:?}"
        );
    }
}

#[test]
fn refusal_ends_the_operation_with_its_reason() {
    let mut record = vm(2, pb::DesiredPower::Off);
    record.rejected_generation = 2;
    record.vm.status.as_mut().unwrap().error =
        Some(error(Code::InvalidArgument, "HOST_REFUSED", "no"));
    let mut wanted = desired(vec![record], vec![]);
    wanted.pending = vec![operation(pb::OperationKind::StartVm, VM, 2)];
    let outcome = only_outcome(&wanted, &nothing_seen()).unwrap().unwrap();
    assert_eq!(outcome.reason, "HOST_REFUSED");
}

#[test]
fn delete_ends_when_the_record_is_gone_and_others_are_aborted() {
    let mut wanted = desired(vec![], vec![]);
    wanted.pending = vec![operation(pb::OperationKind::DeleteVm, VM, 5)];
    assert_eq!(only_outcome(&wanted, &nothing_seen()), Some(None));
    wanted.pending = vec![operation(pb::OperationKind::StartVm, VM, 4)];
    let outcome = only_outcome(&wanted, &nothing_seen()).unwrap().unwrap();
    assert_eq!(outcome.reason, "DELETED");
}

#[test]
fn volume_is_made_recorded_and_then_left_alone() {
    let wanted = desired(vec![], vec![volume(pb::VolumePhase::Pending)]);
    let actions = plan(&wanted, &nothing_seen());
    assert!(
        matches!(&actions[..], [Action::CreateVolume { .. }]),
        "{actions:?}"
    );

    let status = node::VolumeStatus {
        id: "data".into(),
        size_bytes: 512,
        ..Default::default()
    };
    let mut observed = nothing_seen();
    observed.volumes.insert("data".into(), status);
    let actions = plan(&wanted, &observed);
    let [Action::RecordVolume { status, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    let mut record = volume(pb::VolumePhase::Pending);
    record.volume.status = Some(status.clone());
    let mut wanted = desired(vec![], vec![record]);
    wanted.pending = vec![operation(pb::OperationKind::CreateVolume, VOLUME, 1)];
    assert_eq!(
        plan(&wanted, &observed).len(),
        1,
        "the operation ends, nothing else"
    );
    assert_eq!(only_outcome(&wanted, &observed), Some(None));
}

#[test]
fn failed_volume_is_not_tried_again() {
    let wanted = desired(vec![], vec![volume(pb::VolumePhase::Failed)]);
    assert_eq!(plan(&wanted, &nothing_seen()), []);
}

#[test]
fn deleted_volume_goes_from_the_host_first() {
    let mut record = volume(pb::VolumePhase::Ready);
    record.volume.deleting = true;
    let mut observed = nothing_seen();
    observed
        .volumes
        .insert("data".into(), node::VolumeStatus::default());
    let wanted = desired(vec![], vec![record]);
    assert!(matches!(
        &plan(&wanted, &observed)[..],
        [Action::DeleteVolume { .. }]
    ));
    assert!(matches!(
        &plan(&wanted, &nothing_seen())[..],
        [Action::ForgetVolume { .. }]
    ));
}

const OPERATION: &str = "operations/0-1";

/// A snapshot that was asked for, and what the host says of its job.
fn with_job(cancel: bool, complete: bool, seen: Option<node::JobState>) -> (Desired, Observed) {
    let mut wanted = desired(vec![], vec![]);
    wanted.pending = vec![pb::Operation {
        name: OPERATION.into(),
        metadata: Some(pb::OperationMetadata {
            kind: pb::OperationKind::MirrorDisk as i32,
            target: format!("{VM}/disks/root"),
            ..Default::default()
        }),
        ..Default::default()
    }];
    let record = JobRecord {
        start: node::StartJobRequest {
            job_id: "0-1".into(),
            work: None,
        },
        complete,
        cancel,
    };
    wanted.jobs.insert(OPERATION.into(), record);
    let mut observed = Observed {
        connected: true,
        ..Default::default()
    };
    if let Some(state) = seen {
        let job = node::Job {
            job_id: "0-1".into(),
            state: state as i32,
            error: "it broke".into(),
            findings: vec!["found".into()],
            ..Default::default()
        };
        observed.jobs.insert("0-1".into(), job);
    }
    (wanted, observed)
}

fn planned(cancel: bool, complete: bool, seen: Option<node::JobState>) -> Vec<Action> {
    let (desired, observed) = with_job(cancel, complete, seen);
    plan(&desired, &observed)
}

#[test]
fn job_is_begun_followed_and_finished() {
    use node::JobState::*;
    assert!(matches!(
        planned(false, false, None)[..],
        [Action::StartJob { .. }]
    ));
    assert_eq!(planned(false, false, Some(Running)), []);
    assert_eq!(
        planned(false, false, Some(Ready)),
        [],
        "it waits to be told"
    );
    assert!(matches!(
        planned(false, true, Some(Ready))[..],
        [Action::CompleteJob { .. }]
    ));
    assert!(matches!(
        planned(true, false, Some(Running))[..],
        [Action::CancelJob { .. }]
    ));
    let [
        Action::FinishOperation {
            error: None,
            findings,
            ..
        },
    ] = &planned(false, false, Some(Done))[..]
    else {
        panic!()
    };
    assert_eq!(findings, &["found"]);
    let [
        Action::FinishOperation {
            error: Some(error), ..
        },
    ] = &planned(false, false, Some(Failed))[..]
    else {
        panic!()
    };
    assert_eq!(error.message, "it broke");
}

#[test]
fn cancelled_job_that_the_host_does_not_know_ends_without_being_begun() {
    let [
        Action::FinishOperation {
            error: Some(error), ..
        },
    ] = &planned(true, false, None)[..]
    else {
        panic!()
    };
    assert_eq!(error.code, Code::Cancelled as i32);
}

#[test]
fn job_of_no_operation_is_ended_and_forgotten() {
    for (state, over) in [
        (node::JobState::Running, false),
        (node::JobState::Done, true),
    ] {
        let (_, observed) = with_job(false, false, Some(state));
        match &plan(&Desired::default(), &observed)[..] {
            [Action::ForgetJob { .. }] => assert!(over),
            [Action::CancelJob { .. }] => assert!(!over),
            other => panic!("{other:?}"),
        }
    }
}
