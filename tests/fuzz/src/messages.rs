//! A frontend that sends anything with any descriptors: the session ends, and the next one is served.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tempfile::TempDir;
use vhost_user::backend::{self, Device, QueueHandler, Server, Wake};
use vhost_user::driver::GuestMemory;
use vhost_user::eventfd::EventFd;
use vhost_user::ring::{Ring, RingError};

use crate::input::Input;

const NUM_QUEUES: u16 = 2;
const MAX_QUEUE_SIZE: u16 = 64;
const MEMORY_BYTES: u64 = 0x10_0000;
/// One more than a message may bring.
const MAX_FDS: usize = 9;
const PATIENCE: Duration = Duration::from_secs(10);
const VERSION: u32 = 1;
const GET_FEATURES: u32 = 1;
const HEADER_BYTES: usize = 12;

/// Completes whatever it is asked.
struct Yes;

impl Device for Yes {
    fn features(&self) -> u64 {
        1 << 5
    }

    fn num_queues(&self) -> u16 {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn config(&self) -> Vec<u8> {
        b"configuration".to_vec()
    }

    fn start_queue(&self, _index: u16, _features: u64) -> io::Result<Box<dyn QueueHandler>> {
        Ok(Box::new(Yes))
    }
}

impl QueueHandler for Yes {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        while let Some(chain) = ring.pop()? {
            ring.complete(chain, 0);
        }
        Ok(())
    }
}

/// A server that all inputs of this process are sent to, and what they may hand over.
struct Served {
    _dir: TempDir,
    _server: Server,
    socket: PathBuf,
    memory: GuestMemory,
    event: EventFd,
    null: File,
}

impl Served {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("device");
        let listener = backend::bind(&socket).expect("a path that is free");
        let server = Server::spawn("fuzz", listener, Arc::new(Yes)).expect("a thread");
        Self {
            _dir: dir,
            _server: server,
            socket,
            memory: GuestMemory::new(MEMORY_BYTES).expect("memory"),
            event: EventFd::new().expect("an eventfd"),
            null: File::open("/dev/null").expect("every system has one"),
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("the server lives");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        stream
    }

    /// A kind of descriptor for each two bits of `kinds`, so that honest ones are found soon.
    fn fd(&self, kinds: u8, index: usize) -> RawFd {
        match kinds >> (index % 4 * 2) & 3 {
            0 => self.memory.file().as_raw_fd(),
            1 | 2 => self.event.as_raw_fd(),
            _ => self.null.as_raw_fd(),
        }
    }
}

thread_local! {
    static SERVED: Served = Served::start();
}

/// Messages: code, flags, descriptors' kinds, length of the payload, payload. A code with the highest
/// bit set means raw bytes in place of a message.
pub fn run(data: &[u8]) {
    SERVED.with(|served| {
        let stream = served.connect();
        let mut input = Input(data);
        while !input.is_empty() {
            if send(served, &stream, &mut input).is_err() {
                // The server ended the session.
                break;
            }
        }
        assert_ends(&stream);
        assert_serves(served);
    });
}

fn send(served: &Served, stream: &UnixStream, input: &mut Input<'_>) -> nix::Result<usize> {
    let code = input.byte();
    let flags = input.byte();
    let kinds = input.byte();
    let len = usize::from(input.byte());
    let payload = input.bytes(len);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + len);
    if code < 0x80 {
        // The upper half says how many descriptors; the lower half is the protocol's, with the version.
        let declared = payload.len() as u32;
        for word in [u32::from(code), u32::from(flags & 0xf) ^ VERSION, declared] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
    }
    bytes.extend_from_slice(payload);
    let num_fds = usize::from(flags >> 4).min(MAX_FDS);
    let fds: Vec<RawFd> = (0..num_fds).map(|index| served.fd(kinds, index)).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
}

/// After the last message the server hangs up.
fn assert_ends(mut stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let mut replies = [0; 4096];
    loop {
        match stream.read(&mut replies) {
            Ok(0) => return,
            Ok(_) => {}
            // libFuzzer's clock.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the session goes on without a frontend: {error}"),
        }
    }
}

fn assert_serves(served: &Served) {
    let mut stream = served.connect();
    let message: Vec<u8> = [GET_FEATURES, VERSION, 0]
        .iter()
        .flat_map(|word: &u32| word.to_ne_bytes())
        .collect();
    stream.write_all(&message).expect("the server reads");
    let mut reply = [0; HEADER_BYTES + 8];
    stream.read_exact(&mut reply).expect("the server answers");
}
