//! Backends: one that echoes requests, served by this project's own daemon side, and one that
//! follows a script.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost_user::backend::{Device, QueueHandler, Server, Wake};
use vhost_user::ring::{DescChain, Ring, RingError};

/// Writes what it reads. While `hold` is set it takes requests and does not complete them.
pub(super) struct Echo {
    pub(super) features: u64,
    pub(super) hold: AtomicBool,
    pub(super) taken: AtomicU64,
    pub(super) config: Mutex<Vec<u8>>,
}

impl Echo {
    pub(super) fn new() -> Arc<Self> {
        Self::with_features(0)
    }

    pub(super) fn with_features(features: u64) -> Arc<Self> {
        Arc::new(Self {
            features,
            hold: AtomicBool::new(false),
            taken: AtomicU64::new(0),
            config: Mutex::new((0..16).collect()),
        })
    }
}

/// What the server holds; tests keep the other reference.
pub(super) struct EchoDevice(pub(super) Arc<Echo>);

impl Device for EchoDevice {
    fn features(&self) -> u64 {
        self.0.features
    }

    fn num_queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        self.0.config.lock().unwrap().clone()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        self.0.config.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn start_queue(&self, _index: u16, _features: u64) -> io::Result<Box<dyn QueueHandler>> {
        Ok(Box::new(EchoQueue {
            echo: Arc::clone(&self.0),
            held: Vec::new(),
        }))
    }
}

struct EchoQueue {
    echo: Arc<Echo>,
    held: Vec<DescChain>,
}

impl QueueHandler for EchoQueue {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        while let Some(chain) = ring.pop()? {
            self.echo.taken.fetch_add(1, Ordering::SeqCst);
            if self.echo.hold.load(Ordering::SeqCst) {
                self.held.push(chain);
                continue;
            }
            let mut bytes = vec![0; chain.readable_len_bytes() as usize];
            chain.read_at(0, &mut bytes);
            let written = chain.write_at(0, &bytes);
            ring.complete(chain, written as u32);
        }
        Ok(())
    }

    fn drain(&mut self, _ring: &mut Ring, _deadline: Instant) -> usize {
        self.held.len()
    }
}

/// A server whose socket outlives it, as when an agent holds the socket.
pub(super) fn serve(listener: &UnixListener, echo: &Arc<Echo>) -> Server {
    Server::spawn(
        "echo",
        listener.try_clone().unwrap(),
        Arc::new(EchoDevice(Arc::clone(echo))),
    )
    .unwrap()
}

/// Ends a server at once, as a crash would: nothing is drained.
pub(super) fn kill(server: Server) {
    let _ = server.stop(Duration::ZERO);
}

pub(super) fn listen(directory: &Path) -> (UnixListener, std::path::PathBuf) {
    let socket = directory.join("backend.sock");
    (UnixListener::bind(&socket).unwrap(), socket)
}
