//! Frontends that break the protocol: the session ends or the request is refused, and the next
//! frontend is served as if nothing had been.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};

use super::peers::{
    Guest, Honest, MEMORY_BYTES, NEED_REPLY, RING_SIZE, Raw, VERSION, addresses, message, state,
    words,
};
use super::*;
use crate::eventfd::EventFd;

const SET_OWNER: u32 = 3;
const SET_FEATURES: u32 = 2;
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_INFLIGHT_FD: u32 = 32;
const GET_INFLIGHT_FD: u32 = 31;
const NOFD: u64 = 0x100;

#[test]
fn message_that_ends_early_ends_the_session() {
    let served = Served::new();
    let whole = message(SET_FEATURES, VERSION, &words(&[0]));
    for len in [1, 4, 11, 12, 13, 19] {
        let raw = Raw::connect(&served);
        raw.send(&whole[..len], &[]).unwrap();
        raw.stream.shutdown(Shutdown::Write).unwrap();
        raw.assert_ends(&format!("{len} bytes"));
    }
    served.assert_serves();
}

#[test]
fn message_that_is_never_finished_ends_the_session() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.send(&message(SET_FEATURES, VERSION, &words(&[0]))[..15], &[])
        .unwrap();
    raw.assert_ends("half a message");
    served.assert_serves();
}

#[test]
fn message_in_small_pieces_is_understood() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    for byte in message(GET_FEATURES, VERSION, &[]) {
        raw.send(&[byte], &[]).unwrap();
    }
    assert!(raw.reply_value().is_some());
}

#[test]
fn oversized_messages_end_the_session() {
    let served = Served::new();
    for size in [4097u32, 0x10000, i32::MAX as u32, u32::MAX] {
        let raw = Raw::connect(&served);
        let mut bytes = message(SET_FEATURES, VERSION, &[0; 64]);
        bytes[8..12].copy_from_slice(&size.to_ne_bytes());
        raw.send(&bytes, &[]).unwrap();
        raw.assert_ends(&format!("size {size:#x}"));
    }
    served.assert_serves();
}

#[test]
fn wrong_sizes_versions_and_codes_end_the_session() {
    let served = Served::new();
    let cases = [
        ("unknown request", message(0, VERSION, &[])),
        ("unknown request", message(99, VERSION, &[])),
        ("unknown request", message(u32::MAX, VERSION, &words(&[1]))),
        ("version 0", message(GET_FEATURES, 0, &[])),
        ("version 2", message(GET_FEATURES, 2, &[])),
        ("a reply", message(GET_FEATURES, VERSION | 4, &[])),
        ("reserved flags", message(GET_FEATURES, 0xffff_fff1, &[])),
        (
            "payload too long",
            message(SET_OWNER, VERSION, &words(&[1])),
        ),
        ("payload too short", message(SET_FEATURES, VERSION, &[0; 4])),
        (
            "dirty log, which is not offered",
            message(6, VERSION, &words(&[0, 0])),
        ),
        (
            "protocol feature not negotiated",
            message(GET_INFLIGHT_FD, VERSION, &words(&[0, 0, 0])),
        ),
    ];
    for (what, bytes) in cases {
        let raw = Raw::connect(&served);
        raw.send(&bytes, &[]).unwrap();
        raw.assert_ends(what);
    }
    served.assert_serves();
}

#[test]
fn frontend_that_reads_no_answers_ends_its_session() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    let request = message(GET_FEATURES, VERSION, &[]);
    raw.stream.set_nonblocking(true).unwrap();
    eventually("the backend hangs up", || {
        matches!(
            raw.send(&request, &[]),
            Err(nix::Error::EPIPE | nix::Error::ECONNRESET)
        )
    });
    served.assert_serves();
}

#[test]
fn wrong_descriptor_counts_end_the_session_or_are_refused() {
    let served = Served::new();
    let guest = Guest::new();
    let fd = guest.memory.file().as_raw_fd();
    let one_region = words(&[1, 0, MEMORY_BYTES, 0x1000, 0]);
    let cases: [(&str, u32, &[u8], Vec<i32>); 8] = [
        (
            "memory without descriptor",
            SET_MEM_TABLE,
            &one_region,
            vec![],
        ),
        (
            "memory with two descriptors",
            SET_MEM_TABLE,
            &one_region,
            vec![fd; 2],
        ),
        (
            "memory with too many descriptors",
            SET_MEM_TABLE,
            &one_region,
            vec![fd; 60],
        ),
        (
            "kick without descriptor",
            SET_VRING_KICK,
            &words(&[0]),
            vec![],
        ),
        (
            "kick with two descriptors",
            SET_VRING_KICK,
            &words(&[0]),
            vec![fd; 2],
        ),
        (
            "no kick, and a descriptor",
            SET_VRING_KICK,
            &words(&[NOFD]),
            vec![fd],
        ),
        (
            "a descriptor that is not asked for",
            SET_OWNER,
            &[],
            vec![fd],
        ),
        (
            "in-flight region without descriptor",
            SET_INFLIGHT_FD,
            &words(&[64, 0, 1 << 16 | 1]),
            vec![],
        ),
    ];
    for (what, code, payload, fds) in cases {
        let raw = Raw::connect(&served);
        raw.negotiate();
        raw.request(code, VERSION | NEED_REPLY, payload, &fds);
        // The crate refuses some of these itself, with an answer; then the session ends.
        if raw.reply_value().is_some_and(|value| value == 0) {
            panic!("{what}: accepted");
        }
    }
    served.assert_serves();
}

