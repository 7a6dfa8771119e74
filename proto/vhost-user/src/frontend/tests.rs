//! The frontend against scripted peers: what it sends, and what it makes of what they answer.

mod config_change;
mod many_queues;
mod misbehaviour;
mod packed;
mod rust_vmm;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, RequestError};
use super::session::{self, InflightRegion, Resources, SessionError};
use super::{Activation, MemoryRegion, MemoryTable, QueueEvents, QueueState};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;

const F_VERSION_1: u64 = 1 << 32;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_INFLIGHT: u64 = 1 << 12;
const PROTOCOL_MEM_SLOTS: u64 = 1 << 15;
const FLAG_NEED_REPLY: u32 = 1 << 3;
const FLAGS_REPLY: u32 = 1 | 1 << 2;

const TIMEOUT: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(200);
const USED_GPA: u64 = 0x3000;
const USED_IDX: u16 = 77;

/// A request as the peer received it.
struct Request {
    code: u32,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Request {
    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.body[at..at + 4].try_into().unwrap())
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.body[at..at + 8].try_into().unwrap())
    }
}

/// What a peer sends back: body and descriptors. `None` follows the protocol.
type Reply = Option<(Vec<u8>, Vec<RawFd>)>;

/// A peer with these protocol features. `script` may answer requests instead of it.
fn peer(
    protocol_features: u64,
    mut script: impl FnMut(&Request) -> Reply + Send + 'static,
) -> (Connection, Receiver<Request>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (requests, seen) = channel();
    thread::spawn(move || {
        while let Some((request, flags)) = receive(&theirs) {
            let value = |value: u64| Some((value.to_le_bytes().to_vec(), vec![]));
            let reply = script(&request).or_else(|| match request.code {
                GET_FEATURES => value(F_VERSION_1 | F_PROTOCOL_FEATURES),
                GET_PROTOCOL_FEATURES => value(protocol_features),
                GET_QUEUE_NUM => value(2),
                GET_VRING_BASE => {
                    Some(([&request.body[..4], &55u32.to_le_bytes()].concat(), vec![]))
                }
                _ if flags & FLAG_NEED_REPLY != 0 => value(0),
                _ => None,
            });
            let code = request.code;
            let _ = requests.send(request);
            if let Some((body, fds)) = reply {
                send(&theirs, code, &body, &fds);
            }
        }
    });
    (Connection::from_stream(ours, TIMEOUT).unwrap(), seen)
}

fn receive(stream: &UnixStream) -> Option<(Request, u32)> {
    let mut header = [0; 12];
    let mut control = nix::cmsg_space!([RawFd; 8]);
    let mut iov = [IoSliceMut::new(&mut header)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let received = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut control), flags).ok()?;
    let mut fds = Vec::new();
    for message in received.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(rights) = message {
            // SAFETY: the kernel just installed them for this process, and nobody else knows.
            fds.extend(
                rights
                    .iter()
                    .map(|fd| unsafe { std::os::fd::FromRawFd::from_raw_fd(*fd) }),
            );
        }
    }
    if received.bytes != header.len() {
        return None;
    }
    let [code, flags, len] =
        [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
    let mut body = vec![0; len as usize];
    let mut stream = stream;
    stream.read_exact(&mut body).ok()?;
    Some((Request { code, body, fds }, flags))
}

fn send(stream: &UnixStream, code: u32, body: &[u8], fds: &[RawFd]) {
    let header = [code, FLAGS_REPLY, body.len() as u32]
        .map(u32::to_le_bytes)
        .concat();
    let message = [&header, body].concat();
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
    let _ = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&message)],
        rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
}

/// All that [`session::start`] needs: two rings in 64 KiB, whose used rings are at [`USED_IDX`].
struct Fixture {
    memory: MemoryTable,
    queues: Vec<QueueEvents>,
    err: EventFd,
    activation: Activation,
    inflight: Option<InflightRegion>,
    told_memory: bool,
}

impl Fixture {
    fn new(queues: u16) -> Self {
        let file = memfd(0x2_0000, MFdFlags::MFD_CLOEXEC);
        (&file)
            .seek(SeekFrom::Start(0x1_0000 + USED_GPA + 2))
            .unwrap();
        (&file).write_all(&USED_IDX.to_le_bytes()).unwrap();
        let region = MemoryRegion {
            gpa: 0,
            size_bytes: 0x1_0000,
            file: Arc::new(file),
            file_offset: 0x1_0000,
        };
        let event = || EventFd::new(0).unwrap();
        let queue = |index| QueueState {
            index,
            size: 16,
            desc_gpa: 0x1000,
            driver_gpa: 0x2000,
            device_gpa: USED_GPA,
            base: Some(0),
        };
        Self {
            memory: MemoryTable::new(vec![region]),
            queues: (0..queues)
                .map(|_| QueueEvents {
                    kick: event(),
                    call: event(),
                })
                .collect(),
            err: event(),
            activation: Activation {
                features: F_VERSION_1,
                queues: (0..queues).map(queue).collect(),
            },
            inflight: None,
            told_memory: false,
        }
    }

