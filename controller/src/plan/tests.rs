use super::*;
use api::names::Name;
use tonic::Code;

const VM: &str = "projects/default/vms/web";
const VOLUME: &str = "projects/default/volumes/data";
const HOST: &str = "h";

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
        host: HOST.into(),
        placements: 1,
        ..Default::default()
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
        host: HOST.into(),
        ..Default::default()
    }
}

fn desired(vms: Vec<VmRecord>, volumes: Vec<VolumeRecord>) -> Desired {
    Desired {
        hosts: [(HOST.to_owned(), host_record(HOST))].into(),
        vms: vms
            .into_iter()
            .map(|record| {
                (
                    record.vm.name.clone(),
                    Box::new(Stored {
                        record,
                        revision: 1,
                    }),
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
        pending: BTreeMap::new(),
        ..Default::default()
    }
}

fn host_record(id: &str) -> Stored<HostRecord> {
    let record = HostRecord {
        name: host_name(id),
        inventory: nothing_seen().host.map(|host| node::HostStatus {
            host_id: id.into(),
            ..host
        }),
        ..Default::default()
    };
    Stored {
        record,
        revision: 1,
    }
}

/// What is to be done when there is this host alone.
fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    super::plan(desired, &Fleet::from(observed.clone()))
}

/// What a host is told, of all that is to be done.
fn calls(actions: &[Action]) -> Vec<(&str, &Call)> {
    let calls = actions.iter().filter_map(|action| match action {
        Action::Call { host, call, .. } => Some((host.as_str(), call)),
        _ => None,
    });
    calls.collect()
}

fn nothing_seen() -> Observed {
    let host = node::HostStatus {
        host_id: HOST.into(),
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
    let [(HOST, Call::ApplyVm(spec))] = calls(&actions)[..] else {
        panic!("{actions:?}")
    };
    assert_eq!((spec.generation, spec.power()), (3, node::Power::On));
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
    wanted.pending = by_name(operation(pb::OperationKind::StopVm, VM, 3));
    assert_eq!(plan(&wanted, &observed), []);
}

#[test]
fn older_generation_on_the_host_is_replaced() {
    let observed = seen(2, node::VmPhase::Running);
    let record = recorded(vm(3, pb::DesiredPower::Off), &observed);
    let actions = plan(&desired(vec![record], vec![]), &observed);
    assert!(
        matches!(calls(&actions)[..], [(HOST, Call::ApplyVm(_))]),
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
        matches!(calls(&actions)[..], [(HOST, Call::ApplyVm(_))]),
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
    assert!(actions.iter().any(|action| matches!(
        action,
        Action::Call {
            call: Call::ApplyVm(_),
            ..
        }
    )));
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
        let did = match (&calls(&actions)[..], &actions[..]) {
            ([], []) => "wait",
            ([(HOST, Call::ApplyVm(spec))], [_]) if spec.power() == node::Power::OffNow => "apply",
            ([(HOST, Call::DeleteVm(id))], [_]) if id == "web" => "delete",
            ([], [Action::ForgetVm { .. }]) => "forget",
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
        wanted.pending = by_name(operation(kind, VM, generation));
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
        Some(outcome::error(Code::InvalidArgument, "HOST_REFUSED", "no"));
    let mut wanted = desired(vec![record], vec![]);
    wanted.pending = by_name(operation(pb::OperationKind::StartVm, VM, 2));
    let outcome = only_outcome(&wanted, &nothing_seen()).unwrap().unwrap();
    assert_eq!(outcome.reason, "HOST_REFUSED");
}

#[test]
fn delete_ends_when_the_record_is_gone_and_others_are_aborted() {
    let mut wanted = desired(vec![], vec![]);
    wanted.pending = by_name(operation(pb::OperationKind::DeleteVm, VM, 5));
    assert_eq!(only_outcome(&wanted, &nothing_seen()), Some(None));
    wanted.pending = by_name(operation(pb::OperationKind::StartVm, VM, 4));
    let outcome = only_outcome(&wanted, &nothing_seen()).unwrap().unwrap();
    assert_eq!(outcome.reason, "DELETED");
}

#[test]
fn volume_is_made_recorded_and_then_left_alone() {
    let wanted = desired(vec![], vec![volume(pb::VolumePhase::Pending)]);
    let actions = plan(&wanted, &nothing_seen());
    assert!(
        matches!(calls(&actions)[..], [(HOST, Call::CreateVolume(_))]),
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
    wanted.pending = by_name(operation(pb::OperationKind::CreateVolume, VOLUME, 1));
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
        calls(&plan(&wanted, &observed))[..],
        [(HOST, Call::DeleteVolume(_))]
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
    wanted.pending = by_name(pb::Operation {
        name: OPERATION.into(),
        metadata: Some(pb::OperationMetadata {
            kind: pb::OperationKind::MirrorDisk as i32,
            target: format!("{VM}/disks/root"),
            ..Default::default()
        }),
        ..Default::default()
    });
    let record = JobRecord {
        start: node::StartJobRequest {
            job_id: "0-1".into(),
            work: None,
        },
        complete,
        cancel,
        host: HOST.into(),
        then: Vec::new(),
    };
    wanted.jobs.insert(OPERATION.into(), record);
    let mut observed = nothing_seen();
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
        calls(&planned(false, false, None))[..],
        [(HOST, Call::StartJob(_))]
    ));
    assert_eq!(planned(false, false, Some(Running)), []);
    assert_eq!(
        planned(false, false, Some(Ready)),
        [],
        "it waits to be told"
    );
    assert!(matches!(
        calls(&planned(false, true, Some(Ready)))[..],
        [(HOST, Call::CompleteJob(_))]
    ));
    assert!(matches!(
        calls(&planned(true, false, Some(Running)))[..],
        [(HOST, Call::CancelJob(_))]
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
        match calls(&plan(&Desired::default(), &observed))[..] {
            [(HOST, Call::ForgetJob(_))] => assert!(over),
            [(HOST, Call::CancelJob(_))] => assert!(!over),
            _ => panic!("{state:?}"),
        }
    }
}

fn host_seen(id: &str, observed: Observed) -> (std::sync::Arc<str>, std::sync::Arc<Observed>) {
    let host = node::HostStatus {
        host_id: id.into(),
        ..Default::default()
    };
    let observed = Observed {
        host: Some(host),
        ..observed
    };
    (id.into(), std::sync::Arc::new(observed))
}

/// Two hosts, of which the second has nothing.
fn two_hosts(first: Observed) -> Fleet {
    Fleet {
        hosts: [host_seen(HOST, first), host_seen("i", nothing_seen())].into(),
    }
}

fn on_two_hosts(vms: Vec<VmRecord>) -> Desired {
    let mut desired = desired(vms, vec![]);
    desired.hosts.insert("i".into(), host_record("i"));
    desired
}

#[test]
fn each_host_is_told_of_its_own_vms_alone() {
    let record = VmRecord {
        host: "i".into(),
        ..vm(3, pb::DesiredPower::On)
    };
    let actions = super::plan(&on_two_hosts(vec![record]), &two_hosts(nothing_seen()));
    assert!(
        matches!(calls(&actions)[..], [("i", Call::ApplyVm(_))]),
        "{actions:?}"
    );
}

#[test]
fn unplaced_vm_is_placed_where_it_is_found_only_if_it_never_had_a_host() {
    let mut record = VmRecord {
        host: String::new(),
        placements: 0,
        ..vm(3, pb::DesiredPower::On)
    };
    let fleet = two_hosts(seen(3, node::VmPhase::Running));
    let place = |record: &VmRecord| {
        let actions = super::plan(&on_two_hosts(vec![record.clone()]), &fleet);
        let placed = actions.iter().find_map(|action| match action {
            Action::PlaceVm { found, .. } => Some(found.clone()),
            _ => None,
        });
        (placed.expect("it is placed"), calls(&actions).len())
    };
    assert_eq!(place(&record), (Some(HOST.to_owned()), 0));
    record.placements = 1;
    assert_eq!(place(&record), (None, 1), "and what the host has goes");
}

#[test]
fn what_is_not_a_hosts_any_more_goes_from_it() {
    let record = VmRecord {
        host: "i".into(),
        placements: 2,
        ..vm(3, pb::DesiredPower::On)
    };
    let desired = on_two_hosts(vec![record]);
    let actions = super::plan(&desired, &two_hosts(seen(2, node::VmPhase::Running)));
    let calls = calls(&actions);
    assert!(
        calls.contains(&(HOST, &Call::EvictVm("web".to_owned()))),
        "{actions:?}"
    );
}

#[test]
fn eviction_goes_before_the_same_vm_comes_back() {
    let mut wanted = on_two_hosts(vec![vm(3, pb::DesiredPower::On)]);
    wanted.evictions.insert((HOST.into(), "web".into()));
    let actions = super::plan(&wanted, &two_hosts(seen(2, node::VmPhase::Stopped)));
    assert_eq!(calls(&actions), [(HOST, &Call::EvictVm("web".to_owned()))]);
    let actions = super::plan(&wanted, &two_hosts(nothing_seen()));
    assert!(
        matches!(&actions[..], [Action::NoteEvicted { .. }]),
        "{actions:?}"
    );
}

const NETWORK: &str = "projects/default/networks/net";

fn in_network(record: VmRecord) -> VmRecord {
    let mut record = record;
    let nic = pb::Nic {
        name: "nic0".into(),
        network: NETWORK.into(),
        mac: "52:54:00:00:00:01".into(),
        ..Default::default()
    };
    record.vm.spec.get_or_insert_default().nics.push(nic);
    record
}

fn network(hosts: &[&str]) -> Stored<NetworkRecord> {
    let spec = pb::NetworkSpec {
        kind: pb::NetworkKind::Isolated as i32,
        overlay: Some(pb::Overlay {
            vni: 7,
            ..Default::default()
        }),
        ..Default::default()
    };
    let record = NetworkRecord {
        network: pb::Network {
            name: NETWORK.into(),
            spec: Some(spec),
            ..Default::default()
        },
        node_id: "net".into(),
        hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
    };
    Stored {
        record,
        revision: 1,
    }
}

#[test]
fn network_is_noted_and_then_made_where_its_vms_are() {
    let mut wanted = on_two_hosts(vec![in_network(vm(3, pb::DesiredPower::On))]);
    wanted.networks.insert(NETWORK.into(), network(&[]));
    let fleet = two_hosts(nothing_seen());
    let actions = super::plan(&wanted, &fleet);
    assert!(
        matches!(&actions[..], [Action::NoteNetwork { hosts, .. }] if hosts == &[HOST]),
        "{actions:?}"
    );
    wanted.networks.insert(NETWORK.into(), network(&[HOST]));
    let actions = super::plan(&wanted, &fleet);
    assert!(
        matches!(calls(&actions)[..], [(HOST, Call::ApplyNetwork(_))]),
        "{actions:?}"
    );
}

#[test]
fn network_goes_from_hosts_that_need_it_no_more() {
    let mut wanted = on_two_hosts(vec![]);
    wanted.networks.insert(NETWORK.into(), network(&[HOST]));
    let mut seen = nothing_seen();
    seen.networks.insert("net".into(), Default::default());
    let actions = super::plan(&wanted, &two_hosts(seen));
    assert!(
        matches!(calls(&actions)[..], [(HOST, Call::DeleteNetwork(_))]),
        "{actions:?}"
    );
    let actions = super::plan(&wanted, &two_hosts(nothing_seen()));
    assert!(
        matches!(&actions[..], [Action::NoteNetwork { hosts, .. }] if hosts.is_empty()),
        "{actions:?}"
    );
}

#[test]
fn overlay_is_told_its_other_hosts_and_what_is_there() {
    let there = VmRecord {
        host: "i".into(),
        ..in_network(vm(3, pb::DesiredPower::On))
    };
    let here = VmRecord {
        vm: pb::Vm {
            name: "projects/default/vms/other".into(),
            ..in_network(vm(3, pb::DesiredPower::On)).vm
        },
        node_id: "other".into(),
        ..vm(3, pb::DesiredPower::On)
    };
    let mut wanted = on_two_hosts(vec![there, here]);
    wanted
        .networks
        .insert(NETWORK.into(), network(&[HOST, "i"]));
    let other = wanted.hosts.get_mut("i").unwrap();
    let inventory = other.record.inventory.as_mut().unwrap();
    inventory.underlay_address = "192.0.2.2".into();
    let layout = Layout::of(&wanted);
    let record = &wanted.networks[NETWORK].record;
    let spec = crate::model::node_network_spec(record, HOST, &wanted, &layout);
    let peers = &spec.overlay.as_ref().unwrap().peers;
    assert_eq!(peers.len(), 1);
    assert_eq!(peers[0].underlay_address, "192.0.2.2");
    assert_eq!(peers[0].macs, ["52:54:00:00:00:01"]);
    let ours: Vec<&str> = spec
        .endpoints
        .iter()
        .map(|own| own.vm_id.as_str())
        .collect();
    assert_eq!(ours, ["other"], "endpoints of other hosts are theirs");
}

fn by_name(operation: pb::Operation) -> BTreeMap<String, pb::Operation> {
    [(operation.name.clone(), operation)].into()
}

fn draining(record: VmRecord, change: impl FnOnce(&mut pb::VmSpec)) -> Desired {
    let mut record = record;
    change(record.vm.spec.get_or_insert_default());
    let mut wanted = on_two_hosts(vec![record]);
    wanted.hosts.get_mut(HOST).unwrap().record.drain = OPERATION.into();
    wanted
}

#[test]
fn drain_moves_what_is_off_and_shuts_down_what_may_restart_anywhere() {
    use pb::DesiredPower::{Off, On};
    let anywhere = |spec: &mut pb::VmSpec| spec.set_restart_policy(pb::RestartPolicy::Anywhere);
    let running = seen(3, node::VmPhase::Running);
    let stopped = seen(3, node::VmPhase::Stopped);
    let moving = VmRecord {
        moving: true,
        ..vm(3, Off)
    };
    let pinned = |spec: &mut pb::VmSpec| {
        spec.placement.get_or_insert_default().host = host_name(HOST);
    };
    let cases = [
        (draining(vm(3, Off), |_| {}), &stopped, "move"),
        (draining(vm(3, Off), |_| {}), &running, "wait"),
        (draining(vm(3, On), anywhere), &running, "stop"),
        (draining(moving.clone(), anywhere), &running, "wait"),
        (draining(moving, anywhere), &stopped, "move"),
        (draining(vm(3, On), |_| {}), &running, "stays"),
        (draining(vm(3, Off), pinned), &stopped, "stays"),
    ];
    for (wanted, observed, expected) in cases {
        let actions = super::plan(&wanted, &two_hosts(observed.clone()));
        let did = actions.iter().find_map(|action| match action {
            Action::MoveVm { .. } => Some("move"),
            Action::StopToMove { .. } => Some("stop"),
            Action::NoteStays { .. } => Some("stays"),
            _ => None,
        });
        assert_eq!(did.unwrap_or("wait"), expected, "{actions:?}");
    }
}

#[test]
fn drain_is_done_once_all_that_is_left_is_said_to_stay() {
    let mut record = vm(3, pb::DesiredPower::On);
    let mut wanted = draining(record.clone(), |_| {});
    let drain = pb::Operation {
        name: OPERATION.into(),
        metadata: Some(pb::OperationMetadata {
            kind: pb::OperationKind::DrainHost as i32,
            target: host_name(HOST),
            ..Default::default()
        }),
        ..Default::default()
    };
    wanted.pending.insert(OPERATION.into(), drain.clone());
    let fleet = two_hosts(seen(3, node::VmPhase::Running));
    let outcome = |wanted: &Desired| {
        let actions = super::plan(wanted, &fleet);
        actions.into_iter().find_map(|action| match action {
            Action::FinishOperation {
                error, findings, ..
            } => Some((error, findings)),
            _ => None,
        })
    };
    assert_eq!(outcome(&wanted), None);
    record.stays = format!("{OPERATION} is wanted here");
    wanted = draining(record, |_| {});
    wanted.pending.insert(OPERATION.into(), drain);
    let said = vec!["vm web stays: it is wanted here".to_owned()];
    assert_eq!(outcome(&wanted), Some((None, said)));
    let host = wanted.hosts.get_mut(HOST).unwrap();
    host.record.drain.clear();
    let (error, _) = outcome(&wanted).unwrap();
    assert_eq!(error.unwrap().reason, "DRAIN_ENDED");
}