#[test]
fn requests_before_their_time_are_refused() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.request(GET_FEATURES, VERSION, &[], &[]);
    let features = raw.reply_value().unwrap();
    raw.request(SET_FEATURES, VERSION, &words(&[features]), &[]);
    raw.request(SET_PROTOCOL_FEATURES, VERSION, &words(&[1 << 3]), &[]);
    for (code, payload) in [
        (SET_VRING_NUM, state(0, 16)),
        (SET_VRING_BASE, state(0, 0)),
        (SET_VRING_ADDR, addresses(0, 0, 0, 0)),
        (SET_VRING_ENABLE, state(0, 1)),
    ] {
        raw.request(code, VERSION | NEED_REPLY, &payload, &[]);
        raw.assert_refused(&format!("request {code} before SET_OWNER"));
    }
    raw.request(GET_VRING_BASE, VERSION, &state(0, 0), &[]);
    raw.assert_ends("GET_VRING_BASE before SET_OWNER");
    served.assert_serves();
}

#[test]
fn ring_without_memory_does_not_run() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.negotiate();
    let kick = EventFd::new().unwrap();
    kick.ring();
    raw.request(SET_VRING_NUM, VERSION | NEED_REPLY, &state(0, 16), &[]);
    assert_eq!(raw.reply_value(), Some(0));
    raw.request(
        SET_VRING_ADDR,
        VERSION | NEED_REPLY,
        &addresses(0, 0x1000, 0x3000, 0x2000),
        &[],
    );
    assert_eq!(raw.reply_value(), Some(0));
    raw.request(
        SET_VRING_KICK,
        VERSION | NEED_REPLY,
        &words(&[0]),
        &[kick.as_fd().as_raw_fd()],
    );
    assert_eq!(raw.reply_value(), Some(0));
    raw.request(SET_VRING_ENABLE, VERSION | NEED_REPLY, &state(0, 1), &[]);
    assert_eq!(raw.reply_value(), Some(0));
    assert_eq!(served.status().queues_running, 0);
    // The memory that comes does not hold the ring.
    let guest = Guest::new();
    let user_addr = guest.memory.layouts()[0].user_addr;
    let fd = guest.memory.file().as_raw_fd();
    raw.request(
        SET_MEM_TABLE,
        VERSION | NEED_REPLY,
        &words(&[1, 0, MEMORY_BYTES, user_addr, 0]),
        &[fd],
    );
    raw.assert_refused("ring outside memory");
    drop(raw);
    served.assert_serves();
}

#[test]
fn impossible_memory_tables_are_refused() {
    let served = Served::new();
    let guest = Guest::new();
    let fd = guest.memory.file().as_raw_fd();
    let mib = MEMORY_BYTES;
    // Regions of guest address, size, frontend address, file offset.
    let cases: [(&str, &[[u64; 4]]); 8] = [
        (
            "overlap in guest addresses",
            &[
                [0, mib, 0x1_0000_0000, 0],
                [mib - 4096, mib, 0x2_0000_0000, 0],
            ],
        ),
        (
            "overlap in frontend addresses",
            &[[0, mib, 0x1000_0000, 0], [mib, mib, 0x1000_0000 + 4096, 0]],
        ),
        ("the same region twice", &[[0, mib, 0x1000_0000, 0]; 2]),
        ("file too short", &[[0, mib + 1, 0x1000_0000, 0]]),
        (
            "file too short for the offset",
            &[[0, mib, 0x1000_0000, 4096]],
        ),
        ("offset past the file", &[[0, 4096, 0x1000_0000, 1 << 62]]),
        ("larger than any file", &[[0, 1 << 62, 0x1000_0000, 0]]),
        ("half of the address space", &[[0, i64::MAX as u64, 0, 0]]),
    ];
    let raw = Raw::connect(&served);
    raw.negotiate();
    for (what, regions) in cases {
        let mut payload = state(regions.len() as u32, 0);
        regions
            .iter()
            .for_each(|region| payload.extend(words(region)));
        raw.request(
            SET_MEM_TABLE,
            VERSION | NEED_REPLY,
            &payload,
            &vec![fd; regions.len()],
        );
        raw.assert_refused(what);
    }
    raw.share(&guest);
    drop(raw);
    served.assert_serves();
}

