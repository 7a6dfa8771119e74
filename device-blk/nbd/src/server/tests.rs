//! The server against clients that are hostile, slow or stale.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::thread;

use super::*;
use crate::wire::{
    self, ChunkHeader, Claim, RequestHeader, be32, be64, chunk, command, errno, option, reply,
};

const DEADLINE: Duration = Duration::from_secs(20);
const SIZE_BYTES: u64 = 1 << 20;

/// A disk in memory, whose writes can be held up.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Writes wait while this is locked.
    brake: Mutex<()>,
    writing: AtomicUsize,
}

impl Export for Memory {
    fn size_bytes(&self) -> u64 {
        SIZE_BYTES
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn block_bytes(&self) -> (u32, u32) {
        (1, 4096)
    }

    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let at = offset_bytes as usize;
        into.copy_from_slice(&self.bytes.lock().unwrap()[at..at + into.len()]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        let brake = self.brake.lock().unwrap();
        let at = offset_bytes as usize;
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        drop(brake);
        Ok(())
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, _: Zeroing) -> io::Result<()> {
        self.write_at(&vec![0; len_bytes as usize], offset_bytes)
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }
}

struct Place {
    server: Arc<Server>,
    memory: Arc<Memory>,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Place {
    fn new(has_fence: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let memory = Arc::new(Memory::default());
        memory.bytes.lock().unwrap().resize(SIZE_BYTES as usize, 0);
        let fence = has_fence.then(|| Fence::open(tempfile::tempfile().unwrap()).unwrap());
        let options = Options {
            name: "disk".into(),
            tls: None,
            fence,
            max_connections: 4,
            disk_threads: 2,
            boot_id: [3; 16],
        };
        let server = Arc::new(Server::new(memory.clone(), options).unwrap());
        let running = Arc::clone(&server);
        thread::spawn(move || running.run(listener.into()).unwrap());
        Self {
            server,
            memory,
            path,
            _directory: directory,
        }
    }

    fn connect(&self) -> Peer {
        let socket = UnixStream::connect(&self.path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Peer(socket)
    }

    fn await_connections(&self, expected: usize) {
        let give_up = Instant::now() + DEADLINE;
        while self.server.connections() != expected {
            assert!(Instant::now() < give_up, "{:?}", self.server);
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Still serves an honest client.
    fn assert_serving(&self) {
        let mut peer = self.connect();
        peer.greet();
        assert_eq!(peer.go("disk").last().unwrap().0, reply::ACK);
        peer.request(command::READ, 0, 7, 0, 16);
        assert_eq!(peer.simple_reply(), (0, 7));
        peer.read(16);
        peer.request(command::DISC, 0, 0, 0, 0);
        assert_eq!(peer.0.read(&mut [0]).unwrap(), 0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        assert!(self.server.stop(DEADLINE) || thread::panicking());
    }
}

/// A client that says what a test wants.
struct Peer(UnixStream);

impl Peer {
    fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn greet(&mut self) {
        let greeting = self.read(18);
        assert_eq!(be64(&greeting, 0), wire::NBD_MAGIC);
        self.0.write_all(&3_u32.to_be_bytes()).unwrap();
    }

    fn option(&mut self, code: u32, payload: &[u8]) {
        let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        self.0.write_all(&bytes).unwrap();
    }

    fn reply(&mut self) -> (u32, Vec<u8>) {
        let head = self.read(20);
        assert_eq!(be64(&head, 0), wire::OPTION_REPLY_MAGIC);
        let payload = self.read(be32(&head, 16) as usize);
        (be32(&head, 12), payload)
    }

    /// All replies to GO.
    fn go(&mut self, name: &str) -> Vec<(u32, Vec<u8>)> {
        let mut payload = (name.len() as u32).to_be_bytes().to_vec();
        payload.extend_from_slice(name.as_bytes());
        payload.extend_from_slice(&[0, 0]);
        self.option(option::GO, &payload);
        let mut replies = vec![self.reply()];
        while replies.last().unwrap().0 == reply::INFO {
            replies.push(self.reply());
        }
        replies
    }

    fn request(&mut self, code: u16, flags: u16, cookie: u64, offset_bytes: u64, len_bytes: u32) {
        let header = RequestHeader {
            flags,
            command: code,
            cookie,
            offset_bytes,
            len_bytes,
        };
        self.0.write_all(&header.encode()).unwrap();
    }

    /// Error and cookie.
    fn simple_reply(&mut self) -> (u32, u64) {
        let head = self.read(16);
        assert_eq!(be32(&head, 0), wire::SIMPLE_REPLY_MAGIC);
        (be32(&head, 4), be64(&head, 8))
    }
}

#[test]
fn hostile_beginnings_end_their_connection_alone() {
    let place = Place::new(false);
    let option = |code: u32, len: u32, payload: &[u8]| {
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    };
    let beginnings = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        vec![0; 4096],
        0x8000_0003_u32.to_be_bytes().to_vec(),
        // From before the fixed newstyle.
        2_u32.to_be_bytes().to_vec(),
        option(option::GO, u32::MAX, &[]),
        option(option::EXPORT_NAME, 4, &[0xff; 4]),
        option(option::EXPORT_NAME, 4, b"else"),
        [3_u32.to_be_bytes().to_vec(), vec![0x49; 16]].concat(),
    ];
    for beginning in beginnings {
        let mut peer = place.connect();
        let _ = peer.0.write_all(&beginning);
        // The server hangs up; what it said before is of no interest.
        let _ = peer.0.read_to_end(&mut Vec::new());
    }
    place.assert_serving();
}

#[test]
fn broken_options_are_answered_and_forgiven() {
    let place = Place::new(false);
    let mut peer = place.connect();
    peer.greet();
    let long_name = [&5000_u32.to_be_bytes()[..], &[b'x'; 5000]].concat();
    for (code, payload, expected) in [
        (0x1234, vec![1, 2, 3], reply::ERR_UNSUP),
        (option::CLAIM, vec![0; 32], reply::ERR_UNSUP),
        (option::GO, vec![], reply::ERR_INVALID),
        (option::GO, vec![0xff; 8], reply::ERR_INVALID),
        (option::GO, vec![0, 0, 0, 0, 0, 9], reply::ERR_INVALID),
        (option::GO, long_name, reply::ERR_INVALID),
        (
            option::INFO,
            b"\0\0\0\x04else\0\0".to_vec(),
            reply::ERR_UNKNOWN,
        ),
        (option::LIST, vec![0], reply::ERR_INVALID),
        (option::STRUCTURED_REPLY, vec![0], reply::ERR_INVALID),
        (option::STARTTLS, vec![], reply::ERR_POLICY),
        (option::SET_META_CONTEXT, vec![0; 8], reply::ERR_INVALID),
    ] {
        peer.option(code, &payload);
        assert_eq!(peer.reply().0, expected, "option {code}");
    }
    peer.option(option::STRUCTURED_REPLY, &[]);
    assert_eq!(peer.reply().0, reply::ACK);
    for queries in [[0xff; 4], [0, 0, 0, 200]] {
        let payload = [b"\0\0\0\x04disk", &queries[..]].concat();
        peer.option(option::SET_META_CONTEXT, &payload);
        assert_eq!(peer.reply().0, reply::ERR_INVALID);
    }
    peer.option(option::LIST, &[]);
    assert_eq!(peer.reply(), (reply::SERVER, b"\0\0\0\x04disk".to_vec()));
    assert_eq!(peer.reply().0, reply::ACK);
    assert_eq!(peer.go("disk").last().unwrap().0, reply::ACK);
}

#[test]
fn wrong_requests_get_the_protocols_errors() {
    let place = Place::new(false);
    let mut peer = place.connect();
    peer.greet();
    peer.go("disk");
    let end = SIZE_BYTES;
    for (code, flags, offset, len, expected) in [
        (command::READ, 0, end, 1, errno::EINVAL),
        (command::READ, 0, u64::MAX, 2, errno::EINVAL),
        (command::READ, 0, 0, u32::MAX, errno::EINVAL),
        (command::READ, command::FLAG_DF, 0, 1, errno::EINVAL),
        (command::TRIM, 0, end - 1, 2, errno::ENOSPC),
        (command::WRITE_ZEROES, 0, end, 1, errno::ENOSPC),
        (command::WRITE_ZEROES, 1 << 9, 0, 1, errno::EINVAL),
        (command::BLOCK_STATUS, 0, 0, 1, errno::EINVAL),
        (5, 0, 0, 1, errno::EINVAL),
        (99, 0, 0, 0, errno::EINVAL),
        // What the disk says.
        (command::FLUSH, 0, 0, 0, errno::ENOSPC),
    ] {
        peer.request(code, flags, 5, offset, len);
        assert_eq!(peer.simple_reply(), (expected, 5), "command {code}");
    }
    // The data of a refused write is skipped.
    peer.request(command::WRITE, 0, 6, end - 4, 100_000);
    peer.0.write_all(&[9; 100_000]).unwrap();
    assert_eq!(peer.simple_reply(), (errno::ENOSPC, 6));
    peer.request(command::WRITE, 0, 7, 0, 4);
    peer.0.write_all(b"abcd").unwrap();
    assert_eq!(peer.simple_reply(), (0, 7));
    peer.request(command::READ, 0, 8, 0, 4);
    assert_eq!(peer.simple_reply(), (0, 8));
    assert_eq!(peer.read(4), b"abcd");
    // Nobody may send that much, or that.
    for header in [(command::WRITE, 33 << 20, 0_u8), (command::READ, 0, 0xff)] {
        let mut peer = place.connect();
        peer.greet();
        peer.go("disk");
        let mut bytes = RequestHeader {
            flags: 0,
            command: header.0,
            cookie: 1,
            offset_bytes: 0,
            len_bytes: header.1,
        }
        .encode();
        bytes[0] ^= header.2;
        peer.0.write_all(&bytes).unwrap();
        assert_eq!(peer.0.read(&mut [0]).unwrap(), 0);
    }
    place.assert_serving();
}

#[test]
fn structured_answers_are_well_formed() {
    let place = Place::new(false);
    let mut peer = place.connect();
    peer.greet();
    peer.option(option::STRUCTURED_REPLY, &[]);
    assert_eq!(peer.reply().0, reply::ACK);
    peer.go("disk");
    peer.request(command::READ, command::FLAG_DF, 3, 512, 8);
    let head = peer.read(ChunkHeader::BYTES);
    assert_eq!(be32(&head, 0), wire::STRUCTURED_REPLY_MAGIC);
    let head = ChunkHeader::decode(head.first_chunk().unwrap());
    assert_eq!((head.kind, head.flags), (chunk::OFFSET_DATA, 1));
    assert_eq!((head.cookie, head.len_bytes), (3, 16));
    assert_eq!(be64(&peer.read(16), 0), 512);
    peer.request(command::READ, 0, 4, SIZE_BYTES, 8);
    let head = peer.read(ChunkHeader::BYTES);
    let head = ChunkHeader::decode(head.first_chunk().unwrap());
    assert_eq!((head.kind, head.len_bytes), (chunk::ERROR, 6));
    assert_eq!(be32(&peer.read(6), 0), errno::EINVAL);
}

#[test]
fn half_a_request_and_random_bytes_harm_nobody() {
    let place = Place::new(false);
    let mut state = 1_u64;
    for round in 0..40 {
        let mut peer = place.connect();
        peer.greet();
        peer.go("disk");
        if round % 2 == 0 {
            peer.request(command::WRITE, 0, 1, 0, 4096);
            peer.0.write_all(&[7; 100]).unwrap();
        } else {
            let noise: Vec<u8> = (0..500)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            let _ = peer.0.write_all(&noise);
        }
        drop(peer);
        place.await_connections(0);
    }
    place.assert_serving();
    assert_eq!(place.memory.bytes.lock().unwrap()[..100], [0; 100]);
}

#[test]
fn connections_beyond_the_limit_are_turned_away() {
    let place = Place::new(false);
    let mut peers: Vec<_> = (0..4).map(|_| place.connect()).collect();
    place.await_connections(4);
    assert_eq!(place.connect().0.read(&mut [0]).unwrap(), 0);
    peers.pop();
    place.await_connections(3);
    place.assert_serving();
}

/// The newer owner is let in when, and not before, the older one's write is complete; what the
/// older one asks for afterwards is refused.
#[test]
fn newer_owner_comes_after_the_last_write_of_the_older() {
    let place = Place::new(true);
    let mut old = place.connect();
    old.greet();
    assert_eq!(old.go("disk").last().unwrap().0, reply::ERR_POLICY);
    let mut old = place.connect();
    old.greet();
    assert_eq!(old.go("disk@1").last().unwrap().0, reply::ACK);
    let brake = place.memory.brake.lock().unwrap();
    old.request(command::WRITE, 0, 1, 0, 4);
    old.0.write_all(b"late").unwrap();
    let give_up = Instant::now() + DEADLINE;
    while place.memory.writing.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < give_up);
        thread::yield_now();
    }
    let mut new = place.connect();
    new.greet();
    let claim = Claim {
        generation: 2,
        instance: 9,
        epoch: 0,
    };
    new.option(option::CLAIM, &claim.encode());
    assert_eq!(new.reply(), (reply::CLAIMED, vec![3; 16]));
    assert_eq!(new.reply().0, reply::ACK);
    let newcomer = thread::spawn(move || {
        assert_eq!(new.go("disk").last().unwrap().0, reply::ACK);
        new
    });
    // Refused at once, while the newcomer still waits.
    while {
        old.request(command::READ, 0, 2, 0, 1);
        old.simple_reply().0 == 0
    } {
        old.read(1);
        assert!(Instant::now() < give_up);
    }
    assert!(!newcomer.is_finished());
    drop(brake);
    assert_eq!(old.simple_reply(), (0, 1));
    let mut new = newcomer.join().unwrap();
    old.request(command::WRITE, 0, 3, 0, 4);
    old.0.write_all(b"evil").unwrap();
    assert_eq!(old.simple_reply(), (errno::EPERM, 3));
    new.request(command::READ, 0, 1, 0, 4);
    assert_eq!(new.simple_reply(), (0, 1));
    assert_eq!(new.read(4), b"late");
    let mut stale = place.connect();
    stale.greet();
    let replies = stale.go("disk@1");
    assert_eq!(replies[0].0, reply::ERR_POLICY);
    let words = String::from_utf8_lossy(&replies[0].1).into_owned();
    assert!(words.contains("generation 1 is stale"), "{words}");
}
