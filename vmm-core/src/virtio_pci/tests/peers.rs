//! Backends that hang, lie, or break off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vhost_user::frontend::Timeouts;

use super::guest::{Guest, wait_until};
use super::scripted::{self, Answer, message};
use super::{PROMPT, TYPE, listen};
use crate::virtio_pci::AttachError;

/// Short, so that hanging peers are given up soon.
const SHORT: Timeouts = Timeouts {
    first_reply: Duration::from_millis(300),
    request: Duration::from_millis(300),
    stop: Duration::from_millis(1500),
};

#[test]
fn missing_socket_is_reported_with_its_path_and_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nobody.sock");
    let Err(error) = Guest::attach(TYPE, &socket, SHORT) else {
        panic!("nobody listens")
    };
    let message = error.to_string();
    assert!(
        message.contains("nobody.sock") && message.contains("start its daemon"),
        "{message}"
    );
}

#[test]
fn listener_that_never_accepts_is_given_up_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let (_listener, socket) = listen(directory.path());
    let started = Instant::now();
    let attached = Guest::attach(TYPE, &socket, SHORT);
    assert!(matches!(attached, Err(AttachError::Backend { .. })));
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "took {:?}",
        started.elapsed()
    );
}

#[test]
fn backend_that_does_not_answer_a_handshake_request_is_given_up_in_time() {
    for silent in [
        scripted::GET_FEATURES,
        scripted::GET_PROTOCOL_FEATURES,
        scripted::GET_QUEUE_NUM,
        scripted::GET_CONFIG,
    ] {
        let answers = [
            Answer::Silence,
            Answer::Raw(message(silent, &[0; 4])),
            Answer::Raw(vec![0; 5]),
        ];
        for answer in answers {
            let directory = tempfile::tempdir().unwrap();
            let (listener, socket) = listen(directory.path());
            let given = answer.clone();
            scripted::serve(listener, move |request| {
                if request == silent {
                    given.clone()
                } else {
                    Answer::Sound
                }
            });
            let started = Instant::now();
            let attached = Guest::attach(TYPE, &socket, SHORT);
            assert!(
                matches!(attached, Err(AttachError::Backend { .. })),
                "request {silent}: {answer:?}"
            );
            assert!(
                started.elapsed() < Duration::from_secs(3),
                "request {silent}: {answer:?}"
            );
        }
    }
}

#[test]
fn nonsense_replies_end_the_attempt() {
    let oversized = [scripted::GET_FEATURES, 5, 0xffff_ffff]
        .map(u32::to_le_bytes)
        .concat();
    let wrong_request = message(99, &[0; 8]);
    let not_a_reply = [
        &[scripted::GET_FEATURES, 1, 8]
            .map(u32::to_le_bytes)
            .concat()[..],
        &[0; 8],
    ]
    .concat();
    for reply in [oversized, wrong_request, not_a_reply] {
        let directory = tempfile::tempdir().unwrap();
        let (listener, socket) = listen(directory.path());
        let given = reply.clone();
        scripted::serve(listener, move |request| {
            if request == scripted::GET_FEATURES {
                Answer::Raw(given.clone())
            } else {
                Answer::Sound
            }
        });
        assert!(
            matches!(
                Guest::attach(TYPE, &socket, SHORT),
                Err(AttachError::Backend { .. })
            ),
            "{reply:x?}"
        );
    }
}

#[test]
fn legacy_backend_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    scripted::serve(listener, |request| match request {
        scripted::GET_FEATURES => Answer::Value(0),
        _ => Answer::Sound,
    });
    assert!(matches!(
        Guest::attach(TYPE, &socket, SHORT),
        Err(AttachError::Legacy { .. })
    ));
}

