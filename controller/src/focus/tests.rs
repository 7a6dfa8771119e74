use super::*;
use crate::model::VmRecord;
use crate::plan::Stored;
use api::node;

fn name(number: usize) -> String {
    format!("projects/default/vms/vm{number:05}")
}

fn many(count: usize) -> Desired {
    let mut desired = Desired::default();
    for number in 0..count {
        let mut record = VmRecord {
            node_id: format!("vm{number:05}"),
            host: format!("h{}", number % 10),
            ..VmRecord::default()
        };
        record.vm.name = name(number);
        let revision = 1;
        desired
            .vms
            .insert(name(number), Stored { record, revision }.into());
    }
    desired
}

fn host(vms: &[(usize, u64)]) -> Arc<Observed> {
    let vms = vms.iter().map(|(number, resets)| {
        let id = format!("vm{number:05}");
        let vm = node::VmStatus {
            id: id.clone(),
            resets: *resets,
            ..Default::default()
        };
        (id, vm)
    });
    Arc::new(Observed {
        vms: vms.collect(),
        connected: true,
        ..Observed::default()
    })
}

fn fleet(host: Arc<Observed>) -> Arc<Fleet> {
    Arc::new(Fleet {
        hosts: [("h0".into(), host)].into(),
    })
}

fn focus() -> Focus {
    Focus::new(Duration::from_secs(5))
}

#[tokio::test(start_paused = true)]
async fn few_are_all_looked_at_each_time() {
    let desired = many(20);
    let index = Index::of(&desired);
    let mut focus = focus();
    for _ in 0..3 {
        assert_eq!(focus.next(&desired, &index, 8).names.len(), 20);
    }
}

#[tokio::test(start_paused = true)]
async fn many_are_looked_at_within_a_round() {
    let desired = many(4_500);
    let index = Index::of(&desired);
    let mut focus = focus();
    let mut looked = BTreeSet::new();
    for _ in 0..5 {
        let part = focus.next(&desired, &index, 8);
        assert!(part.names.len() <= 1_000);
        looked.extend(part.names);
        let rest = focus.rest(true);
        assert_eq!(rest, Duration::from_secs(1));
        tokio::time::advance(rest).await;
    }
    assert_eq!(looked.len(), 4_500);
    assert!(
        !focus.next(&desired, &index, 8).names.is_empty(),
        "and again"
    );
}

#[tokio::test(start_paused = true)]
async fn only_what_a_host_says_otherwise_is_looked_at() {
    let desired = many(4_500);
    let index = Index::of(&desired);
    let mut focus = focus();
    let nobody = BTreeSet::new();
    focus.see(&fleet(host(&[(0, 0), (10, 0)])), &nobody, &index);
    while !focus.next(&desired, &index, 8).names.is_empty() {}
    focus.see(&fleet(host(&[(0, 0), (10, 1)])), &nobody, &index);
    let part = focus.next(&desired, &index, 8);
    assert_eq!(part.names, [name(10)].into());
    assert_eq!(part.hosts, ["h0".to_owned()].into());
    focus.see(&fleet(host(&[(10, 1)])), &nobody, &index);
    assert_eq!(focus.next(&desired, &index, 8).names, [name(0)].into());
    focus.see(&fleet(host(&[(10, 1)])), &["h0".to_owned()].into(), &index);
    let part = focus.next(&desired, &index, 8);
    assert_eq!(part.names.len(), 450, "all of a host that is lost");
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_call_is_looked_at_when_one_is_free() {
    let desired = many(2_000);
    let index = Index::of(&desired);
    let mut focus = focus();
    while !focus.next(&desired, &index, 0).names.is_empty() {}
    focus.no_call("h0", &name(0));
    focus.no_call("h0", &name(10));
    focus.no_call("h0", &name(10));
    assert!(focus.next(&desired, &index, 0).names.is_empty());
    assert_ne!(focus.rest(false), Duration::ZERO, "a call's end wakes");
    assert_eq!(focus.rest(true), Duration::ZERO);
    assert_eq!(focus.next(&desired, &index, 1).names, [name(0)].into());
    assert_eq!(focus.next(&desired, &index, 1).names, [name(10)].into());
}

#[tokio::test(start_paused = true)]
async fn what_somebody_else_changed_is_looked_at_a_moment_later() {
    let desired = many(2_000);
    let index = Index::of(&desired);
    let mut focus = focus();
    while !focus.next(&desired, &index, 0).names.is_empty() {}
    focus.again(&name(3));
    assert!(focus.next(&desired, &index, 0).names.is_empty());
    tokio::time::advance(focus.rest(true)).await;
    assert_eq!(focus.next(&desired, &index, 0).names, [name(3)].into());
}
