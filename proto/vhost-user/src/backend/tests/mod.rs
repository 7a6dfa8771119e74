//! Sessions over real sockets: an echo device served to honest and hostile frontends.

mod config_change;
mod fuzz;
mod groups;
mod hostile;
mod looks;
mod peers;
mod sessions;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::ring::DescChain;

const NUM_QUEUES: u16 = 2;
const MAX_QUEUE_SIZE: u16 = 64;
const CONFIG: &[u8] = b"configuration";

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::yield_now();
    }
}

/// Copies what it reads to what it may write, and remembers the order.
#[derive(Debug, Default)]
struct EchoDevice {
    /// Requests are taken but not completed.
    holds: AtomicBool,
    /// Held by a test: threads that take requests are stuck.
    stuck: Mutex<()>,
    /// The next `start_queue` fails.
    refuses_to_start: AtomicBool,
    resets: AtomicU32,
    queues_started: AtomicU32,
    /// First byte of each request, in the order taken, over all sessions.
    taken: Mutex<Vec<u8>>,
    /// The ring that others fill, once it has started.
    shared: Mutex<Option<Arc<SharedRing>>>,
}

impl EchoDevice {
    fn taken(&self) -> Vec<u8> {
        self.taken.lock().unwrap().clone()
    }
}

impl Device for EchoHandle {
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
        CONFIG.to_vec()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        match (offset, data) {
            (0, b"allowed") => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
        }
    }

    fn start_queue(&self, _index: u16, _features: u64) -> io::Result<Box<dyn QueueHandler>> {
        if self.0.refuses_to_start.load(Ordering::SeqCst) {
            return Err(io::Error::other("not today"));
        }
        self.0.queues_started.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(EchoQueue {
            device: Arc::clone(&self.0),
            held: VecDeque::new(),
        }))
    }

    fn group(&self) -> Option<Seat> {
        self.1.clone()
    }

    fn shares_ring(&self, index: u16, _features: u64) -> bool {
        self.2.contains(&index)
    }

    fn start_shared_queue(&self, ring: &Arc<SharedRing>) -> io::Result<Box<dyn QueueHandler>> {
        *self.0.shared.lock().unwrap() = Some(Arc::clone(ring));
        Ok(Box::new(LeftToOthers))
    }

    fn reset(&self) {
        self.0.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// The device, where its rings are served, and which of them others fill.
struct EchoHandle(Arc<EchoDevice>, Option<Seat>, Vec<u16>);

struct LeftToOthers;

impl QueueHandler for LeftToOthers {
    fn takes_kicks(&self) -> bool {
        false
    }

    fn process(&mut self, _ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        Ok(())
    }
}

struct EchoQueue {
    device: Arc<EchoDevice>,
    held: VecDeque<DescChain>,
}

impl EchoQueue {
    fn echo(ring: &mut Ring, chain: DescChain) {
        let mut data = vec![0; chain.readable_len_bytes() as usize];
        chain.read_at(0, &mut data);
        let written = chain.write_at(0, &data);
        ring.complete(chain, written as u32);
    }
}

impl QueueHandler for EchoQueue {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        while let Some(chain) = ring.pop()? {
            let mut first = [0];
            chain.read_at(0, &mut first);
            self.device.taken.lock().unwrap().push(first[0]);
            drop(self.device.stuck.lock().unwrap());
            self.held.push_back(chain);
        }
        if !self.device.holds.load(Ordering::SeqCst) {
            self.held
                .drain(..)
                .for_each(|chain| EchoQueue::echo(ring, chain));
        }
        Ok(())
    }

    fn drain(&mut self, ring: &mut Ring, deadline: Instant) -> usize {
        while self.device.holds.load(Ordering::SeqCst) && Instant::now() < deadline {
            if self.held.is_empty() {
                return 0;
            }
            thread::yield_now();
        }
        if !self.device.holds.load(Ordering::SeqCst) {
            self.held
                .drain(..)
                .for_each(|chain| EchoQueue::echo(ring, chain));
        }
        self.held.len()
    }
}

/// The echo device behind a socket.
struct Served {
    device: Arc<EchoDevice>,
    server: Option<Server>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new() -> Served {
        Served::on(None, &[])
    }

    fn on(seat: Option<Seat>, shared: &[u16]) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("echo.sock");
        let device = Arc::new(EchoDevice::default());
        let handle: Arc<dyn Device> =
            Arc::new(EchoHandle(Arc::clone(&device), seat, shared.to_vec()));
        let server = Server::spawn("echo", bind(&path).unwrap(), handle).unwrap();
        Served {
            device,
            server: Some(server),
            path,
            _dir: dir,
        }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn status(&self) -> Status {
        self.server.as_ref().unwrap().status()
    }

    #[track_caller]
    fn stop(&mut self) {
        self.server.take().unwrap().stop(PATIENCE).unwrap();
    }

    /// The next frontend is accepted and its requests are served.
    #[track_caller]
    fn assert_serves(&self) {
        let mut honest = peers::Honest::connect(self);
        honest.set_up();
        honest.start(0);
        honest.assert_echo(0, b"after all that");
    }
}
