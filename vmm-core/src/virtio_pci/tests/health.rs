//! What can be seen of a device, before, during and after an outage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use super::TYPE;
use super::backends::{Echo, kill, listen, serve};
use super::guest::{Guest, TIMEOUTS, wait_until};
use super::scripted::{self, Answer, GET_VRING_BASE, SET_VRING_KICK};

#[test]
fn outage_is_told_with_its_requests_and_the_times_of_its_parts() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    let head = driver.submit(b"served");
    driver.complete(head, 6);
    let quiet = guest.device.health(8);
    assert_eq!((quiet.in_flight(), quiet.link.outages_total), (0, 0));
    assert_eq!(quiet.link.stalled_since, None);

    echo.hold.store(true, Ordering::SeqCst);
    let head = driver.submit(b"in flight");
    wait_until("the backend took the request", || {
        guest.device.health(8).in_flight() == 1
    });
    let before = SystemTime::now();
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    let out = guest.device.health(8);
    assert_eq!(out.in_flight(), 1, "nobody completed it: {out:?}");
    assert!(out.link.stalled_since.unwrap() >= before);
    assert!(!out.link.replaying);
    let outage = &out.outages[0];
    assert_eq!((outage.number, outage.in_flight), (1, 1), "{outage:?}");
    assert_eq!(outage.replayed_after, None);

    echo.hold.store(false, Ordering::SeqCst);
    let _server = serve(&listener, &echo);
    assert_eq!(driver.complete(head, 9), b"in flight");
    wait_until("the first completion is noticed", || {
        guest.device.health(8).outages[0]
            .first_completion_after
            .is_some()
    });
    let healed = guest.device.health(8);
    let outage = &healed.outages[0];
    let parts = [
        outage.connected_after,
        outage.replayed_after,
        outage.first_completion_after,
    ]
    .map(Option::unwrap);
    assert!(parts.is_sorted() && parts[0] > Duration::ZERO, "{parts:?}");
    assert_eq!(outage.incarnation, 2);
    assert_eq!(healed.link.last_recovery, Some(parts[2]));
    assert_eq!(healed.link.stalled_since, None);
    assert_eq!(healed.in_flight(), 0);
}

#[test]
fn backend_that_fails_each_replay_is_one_outage_that_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let is_failing = Arc::new(AtomicBool::new(false));
    let fails = Arc::clone(&is_failing);
    let seen = scripted::serve(listener, move |request| match request {
        SET_VRING_KICK | GET_VRING_BASE if fails.load(Ordering::SeqCst) => Answer::HangUp,
        _ => Answer::Sound,
    });
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let _driver = guest.drive();
    wait_until("the rings run", || {
        seen.lock().unwrap().contains(&SET_VRING_KICK)
    });
    is_failing.store(true, Ordering::SeqCst);
    guest.device.pause(Duration::from_secs(5));
    guest.device.resume();
    let incarnations = guest.device.health(8).link.incarnations;
    wait_until("a replay fails", || {
        guest.device.health(8).link.incarnations > incarnations + 1
    });
    let first = guest.device.health(8).link;
    assert!(first.stalled_since.is_some(), "{first:?}");
    wait_until("replay after replay fails", || {
        guest.device.health(8).link.incarnations > first.incarnations + 2
    });
    let later = guest.device.health(8).link;
    assert_eq!(
        (later.outages_total, later.stalled_since),
        (first.outages_total, first.stalled_since)
    );
    is_failing.store(false, Ordering::SeqCst);
    wait_until("the device is healed", || {
        guest.device.health(8).link.stalled_since.is_none()
    });
    assert_eq!(
        guest.device.health(8).link.outages_total,
        first.outages_total
    );
}
