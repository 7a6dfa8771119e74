use super::*;
use api::node;

const GIB: u64 = 1 << 30;

/// A host with four CPUs and 8 GiB that promises no more than it has.
#[derive(Clone)]
struct Host {
    record: HostRecord,
    reserved: ReservationRecord,
    connected: bool,
}

fn host(id: &str) -> Host {
    let record = HostRecord {
        name: host_name(id),
        spec: pb::HostSpec {
            cpu_overcommit: 1.0,
            memory_overcommit: 1.0,
            ..Default::default()
        },
        inventory: Some(node::HostStatus {
            host_id: id.into(),
            version: "0.9.2".into(),
            cpus: 4,
            memory_bytes: 8 * GIB,
            kvm: "hardware".into(),
            cpu_model: "Example 9000".into(),
            cpu_features: vec!["avx2".into(), "sse4_2".into()],
            zone: "east".into(),
            labels: [("disk".to_owned(), "nvme".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Host {
        record,
        reserved: ReservationRecord::default(),
        connected: true,
    }
}

impl Host {
    fn candidate(&self) -> Candidate<'_> {
        Candidate {
            id: self.record.id(),
            record: &self.record,
            reserved: &self.reserved,
            connected: self.connected,
        }
    }

    fn with(mut self, request: &Request) -> Self {
        self.reserved = self.reserved.plus(&request.demand);
        self
    }
}

fn vm(change: impl FnOnce(&mut pb::VmSpec)) -> Request {
    vm_in(&[], change)
}

/// A VM with NICs in networks that have a switch.
fn vm_in(networks: &[&str], change: impl FnOnce(&mut pb::VmSpec)) -> Request {
    let mut spec = pb::VmSpec {
        vcpus: 1,
        memory_bytes: GIB,
        ..Default::default()
    };
    change(&mut spec);
    let networks = networks.iter().map(|name| (*name).to_owned()).collect();
    Request::of_vm("p", "projects/p/vms/web", &spec, &networks)
}

fn placed(change: impl FnOnce(&mut pb::Placement)) -> Request {
    vm(|spec| change(spec.placement.get_or_insert_default()))
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = pairs.iter();
    let pairs = pairs.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    pairs.collect()
}

fn app(name: &str) -> BTreeMap<String, String> {
    labels(&[("app", name)])
}

/// Which conditions a host does not meet.
fn refusals(request: &Request, host: &Host) -> Vec<&'static str> {
    let verdicts = explain(request, 1, |_| host.candidate());
    let refusals = verdicts[0].refusals.iter();
    refusals.map(|refusal| refusal.filter).collect()
}

fn chosen<'a>(request: &Request, hosts: &'a [Host]) -> &'a str {
    let index = choose(request, hosts.len(), |index| hosts[index].candidate());
    hosts[index.expect("there is one")].record.id()
}

#[test]
fn each_condition_names_itself() {
    let plain = host("a");
    let changed = |change: fn(&mut Host)| {
        let mut host = host("a");
        change(&mut host);
        host
    };
    let cases: Vec<(Request, Host, &[&str])> = vec![
        (vm(|_| {}), plain.clone(), &[]),
        (
            placed(|p| p.host = "hosts/b".into()),
            plain.clone(),
            &["pinned"],
        ),
        (placed(|p| p.host = "hosts/a".into()), plain.clone(), &[]),
        (
            vm(|_| {}),
            changed(|host| host.connected = false),
            &["connected"],
        ),
        (
            vm(|_| {}),
            changed(|host| host.record.spec.cordoned = true),
            &["cordoned"],
        ),
        (vm(|spec| spec.vcpus = 5), plain.clone(), &["cpus"]),
        (
            vm(|spec| spec.vcpus = 5),
            changed(|host| host.record.spec.cpu_overcommit = 2.0),
            &[],
        ),
        (
            vm(|spec| spec.memory_bytes = 9 * GIB),
            plain.clone(),
            &["memory"],
        ),
        (
            placed(|p| p.zones = vec!["west".into()]),
            plain.clone(),
            &["zones"],
        ),
        (
            placed(|p| p.zones = vec!["west".into()]),
            changed(|host| host.record.spec.zone = "west".into()),
            &[],
        ),
        (
            placed(|p| p.node_selector = labels(&[("disk", "hdd")])),
            plain.clone(),
            &["labels"],
        ),
        (
            placed(|p| p.node_selector = labels(&[("disk", "nvme")])),
            plain.clone(),
            &[],
        ),
        (
            placed(|p| p.cpu_features = vec!["avx512f".into()]),
            plain.clone(),
            &["cpu_features"],
        ),
        (
            placed(|p| p.cpu_features = vec!["avx2".into()]),
            plain.clone(),
            &[],
        ),
        (
            placed(|p| p.cpu_model = "Other".into()),
            plain.clone(),
            &["cpu_model"],
        ),
        (
            placed(|p| p.kvm = "interpreted".into()),
            plain.clone(),
            &["kvm"],
        ),
        (
            placed(|p| p.min_version = "0.10".into()),
            plain.clone(),
            &["version"],
        ),
        (placed(|p| p.min_version = "0.9.2".into()), plain, &[]),
    ];
    for (request, host, expected) in cases {
        assert_eq!(
            refusals(&request, &host),
            expected,
            "{:?}",
            request.placement
        );
    }
}

#[test]
fn taint_keeps_away_who_does_not_tolerate_it() {
    let mut tainted = host("a");
    tainted.record.spec.taints.push(pb::Taint {
        key: "gpu".into(),
        value: "yes".into(),
    });
    let tolerating = |key: &str, value: &str| {
        let toleration = pb::Toleration {
            key: key.into(),
            value: value.into(),
        };
        placed(|p| p.tolerations.push(toleration))
    };
    assert_eq!(refusals(&vm(|_| {}), &tainted), ["taints"]);
    assert_eq!(refusals(&tolerating("gpu", "no"), &tainted), ["taints"]);
    for (key, value) in [("gpu", "yes"), ("gpu", ""), ("", "")] {
        assert!(refusals(&tolerating(key, value), &tainted).is_empty());
    }
    let volume = Request::of_volume("v", "");
    assert!(refusals(&volume, &tainted).is_empty(), "it keeps VMs away");
}

#[test]
fn what_is_promised_counts() {
    let two = vm(|spec| spec.vcpus = 2);
    let half = host("a").with(&two);
    assert!(refusals(&two, &half).is_empty());
    assert_eq!(refusals(&two, &half.with(&two)), ["cpus"]);
}

#[test]
fn vm_is_where_its_volumes_are() {
    let mut request = vm(|_| {});
    request.bound.push(("volume data".into(), "b".into()));
    assert_eq!(refusals(&request, &host("a")), ["volumes"]);
    assert_eq!(chosen(&request, &[host("a"), host("b"), host("c")]), "b");
}

fn term(name: &str, scope: pb::AffinityScope, anti: bool) -> pb::Affinity {
    pb::Affinity {
        labels: app(name),
        scope: scope as i32,
        anti,
        preferred: false,
    }
}

#[test]
fn affinity_is_near_and_anti_affinity_is_away_on_hosts_and_zones() {
    use pb::AffinityScope::{Host as OnHost, Zone};
    let db = vm(|spec| spec.labels = app("db"));
    let mut far = host("c");
    far.record.spec.zone = "west".into();
    let hosts = [host("a").with(&db), host("b"), far];
    let near = |scope| placed(|p| p.affinity = vec![term("db", scope, false)]);
    let away = |scope| placed(|p| p.affinity = vec![term("db", scope, true)]);
    assert_eq!(chosen(&near(OnHost), &hosts), "a");
    assert_ne!(chosen(&near(Zone), &hosts), "c");
    assert_ne!(chosen(&away(OnHost), &hosts), "a");
    assert_eq!(chosen(&away(Zone), &hosts), "c");
    let mut wish = away(OnHost);
    wish.placement.affinity[0].preferred = true;
    assert_eq!(chosen(&wish, &hosts[..1]), "a", "a wish is no condition");
    assert_ne!(chosen(&wish, &hosts), "a");
}

#[test]
fn those_that_are_there_keep_others_away() {
    let mut loner = placed(|p| p.affinity = vec![term("web", pb::AffinityScope::Host, true)]);
    loner.labels = app("db");
    let there = host("a").with(&loner);
    let web = vm(|spec| spec.labels = app("web"));
    assert_eq!(refusals(&web, &there), ["anti_affinity"]);
    let other = vm(|spec| spec.labels = app("mail"));
    assert!(refusals(&other, &there).is_empty());
}

#[test]
fn bound_on_who_shares_a_daemon_holds_for_both_sides() {
    let bounded = vm_in(&["net"], |spec| {
        spec.placement.get_or_insert_default().max_vms_per_daemon = 2;
    });
    let plain = vm_in(&["net"], |_| {});
    let elsewhere = vm_in(&["other"], |_| {});
    let full = host("a").with(&bounded).with(&plain);
    assert_eq!(refusals(&bounded, &full), ["daemons"]);
    assert_eq!(
        refusals(&plain, &full),
        ["daemons"],
        "it would be a third one"
    );
    assert!(refusals(&elsewhere, &full).is_empty());
}

#[test]
fn anti_affinity_of_daemons_allows_the_host_and_not_the_daemon() {
    let replica = |networks: &[&str]| {
        vm_in(networks, |spec| {
            spec.labels = app("db");
            let placement = spec.placement.get_or_insert_default();
            placement.affinity = vec![term("db", pb::AffinityScope::Daemon, true)];
        })
    };
    let there = host("a").with(&replica(&["net"]));
    assert_eq!(refusals(&replica(&["net"]), &there), ["anti_affinity"]);
    assert!(refusals(&replica(&["other"]), &there).is_empty());
}

#[test]
fn the_host_with_the_most_room_is_chosen() {
    let one = vm(|_| {});
    let hosts = [
        host("a").with(&one),
        host("b"),
        host("c").with(&one).with(&one),
    ];
    assert_eq!(chosen(&one, &hosts), "b");
    let mut sick = host("d");
    sick.record.inventory.as_mut().unwrap().problem = "no /dev/kvm".into();
    let hosts = [hosts[2].clone(), sick];
    assert_eq!(chosen(&one, &hosts), "c", "who cannot run it is the last");
}

#[test]
fn waiting_helps_only_against_what_passes() {
    let mut away = host("a");
    away.connected = false;
    let explained = |request: &Request, host: &Host| explain(request, 1, |_| host.candidate());
    assert!(may_pass(&explained(&vm(|_| {}), &away)));
    let large = vm(|spec| spec.vcpus = 100);
    assert!(!may_pass(&explained(&large, &away)));
    assert!(words(&explained(&large, &away)).contains("100 vCPUs are wanted"));
}

#[test]
fn explanation_has_the_best_first_and_all_reasons() {
    let mut small = host("b");
    small.record.inventory.as_mut().unwrap().memory_bytes = GIB / 2;
    small.record.spec.cordoned = true;
    let hosts = [small, host("a")];
    let verdicts = explain(&vm(|_| {}), 2, |index| hosts[index].candidate());
    assert_eq!(verdicts[0].host, "hosts/a");
    assert!(verdicts[0].refusals.is_empty() && verdicts[0].score > 0.0);
    let reasons: Vec<&str> = verdicts[1].refusals.iter().map(|r| r.filter).collect();
    assert_eq!(reasons, ["cordoned", "memory"]);
}

#[test]
fn not_every_host_of_a_large_fleet_is_looked_at() {
    let hosts: Vec<Host> = (0..1_000).map(|n| host(&format!("h{n}"))).collect();
    let looked = std::cell::Cell::new(0);
    let at = |index: usize| {
        looked.set(looked.get() + 1);
        hosts[index].candidate()
    };
    choose(&vm(|_| {}), hosts.len(), at).unwrap();
    assert_eq!(looked.get(), ENOUGH_HOSTS);
}
