use std::sync::atomic::AtomicU32;
use std::time::Instant;

use super::*;
use crate::rule::LAST_HITS;
use crate::{Action, Event, Op, Point, Selector, Trigger, Wake};

const SECOND: u64 = 1_000_000_000;
const TTL: Duration = Duration::from_secs(10);

fn rule(name: &str, device: &str) -> Rule {
    Rule {
        name: name.to_owned(),
        selector: Selector {
            device: device.to_owned(),
            ..Selector::default()
        },
        trigger: Trigger::default(),
        start_after: Duration::ZERO,
        duration: None,
        action: Action::Drop,
    }
}

fn write() -> Event<'static> {
    Event {
        op: Some(Op::Write),
        sectors: Some((16, 8)),
        ..Event::of_queue(Point::Request, 2)
    }
}

#[test]
fn only_devices_that_are_meant_are_armed() {
    let faults = Faults::untimed(Kind::Block);
    let (root, data) = (faults.device("root"), faults.device("data"));
    assert!(!root.is_any_armed());
    faults
        .arm_at("a", vec![rule("r", "root")], TTL, 1, SECOND)
        .unwrap();
    assert!(root.is_armed(Point::Request) && !root.is_armed(Point::Call));
    assert!(!data.is_any_armed());
    let later = faults.device("root");
    assert!(
        later.is_any_armed(),
        "a device that comes later is meant too"
    );
}

#[test]
fn hits_are_counted_with_their_times() {
    let faults = Faults::untimed(Kind::Block);
    let device = faults.device("root");
    let second_of_two = Rule {
        trigger: Trigger {
            nth: 2,
            every: 2,
            max_hits: Some(2),
            ..Trigger::default()
        },
        ..rule("r", "")
    };
    faults
        .arm_at("a", vec![second_of_two], TTL, 1, SECOND)
        .unwrap();
    let struck: Vec<_> = (0..8)
        .map(|step| device.strike_at(&write(), SECOND + step).len())
        .collect();
    assert_eq!(struck, [0, 1, 0, 1, 0, 0, 0, 0]);
    let status = &faults.disarm_at(None, 2 * SECOND)[0].rules[0];
    assert_eq!((status.seen, status.hits), (8, 2));
    let hit = &status.last_hits[1];
    assert_eq!((hit.number, hit.at_ns), (2, SECOND + 3));
    assert_eq!((hit.device.as_str(), hit.queue), ("root", Some(2)));
    assert_eq!((hit.op, hit.sector), (Some(Op::Write), Some(16)));
}

#[test]
fn rule_that_nothing_matches_has_no_hits() {
    let faults = Faults::untimed(Kind::Block);
    let device = faults.device("root");
    let flushes = Rule {
        selector: Selector {
            ops: vec![Op::Flush],
            ..Selector::default()
        },
        ..rule("r", "")
    };
    faults.arm_at("a", vec![flushes], TTL, 1, SECOND).unwrap();
    assert!(device.strike_at(&write(), SECOND).is_empty());
    let status = &faults.disarm_at(Some("a"), SECOND)[0].rules[0];
    assert_eq!((status.seen, status.hits), (0, 0));
}

#[test]
fn only_the_last_hits_are_remembered() {
    let faults = Faults::untimed(Kind::Block);
    let device = faults.device("root");
    faults
        .arm_at("a", vec![rule("r", "")], TTL, 1, SECOND)
        .unwrap();
    let events = LAST_HITS as u64 + 10;
    for step in 0..events {
        device.strike_at(&write(), SECOND + step);
    }
    let status = &faults.disarm_at(None, SECOND)[0].rules[0];
    assert_eq!(status.hits, events);
    assert_eq!(status.last_hits.len(), LAST_HITS);
    assert_eq!(status.last_hits[0].number, 11);
}

#[test]
fn rules_end_with_their_time_to_live_and_are_remembered() {
    let faults = Faults::untimed(Kind::Block);
    let device = faults.device("root");
    faults
        .arm_at("a", vec![rule("r", "")], TTL, 1, SECOND)
        .unwrap();
    assert_eq!(device.strike_at(&write(), 11 * SECOND - 1).len(), 1);
    assert!(
        device.strike_at(&write(), 11 * SECOND).is_empty(),
        "also before anybody has noticed"
    );
    assert!(device.is_any_armed());
    faults.tick(11 * SECOND);
    assert!(!device.is_any_armed());
    let listed = faults.list();
    assert_eq!(listed[0].state, ArmingState::Expired);
    assert_eq!(listed[0].rules[0].hits, 1);
}

