//! What filters, orders and masks let through.

use api::controller as pb;
use prost_types::FieldMask;

use super::*;

fn vm(id: &str, phase: pb::VmPhase, vcpus: u32) -> pb::Vm {
    pb::Vm {
        name: format!("projects/default/vms/{id}"),
        create_time: Some(prost_types::Timestamp {
            seconds: 1_700_000_000 + i64::from(vcpus),
            nanos: 0,
        }),
        spec: Some(pb::VmSpec {
            vcpus,
            disks: vec![pb::Disk {
                name: "root".into(),
                source: Some(pb::disk::Source::Volume(format!(
                    "projects/default/volumes/{id}"
                ))),
                ..Default::default()
            }],
            ..Default::default()
        }),
        status: Some(pb::VmStatus {
            phase: phase as i32,
            host: "hosts/h1".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn ids(filter: &str) -> Vec<String> {
    let kind = descriptor("Vm");
    let filter = Filter::parse(&kind, filter).unwrap();
    [
        vm("web", pb::VmPhase::Running, 1),
        vm("db", pb::VmPhase::Stopped, 2),
        vm("web2", pb::VmPhase::Running, 4),
    ]
    .iter()
    .filter(|vm| filter.matches(&dynamic(&kind, *vm)))
    .map(|vm| vm.name.rsplit('/').next().unwrap().to_owned())
    .collect()
}

#[test]
fn filters_let_through_what_they_say() {
    let cases: &[(&str, &[&str])] = &[
        ("", &["web", "db", "web2"]),
        ("status.phase = running", &["web", "web2"]),
        ("status.phase = VM_PHASE_STOPPED", &["db"]),
        ("status.phase != RUNNING", &["db"]),
        ("NOT status.phase = running", &["db"]),
        ("-status.phase=running", &["db"]),
        ("spec.vcpus >= 2", &["db", "web2"]),
        ("spec.vcpus > 1 AND status.phase=running", &["web2"]),
        ("spec.vcpus > 1 status.phase=running", &["web2"]),
        ("spec.vcpus = 1 OR spec.vcpus = 2", &["web", "db"]),
        // OR binds closer: (1 or 2) and running.
        (
            "spec.vcpus=1 OR spec.vcpus=2 status.phase=running",
            &["web"],
        ),
        (
            "(spec.vcpus=2 status.phase=stopped) OR spec.vcpus=4",
            &["db", "web2"],
        ),
        ("name = \"*/web*\"", &["web", "web2"]),
        ("name = '*web'", &["web"]),
        ("name : web", &["web", "web2"]),
        ("spec.disks.volume : volumes/db", &["db"]),
        ("spec.disks.name : root", &["web", "db", "web2"]),
        ("spec.cloud_init:*", &[]),
        ("status.host:*", &["web", "db", "web2"]),
        ("create_time < 2023-11-14T22:13:22Z", &["web"]),
        ("deleting = false", &["web", "db", "web2"]),
    ];
    for (filter, expected) in cases {
        assert_eq!(ids(filter), *expected, "{filter}");
    }
}

#[test]
fn what_is_no_filter_is_refused_with_the_place() {
    let kind = descriptor("Vm");
    let refused = |text: &str| Filter::parse(&kind, text).unwrap_err().to_string();
    assert!(
        refused("sepc.vcpus = 1").contains("has no field sepc"),
        "{}",
        refused("sepc.vcpus = 1")
    );
    assert!(refused("spec.vcpus = many").contains("whole number"));
    assert!(refused("status.phase = rnning").contains("running, paused"));
    assert!(refused("spec = 1").contains("name one of its fields"));
    assert!(refused("spec.vcpus").contains("at byte 10"));
    assert!(refused("(spec.vcpus = 1").contains("not closed"));
    assert!(refused("spec.vcpus = 1)").contains("nothing opens"));
    assert!(refused("name = \"web").contains("not closed"));
    assert!(refused(&"(".repeat(1000)).contains("deeper"));
    assert!(refused(&"-".repeat(1000)).contains("deeper"));
    assert!(refused(&" ".repeat(3000)).contains("longer"));
    assert!(refused("AND").contains("here should be"));
}

#[test]
fn orders_sort_by_each_field_in_turn() {
    let kind = descriptor("Vm");
    let order = Order::parse(&kind, "status.phase desc, spec.vcpus")
        .unwrap()
        .unwrap();
    let mut vms = [
        vm("a", pb::VmPhase::Running, 4),
        vm("b", pb::VmPhase::Stopped, 2),
        vm("c", pb::VmPhase::Running, 1),
    ];
    vms.sort_by(|a, b| {
        let (a, b) = (dynamic(&kind, a), dynamic(&kind, b));
        order.key(&a).compare(&order.key(&b))
    });
    let names: Vec<&str> = vms.iter().map(|vm| &vm.name[vm.name.len() - 1..]).collect();
    assert_eq!(names, ["b", "c", "a"]);
    assert!(Order::parse(&kind, "spec.disks").is_err());
    assert!(Order::parse(&kind, "name sideways").is_err());
    assert!(Order::parse(&kind, "  ").unwrap().is_none());
}

#[test]
fn masks_keep_only_what_they_name() {
    let kind = descriptor("Vm");
    let mask = |paths: &[&str]| {
        let mask = FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        };
        Mask::parse(&kind, Some(&mask))
    };
    let whole = vm("web", pb::VmPhase::Running, 2);
    let kept = mask(&["name", "status.phase", "spec.disks.name"])
        .unwrap()
        .unwrap()
        .apply(&whole);
    assert_eq!(kept.name, whole.name);
    assert_eq!(kept.status.as_ref().unwrap().phase(), pb::VmPhase::Running);
    assert_eq!(kept.status.unwrap().host, "");
    let spec = kept.spec.unwrap();
    assert_eq!((spec.vcpus, spec.disks[0].name.as_str()), (0, "root"));
    assert_eq!(spec.disks[0].source, None);
    // What is named whole stays whole, whatever else is named in it.
    let kept = mask(&["spec.vcpus", "spec"])
        .unwrap()
        .unwrap()
        .apply(&whole);
    assert_eq!(kept.spec, whole.spec);
    assert!(mask(&[]).unwrap().is_none());
    assert!(mask(&["spec.vcpu"]).is_err());
}
