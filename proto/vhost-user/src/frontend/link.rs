//! One device's connection, kept for ever by a thread of its own.
//!
//! ```text
//!               connected, handshake done          activation wanted, not paused
//!   Absent ───────────────────────────────▶ Idle ─────────────────────────────▶ Running
//!     ▲ ▲                                    │ ▲                                   │
//!     │ └───────── hang-up, time-out ────────┘ └── rings stopped (reset, pause) ───┤
//!     └─────────────────────────── hang-up, time-out ──────────────────────────────┘
//! ```
//!
//! Everybody else states what is *wanted* ([`Link::activate`], [`Link::deactivate`],
//! [`Link::pause`] ...) and returns at once or within a bound; the thread brings the backend
//! there, as often as backends come and go.

mod keeper;
mod outage;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use faults::{DeviceFaults, Wake};
use nix::sys::eventfd::{EfdFlags, EventFd as WakeFd};

use self::keeper::Keeper;
pub use self::outage::Outage;
use self::outage::OutageLog;
use super::connection::{ConnectError, Connection, HangUp};
use super::memory::MemoryTable;
use super::progress::{QueueProgress, Watched};
use super::session::{self, Activation, Offer, QueueEvents, SessionError};

/// Writes to configuration space that wait for a backend. Drivers write a field now and then, so
/// more than this means that the guest floods.
const CONFIG_WRITES_LIMIT: usize = 64;
/// First and longest pause between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How long a backend may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// To answer the first request. A listener that outlives its daemon accepts connections
    /// into its backlog, so this includes a daemon's restart.
    pub first_reply: Duration,
    /// To answer any other request.
    pub request: Duration,
    /// To answer GET_VRING_BASE, which may drain what is in flight.
    pub stop: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            first_reply: Duration::from_secs(10),
            request: Duration::from_secs(5),
            stop: Duration::from_secs(30),
        }
    }
}

/// How to reach a backend and what to ask it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Where it listens.
    pub socket: PathBuf,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// Bytes of device configuration space to read.
    pub config_len: u16,
}

/// A backend that was claimed and whose offer is known.
pub struct Connected {
    connection: Connection,
    /// What it offers.
    pub offer: Offer,
    since: Instant,
    told_memory: bool,
    rings_started: bool,
}

/// What the link's thread tells; called without any lock of the link's held.
pub trait Events: Send + Sync {
    /// The rings that [`Link::deactivate`] was to stop stand still.
    fn stopped(&self);
    /// The device configuration space was read as `config`. To be ignored if not `is_current`:
    /// the driver has written since, and what comes of that is read afterwards. To be asked under
    /// the lock under which [`Link::write_config`] is called.
    fn config_read(&self, config: &[u8], is_current: &dyn Fn() -> bool);
    /// The backend found a ring broken.
    fn ring_broken(&self);
}

/// What of this process the backend shares. Kept for all incarnations.
pub struct Wiring {
    /// Guest memory.
    pub memory: Arc<MemoryTable>,
    /// By queue index.
    pub queues: Vec<QueueEvents>,
    /// Who is told.
    pub events: Arc<dyn Events>,
}

/// How the link is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkHealth {
    /// A backend is connected and has been told all it needs.
    pub connected: bool,
    /// Backends that completed the handshake since the start.
    pub incarnations: u64,
    /// The last failure, empty if there was none.
    pub last_error: String,
    /// Requests in flight survive a crash of the backend.
    pub inflight_tracking: bool,
    /// A backend is there and is being told what the last one knew.
    pub replaying: bool,
    /// Since when nobody serves; `None` while somebody does.
    pub stalled_since: Option<SystemTime>,
    /// Losses of a backend since the start.
    pub outages_total: u64,
    /// Of the last outage that is over, until the first completion after it.
    pub last_recovery: Option<Duration>,
    /// Requests in flight when the last outage began.
    pub last_outage_in_flight: u32,
}

