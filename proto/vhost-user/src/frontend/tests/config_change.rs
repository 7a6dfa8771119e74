//! A backend's configuration changes: both ends of this crate, and a backend that says nothing
//! else.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use super::*;
use crate::backend::{Device, QueueHandler, Server, bind};
use crate::frontend::{Endpoint, Events, Link, Timeouts, Wiring};

const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
const PROTOCOL_CONFIG: u64 = 1 << 9;

/// A device without work, whose configuration is one number.
#[derive(Debug, Default)]
pub(super) struct Dial(AtomicU8);

impl Device for Dial {
    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        vec![self.0.load(Ordering::SeqCst); 4]
    }

    fn start_queue(&self, _index: u16, _features: u64) -> std::io::Result<Box<dyn QueueHandler>> {
        Err(std::io::Error::other("no queues here"))
    }
}

/// Remembers every configuration that was read.
#[derive(Default)]
pub(super) struct Reader(Mutex<Vec<u8>>);

impl Reader {
    fn last(&self) -> Option<u8> {
        self.0.lock().unwrap().last().copied()
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl Events for Reader {
    fn stopped(&self) {}

    fn config_read(&self, config: &[u8], _is_current: &dyn Fn() -> bool) {
        self.0.lock().unwrap().push(config[0]);
    }

    fn ring_broken(&self) {}
}

fn link_to(socket: &std::path::Path, reader: &Arc<Reader>) -> Link {
    let endpoint = Endpoint {
        socket: socket.to_owned(),
        timeouts: Timeouts::default(),
        config_len: 4,
    };
    let first = endpoint.connect_within(TIMEOUT).unwrap();
    let wiring = Wiring {
        memory: Arc::new(MemoryTable::new(vec![])),
        queues: vec![],
        events: Arc::clone(reader) as _,
    };
    Link::spawn("dial", endpoint, first, wiring).unwrap()
}

#[track_caller]
pub(super) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::yield_now();
    }
}

#[test]
fn changes_reach_the_frontend_and_the_last_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("dial.sock");
    let dial = Arc::new(Dial::default());
    let server = Server::spawn("dial", bind(&socket).unwrap(), Arc::clone(&dial) as _).unwrap();
    // Nobody is there to be told, and who comes later reads it anyway.
    server.config_changed();
    let reader = Arc::new(Reader::default());
    let link = link_to(&socket, &reader);
    eventually("the first configuration is read", || {
        reader.last() == Some(0)
    });
    for value in 1..=3 {
        dial.0.store(value, Ordering::SeqCst);
        server.config_changed();
        eventually("the change is read", || reader.last() == Some(value));
    }
    for value in 4..=200 {
        dial.0.store(value, Ordering::SeqCst);
        server.config_changed();
    }
    eventually("the last of many changes is read", || {
        reader.last() == Some(200)
    });
    assert!(
        reader.count() < 100,
        "{} reads for 200 changes",
        reader.count()
    );
    assert!(link.health().connected);
    drop(link);
    server.stop(TIMEOUT).unwrap();
}

#[test]
fn backend_that_says_nothing_but_that_it_changed_is_asked_ten_times_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("flood.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let peer = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut flood = None;
        let mut reads = 0;
        while let Some((request, flags)) = receive(&stream) {
            let value = |value: u64| Some(value.to_le_bytes().to_vec());
            let reply = match request.code {
                GET_FEATURES => value(F_VERSION_1 | F_PROTOCOL_FEATURES),
                GET_PROTOCOL_FEATURES => {
                    value(PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG | PROTOCOL_BACKEND_REQ)
                }
                GET_CONFIG => {
                    reads += 1;
                    Some(request.body.clone())
                }
                _ if flags & FLAG_NEED_REPLY != 0 => value(0),
                _ => None,
            };
            if request.code == SET_BACKEND_REQ_FD {
                let channel = UnixStream::from(request.fds.into_iter().next().unwrap());
                flood = Some(thread::spawn(move || {
                    let change = [2u32, 1, 0].map(u32::to_le_bytes).concat().repeat(100);
                    while (&channel).write_all(&change).is_ok() {}
                }));
            }
            if let Some(body) = reply {
                send(&stream, request.code, &body, &[]);
            }
        }
        drop(stream);
        flood.expect("the channel was opened").join().unwrap();
        reads
    });
    let reader = Arc::new(Reader::default());
    let link = link_to(&socket, &reader);
    let started = Instant::now();
    eventually("several changes are heard", || reader.count() >= 6);
    let elapsed = started.elapsed();
    assert!(elapsed >= Duration::from_millis(350), "{elapsed:?}");
    assert!(link.health().connected);
    drop(link);
    let reads = peer.join().unwrap();
    assert!(reads < 100, "{reads} reads");
}