    fn start(&mut self, connection: &mut Connection) -> Result<(), SessionError> {
        let offer = session::handshake(connection, 0)?;
        let resources = Resources {
            memory: &self.memory,
            queues: &self.queues,
            err: &self.err,
        };
        session::start(
            connection,
            &offer,
            &mut self.activation,
            &mut self.inflight,
            &resources,
            &mut self.told_memory,
        )
    }
}

fn memfd(len: u64, flags: MFdFlags) -> File {
    let file = File::from(memfd_create(c"test", flags).unwrap());
    file.set_len(len).unwrap();
    file
}

fn codes(seen: &Receiver<Request>) -> Vec<u32> {
    seen.try_iter().map(|request| request.code).collect()
}

#[test]
fn rings_are_enabled_before_the_first_of_them_starts() {
    let (mut connection, seen) = peer(PROTOCOL_MQ | PROTOCOL_REPLY_ACK, |_| None);
    Fixture::new(2).start(&mut connection).unwrap();
    let ring = [
        SET_VRING_NUM,
        SET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_ERR,
        SET_VRING_CALL,
    ];
    let expected = [
        &[
            SET_OWNER,
            GET_FEATURES,
            GET_PROTOCOL_FEATURES,
            SET_PROTOCOL_FEATURES,
            GET_QUEUE_NUM,
        ][..],
        &[SET_FEATURES, SET_MEM_TABLE],
        &ring,
        &ring,
        &[SET_VRING_ENABLE, SET_VRING_ENABLE],
        &[SET_VRING_KICK, SET_VRING_KICK, GET_FEATURES],
    ];
    assert_eq!(codes(&seen), expected.concat());
}

#[test]
fn peer_without_protocol_features_is_served_with_what_it_knows() {
    let (mut connection, seen) = peer(0, |request| match request.code {
        GET_FEATURES => Some((F_VERSION_1.to_le_bytes().to_vec(), vec![])),
        _ => None,
    });
    Fixture::new(1).start(&mut connection).unwrap();
    let seen = codes(&seen);
    assert!(seen.contains(&SET_VRING_KICK));
    assert!(
        !seen.contains(&SET_VRING_ENABLE),
        "rings of such a peer start enabled"
    );
    assert!(!seen.contains(&GET_PROTOCOL_FEATURES));
}

#[test]
fn peer_with_memory_slots_gets_regions_and_no_table() {
    let (mut connection, seen) = peer(PROTOCOL_MEM_SLOTS, |_| None);
    Fixture::new(1).start(&mut connection).unwrap();
    let seen = codes(&seen);
    assert!(
        seen.contains(&ADD_MEM_REG) && !seen.contains(&SET_MEM_TABLE),
        "{seen:?}"
    );
}

#[test]
fn no_address_of_this_process_reaches_the_peer() {
    let (mut connection, seen) = peer(PROTOCOL_REPLY_ACK, |_| None);
    Fixture::new(1).start(&mut connection).unwrap();
    let seen: Vec<Request> = seen.try_iter().collect();
    let find = |code| seen.iter().find(|request| request.code == code).unwrap();
    let table = find(SET_MEM_TABLE);
    // num_regions, padding, then guest address, size, user address, offset.
    let table: Vec<u64> = (8..40).step_by(8).map(|at| table.u64_at(at)).collect();
    assert_eq!(table, [0, 0x1_0000, 0, 0x1_0000]);
    let address = find(SET_VRING_ADDR);
    // index, flags, then descriptors, used, available, log.
    let areas: Vec<u64> = (8..40).step_by(8).map(|at| address.u64_at(at)).collect();
    assert_eq!(areas, [0x1000, USED_GPA, 0x2000, 0]);
}

