//! A backend that answers each request as a script says: the hostile and the half-dead ones.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;

/// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30;
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_CONFIG: u64 = 1 << 9;
const FLAG_NEED_REPLY: u32 = 1 << 3;
const FLAGS_REPLY: u32 = 1 | 1 << 2;

/// What to do about a request.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// What a sound backend would do.
    Sound,
    /// Answer with these 64 bits.
    Value(u64),
    /// Send these bytes instead of a message.
    Raw(Vec<u8>),
    /// Send these bytes and hang up.
    RawThenHangUp(Vec<u8>),
    /// Never answer, and read nothing more.
    Silence,
    /// Hang up.
    HangUp,
}

/// Decides about each request, given its number in the session's count.
pub(super) type Script = Arc<dyn Fn(u32) -> Answer + Send + Sync>;

/// Requests seen, over all sessions.
pub(super) type Seen = Arc<Mutex<Vec<u32>>>;

/// Serves sessions, each in a thread, until the process ends.
pub(super) fn serve(
    listener: UnixListener,
    script: impl Fn(u32) -> Answer + Send + Sync + 'static,
) -> Seen {
    let seen = Seen::default();
    let (script, record): (Script, Seen) = (Arc::new(script), Arc::clone(&seen));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (script, record) = (Arc::clone(&script), Arc::clone(&record));
            thread::spawn(move || session(stream.unwrap(), &script, &record));
        }
    });
    seen
}

fn session(mut stream: UnixStream, script: &Script, seen: &Seen) {
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let [request, flags, len] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        let mut body = vec![0; len as usize];
        stream.read_exact(&mut body).unwrap();
        seen.lock().unwrap().push(request);
        let reply = match script(request) {
            Answer::Sound => sound_reply(request, flags, &body),
            Answer::Value(value) => Some(message(request, &value.to_le_bytes())),
            Answer::Raw(bytes) => Some(bytes),
            Answer::RawThenHangUp(bytes) => {
                let _ = stream.write_all(&bytes);
                return;
            }
            Answer::Silence => loop {
                thread::park();
            },
            Answer::HangUp => return,
        };
        // A frontend that gave up is no failure of a backend.
        if reply.is_some_and(|reply| stream.write_all(&reply).is_err()) {
            return;
        }
    }
}

fn sound_reply(request: u32, flags: u32, body: &[u8]) -> Option<Vec<u8>> {
    let value = |value: u64| Some(message(request, &value.to_le_bytes()));
    match request {
        GET_FEATURES => value(FEATURES),
        GET_PROTOCOL_FEATURES => value(PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG),
        GET_QUEUE_NUM => value(1),
        GET_VRING_BASE => Some(message(request, &[&body[..4], &[0; 4]].concat())),
        GET_CONFIG => Some(message(request, body)),
        _ if flags & FLAG_NEED_REPLY != 0 => value(0),
        _ => None,
    }
}

/// A reply as it should be.
pub(super) fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, FLAGS_REPLY, body.len() as u32]
        .map(u32::to_le_bytes)
        .concat();
    [&header, body].concat()
}
