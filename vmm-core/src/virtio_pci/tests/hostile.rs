//! Backends that come back as something else: each test ends with a sound one, which the device must take as if
//! nothing had been. Another device of the same VM is served all the while.

use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost_user::frontend::Timeouts;

use super::backends::{Echo, listen, serve};
use super::guest::{Driver, Guest, TIMEOUTS, wait_until};
use super::scripted::{self, Answer, FEATURES, GET_FEATURES, message};
use super::{PROMPT, TYPE};

/// Short, so that peers that hang are given up soon.
const SHORT: Timeouts = Timeouts {
    first_reply: Duration::from_millis(200),
    request: Duration::from_millis(200),
    stop: Duration::from_millis(200),
};

/// Far more than a request takes on a busy machine.
const NEIGHBOURS_PATIENCE: Duration = Duration::from_secs(2);

/// Requests of all kinds that a scripted backend hears when rings start.
const REPLAY: [u32; 8] = [
    scripted::GET_FEATURES,
    scripted::GET_CONFIG,
    scripted::SET_VRING_BASE,
    scripted::SET_VRING_KICK,
    // SET_FEATURES, SET_OWNER, SET_MEM_TABLE, SET_VRING_ENABLE.
    2,
    3,
    5,
    18,
];

/// A VM's other device, which is to notice nothing.
struct Neighbour {
    _directory: tempfile::TempDir,
    _server: vhost_user::backend::Server,
    guest: Guest,
}

impl Neighbour {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (listener, socket) = listen(directory.path());
        let server = serve(&listener, &Echo::new());
        let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
        Self {
            _directory: directory,
            _server: server,
            guest,
        }
    }

    #[track_caller]
    fn assert_served(&self, driver: &mut Driver<'_>) {
        let started = Instant::now();
        let head = driver.submit(b"neighbour");
        assert_eq!(driver.complete(head, 9), b"neighbour");
        let took = started.elapsed();
        assert!(
            took < NEIGHBOURS_PATIENCE,
            "the neighbour waited for {took:?}"
        );
        let health = self.guest.device.health(1);
        assert_eq!(
            (health.link.incarnations, health.link.outages_total),
            (1, 0)
        );
    }
}

/// Attaches to a sound backend that is replaced, by a hang-up, with one of which each session `n` from 1 on
/// answers as `answer(n, request)` says, until there were `sessions` of them. The device must heal then.
fn survives(
    sessions: u64,
    timeouts: Timeouts,
    answer: impl Fn(u64, u32) -> Answer + Send + Sync + 'static,
) {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let session = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&session);
    let rings_start = Arc::new(AtomicBool::new(false));
    let start = Arc::clone(&rings_start);
    scripted::serve(listener, move |request| {
        const SET_OWNER: u32 = 3;
        if request == scripted::SET_VRING_KICK {
            start.store(true, Ordering::SeqCst);
        }
        let session = match request {
            SET_OWNER => counted.fetch_add(1, Ordering::SeqCst),
            _ => counted.load(Ordering::SeqCst).saturating_sub(1),
        };
        match session {
            0 if request == scripted::GET_VRING_BASE => Answer::HangUp,
            0 => Answer::Sound,
            session if session <= sessions => answer(session, request),
            _ => Answer::Sound,
        }
    });
    let guest = Guest::attach(TYPE, &socket, timeouts).unwrap();
    let _driver = guest.drive();
    let neighbour = Neighbour::new();
    let mut neighbours_driver = neighbour.guest.drive();
    wait_until("the rings start", || rings_start.load(Ordering::SeqCst));
    assert_eq!(session.load(Ordering::SeqCst), 1);
    // Ends the first session: only rings that were started are asked for their position.
    guest.device.pause(Duration::from_secs(2));
    guest.device.resume();
    let mut looks = 0;
    wait_until("a sound backend is taken again", || {
        neighbour.assert_served(&mut neighbours_driver);
        let started = Instant::now();
        let health = guest.device.health(1);
        assert!(started.elapsed() < NEIGHBOURS_PATIENCE);
        looks += 1;
        health.link.connected && session.load(Ordering::SeqCst) > sessions
    });
    assert!(looks > 0);
}

#[test]
fn backend_that_closes_in_the_middle_of_any_message_is_tried_again() {
    survives(REPLAY.len() as u64, SHORT, |session, request| {
        match REPLAY[(session - 1) as usize] == request {
            true => Answer::RawThenHangUp(message(request, &[0; 8])[..13].to_vec()),
            false => Answer::Sound,
        }
    });
}

