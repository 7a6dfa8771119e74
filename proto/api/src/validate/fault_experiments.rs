//! Fault experiments, in requests of the controller.

use super::*;
use crate::controller as pb;
use crate::controller::fault_injection::Action;
use crate::node::FaultProcess;
use crate::node::process_fault::Action as ProcessAction;

/// Of a campaign file.
pub const MAX_CAMPAIGN_BYTES: usize = 65536;
/// Faults of one experiment, and its probes.
const MAX_PARTS: usize = 32;
const MAX_ID_BYTES: usize = 32;
const DURATION_MS: std::ops::RangeInclusive<u32> = 100..=86_400_000;
const TTL_MS: std::ops::RangeInclusive<u32> = 1_000..=60_000;
const MAX_SETTLE_MS: u32 = 3_600_000;
/// Beginnings closer to each other could not be told apart in a report.
const MIN_EVERY_MS: u32 = 20;
const FIGURES: [&str; 5] = [
    "errors",
    "latency-p99-us",
    "latency-max-us",
    "inflight",
    "outage-ms",
];

/// Checks the name of an experiment.
///
/// # Errors
/// As [`attach_request`].
pub fn fault_experiment_request(name: &str) -> Result<names::Name, Status> {
    resource(Violations::new(), names::Name::parse_fault_experiment(name))
}

/// Checks an experiment that is to be run.
///
/// # Errors
/// As [`attach_request`].
pub fn create_fault_experiment_request(
    request: &pb::CreateFaultExperimentRequest,
) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "experiment_id", &request.experiment_id);
    request_id(&mut found, &request.request_id);
    let spec = request.experiment.as_ref();
    match spec.and_then(|experiment| experiment.spec.as_ref()) {
        Some(spec) => experiment_spec(&mut found, &request.parent, spec),
        None => found.add("experiment.spec", "is missing"),
    }
    found.into_result()
}

fn experiment_spec(found: &mut Violations, parent: &str, spec: &pb::FaultExperimentSpec) {
    let at = "experiment.spec.";
    found.require(
        DURATION_MS.contains(&spec.duration_ms),
        &format!("{at}duration_ms"),
        || format!("must be 100 to 86400000, not {}", spec.duration_ms),
    );
    at_most(
        found,
        &format!("{at}settle_ms"),
        spec.settle_ms,
        MAX_SETTLE_MS,
    );
    found.require(
        spec.ttl_ms == 0 || TTL_MS.contains(&spec.ttl_ms),
        &format!("{at}ttl_ms"),
        || format!("must be 1000 to 60000, not {}", spec.ttl_ms),
    );
    found.require(
        spec.source.len() <= MAX_CAMPAIGN_BYTES,
        &format!("{at}source"),
        || format!("must be at most {MAX_CAMPAIGN_BYTES} bytes"),
    );
    found.require(
        (1..=MAX_PARTS).contains(&spec.faults.len()),
        &format!("{at}faults"),
        || format!("must be 1 to {MAX_PARTS}, not {}", spec.faults.len()),
    );
    found.require(
        spec.probes.len() <= MAX_PARTS,
        &format!("{at}probes"),
        || format!("must be at most {MAX_PARTS}, not {}", spec.probes.len()),
    );
    let mut ids = std::collections::BTreeSet::new();
    for (index, fault) in spec.faults.iter().enumerate() {
        let at = format!("{at}faults[{index}]");
        part_id(found, &format!("{at}.id"), &fault.id);
        found.require(ids.insert(&fault.id), &format!("{at}.id"), || {
            format!("{:?} is the id of another fault, too", fault.id)
        });
        injection(found, parent, &at, fault, spec.duration_ms);
        as_on_host(found, &at, fault);
    }
    let mut probes = std::collections::BTreeSet::new();
    for (index, probe) in spec.probes.iter().enumerate() {
        let at = format!("{at}probes[{index}]");
        part_id(found, &format!("{at}.id"), &probe.id);
        found.require(probes.insert(&probe.id), &format!("{at}.id"), || {
            format!("{:?} is the id of another probe, too", probe.id)
        });
        fault_probe(found, parent, &at, probe);
    }
    let expect = spec.expect.clone().unwrap_or_default();
    for id in expect.min_hits_of.keys() {
        found.require(ids.contains(id), &format!("{at}expect.min_hits_of"), || {
            format!("no fault is called {id:?}")
        });
    }
}

