//! CONFIG_CHANGE_MSG, as a frontend on the channel sees it.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use super::peers::{NEED_REPLY, Raw, VERSION, message, words};
use super::*;

const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: u32 = 2;
const REPLY: u32 = 4;

/// A frontend that opened a channel, and its end of it.
fn with_channel(served: &Served) -> (Raw, UnixStream) {
    let raw = Raw::connect(served);
    raw.negotiate();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    raw.request(
        SET_BACKEND_REQ_FD,
        VERSION | NEED_REPLY,
        &[],
        &[theirs.as_raw_fd()],
    );
    assert_eq!(raw.reply_value(), Some(0));
    (raw, ours)
}

#[track_caller]
fn assert_told(channel: &mut UnixStream) {
    let mut received = [0; 12];
    channel.read_exact(&mut received).unwrap();
    assert_eq!(
        received[..],
        message(CONFIG_CHANGE, VERSION | NEED_REPLY, &[])
    );
}

#[track_caller]
fn assert_silent(channel: &mut UnixStream) {
    channel.set_nonblocking(true).unwrap();
    let error = channel.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    channel.set_nonblocking(false).unwrap();
}

/// The session has looked at everything that happened before.
fn settle(raw: &Raw) {
    raw.request(1, VERSION, &[], &[]);
    assert!(raw.reply_value().is_some());
}

#[test]
fn next_change_is_told_once_the_last_one_was_answered() {
    let served = Served::new();
    let (raw, mut channel) = with_channel(&served);
    assert_silent(&mut channel);
    let server = served.server.as_ref().unwrap();
    server.config_changed();
    assert_told(&mut channel);
    for _ in 0..10 {
        server.config_changed();
        settle(&raw);
    }
    assert_silent(&mut channel);
    let answer = message(CONFIG_CHANGE, VERSION | REPLY, &words(&[0]));
    for byte in answer {
        channel.write_all(&[byte]).unwrap();
    }
    assert_told(&mut channel);
    // A refusal is an answer too.
    let refusal = message(CONFIG_CHANGE, VERSION | REPLY, &words(&[1]));
    channel.write_all(&refusal).unwrap();
    settle(&raw);
    assert_silent(&mut channel);
}

#[test]
fn without_reply_ack_a_frontend_that_does_not_read_holds_nobody_up() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.request(3, VERSION, &[], &[]);
    raw.request(1, VERSION, &[], &[]);
    let features = raw.reply_value().unwrap();
    raw.request(2, VERSION, &words(&[features]), &[]);
    raw.request(16, VERSION, &words(&[1 << 5]), &[]);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    raw.request(SET_BACKEND_REQ_FD, VERSION, &[], &[theirs.as_raw_fd()]);
    drop(theirs);
    for _ in 0..2000 {
        served.server.as_ref().unwrap().config_changed();
        settle(&raw);
    }
    channel.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = [0; 12];
    channel.read_exact(&mut received).unwrap();
    assert_eq!(received[..], message(CONFIG_CHANGE, VERSION, &[]));
}

#[test]
fn channel_that_is_closed_or_speaks_rubbish_ends_alone() {
    let served = Served::new();
    let whole = message(CONFIG_CHANGE, VERSION | REPLY, &words(&[0]));
    let cases: [(&str, bool, Vec<u8>); 4] = [
        ("spoke unasked", false, whole.clone()),
        (
            "another answer",
            true,
            message(7, VERSION | REPLY, &words(&[0])),
        ),
        (
            "no reply",
            true,
            message(CONFIG_CHANGE, VERSION, &words(&[0])),
        ),
        (
            "another size",
            true,
            message(CONFIG_CHANGE, VERSION | REPLY, &words(&[0, 0])),
        ),
    ];
    for (what, asked, bytes) in cases {
        let (raw, mut channel) = with_channel(&served);
        if asked {
            served.server.as_ref().unwrap().config_changed();
            assert_told(&mut channel);
        }
        let _ = channel.write_all(&bytes);
        let mut rest = Vec::new();
        // Closed with unread bytes in it, the channel is reset.
        match channel.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{what}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{what}"),
        }
        settle(&raw);
    }
    let (raw, channel) = with_channel(&served);
    drop(channel);
    served.server.as_ref().unwrap().config_changed();
    settle(&raw);
    drop(raw);
    served.assert_serves();
}

#[test]
fn what_is_no_channel_is_refused_or_ends_the_session() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.negotiate();
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_raw_fd();
    raw.request(SET_BACKEND_REQ_FD, VERSION | NEED_REPLY, &[], &[fd]);
    raw.assert_refused("a file");
    drop(raw);
    for (what, payload, fds) in [
        ("no descriptor", &[][..], vec![]),
        ("two descriptors", &[], vec![fd; 2]),
        ("a payload", &words(&[1]), vec![fd]),
    ] {
        let raw = Raw::connect(&served);
        raw.negotiate();
        raw.request(SET_BACKEND_REQ_FD, VERSION | NEED_REPLY, payload, &fds);
        raw.assert_ends(what);
    }
    // Not negotiated.
    let raw = Raw::connect(&served);
    raw.request(3, VERSION, &[], &[]);
    raw.request(SET_BACKEND_REQ_FD, VERSION, &[], &[fd]);
    raw.assert_ends("no feature");
    served.assert_serves();
}