#[test]
fn guest_never_waits_for_a_backend_that_does_not_stop_its_rings() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let seen = scripted::serve(listener, |request| match request {
        scripted::GET_VRING_BASE => Answer::Silence,
        _ => Answer::Sound,
    });
    let guest = Guest::attach(TYPE, &socket, SHORT).unwrap();
    let driver = guest.drive();
    wait_until("the rings are being started", || {
        seen.lock().unwrap().contains(&scripted::SET_VRING_KICK)
    });
    let started = Instant::now();
    driver.set_status(0);
    assert_ne!(driver.status(), 0, "the rings may still be in use");
    assert!(started.elapsed() < PROMPT, "took {:?}", started.elapsed());
    wait_until("the reset completes when the backend is given up", || {
        driver.status() == 0
    });
    assert!(
        guest
            .device
            .health(8)
            .link
            .last_error
            .contains("GET_VRING_BASE"),
        "{:?}",
        guest.device.health(8)
    );
}

#[test]
fn pause_gives_up_a_backend_that_does_not_stop_its_rings() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let timeouts = Timeouts {
        stop: Duration::from_secs(60),
        ..SHORT
    };
    let seen = scripted::serve(listener, |request| match request {
        scripted::GET_VRING_BASE => Answer::Silence,
        _ => Answer::Sound,
    });
    let guest = Guest::attach(TYPE, &socket, timeouts).unwrap();
    let _driver = guest.drive();
    wait_until("the rings are being started", || {
        seen.lock().unwrap().contains(&scripted::SET_VRING_KICK)
    });
    let started = Instant::now();
    guest.device.pause(Duration::from_millis(200));
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "took {:?}",
        started.elapsed()
    );
}

#[test]
fn configuration_space_is_answered_while_the_backend_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let timeouts = Timeouts {
        request: Duration::from_secs(5),
        ..SHORT
    };
    let seen = scripted::serve(listener, |request| match request {
        scripted::SET_CONFIG => Answer::Silence,
        _ => Answer::Sound,
    });
    let guest = Guest::attach(TYPE, &socket, timeouts).unwrap();
    let driver = guest.drive();
    guest.write(driver.device_cfg, 1, 7);
    wait_until("the backend hangs", || {
        seen.lock().unwrap().contains(&scripted::SET_CONFIG)
    });
    let started = Instant::now();
    assert_eq!(guest.read(driver.device_cfg, 1), 7);
    assert_eq!(guest.read(driver.common + 0x12, 2), 1);
    for _ in 0..1000 {
        guest.write(driver.device_cfg + 1, 1, 8);
    }
    driver.set_status(0);
    assert!(started.elapsed() < PROMPT, "took {:?}", started.elapsed());
}

#[test]
fn backend_that_breaks_off_while_rings_start_is_tried_again_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let left = Arc::new(AtomicU32::new(3));
    let counter = Arc::clone(&left);
    let seen = scripted::serve(listener, move |request| {
        let breaks = request == scripted::SET_VRING_BASE
            && counter
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                    left.checked_sub(1)
                })
                .is_ok();
        if breaks {
            Answer::HangUp
        } else {
            Answer::Sound
        }
    });
    let guest = Guest::attach(TYPE, &socket, SHORT).unwrap();
    let _driver = guest.drive();
    wait_until("the fourth attempt succeeds", || {
        let health = guest.device.health(8);
        health.link.connected && health.link.incarnations == 4
    });
    let handshakes = seen
        .lock()
        .unwrap()
        .iter()
        .filter(|request| **request == scripted::GET_FEATURES)
        .count();
    assert!(handshakes >= 4, "each attempt starts with the handshake");
}

#[test]
fn message_that_nobody_asked_for_ends_the_session() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let chatty = Arc::new(AtomicBool::new(true));
    let once = Arc::clone(&chatty);
    scripted::serve(listener, move |request| {
        if request == scripted::GET_CONFIG && once.swap(false, Ordering::SeqCst) {
            let body = [&[0, 16, 0].map(u32::to_le_bytes).concat()[..], &[0; 16]].concat();
            return Answer::Raw([message(request, &body), message(1, &[0; 8])].concat());
        }
        Answer::Sound
    });
    let guest = Guest::attach(TYPE, &socket, SHORT).unwrap();
    wait_until("the session ends and the next is sound", || {
        let health = guest.device.health(8);
        health.link.last_error.contains("nobody asked for")
            && health.link.incarnations == 2
            && health.link.connected
    });
}