#[test]
fn backend_that_speaks_rubbish_is_tried_again() {
    survives(8, SHORT, |session, request| {
        // xorshift: the same rubbish in each run.
        let mut state = (session * 0x9e37_79b9_7f4a_7c15) ^ u64::from(request);
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        match byte() % 3 {
            0 => Answer::RawThenHangUp((0..byte()).map(|_| byte()).collect()),
            1 => {
                let body: Vec<u8> = (0..byte() % 64).map(|_| byte()).collect();
                Answer::Raw(message(request, &body))
            }
            _ => Answer::Sound,
        }
    });
}

#[test]
fn backend_that_never_answers_again_holds_nothing_up() {
    // Longer than the neighbour may wait.
    let patient = Timeouts {
        first_reply: NEIGHBOURS_PATIENCE * 2,
        ..SHORT
    };
    survives(1, patient, |_, _| Answer::Silence);
}

#[test]
fn backend_that_changes_its_features_is_refused_until_it_has_them_again() {
    survives(4, SHORT, |session, request| match (request, session) {
        // VERSION_1 is gone, no protocol features, none at all, or all that there are.
        (GET_FEATURES, 1) => Answer::Value(FEATURES & !(1 << 32)),
        (GET_FEATURES, 2) => Answer::Value(0),
        (scripted::GET_PROTOCOL_FEATURES, 3) => Answer::Value(u64::MAX),
        (scripted::GET_QUEUE_NUM, 4) => Answer::Value(0),
        _ => Answer::Sound,
    });
}

#[test]
fn unexpected_descriptors_are_closed() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            // Whatever is asked first is answered with descriptors that nobody wants.
            let gift = tempfile::tempfile().unwrap();
            let fds = [gift.as_raw_fd(); 8];
            let reply = message(GET_FEATURES, &FEATURES.to_le_bytes());
            let rights = [ControlMessage::ScmRights(&fds)];
            let iov = [IoSlice::new(&reply)];
            let _ = sendmsg::<()>(
                stream.as_raw_fd(),
                &iov,
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            let _ = sendmsg::<()>(
                stream.as_raw_fd(),
                &iov,
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
        }
    });
    // Other tests open files meanwhile: only those of deleted temporary files of this size count.
    let gifts = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().contains("(deleted)"))
            .count()
    };
    let before = gifts();
    for _ in 0..20 {
        assert!(Guest::attach(TYPE, &socket, SHORT).is_err());
    }
    let mut after = gifts();
    wait_until("what was sent is closed", || {
        after = gifts();
        after < before + 100
    });
}

/// Named for what another VMM did: a daemon that was away for more than 60 s was never connected to again.
/// Attempts go on at the longest pause, one second, without a count.
#[test]
fn device_disabled_for_ever_after_a_long_outage() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    super::backends::kill(server);
    drop(listener);
    std::fs::remove_file(&socket).unwrap();
    wait_until("the outage is noticed", || {
        !guest.device.health(1).link.connected
    });
    let head = driver.submit(b"an hour later");
    let outage = Instant::now();
    // The pauses have grown to their limit by then; later attempts differ in nothing.
    wait_until("attempts were refused for some seconds", || {
        outage.elapsed() > Duration::from_secs(4)
    });
    let (listener, _) = listen(directory.path());
    let _server = serve(&listener, &echo);
    assert_eq!(driver.complete(head, 13), b"an hour later");
}

/// Named for what another VMM did: it waited for all queues that were offered, and firmware uses one.
#[test]
fn pause_deadlocks_with_fewer_queues_than_offered() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive_queues(1);
    let head = driver.submit(b"one queue");
    assert_eq!(driver.complete(head, 9), b"one queue");
    let started = Instant::now();
    guest.device.pause(Duration::from_secs(5));
    guest.device.resume();
    assert!(started.elapsed() < PROMPT, "took {:?}", started.elapsed());
    let head = driver.submit(b"goes on");
    assert_eq!(driver.complete(head, 7), b"goes on");
}

/// Named for what another VMM did: a listener whose daemon is dying takes connections into its backlog, the first
/// request then fails, and that was the end.
#[test]
fn connect_succeeds_on_a_dying_listener() {
    survives(5, SHORT, |_, _| Answer::HangUp);
}