#[test]
fn overflowing_regions_end_the_session() {
    let served = Served::new();
    let guest = Guest::new();
    let fd = guest.memory.file().as_raw_fd();
    for region in [
        [u64::MAX, 4096, 0, 0],
        [0, 4096, u64::MAX, 0],
        [0, 4096, 0, u64::MAX],
        [0, 0, 0, 0],
    ] {
        let raw = Raw::connect(&served);
        raw.request(SET_OWNER, VERSION, &[], &[]);
        let mut payload = state(1, 0);
        payload.extend(words(&region));
        raw.request(SET_MEM_TABLE, VERSION, &payload, &[fd]);
        raw.assert_ends(&format!("{region:x?}"));
    }
    served.assert_serves();
}

#[test]
fn impossible_rings_are_refused() {
    let served = Served::new();
    let guest = Guest::new();
    let raw = Raw::connect(&served);
    raw.negotiate();
    raw.share(&guest);
    for size in [0, 3, 48, 128, 32768, 65536, u32::MAX] {
        raw.request(SET_VRING_NUM, VERSION | NEED_REPLY, &state(0, size), &[]);
        raw.assert_refused(&format!("ring size {size}"));
    }
    raw.request(
        SET_VRING_NUM,
        VERSION | NEED_REPLY,
        &state(0, u32::from(RING_SIZE)),
        &[],
    );
    assert_eq!(raw.reply_value(), Some(0));
    let base = guest.memory.layouts()[0].user_addr;
    let end = base + MEMORY_BYTES;
    for (desc, used, avail) in [
        (0, base, base),
        (base, 0, base),
        (base, base, 0),
        (end - 16, base, base),
        (base, end - 4, base),
        (base, base, end - 2),
        (u64::MAX - 15, base, base),
        (base, u64::MAX - 3, base),
    ] {
        raw.request(
            SET_VRING_ADDR,
            VERSION | NEED_REPLY,
            &addresses(0, desc, used, avail),
            &[],
        );
        raw.assert_refused(&format!("areas {desc:x} {used:x} {avail:x}"));
    }
    raw.request(
        SET_VRING_BASE,
        VERSION | NEED_REPLY,
        &state(0, 0x10000),
        &[],
    );
    raw.assert_refused("ring base beyond 16 bits");
    for index in [u32::from(NUM_QUEUES), 0x8000, u32::MAX] {
        for code in [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE] {
            raw.request(code, VERSION | NEED_REPLY, &state(index, 1), &[]);
            raw.assert_refused(&format!("request {code} for queue {index}"));
        }
    }
    raw.request(SET_VRING_KICK, VERSION | NEED_REPLY, &words(&[NOFD]), &[]);
    raw.assert_refused("a ring to be polled");
    raw.request(SET_OWNER, VERSION | NEED_REPLY, &[], &[]);
    raw.assert_refused("a second owner");
    raw.request(
        GET_VRING_BASE,
        VERSION,
        &state(u32::from(NUM_QUEUES), 0),
        &[],
    );
    raw.assert_ends("base of a queue that does not exist");
    served.assert_serves();
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.negotiate();
    for features in [1 << 35, 1 << 26, u64::MAX] {
        raw.request(SET_FEATURES, VERSION | NEED_REPLY, &words(&[features]), &[]);
        raw.assert_refused(&format!("features {features:#x}"));
    }
    drop(raw);
    served.assert_serves();
}

#[test]
fn impossible_inflight_regions_are_refused() {
    let served = Served::new();
    let guest = Guest::new();
    let fd = guest.memory.file().as_raw_fd();
    let shape = |num_queues: u64, queue_size: u64| num_queues | queue_size << 16;
    let raw = Raw::connect(&served);
    raw.negotiate();
    for (what, fields) in [
        ("mapping too short", [64, 0, shape(2, 64)]),
        ("file too short", [1 << 30, MEMORY_BYTES - 64, shape(2, 64)]),
        ("offset past the file", [1 << 20, 1 << 40, shape(1, 4)]),
        ("offset overflows", [u64::MAX, u64::MAX - 63, shape(1, 4)]),
        ("odd offset", [4096, 8, shape(1, 4)]),
        ("ring too large", [1 << 20, 0, shape(1, 40000)]),
    ] {
        raw.request(
            SET_INFLIGHT_FD,
            VERSION | NEED_REPLY,
            &words(&fields),
            &[fd],
        );
        raw.assert_refused(what);
    }
    raw.request(
        GET_INFLIGHT_FD,
        VERSION,
        &words(&[0, 0, shape(u64::from(NUM_QUEUES) + 1, 16)]),
        &[],
    );
    raw.assert_ends("region for more queues than there are");
    served.assert_serves();
}

