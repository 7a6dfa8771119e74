//! Files, read.

use super::*;
use api::device::fault_rule::Action as Rule;

const SOUND: &str = "\
name: storm
description: kills and slow reads
seed: 7
duration: 30s
settle: 5s
target: {vm: web, device: root}
faults:
  - id: kill
    kind: kill
    schedule: {after: 1s, every: 2s, jitter: 500ms}
  - id: slow
    kind: latency
    delay: 50ms
    jitter: 10ms
    target: {ops: [read], lba: 0-2047, queues: [1], nth: 3, every: 7}
    schedule: {for: 10s}
probes:
  - id: up
    check: vm-running
    at: [start, during, end]
    stop: true
expect:
  oracle: true
  hits: {kill: 10}
  stall-max: 1s
";

fn read(text: &str) -> Result<Campaign, String> {
    parse(text, "c.yaml", "default", &Overrides::default())
}

#[test]
fn a_file_says_all_that_the_api_knows() {
    let campaign = read(SOUND).unwrap();
    let spec = campaign.spec;
    assert_eq!((campaign.name.as_str(), spec.seed), ("storm", 7));
    assert_eq!((spec.duration_ms, spec.settle_ms), (30_000, 5_000));
    assert_eq!(spec.source, SOUND);
    let kill = &spec.faults[0];
    let target = kill.target.clone().unwrap();
    assert_eq!(target.vm, "projects/default/vms/web");
    assert_eq!(target.device, "root");
    assert_eq!(kill.schedule.unwrap().jitter_ms, 500);
    let Some(Action::Rule(slow)) = &spec.faults[1].action else {
        panic!("{:?}", spec.faults[1])
    };
    let selector = slow.selector.clone().unwrap();
    assert_eq!((selector.first_sector, selector.num_sectors), (0, 2048));
    assert_eq!(selector.ops, [FaultOp::Read as i32]);
    assert_eq!(slow.trigger.unwrap().every, 7);
    assert!(matches!(&slow.action, Some(Rule::Latency(l)) if l.latency_us == 50_000));
    assert!(spec.probes[0].at_start && spec.probes[0].stop);
    let expect = spec.expect.unwrap();
    assert_eq!(
        (expect.min_hits_of["kill"], expect.stall_max_ms),
        (10, Some(1000))
    );
}

#[test]
fn what_is_read_passes_the_apis_own_checks() {
    let campaign = read(SOUND).unwrap();
    let request = pb::CreateFaultExperimentRequest {
        parent: "projects/default".into(),
        experiment_id: campaign.name,
        experiment: Some(pb::FaultExperiment {
            spec: Some(campaign.spec),
            ..Default::default()
        }),
        ..Default::default()
    };
    api::validate::create_fault_experiment_request(&request).unwrap();
}

#[test]
fn the_command_line_overrides_the_file_where_it_names_nothing_of_its_own() {
    let overrides = Overrides {
        vm: Some("db".into()),
        device: Some("data".into()),
        seed: Some(9),
        duration: Some("1s".into()),
        ..Overrides::default()
    };
    let spec = parse(SOUND, "c.yaml", "p", &overrides).unwrap().spec;
    let target = spec.faults[0].target.clone().unwrap();
    assert_eq!(
        (target.vm.as_str(), target.device.as_str()),
        ("projects/p/vms/db", "data")
    );
    assert_eq!((spec.seed, spec.duration_ms), (9, 1000));
}

/// The line and what is said of it, of a file with one line changed.
fn complaint(line: &str, instead: &str) -> String {
    assert!(SOUND.contains(line), "{line}");
    read(&SOUND.replace(line, instead)).unwrap_err()
}

#[test]
fn every_mistake_is_told_with_its_line_and_a_remedy() {
    let cases = [
        (
            "duration: 30s",
            "duration: fast",
            "c.yaml:4:11: duration: \"fast\" is no duration; write it as 50ms",
        ),
        (
            "kind: kill",
            "kind: kil",
            "c.yaml:9:11: faults[0].kind: \"kil\" is no kind of fault; did you mean kill?",
        ),
        (
            "    delay: 50ms\n",
            "",
            "c.yaml:12:11: faults[1].delay: latency needs delay",
        ),
        (
            "    delay: 50ms\n",
            "    delay: 50ms\n    copies: 2\n",
            "faults[1].copies: latency has no copies; its parameters: delay, jitter",
        ),
        (
            "ops: [read]",
            "ops: [peek]",
            "c.yaml:15:20: faults[1].target.ops: \"peek\" must be read",
        ),
        (
            "lba: 0-2047",
            "lba: x",
            "faults[1].target.lba: \"x\" is no range of sectors; write it as 0-2047",
        ),
        (
            "check: vm-running",
            "check: vm-up",
            "c.yaml:19:12: probes[0].check: \"vm-up\" must be vm-running",
        ),
        (
            "at: [start, during, end]",
            "at: [always]",
            "probes[0].at: \"always\" must be start, during or end",
        ),
        (
            "hits: {kill: 10}",
            "hits: {kil: 10}",
            "expect.hits.kil: no fault is called \"kil\"",
        ),
        (
            "target: {vm: web, device: root}",
            "target: {device: root}",
            "faults[0].target.vm: no VM is named; give --vm NAME",
        ),
        (
            "name: storm",
            "name: Storm",
            "c.yaml:1:7: name: \"Storm\" must be a lower-case letter",
        ),
    ];
    for (line, instead, words) in cases {
        let complaint = complaint(line, instead);
        assert!(complaint.contains(words), "{instead:?}: {complaint}");
    }
}