fn injection(
    found: &mut Violations,
    parent: &str,
    at: &str,
    fault: &pb::FaultInjection,
    duration_ms: u32,
) {
    let target = fault.target.clone().unwrap_or_default();
    vm_of(found, parent, &format!("{at}.target.vm"), &target.vm);
    if !target.device.is_empty() {
        id(found, &format!("{at}.target.device"), &target.device);
    }
    let process = FaultProcess::try_from(target.process);
    found.require(process.is_ok(), &format!("{at}.target.process"), || {
        "is of an unknown kind".into()
    });
    let schedule = fault.schedule.unwrap_or_default();
    found.require(
        schedule.after_ms < duration_ms,
        &format!("{at}.schedule.after_ms"),
        || format!("must be less than the experiment's {duration_ms} ms: it would never begin"),
    );
    found.require(
        schedule.every_ms == 0 || schedule.every_ms >= MIN_EVERY_MS,
        &format!("{at}.schedule.every_ms"),
        || format!("must be at least {MIN_EVERY_MS}"),
    );
    found.require(
        schedule.every_ms > 0 || schedule.times <= 1,
        &format!("{at}.schedule.times"),
        || "needs every_ms".into(),
    );
    found.require(
        schedule.every_ms == 0 || schedule.jitter_ms <= schedule.every_ms,
        &format!("{at}.schedule.jitter_ms"),
        || "must be at most every_ms".into(),
    );
    match &fault.action {
        None => found.add(
            format!("{at}.action"),
            "is missing; give rule, process, host or upgrade",
        ),
        Some(Action::Rule(rule)) => {
            let own = rule.name.is_empty()
                && rule.start_after_ms == 0
                && rule.duration_ms == 0
                && rule
                    .selector
                    .as_ref()
                    .is_none_or(|selector| selector.device.is_empty());
            found.require(own, &format!("{at}.rule"), || {
                "must have no name, times or device of its own: the fault's id, schedule and target say them"
                    .into()
            });
            found.require(rule.action.is_some(), &format!("{at}.rule.action"), || {
                "is missing".into()
            });
            if let Some(trigger) = &rule.trigger {
                found.require(
                    (0.0..=1.0).contains(&trigger.probability),
                    &format!("{at}.rule.trigger.probability"),
                    || format!("must be 0 to 1, not {}", trigger.probability),
                );
            }
        }
        Some(Action::Process(process)) => {
            let known = process.action.is_some();
            found.require(known, &format!("{at}.process.action"), || {
                "is missing".into()
            });
            if let Some(ProcessAction::VersionSkew(skew)) = &process.action {
                absolute(
                    found,
                    &format!("{at}.process.version_skew.binary"),
                    &skew.binary,
                );
            }
        }
        Some(Action::Host(host)) => {
            let nowhere = target.vm.is_empty() && target.device.is_empty();
            found.require(nowhere, &format!("{at}.target"), || {
                "must be empty: the fault is the host's".into()
            });
            found.require(host.action.is_some(), &format!("{at}.host.action"), || {
                "is missing".into()
            });
        }
        Some(Action::Upgrade(upgrade)) => {
            if !upgrade.binary.is_empty() {
                absolute(found, &format!("{at}.upgrade.binary"), &upgrade.binary);
            }
        }
    }
}

/// The host's own checks, before anything is begun: it would refuse the fault when its time comes.
fn as_on_host(found: &mut Violations, at: &str, fault: &pb::FaultInjection) {
    let told = match fault.action.clone() {
        Some(Action::Rule(rule)) if rule.action.is_some() => node::fault::Fault::Rule(rule),
        Some(Action::Process(process)) if process.action.is_some() => {
            node::fault::Fault::Process(process)
        }
        Some(Action::Host(host)) if host.action.is_some() => node::fault::Fault::Host(host),
        _ => return,
    };
    let target = fault.target.clone().unwrap_or_default();
    let told = node::Fault {
        id: "fault".into(),
        target: Some(node::FaultTarget {
            vm_id: String::new(),
            device: target.device,
            process: target.process,
        }),
        fault: Some(told),
    };
    node_fault(found, at, &told);
}

fn fault_probe(found: &mut Violations, parent: &str, at: &str, probe: &pb::FaultProbe) {
    use pb::FaultProbeKind as Kind;
    vm_of(found, parent, &format!("{at}.vm"), &probe.vm);
    let kind = probe.kind();
    found.require(kind != Kind::Unspecified, &format!("{at}.kind"), || {
        "is missing".into()
    });
    found.require(probe.at_start || probe.during || probe.at_end, at, || {
        "is never looked at; set at_start, during or at_end".into()
    });
    found.require(
        (kind == Kind::GuestLine) != probe.contains.is_empty(),
        &format!("{at}.contains"),
        || "belongs to guest-line, and only there".into(),
    );
    found.require(
        (kind == Kind::Figure) == FIGURES.contains(&probe.figure.as_str()),
        &format!("{at}.figure"),
        || format!("belongs to figure, and is one of {}", FIGURES.join(", ")),
    );
    found.require(probe.at_most >= 0.0, &format!("{at}.at_most"), || {
        "must not be negative".into()
    });
}