#[test]
fn refusal_that_nobody_asked_for_ends_the_session() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    raw.negotiate();
    raw.request(SET_VRING_NUM, VERSION, &state(0, 3), &[]);
    raw.assert_ends("refused without acknowledgement");
    served.assert_serves();
}

#[test]
fn garbage_ends_the_session() {
    let served = Served::new();
    for seed in 1..50u64 {
        let raw = Raw::connect(&served);
        let bytes: Vec<u8> = (0..97u64)
            .map(|index| ((seed * 0x9e37 * (index + 3)) >> 7) as u8)
            .collect();
        let _ = raw.send(&bytes, &[]);
        let _ = raw.stream.shutdown(Shutdown::Write);
        raw.assert_ends(&format!("seed {seed}"));
    }
    served.assert_serves();
}

#[test]
fn received_descriptors_are_closed_on_exec_and_at_the_sessions_end() {
    let served = Served::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("marker");
    let marker = std::fs::File::create_new(&path).unwrap();
    // Flags of every descriptor of this process for the marker, but for the test's own.
    let flags_of_copies = || -> Vec<i32> {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let copies =
            links.filter(|link| std::fs::read_link(link.path()).is_ok_and(|target| target == path));
        let fds = copies.map(|link| link.file_name().to_string_lossy().parse::<i32>().unwrap());
        fds.filter(|fd| *fd != marker.as_raw_fd())
            // SAFETY: F_GETFD only reads the descriptor's state.
            .map(|fd| unsafe { libc::fcntl(fd, libc::F_GETFD) })
            .collect()
    };
    let raw = Raw::connect(&served);
    raw.negotiate();
    for code in [SET_VRING_KICK, SET_VRING_CALL] {
        raw.request(
            code,
            VERSION | NEED_REPLY,
            &words(&[0]),
            &[marker.as_raw_fd()],
        );
        assert_eq!(raw.reply_value(), Some(0));
    }
    assert_eq!(flags_of_copies(), [libc::FD_CLOEXEC; 2]);
    drop(raw);
    eventually("all are closed", || flags_of_copies().is_empty());
}

#[test]
fn memory_truncated_under_a_ring_ends_that_session_only() {
    let served = Served::new();
    let neighbour = Served::new();
    let mut witness = Honest::connect(&neighbour);
    witness.set_up();
    witness.start(0);

    for round in 0..3 {
        let mut honest = Honest::connect(&served);
        honest.set_up();
        honest.track_inflight();
        honest.start(0);
        honest.assert_echo(0, b"before");
        // Not through `honest`: the test's own access to the memory would end the test.
        honest.guest.memory.file().set_len(0).unwrap();
        honest.guest.kicks[0].write(1).unwrap();
        eventually("the session ends", || {
            let status = served.status();
            status.sessions == round + 1 && !status.connected
        });
        let end = served.status().last_session_end.unwrap();
        assert!(end.contains("truncated the memory"), "{end}");
        witness.assert_echo(0, b"the neighbour goes on");
    }
    served.assert_serves();
}

/// Out of order by the specification, but QEMU's vhost-user-net begins so.
#[test]
fn ring_enabled_before_features_is_taken_once_protocol_features_are_negotiated() {
    let served = Served::new();
    let raw = Raw::connect(&served);
    let get_features = message(GET_FEATURES, VERSION, &[]);
    raw.send(&get_features, &[]).unwrap();
    let features = raw.reply_value().unwrap();
    // CONFIG and REPLY_ACK.
    raw.send(
        &message(SET_PROTOCOL_FEATURES, VERSION, &words(&[1 << 9 | 1 << 3])),
        &[],
    )
    .unwrap();
    raw.send(&message(SET_OWNER, VERSION, &[]), &[]).unwrap();
    raw.send(&message(SET_VRING_ENABLE, VERSION, &state(0, 1)), &[])
        .unwrap();
    let with_answer = message(SET_VRING_ENABLE, VERSION | NEED_REPLY, &state(1, 1));
    raw.send(&with_answer, &[]).unwrap();
    assert_eq!(raw.reply_value(), Some(0));
    let no_such_ring = message(SET_VRING_ENABLE, VERSION | NEED_REPLY, &state(99, 1));
    raw.send(&no_such_ring, &[]).unwrap();
    assert_eq!(raw.reply_value(), Some(1));
    raw.send(&get_features, &[]).unwrap();
    assert_eq!(raw.reply_value(), Some(features));
}