#[test]
fn rings_start_at_0_then_where_they_stopped_and_after_a_loss_at_used_idx() {
    let mut fixture = Fixture::new(1);
    let base_sent = |fixture: &mut Fixture, stops: bool| {
        let (mut connection, seen) = peer(PROTOCOL_REPLY_ACK, |_| None);
        fixture.told_memory = false;
        fixture.start(&mut connection).unwrap();
        if stops {
            session::stop(&mut connection, &mut fixture.activation).unwrap();
        }
        seen.try_iter()
            .find(|request| request.code == SET_VRING_BASE)
            .unwrap()
            .u32_at(4)
    };
    assert_eq!(base_sent(&mut fixture, false), 0);
    assert_eq!(
        base_sent(&mut fixture, true),
        u32::from(USED_IDX),
        "after a loss"
    );
    assert_eq!(base_sent(&mut fixture, false), 55, "after GET_VRING_BASE");
    assert_eq!(
        base_sent(&mut fixture, false),
        u32::from(USED_IDX),
        "after another loss"
    );
}

#[test]
fn lost_features_are_refused_before_anything_is_set() {
    let (mut connection, seen) = peer(PROTOCOL_REPLY_ACK, |_| None);
    let mut fixture = Fixture::new(1);
    fixture.activation.features |= 1 << 5;
    let error = fixture.start(&mut connection).unwrap_err();
    assert!(
        matches!(error, SessionError::FeaturesLost { missing: 0x20, .. }),
        "{error}"
    );
    assert!(!codes(&seen).contains(&SET_FEATURES));
}

/// GET_INFLIGHT_FD's answer: size, offset, queues, queue size.
fn inflight_reply(size_bytes: u64, offset: u64) -> Vec<u8> {
    let sizes = [size_bytes.to_le_bytes(), offset.to_le_bytes()].concat();
    [
        &sizes[..],
        &1u16.to_le_bytes(),
        &16u16.to_le_bytes(),
        &[0; 4],
    ]
    .concat()
}

#[test]
fn inflight_region_is_sealed_and_shown_to_each_incarnation() {
    for flags in [
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        MFdFlags::MFD_CLOEXEC,
    ] {
        let mut file = memfd(4096, flags);
        file.write_all(b"version and records").unwrap();
        let fd = file.as_raw_fd();
        let mut fixture = Fixture::new(1);
        for incarnation in 0..3 {
            let (mut connection, seen) =
                peer(PROTOCOL_REPLY_ACK | PROTOCOL_INFLIGHT, move |request| {
                    (request.code == GET_INFLIGHT_FD).then(|| (inflight_reply(4096, 0), vec![fd]))
                });
            fixture.told_memory = false;
            fixture.start(&mut connection).unwrap();
            let seen: Vec<Request> = seen.try_iter().collect();
            let asked = seen
                .iter()
                .filter(|request| request.code == GET_INFLIGHT_FD)
                .count();
            assert_eq!(
                asked,
                usize::from(incarnation == 0),
                "incarnation {incarnation}"
            );
            let set = seen
                .iter()
                .find(|request| request.code == SET_INFLIGHT_FD)
                .unwrap();
            let mut shown = File::from(set.fds[0].try_clone().unwrap());
            let seals = SealFlag::from_bits_retain(fcntl(&shown, FcntlArg::F_GET_SEALS).unwrap());
            assert!(seals.contains(SealFlag::F_SEAL_SHRINK), "{flags:?}");
            let mut bytes = [0; 19];
            shown.seek(SeekFrom::Start(0)).unwrap();
            shown.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"version and records", "{flags:?}");
            let kick = seen
                .iter()
                .position(|request| request.code == SET_VRING_KICK);
            let region = seen
                .iter()
                .position(|request| request.code == SET_INFLIGHT_FD);
            assert!(region < kick, "before the rings start");
        }
    }
}

#[test]
fn inflight_region_that_is_none_is_refused() {
    let cases = [(0, 0), (8192, 0), (4096, 1), (u64::MAX, 2), (1 << 40, 0)];
    for (size_bytes, offset) in cases {
        let file = memfd(4096, MFdFlags::MFD_CLOEXEC);
        let (mut connection, _seen) = peer(PROTOCOL_INFLIGHT, move |request| {
            (request.code == GET_INFLIGHT_FD)
                .then(|| (inflight_reply(size_bytes, offset), vec![file.as_raw_fd()]))
        });
        let error = Fixture::new(1).start(&mut connection).unwrap_err();
        assert!(
            matches!(error, SessionError::Inflight(_)),
            "{size_bytes:#x}+{offset:#x}: {error}"
        );
    }
}