#[test]
fn same_rules_again_renew_and_others_are_refused() {
    let faults = Faults::untimed(Kind::Block);
    let device = faults.device("root");
    let arm =
        |name: &str, seed, now_ns| faults.arm_at("a", vec![rule(name, "")], TTL, seed, now_ns);
    arm("r", 1, SECOND).unwrap();
    device.strike_at(&write(), SECOND);
    let renewed = arm("r", 1, 5 * SECOND).unwrap();
    assert_eq!((renewed.remaining, renewed.rules[0].hits), (TTL, 1));
    assert_eq!(device.strike_at(&write(), 14 * SECOND).len(), 1);
    let id = "a".to_owned();
    assert_eq!(
        arm("s", 1, SECOND),
        Err(ArmError::IdTaken { id: id.clone() })
    );
    assert_eq!(arm("r", 2, SECOND), Err(ArmError::IdTaken { id }));
    faults.disarm_at(None, 14 * SECOND);
    arm("s", 2, 14 * SECOND).unwrap();
}

#[test]
fn schedule_bounds_when_a_rule_is_active() {
    let faults = Faults::untimed(Kind::Block);
    let device = faults.device("root");
    let scheduled = Rule {
        start_after: Duration::from_secs(2),
        duration: Some(Duration::from_secs(3)),
        ..rule("r", "")
    };
    faults.arm_at("a", vec![scheduled], TTL, 1, SECOND).unwrap();
    let is_hit = |at_ns| !device.strike_at(&write(), at_ns).is_empty();
    assert!(!is_hit(3 * SECOND - 1) && is_hit(3 * SECOND) && is_hit(6 * SECOND - 1));
    assert!(!is_hit(6 * SECOND));
    let strike = &device.strike_at(&write(), 3 * SECOND)[0];
    assert_eq!(strike.ends_ns(), 6 * SECOND);
}

#[test]
fn what_a_process_cannot_do_is_refused_whole() {
    let faults = Faults::untimed(Kind::Net);
    let device = faults.device("nic");
    let torn = Rule {
        action: Action::Error { errno: 5 },
        ..rule("no", "")
    };
    let error = faults
        .arm_at("a", vec![rule("yes", ""), torn], TTL, 1, SECOND)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a daemon of NICs does not know error")
    );
    assert!(!device.is_any_armed());
}

#[test]
fn same_seed_hits_the_same_events() {
    let run = |seed| {
        let faults = Faults::untimed(Kind::Block);
        let device = faults.device("root");
        let sometimes = Rule {
            trigger: Trigger {
                probability: 0.5,
                ..Trigger::default()
            },
            ..rule("r", "")
        };
        faults
            .arm_at("a", vec![sometimes], TTL, seed, SECOND)
            .unwrap();
        let strikes = (0..64).map(|step| device.strike_at(&write(), SECOND + step));
        strikes
            .map(|strikes| strikes.first().map(|strike| strike.random))
            .collect::<Vec<_>>()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn armings_are_bounded() {
    let faults = Faults::untimed(Kind::Block);
    let arm =
        |number: usize| faults.arm_at(&number.to_string(), vec![rule("r", "")], TTL, 1, SECOND);
    for number in 0..MAX_ARMINGS {
        arm(number).unwrap();
    }
    assert_eq!(arm(MAX_ARMINGS), Err(ArmError::TooMany));
    assert_eq!(faults.disarm_at(None, SECOND).len(), MAX_ARMINGS);
    arm(MAX_ARMINGS).unwrap();
    faults.disarm_at(None, SECOND);
    assert_eq!(faults.list().len(), MAX_ARMINGS, "the oldest was forgotten");
}

#[derive(Default)]
struct Counter(AtomicU32);

impl Wake for Counter {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn thread_ends_what_expires_and_wakes_those_who_wait() {
    let faults = Faults::start(Kind::Block).unwrap();
    let device = faults.device("root");
    let counter = Arc::new(Counter::default());
    let waker: Arc<dyn Wake> = counter.clone();
    device.add_waker(&waker);
    faults
        .arm("a", vec![rule("r", "")], Duration::from_millis(30), 1)
        .unwrap();
    let woken = counter.0.load(Ordering::SeqCst);
    assert!(woken > 0, "arming is a change");
    eventually("the rule ends by itself", || !device.is_any_armed());
    eventually("its end is told", || {
        counter.0.load(Ordering::SeqCst) > woken
    });
    let woken = counter.0.load(Ordering::SeqCst);
    device.wake_at(monotonic_ns() + 5_000_000);
    eventually("the time has come", || {
        counter.0.load(Ordering::SeqCst) > woken
    });
    drop(waker);
    drop(faults);
}
