//! What a frontend does wrong on purpose: it loses its backend and hesitates to look for the next.

use faults::{Action, Faults, Kind, Rule, Selector, Trigger};

use super::config_change::{Dial, Reader, eventually};
use super::*;
use crate::backend::{Server, bind};
use crate::frontend::{Endpoint, Link, Timeouts, Wiring};

const FOR_LONG: Duration = Duration::from_secs(600);

fn rule(action: Action, messages: &[&str]) -> Rule {
    Rule {
        name: "it".to_owned(),
        selector: Selector {
            messages: messages.iter().map(|&name| name.to_owned()).collect(),
            ..Selector::default()
        },
        trigger: Trigger {
            max_hits: Some(1),
            ..Trigger::default()
        },
        start_after: Duration::ZERO,
        duration: None,
        action,
    }
}

#[test]
fn lost_backend_is_looked_for_once_the_fault_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("dial.sock");
    let server = Server::spawn("dial", bind(&socket).unwrap(), Arc::new(Dial::default())).unwrap();
    let faults = Faults::start(Kind::Frontend).unwrap();
    let endpoint = Endpoint {
        socket,
        timeouts: Timeouts::default(),
        config_len: 4,
    };
    let first = endpoint.connect_within(TIMEOUT).unwrap();
    let wiring = Wiring {
        memory: Arc::new(MemoryTable::new(vec![])),
        queues: vec![],
        events: Arc::new(Reader::default()),
    };
    let link = Link::spawn_faulty("dial", endpoint, first, wiring, faults.device("dial")).unwrap();
    let rules = vec![
        rule(Action::LateReply(Duration::from_millis(1)), &["GET_CONFIG"]),
        rule(Action::Disconnect, &["GET_CONFIG"]),
        rule(Action::LateReconnect(FOR_LONG), &[]),
    ];
    faults.arm("all", rules, FOR_LONG, 1).unwrap();
    link.refresh_config();
    eventually("the backend is lost", || !link.health().connected);
    let said = link.health().last_error;
    assert!(said.contains("a fault closes the connection"), "{said}");
    let hits = || -> Vec<u64> {
        let armings = faults.list();
        armings[0].rules.iter().map(|rule| rule.hits).collect()
    };
    eventually("it is not looked for", || hits() == [1, 1, 1]);
    assert!(!link.health().connected);
    faults.disarm(None);
    eventually("it is found", || link.health().connected);
    assert_eq!(link.health().incarnations, 2);
    drop(link);
    server.stop(TIMEOUT).unwrap();
}