#[test]
fn wrong_number_of_descriptors_is_refused() {
    for count in [0, 2] {
        let file = memfd(4096, MFdFlags::MFD_CLOEXEC);
        let (mut connection, _seen) = peer(PROTOCOL_INFLIGHT, move |request| {
            (request.code == GET_INFLIGHT_FD)
                .then(|| (inflight_reply(4096, 0), vec![file.as_raw_fd(); count]))
        });
        let error = Fixture::new(1).start(&mut connection).unwrap_err();
        assert!(
            matches!(error, SessionError::Request(RequestError::Failed { .. })),
            "{count}: {error}"
        );
    }
    let file = memfd(4096, MFdFlags::MFD_CLOEXEC);
    let (mut connection, _seen) = peer(0, move |request| {
        (request.code == GET_FEATURES).then(|| (vec![0; 8], vec![file.as_raw_fd()]))
    });
    assert!(
        matches!(connection.features(), Err(RequestError::Failed { .. })),
        "features with a descriptor"
    );
}

#[test]
fn received_descriptors_are_not_inherited_by_children() {
    let file = memfd(4096, MFdFlags::MFD_CLOEXEC);
    let (mut connection, _seen) = peer(PROTOCOL_INFLIGHT, move |request| {
        (request.code == GET_INFLIGHT_FD).then(|| (inflight_reply(4096, 0), vec![file.as_raw_fd()]))
    });
    session::handshake(&mut connection, 0).unwrap();
    let (_, received) = connection.inflight_fd(1, 16).unwrap();
    let flags = FdFlag::from_bits_retain(fcntl(&received, FcntlArg::F_GETFD).unwrap());
    assert!(flags.contains(FdFlag::FD_CLOEXEC));
}

#[test]
fn refusal_is_reported_and_the_connection_goes_on() {
    let (mut connection, _seen) = peer(PROTOCOL_REPLY_ACK, |request| {
        (request.code == SET_VRING_NUM).then(|| (1u64.to_le_bytes().to_vec(), vec![]))
    });
    session::handshake(&mut connection, 0).unwrap();
    let refused = connection.set_vring_num(0, 16);
    assert!(
        matches!(
            refused,
            Err(RequestError::Refused {
                request: "SET_VRING_NUM"
            })
        ),
        "{refused:?}"
    );
    connection.set_vring_base(0, 0).unwrap();
}

#[test]
fn silent_peer_is_given_up_at_the_deadline_and_others_are_not() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut silent = Connection::from_stream(ours, SHORT).unwrap();
    let (mut sound, _seen) = peer(0, |_| None);
    let started = Instant::now();
    let given_up = silent.features();
    assert!(
        matches!(
            given_up,
            Err(RequestError::Timeout {
                request: "GET_FEATURES",
                ..
            })
        ),
        "{given_up:?}"
    );
    assert!(
        (SHORT..TIMEOUT).contains(&started.elapsed()),
        "took {:?}",
        started.elapsed()
    );
    sound.features().unwrap();
}

#[test]
fn reply_that_trickles_in_does_not_move_the_deadline() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::from_stream(ours, SHORT).unwrap();
    thread::spawn(move || {
        while theirs.write_all(&[GET_FEATURES as u8]).is_ok() {
            thread::sleep(SHORT / 4);
        }
    });
    let started = Instant::now();
    assert!(connection.features().is_err());
    assert!(started.elapsed() < TIMEOUT, "took {:?}", started.elapsed());
}

#[test]
fn peer_that_reads_nothing_cannot_block_a_request() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::from_stream(ours, SHORT).unwrap();
    let started = Instant::now();
    // No replies were negotiated, so the socket buffer fills up.
    let blocked = (0..100_000).find_map(|_| connection.set_owner().err());
    assert!(
        matches!(blocked, Some(RequestError::Timeout { .. })),
        "{blocked:?}"
    );
    assert!(started.elapsed() < TIMEOUT, "took {:?}", started.elapsed());
}

#[test]
fn full_backlog_cannot_block_a_connect() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("full.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut held = Vec::new();
    let started = Instant::now();
    let error = loop {
        match Connection::connect(&path, SHORT) {
            Ok(connection) => held.push(connection),
            Err(error) => break error,
        }
    };
    assert!(!held.is_empty());
    assert_eq!(error.source.kind(), std::io::ErrorKind::WouldBlock);
    assert!(started.elapsed() < TIMEOUT, "took {:?}", started.elapsed());
}

#[test]
fn network_devices_answer_of_pairs_does_not_limit_ring_indexes() {
    let (mut connection, _seen) = peer(PROTOCOL_MQ, |request| {
        (request.code == GET_QUEUE_NUM).then(|| (1u64.to_le_bytes().to_vec(), vec![]))
    });
    session::handshake(&mut connection, 0).unwrap();
    connection.set_vring_num(1, 16).unwrap();
}