/// No backend could be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Somebody does, but the handshake failed.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Endpoint {
    /// Tries to connect for `patience` at most.
    ///
    /// # Errors
    /// What went wrong last.
    pub fn connect_within(&self, patience: Duration) -> Result<Connected, LinkError> {
        let deadline = Instant::now() + patience;
        let mut backoff = BACKOFF.0;
        loop {
            let mut endpoint = self.clone();
            let left = deadline
                .saturating_duration_since(Instant::now())
                .max(BACKOFF.0);
            endpoint.timeouts.first_reply = left;
            endpoint.timeouts.request = self.timeouts.request.min(left);
            match endpoint.connect(&DeviceFaults::none(), |_| {}) {
                Ok(mut connected) => {
                    connected.connection.set_timeout(self.timeouts.request);
                    return Ok(connected);
                }
                Err(error) if Instant::now() + backoff >= deadline => return Err(error),
                Err(_) => thread::sleep(backoff),
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    /// Connects and shakes hands; `opened` gets the means to interrupt that.
    fn connect(
        &self,
        faults: &Arc<DeviceFaults>,
        opened: impl FnOnce(HangUp),
    ) -> Result<Connected, LinkError> {
        let mut connection = Connection::connect(&self.socket, self.timeouts.request)?;
        connection.use_faults(faults);
        opened(connection.hang_up_handle());
        connection.set_timeout(self.timeouts.first_reply);
        let offer = session::handshake(&mut connection, self.config_len)?;
        connection.set_timeout(self.timeouts.request);
        Ok(Connected {
            connection,
            offer,
            since: Instant::now(),
            told_memory: false,
            rings_started: false,
        })
    }
}

/// Handle to the thread that keeps one device's connection. Dropping it ends both.
pub struct Link {
    shared: Arc<Shared>,
    memory: Arc<MemoryTable>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    wake: WakeFd,
}

/// What is wanted, and what is.
#[derive(Default)]
struct Control {
    activation: Option<Activation>,
    /// Counts activations, so that the thread sees one end and another begin.
    activation_id: u64,
    paused: bool,
    config_writes: VecDeque<(u32, Vec<u8>)>,
    /// What the driver's writes made of the configuration space: the last one of each place.
    /// The next backend hears them again.
    config_written: Vec<(u32, Vec<u8>)>,
    refresh_config: bool,
    shutdown: bool,
    /// The rings of the activation with this number are, or may be, served.
    running: Option<u64>,
    health: LinkHealth,
    outages: OutageLog,
    /// The rings that were started last for the present driver.
    watched: Option<Watched>,
    hang_up: Option<HangUp>,
}

impl Control {
    /// A backend took a write of the driver's.
    fn keep_config_write(&mut self, offset: u32, bytes: Vec<u8>) {
        let place = |(at, old): &(u32, Vec<u8>)| (*at, old.len()) == (offset, bytes.len());
        self.config_written.retain(|written| !place(written));
        if self.config_written.len() < CONFIG_WRITES_LIMIT {
            self.config_written.push((offset, bytes));
        }
    }

    /// A new backend knows nothing of what the driver wrote.
    fn repeat_config_writes(&mut self) {
        for write in self.config_written.drain(..).rev() {
            self.config_writes.push_front(write);
        }
    }
}

impl Link {
    /// Starts the thread on a first connection.
    ///
    /// # Errors
    /// No descriptor or no thread is left.
    pub fn spawn(
        name: &str,
        endpoint: Endpoint,
        first: Connected,
        wiring: Wiring,
    ) -> io::Result<Self> {
        Self::spawn_faulty(name, endpoint, first, wiring, DeviceFaults::none())
    }

    /// As [`Link::spawn`]; what goes wrong on purpose is decided by `faults`.
    ///
    /// # Errors
    /// As [`Link::spawn`].
    pub fn spawn_faulty(
        name: &str,
        endpoint: Endpoint,
        first: Connected,
        wiring: Wiring,
        faults: Arc<DeviceFaults>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            control: Mutex::default(),
            changed: Condvar::new(),
            wake: WakeFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let memory = Arc::clone(&wiring.memory);
        let waker: Arc<dyn Wake> = Arc::clone(&shared) as _;
        faults.add_waker(&waker);
        let keeper = Keeper::new(Arc::clone(&shared), endpoint, first, wiring, faults)?;
        let thread = thread::Builder::new()
            .name(format!("vu-{name}"))
            .spawn(move || keeper.run())?;
        Ok(Self {
            shared,
            memory,
            thread: Some(thread),
        })
    }

    /// The driver set DRIVER_OK: the rings are started as soon as there is a backend.
    pub fn activate(&self, activation: Activation) {
        let mut control = self.shared.lock();
        control.activation = Some(activation);
        control.activation_id += 1;
        drop(control);
        self.shared.wake();
    }

    /// The driver reset the device. Whether the rings stand still already; if not,
    /// [`Events::stopped`] tells when they do.
    #[must_use]
    pub fn deactivate(&self) -> bool {
        let mut control = self.shared.lock();
        control.activation = None;
        control.config_written.clear();
        let stopped = control.running.is_none();
        drop(control);
        self.shared.wake();
        stopped
    }

    /// Waits until the rings stand still; a backend that takes longer than `patience` is
    /// disconnected, which ends its hold on the rings as well.
    pub fn wait_stopped(&self, patience: Duration) {
        let control = self.shared.lock();
        let (control, timed_out) = self
            .shared
            .changed
            .wait_timeout_while(control, patience, |control| control.running.is_some())
            .expect("no code that holds this lock can panic");
        if !timed_out.timed_out() {
            return;
        }
        if let Some(hang_up) = &control.hang_up {
            hang_up.hang_up();
        }
        // The thread's request fails at once now; the bound is for a host that is out of CPU.
        let waited = self
            .shared
            .changed
            .wait_timeout_while(control, patience, |control| control.running.is_some());
        drop(waited.expect("no code that holds this lock can panic"));
    }

    /// Stops the rings (within `patience`, see [`Link::wait_stopped`]) and keeps them stopped.
    pub fn pause(&self, patience: Duration) {
        self.shared.lock().paused = true;
        self.shared.wake();
        self.wait_stopped(patience);
    }

    /// Lets the rings go on.
    pub fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.wake();
    }

    /// Passes on what the driver wrote to configuration space. Whether there was room.
    #[must_use]
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> bool {
        let mut control = self.shared.lock();
        let has_room = control.config_writes.len() < CONFIG_WRITES_LIMIT;
        if has_room {
            control.config_writes.push_back((offset, bytes.to_owned()));
        }
        drop(control);
        self.shared.wake();
        has_room
    }

    /// Reads the configuration space again: somebody says that it changed.
    pub fn refresh_config(&self) {
        self.shared.lock().refresh_config = true;
        self.shared.wake();
    }

    /// How the link is.
    #[must_use]
    pub fn health(&self) -> LinkHealth {
        let control = self.shared.lock();
        let newest = control.outages.newest(1);
        LinkHealth {
            stalled_since: control.outages.stalled_since(),
            outages_total: control.outages.total(),
            last_recovery: control.outages.last_recovery(),
            last_outage_in_flight: newest.first().map_or(0, |outage| outage.in_flight),
            ..control.health.clone()
        }
    }

    /// How far the rings are. Never waits for the backend.
    #[must_use]
    pub fn progress(&self) -> Vec<QueueProgress> {
        let watched = self.shared.lock().watched.clone();
        watched.map_or_else(Vec::new, |watched| watched.progress(&self.memory))
    }

    /// The newest `count` outages, oldest first; 256 are kept.
    #[must_use]
    pub fn outages(&self, count: usize) -> Vec<Outage> {
        self.shared.lock().outages.newest(count)
    }

    /// What would be replayed to the next backend; exact while paused.
    #[must_use]
    pub fn activation(&self) -> Option<Activation> {
        self.shared.lock().activation.clone()
    }
}

#[cfg(test)]
impl Link {
    /// Drops the link; how it was last.
    pub(super) fn last_health(self) -> LinkHealth {
        let shared = Arc::clone(&self.shared);
        drop(self);
        shared.lock().health.clone()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut control = self.shared.lock();
        control.shutdown = true;
        if let Some(hang_up) = &control.hang_up {
            hang_up.hang_up();
        }
        drop(control);
        self.shared.wake();
        // The handle may be dropped on the thread itself, by way of `Events`.
        if let Some(thread) = self
            .thread
            .take()
            .filter(|thread| thread.thread().id() != thread::current().id())
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control
            .lock()
            .expect("no code that holds this lock can panic")
    }

    fn wake(&self) {
        // Only a counter that is full fails, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

/// Rules changed: the thread looks whether it still has to wait.
impl Wake for Shared {
    fn wake(&self) {
        Shared::wake(self);
    }
}
