//! Kicks that go wrong on purpose.

use std::time::Duration;

use faults::{Action, Faults, Kind, Rule, Selector, Trigger};

use super::backends::{Echo, listen, serve};
use super::guest::{Guest, TIMEOUTS, wait_until};
use super::*;

const FOR_LONG: Duration = Duration::from_secs(600);

fn once(action: Action) -> Vec<Rule> {
    vec![Rule {
        name: "it".to_owned(),
        selector: Selector::default(),
        trigger: Trigger {
            max_hits: Some(1),
            ..Trigger::default()
        },
        start_after: Duration::ZERO,
        duration: None,
        action,
    }]
}

#[test]
fn late_kick_is_heard_later_and_a_lost_one_when_the_fault_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let faults = Faults::start(Kind::Frontend).unwrap();
    let guest = Guest::attach_faulty(TYPE, &socket, TIMEOUTS, faults.device("test")).unwrap();
    let mut driver = guest.drive();
    let bells = guest.fabric.doorbell_gpas();
    assert!(!bells.is_empty());
    // A ring that is just being started is looked at without a kick.
    let head = driver.submit(b"first");
    assert_eq!(driver.complete(head, 5), b"first");

    let late = Action::LateKick(Duration::from_millis(20));
    faults.arm("late", once(late), FOR_LONG, 1).unwrap();
    wait_until("kicks exit", || guest.fabric.doorbell_gpas().is_empty());
    let began = Instant::now();
    let head = driver.submit(b"late");
    assert_eq!(driver.complete(head, 4), b"late");
    assert!(began.elapsed() >= Duration::from_millis(20), "it was late");
    let head = driver.submit(b"by hand");
    assert_eq!(driver.complete(head, 7), b"by hand");
    faults.disarm(Some("late"));
    wait_until("kicks exit no more", || {
        guest.fabric.doorbell_gpas() == bells
    });

    faults
        .arm("lost", once(Action::LostKick), FOR_LONG, 1)
        .unwrap();
    wait_until("kicks exit again", || {
        guest.fabric.doorbell_gpas().is_empty()
    });
    let head = driver.submit(b"lost");
    assert_eq!(faults.list().pop().unwrap().rules[0].hits, 1);
    faults.disarm(None);
    assert_eq!(driver.complete(head, 4), b"lost");
    assert_eq!(guest.fabric.doorbell_gpas(), bells);
}