fn vm_of(found: &mut Violations, parent: &str, field: &str, vm: &str) {
    if vm.is_empty() {
        return;
    }
    match names::Name::parse_vm(vm) {
        Ok(name) => found.require(
            parent == format!("projects/{}", name.project),
            field,
            || "belongs to another project".into(),
        ),
        Err(error) => found.add(field, error.to_string()),
    }
}

/// Shorter than an id: a host's fault is called after it, with a number.
fn part_id(found: &mut Violations, field: &str, value: &str) {
    id(found, field, value);
    found.require(value.len() <= MAX_ID_BYTES, field, || {
        format!("must be at most {MAX_ID_BYTES} bytes")
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{FaultRule, LatencyFault, fault_rule};
    use tonic_types::StatusExt as _;

    fn request() -> pb::CreateFaultExperimentRequest {
        let rule = FaultRule {
            action: Some(fault_rule::Action::Latency(LatencyFault::default())),
            ..Default::default()
        };
        let fault = pb::FaultInjection {
            id: "slow".into(),
            target: Some(pb::FaultTarget {
                vm: "projects/p/vms/web".into(),
                ..Default::default()
            }),
            action: Some(Action::Rule(rule)),
            ..Default::default()
        };
        let spec = pb::FaultExperimentSpec {
            duration_ms: 1000,
            faults: vec![fault],
            ..Default::default()
        };
        pb::CreateFaultExperimentRequest {
            parent: "projects/p".into(),
            experiment_id: "slow".into(),
            experiment: Some(pb::FaultExperiment {
                spec: Some(spec),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn fields(change: impl FnOnce(&mut pb::FaultExperimentSpec)) -> Vec<String> {
        let mut request = request();
        change(request.experiment.as_mut().unwrap().spec.as_mut().unwrap());
        let Err(status) = create_fault_experiment_request(&request) else {
            return Vec::new();
        };
        let bad = status.get_details_bad_request().unwrap();
        let violations = bad.field_violations.into_iter();
        violations.map(|violation| violation.field).collect()
    }

    #[test]
    fn a_sound_experiment_passes() {
        assert_eq!(fields(|_| {}), Vec::<String>::new());
    }

    #[test]
    fn each_mistake_is_found_at_its_field() {
        let at = |field: &str| vec![format!("experiment.spec.{field}")];
        assert_eq!(fields(|spec| spec.duration_ms = 1), at("duration_ms"));
        assert_eq!(fields(|spec| spec.ttl_ms = 1), at("ttl_ms"));
        assert_eq!(fields(|spec| spec.faults.clear()), at("faults"));
        assert_eq!(
            fields(|spec| spec.faults[0].action = None),
            at("faults[0].action")
        );
        assert_eq!(
            fields(|spec| spec.faults.push(spec.faults[0].clone())),
            at("faults[1].id")
        );
        assert_eq!(
            fields(|spec| {
                spec.faults[0].target.as_mut().unwrap().vm = "projects/q/vms/web".into();
            }),
            at("faults[0].target.vm")
        );
        assert_eq!(
            fields(|spec| {
                spec.faults[0].schedule = Some(pb::FaultSchedule {
                    after_ms: 1000,
                    ..Default::default()
                });
            }),
            at("faults[0].schedule.after_ms")
        );
        assert_eq!(
            fields(|spec| {
                let expect = spec.expect.get_or_insert_default();
                expect.min_hits_of.insert("fast".into(), 1);
            }),
            at("expect.min_hits_of")
        );
    }

    #[test]
    fn probes_say_what_and_when() {
        let probe = |change: fn(&mut pb::FaultProbe)| {
            let mut probe = pb::FaultProbe {
                id: "p".into(),
                kind: pb::FaultProbeKind::VmRunning as i32,
                during: true,
                ..Default::default()
            };
            change(&mut probe);
            fields(|spec| spec.probes = vec![probe])
        };
        let at = |field: &str| vec![format!("experiment.spec.probes[0]{field}")];
        assert_eq!(probe(|_| {}), Vec::<String>::new());
        assert_eq!(probe(|probe| probe.during = false), at(""));
        assert_eq!(probe(|probe| probe.contains = "x".into()), at(".contains"));
        assert_eq!(
            probe(|probe| probe.kind = pb::FaultProbeKind::Figure as i32),
            at(".figure")
        );
    }
}
