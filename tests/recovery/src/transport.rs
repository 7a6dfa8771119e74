//! A vhost-user connection that is made again as often as backends come and go, around the
//! third-party crates `vhost` (the protocol's frontend) and `virtio-driver` (the rings).
//!
//! ```text
//!   connect ─ handshake ─ memory ─ in-flight region ─ rings ─▶ served ─ hang-up ─┐
//!      ▲                                                                         │
//!      └──────────────────────── the whole transaction again ◀───────────────────┘
//! ```
//!
//! [`Flaw`] leaves out what a crash-proof frontend must do: with it, verification must fail.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;

/// `VHOST_USER_F_PROTOCOL_FEATURES`
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_RING_PACKED`
pub const F_RING_PACKED: u64 = 1 << 34;
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
/// Between attempts while nobody listens.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// What a frontend may get wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flaw {
    /// Nothing.
    #[default]
    None,
    /// It goes on with what comes, and skips what was in flight.
    NoReplay,
    /// It keeps no in-flight region, so that nobody knows what was in flight.
    NoInflightRegion,
}

/// One ring, as backends are told of it.
#[derive(Debug)]
pub struct RingPlan {
    /// Descriptors.
    pub size: u16,
    /// Addresses of descriptors, driver's and device's area.
    pub desc: usize,
    /// The available ring, or the driver's event suppression.
    pub driver: usize,
    /// The used ring, or the device's event suppression.
    pub device: usize,
    /// Signalled by the driver.
    pub kick: EventFd,
    /// Signalled by the backend.
    pub call: EventFd,
}

/// All that is replayed on a new connection.
#[derive(Debug)]
pub struct Wiring {
    /// Where backends listen.
    pub socket: PathBuf,
    /// Shared with them.
    pub memory: Arc<Memory>,
    /// In the order of their indices.
    pub rings: Vec<RingPlan>,
    /// Virtio features to acknowledge, of those offered.
    pub features: u64,
    /// What to leave out.
    pub flaw: Flaw,
}

/// What the connection's thread tells.
#[derive(Debug, Default)]
pub struct Progress {
    /// Backends whose rings were started.
    pub sessions: AtomicU64,
    /// Connections that were lost, of those that had a ring running: the backend may have answered
    /// requests before all of them were.
    pub hang_ups: AtomicU64,
    /// Attempts that failed, and why the last one did.
    failures: Mutex<(u64, String)>,
    ended: AtomicBool,
}

impl Progress {
    /// Why the last attempt failed; empty if none did.
    pub fn last_failure(&self) -> String {
        self.lock().1.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (u64, String)> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a connection until it is dropped.
#[derive(Debug)]
pub struct Transport {
    wiring: Arc<Wiring>,
    progress: Arc<Progress>,
    /// The connection of now, to be shut down by others.
    open: Arc<Mutex<Option<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Transport {
    /// Starts to connect.
    ///
    /// # Errors
    /// No thread is to be had.
    pub fn start(wiring: Wiring) -> io::Result<Self> {
        let wiring = Arc::new(wiring);
        let progress = Arc::<Progress>::default();
        let open = Arc::<Mutex<Option<UnixStream>>>::default();
        let keeper = Keeper {
            wiring: Arc::clone(&wiring),
            progress: Arc::clone(&progress),
            open: Arc::clone(&open),
            inflight: None,
        };
        let thread = thread::Builder::new()
            .name("transport".to_owned())
            .spawn(move || keeper.run())?;
        Ok(Self {
            wiring,
            progress,
            open,
            thread: Some(thread),
        })
    }

    /// The rings and their events.
    pub fn wiring(&self) -> &Arc<Wiring> {
        &self.wiring
    }

    /// How far it got.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Hangs up, whatever is going on: the `vhost` crate has no deadlines. It connects again.
    pub fn hang_up(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*open {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.progress.ended.store(true, Ordering::SeqCst);
        self.hang_up();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Keeper {
    wiring: Arc<Wiring>,
    progress: Arc<Progress>,
    open: Arc<Mutex<Option<UnixStream>>>,
    inflight: Option<(VhostUserInflight, File)>,
}

/// An attempt failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot connect")]
    Connect(#[from] io::Error),
    #[error("the backend failed at {0}: {1}")]
    Request(&'static str, String),
    #[error("the backend offers no {0}")]
    Missing(&'static str),
}

trait Named<T> {
    fn at(self, request: &'static str) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Debug> Named<T> for Result<T, E> {
    fn at(self, request: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure::Request(request, format!("{error:?}")))
    }
}

impl Keeper {
    fn run(mut self) {
        let mut was_served = false;
        while !self.has_ended() {
            let mut has_served = false;
            let session = self.session(was_served, &mut has_served);
            was_served |= has_served;
            let failure = match session {
                Ok(stream) => {
                    self.progress.sessions.fetch_add(1, Ordering::SeqCst);
                    await_hang_up(&stream);
                    None
                }
                Err(failure) => Some(failure),
            };
            if has_served {
                // In this order: what the driver finds when it is woken now is the old
                // backend's.
                self.progress.hang_ups.fetch_add(1, Ordering::SeqCst);
                self.ring_all_calls();
            }
            if let Some(failure) = failure {
                let mut failures = self.progress.lock();
                failures.0 += 1;
                failures.1 = failure.to_string();
                drop(failures);
                thread::sleep(RETRY_INTERVAL);
            }
            *self.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    fn has_ended(&self) -> bool {
        self.progress.ended.load(Ordering::SeqCst)
    }

    /// One transaction, from the connection to running rings. From the first of them on, the
    /// backend serves, also when the transaction comes to no end.
    fn session(&mut self, was_served: bool, has_served: &mut bool) -> Result<UnixStream, Failure> {
        let stream = UnixStream::connect(&self.wiring.socket)?;
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
        if self.has_ended() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let num_queues = self.wiring.rings.len() as u64;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, num_queues);
        frontend.set_owner().at("SET_OWNER")?;
        let offered = frontend.get_features().at("GET_FEATURES")?;
        let features = (self.wiring.features | F_PROTOCOL_FEATURES) & offered;
        if features & F_PROTOCOL_FEATURES == 0 {
            return Err(Failure::Missing("protocol features"));
        }
        let offered = frontend
            .get_protocol_features()
            .at("GET_PROTOCOL_FEATURES")?;
        frontend
            .set_protocol_features(offered & WANTED)
            .at("SET_PROTOCOL_FEATURES")?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.get_queue_num().at("GET_QUEUE_NUM")?;
        frontend.set_features(features).at("SET_FEATURES")?;
        frontend
            .set_mem_table(&[self.wiring.memory.region()])
            .at("SET_MEM_TABLE")?;
        if self.wiring.flaw != Flaw::NoInflightRegion {
            if !offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
                return Err(Failure::Missing("in-flight tracking"));
            }
            self.share_inflight(&mut frontend)?;
        }
        for index in 0..self.wiring.rings.len() {
            self.start_ring(&mut frontend, index, was_served)?;
        }
        for index in 0..self.wiring.rings.len() {
            *has_served = true;
            frontend
                .set_vring_enable(index, true)
                .at("SET_VRING_ENABLE")?;
        }
        // A kick that the old backend took, and an interrupt that it did not get to.
        self.rings(|ring| &ring.kick);
        self.ring_all_calls();
        Ok(stream)
    }

    fn share_inflight(&mut self, frontend: &mut Frontend) -> Result<(), Failure> {
        let queue_size = self.wiring.rings.iter().map(|ring| ring.size).max();
        let shape = VhostUserInflight {
            mmap_size: 0,
            mmap_offset: 0,
            num_queues: self.wiring.rings.len() as u16,
            queue_size: queue_size.unwrap_or(0),
        };
        if self.wiring.flaw == Flaw::NoReplay {
            // A new region says that nothing is in flight.
            self.inflight = None;
        }
        let (description, file) = match self.inflight.take() {
            Some(kept) => kept,
            None => frontend.get_inflight_fd(&shape).at("GET_INFLIGHT_FD")?,
        };
        let description = VhostUserInflight {
            num_queues: shape.num_queues,
            queue_size: shape.queue_size,
            ..description
        };
        frontend
            .set_inflight_fd(&description, file.as_raw_fd())
            .at("SET_INFLIGHT_FD")?;
        self.inflight = Some((description, file));
        Ok(())
    }

    fn start_ring(
        &self,
        frontend: &mut Frontend,
        index: usize,
        was_served: bool,
    ) -> Result<(), Failure> {
        let ring = &self.wiring.rings[index];
        let base = self.base_of(ring, was_served);
        frontend
            .set_vring_num(index, ring.size)
            .at("SET_VRING_NUM")?;
        frontend.set_vring_base(index, base).at("SET_VRING_BASE")?;
        let areas = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: ring.desc as u64,
            used_ring_addr: ring.device as u64,
            avail_ring_addr: ring.driver as u64,
            log_addr: None,
        };
        frontend
            .set_vring_addr(index, &areas)
            .at("SET_VRING_ADDR")?;
        frontend
            .set_vring_call(index, &ring.call)
            .at("SET_VRING_CALL")?;
        frontend
            .set_vring_kick(index, &ring.kick)
            .at("SET_VRING_KICK")
    }

    /// Where a ring goes on. A packed one says so in its in-flight region alone.
    fn base_of(&self, ring: &RingPlan, was_served: bool) -> u16 {
        const INDEX_OFFSET: usize = 2;
        if self.wiring.features & F_RING_PACKED != 0 {
            return 1 << 15;
        }
        match self.wiring.flaw {
            Flaw::NoReplay if was_served => self.wiring.memory.load_u16(ring.driver + INDEX_OFFSET),
            _ => self.wiring.memory.load_u16(ring.device + INDEX_OFFSET),
        }
    }

    fn ring_all_calls(&self) {
        self.rings(|ring| &ring.call);
    }

    fn rings(&self, event: impl Fn(&RingPlan) -> &EventFd) {
        for ring in &self.wiring.rings {
            // Only a full counter fails, and then it is readable.
            let _ = event(ring).write(1);
        }
    }
}

fn await_hang_up(stream: &UnixStream) {
    let mut polls = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    // Whoever ends the transport shuts the connection down.
    while matches!(
        poll(&mut polls, PollTimeout::NONE),
        Err(nix::errno::Errno::EINTR)
    ) {}
}

/// Waits for a condition, in milliseconds' steps.
///
/// # Errors
/// It does not hold within `patience`.
pub fn await_true(patience: Duration, mut holds: impl FnMut() -> bool) -> Result<(), TooLate> {
    let give_up = Instant::now() + patience;
    while !holds() {
        if Instant::now() >= give_up {
            return Err(TooLate(patience));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// It did not happen in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not within {0:?}")]
pub struct TooLate(pub Duration);