#[test]
fn a_field_that_does_not_exist_is_named_with_its_line() {
    let complaint = complaint("seed: 7", "sead: 7");
    assert!(complaint.starts_with("c.yaml:3:"), "{complaint}");
    assert!(complaint.contains("sead"), "{complaint}");
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_their_lines() {
    let text = SOUND
        .replace("duration: 30s", "duration: x")
        .replace("kind: kill", "kind: k");
    let complaint = read(&text).unwrap_err();
    let lines: Vec<&str> = complaint.lines().collect();
    assert_eq!(lines.len(), 2, "{complaint}");
    assert!(lines[0].starts_with("c.yaml:4:") && lines[1].starts_with("c.yaml:9:"));
}

#[test]
fn requests_cannot_be_chosen_for_what_hits_a_process() {
    let text = SOUND.replace(
        "    kind: kill\n",
        "    kind: kill\n    target: {ops: [read]}\n",
    );
    let complaint = read(&text).unwrap_err();
    assert!(
        complaint.contains("are for faults of requests"),
        "{complaint}"
    );
}

#[test]
fn a_hosts_fault_has_no_target() {
    let text = "name: away\nduration: 10s\nfaults:\n  - {id: gone, kind: controller-partition, length: 2s}\n";
    let spec = read(text).unwrap().spec;
    assert_eq!(spec.faults[0].target, Some(pb::FaultTarget::default()));
}

#[test]
fn anchors_and_aliases_work_and_bombs_do_not() {
    let text = SOUND
        .replace("jitter: 500ms}", "jitter: &j 500ms}")
        .replace("jitter: 10ms", "jitter: *j");
    read(&text).unwrap();
    let mut bomb = "a0: &a0 [x]\n".to_owned();
    for level in 1..40 {
        let below = level - 1;
        bomb.push_str(&format!("a{level}: &a{level} [*a{below}, *a{below}]\n"));
    }
    assert!(read(&bomb).is_err());
}

#[test]
fn every_campaign_of_the_library_is_sound_for_a_vm() {
    let overrides = Overrides {
        vm: Some("web".into()),
        ..Overrides::default()
    };
    for entry in library::ENTRIES {
        let campaign = parse(entry.text, entry.name, "default", &overrides)
            .unwrap_or_else(|complaint| panic!("{complaint}"));
        assert_eq!(campaign.name, entry.name);
        assert!(!campaign.spec.description.is_empty(), "{}", entry.name);
        let request = pb::CreateFaultExperimentRequest {
            parent: "projects/default".into(),
            experiment_id: campaign.name,
            experiment: Some(pb::FaultExperiment {
                spec: Some(campaign.spec),
                ..Default::default()
            }),
            ..Default::default()
        };
        api::validate::create_fault_experiment_request(&request)
            .unwrap_or_else(|status| panic!("{}: {}", entry.name, status.message()));
    }
}

#[test]
fn every_kind_can_be_read_with_what_it_needs() {
    let value = |name: &str| match name {
        "errno" => "EIO",
        "bytes" | "sectors" | "window" | "copies" | "features" | "signal" => "1",
        "bytes-per-second" | "limit" => "1M",
        "peers" => "[\"52:54:00:00:00:01\"]",
        "end" => "error",
        "binary" => "/bin/device-blk",
        "offset" => "-5s",
        _ => "50ms",
    };
    for kind in kinds::KINDS {
        let parameters = kind.required.iter().chain(kind.optional);
        let parameters: String = parameters
            .map(|name| format!("    {name}: {}\n", value(name)))
            .collect();
        let text = format!(
            "name: all\nduration: 1s\ntarget: {{vm: web}}\nfaults:\n  - id: one\n    kind: {}\n{parameters}",
            kind.name
        );
        read(&text).unwrap_or_else(|complaint| panic!("{}: {complaint}", kind.name));
    }
}

#[test]
fn a_duration_too_short_for_all_faults_squeezes_the_schedule() {
    let text = library::find("lost-kick").expect("it ships").text;
    let read = |duration: &str| {
        let overrides = Overrides {
            vm: Some("web".into()),
            duration: Some(duration.into()),
            ..Overrides::default()
        };
        let campaign = parse(text, "lost-kick", "default", &overrides);
        let schedules = campaign.unwrap().spec.faults.into_iter();
        let times = |schedule: pb::FaultSchedule| (schedule.after_ms, schedule.for_ms);
        schedules
            .map(|fault| times(fault.schedule.unwrap()))
            .collect::<Vec<_>>()
    };
    let usual = [(2_000, 8_000), (12_000, 8_000), (22_000, 6_000)];
    assert_eq!(read("30s"), usual);
    assert_eq!(read("25s"), usual, "all of them begin");
    assert_eq!(read("5m"), usual, "a longer one only lasts longer");
    let squeezed = [(1_000, 4_000), (6_000, 4_000), (11_000, 3_000)];
    assert_eq!(read("15s"), squeezed);
}
