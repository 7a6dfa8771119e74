//! A remote disk: many requests under way, over connections that come and go.
//!
//! ```text
//!             connect()            start()
//!   Dial ──► Connected ──────────► Client ──submit──► Inbox ──► link (one thread a connection)
//!                                    │
//!                                    └─ supervisor (one thread): session after session
//!
//!   session: Connecting ─► Serving ─► connection lost ─► Connecting ─► ...   (for ever)
//!                  └─ refused by generation ─► Failed: every request answers EIO
//! ```
//!
//! # What is promised
//! - A request is answered once. When a connection is lost its requests are sent again over the
//!   next one, before anything that was asked for later by whoever waits for them.
//! - The server may carry out a write twice, but not after a later write to the same place: a
//!   session begins when the connections of the one before are answered in full or gone with
//!   their server, or when a server that orders sessions ([`crate::Generation`]) has fenced
//!   them. Of a server that does not, one thing is assumed: when the kernel gives a connection
//!   up for want of acknowledgements (25 s), the server does not act on it later.
//! - A write that was answered has reached the server's page cache: it outlives the server's
//!   process. It outlives the server's host from the next answered flush on, or at once with
//!   [`Options::every_write_durable`]. Should the host lose answered writes, flushes fail from
//!   then on if the server is ours; of others this cannot be known, so use that option when the
//!   server's host may restart under a running guest.
//! - Size, block sizes and writability stay: a server that comes back with less is not used, and
//!   asked again until it has what it had.

mod handshake;
mod ledger;
mod link;
mod request;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use handshake::{Established, Export, Wanted, is_export_name, shake_hands};
use ledger::Ledger;
use link::Outcome;
use request::Awaited;

pub use handshake::HandshakeError;
pub use request::{Command, Request};

use crate::Generation;
use crate::inbox::Inbox;
use crate::tls::TlsClient;
use crate::wire::{BootId, Claim, transmission};

/// Connections of one session.
pub const MAX_CONNECTIONS: usize = 16;
/// First pause before connecting again, doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// What one request carries at most, whatever the server takes: it is one piece of a buffer.
const MAX_PAYLOAD_BYTES: u32 = 4 << 20;

/// Where connections come from. A confined process asks another one.
pub trait Dial: Send {
    /// A fresh connection to the server.
    ///
    /// # Errors
    /// Not this time.
    fn dial(&mut self, deadline: Instant) -> io::Result<OwnedFd>;
}

/// How a disk is to be used.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the export; may be empty for a server's only one.
    pub export: String,
    /// Presented to the server, which refuses stale owners. None: whoever else writes is the
    /// user's affair.
    pub generation: Option<Generation>,
    /// Encrypts; the server is verified.
    pub tls: Option<TlsClient>,
    /// Nothing will be written.
    pub read_only: bool,
    /// Opened if the server lets several connections see each other's writes.
    pub connections: usize,
    /// Each write is on stable storage before it is answered.
    pub every_write_durable: bool,
    /// For one connection, until it takes requests.
    pub handshake_timeout: Duration,
    /// How long a server may owe answers without a word.
    pub stall_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: String::new(),
            generation: None,
            tls: None,
            read_only: false,
            connections: 1,
            every_write_durable: false,
            handshake_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Asked for in vain.
    #[error("NBD: {0}")]
    Options(&'static str),
    /// No connection.
    #[error("NBD: cannot connect")]
    Dial(#[source] io::Error),
    /// A connection, but no use.
    #[error("NBD")]
    Handshake(#[source] HandshakeError),
    /// The export can only be read.
    #[error("NBD: the server exports the disk for reading only; attach it read-only")]
    ReadOnly,
    /// No write could be made durable one by one.
    #[error("NBD: the server has no FUA, so that single writes cannot be made durable")]
    NoFua,
    /// Came back different.
    #[error(
        "NBD: the disk had {was_bytes} bytes and now has {is_bytes}; restore the export to its size"
    )]
    Shrunk {
        /// Before.
        was_bytes: u64,
        /// Now.
        is_bytes: u64,
    },
    /// Came back different.
    #[error("NBD: the server no longer offers what it did: {0}")]
    Changed(&'static str),
    /// No threads or descriptors left.
    #[error("NBD: cannot start")]
    Resources(#[source] io::Error),
}

impl ConnectError {
    /// No later attempt can succeed: the disk belongs to somebody else.
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Handshake(HandshakeError::Refused { .. } | HandshakeError::NoClaims)
        )
    }

    /// With its causes, for people.
    pub fn describe(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

/// How a client is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Requests are served.
    Serving,
    /// The server owes answers and is silent.
    Stalled,
    /// Requests wait.
    Reconnecting {
        /// Of the last attempt, or how the connection was lost.
        reason: String,
    },
    /// Requests fail.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A snapshot for people and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Now.
    pub state: State,
    /// Sessions lost so far.
    pub reconnects: u64,
    /// Connections of the session.
    pub connections: usize,
    /// Every byte is encrypted.
    pub is_encrypted: bool,
}

/// A session that stands; no thread has been started.
#[derive(Debug)]
pub struct Connected {
    session: Session,
    owner: Owner,
}

/// Who connects, and as what.
struct Owner {
    dialer: Box<dyn Dial>,
    options: Options,
    instance: u128,
    epoch: u64,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner")
            .field("options", &self.options)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Session {
    links: Vec<Established>,
    export: Export,
    boot_id: Option<BootId>,
}

/// Connects for the first time, on the calling thread.
///
/// # Errors
/// See [`ConnectError`]; nothing is tried again.
pub fn connect(dialer: Box<dyn Dial>, options: Options) -> Result<Connected, ConnectError> {
    if !is_export_name(&options.export) {
        return Err(ConnectError::Options(
            "an export's name has at most 4096 bytes, none of them 0",
        ));
    }
    if !(1..=MAX_CONNECTIONS).contains(&options.connections) {
        return Err(ConnectError::Options("1 to 16 connections are possible"));
    }
    let mut owner = Owner {
        dialer,
        options,
        instance: u128::from_ne_bytes(random_bytes()),
        epoch: 0,
    };
    let session = owner.open_session()?;
    Ok(Connected { session, owner })
}

impl Owner {
    fn open_session(&mut self) -> Result<Session, ConnectError> {
        let first = self.open_link()?;
        let (export, boot_id) = (first.export, first.boot_id);
        let has = |flag| export.flags & flag != 0;
        if has(transmission::READ_ONLY) && !self.options.read_only {
            return Err(ConnectError::ReadOnly);
        }
        if self.options.every_write_durable
            && !self.options.read_only
            && !has(transmission::SEND_FUA)
        {
            return Err(ConnectError::NoFua);
        }
        let mut links = vec![first];
        if has(transmission::CAN_MULTI_CONN) {
            while links.len() < self.options.connections {
                match self.open_link() {
                    Ok(link) if link.export == export => links.push(link),
                    Ok(_) => return Err(ConnectError::Changed("one disk on all connections")),
                    // A server may limit them; one is enough.
                    Err(error) => {
                        tracing::debug!("no further connection: {}", error.describe());
                        break;
                    }
                }
            }
        }
        Ok(Session {
            links,
            export,
            boot_id,
        })
    }

    fn open_link(&mut self) -> Result<Established, ConnectError> {
        let deadline = Instant::now() + self.options.handshake_timeout;
        let socket = self.dialer.dial(deadline).map_err(ConnectError::Dial)?;
        let wanted = Wanted {
            export: &self.options.export,
            tls: self.options.tls.as_ref(),
            claim: self.options.generation.map(|Generation(generation)| Claim {
                generation,
                instance: self.instance,
                epoch: self.epoch,
            }),
        };
        shake_hands(socket, &wanted, deadline).map_err(ConnectError::Handshake)
    }
}

impl Connected {
    /// See [`Client::size_bytes`].
    pub fn size_bytes(&self) -> u64 {
        self.session.export.size_bytes
    }

    /// See [`Client::min_block_bytes`].
    pub fn min_block_bytes(&self) -> u32 {
        self.session.export.min_block_bytes
    }

    /// Starts the threads; `name` is theirs.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(self, name: &str) -> Result<Client, ConnectError> {
        let Self { session, owner } = self;
        let inboxes = (0..owner.options.connections)
            .map(|_| Inbox::new())
            .collect::<io::Result<Vec<_>>>()
            .map_err(ConnectError::Resources)?;
        let shared = Arc::new(Shared {
            inboxes,
            active_inboxes: AtomicUsize::new(session.links.len()),
            next_inbox: AtomicUsize::new(0),
            ledger: Ledger::default(),
            size_bytes: AtomicU64::new(session.export.size_bytes),
            export: session.export,
            options: owner.options.clone(),
            stop_session: AtomicBool::new(false),
            is_closing: AtomicBool::new(false),
            is_failed: AtomicBool::new(false),
            is_stalled: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            situation: Mutex::new(Situation::Serving {
                connections: session.links.len(),
            }),
            closing: Condvar::new(),
        });
        let supervisor = Supervisor {
            shared: Arc::clone(&shared),
            owner,
            boot_id: session.boot_id,
            name: name.to_owned(),
        };
        std::thread::Builder::new()
            .name(thread_name(name))
            .spawn(move || supervisor.run(session))
            .map_err(ConnectError::Resources)?;
        Ok(Client { shared })
    }
}

/// Of the kernel. (The usual crates open a file where libc is linked statically, and this process
/// may open none.)
fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: `bytes` is N bytes to write to.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Cannot fail for so few bytes, as getrandom(2) says.
    assert_eq!(got, N as isize, "getrandom: {}", io::Error::last_os_error());
    bytes
}

/// The kernel keeps 15 bytes.
fn thread_name(name: &str) -> String {
    format!("nbd-{name}").chars().take(15).collect()
}

/// A remote disk. Dropping it ends the session; what is under way then answers ESHUTDOWN.
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    /// One for each connection there may be.
    inboxes: Vec<Inbox<Box<dyn Request>>>,
    /// How many of them have a connection in this session.
    active_inboxes: AtomicUsize,
    next_inbox: AtomicUsize,
    ledger: Ledger,
    size_bytes: AtomicU64,
    /// As it was at first.
    export: Export,
    options: Options,
    /// The links of the session are to end.
    stop_session: AtomicBool,
    is_closing: AtomicBool,
    /// Nothing will be served any more.
    is_failed: AtomicBool,
    is_stalled: AtomicBool,
    reconnects: AtomicU64,
    situation: Mutex<Situation>,
    /// Ends pauses, with `situation`.
    closing: Condvar,
}

enum Situation {
    Serving { connections: usize },
    Reconnecting { reason: String },
    Failed { reason: String },
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("export", &self.shared.export)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Hands a request over. Waits for nobody; [`Request::complete`] is called on another thread,
    /// or on this one if the client has failed or the request exceeds the disk's limits.
    pub fn submit(&self, request: Box<dyn Request>) {
        if let Err(errno) = self.check(&request.command()) {
            return request.complete(Err(errno));
        }
        let shared = &*self.shared;
        let active = shared.active_inboxes.load(Ordering::Acquire).max(1);
        let index = shared.next_inbox.fetch_add(1, Ordering::Relaxed) % active;
        shared.inboxes[index].push(request);
        // Whoever set it emptied the inboxes, perhaps before this one came.
        if shared.is_failed.load(Ordering::SeqCst) {
            shared.fail_waiting(libc::EIO);
        }
    }

    /// Reads, waiting.
    ///
    /// # Errors
    /// As [`Request::complete`].
    pub fn read_at(&self, offset_bytes: u64, len_bytes: u32) -> Result<Vec<u8>, i32> {
        let command = Command::Read {
            offset_bytes,
            len_bytes,
        };
        self.call(command, vec![0; len_bytes as usize])
    }

    /// Writes, waiting.
    ///
    /// # Errors
    /// As [`Request::complete`].
    pub fn write_at(&self, offset_bytes: u64, data: Vec<u8>) -> Result<(), i32> {
        let len_bytes = u32::try_from(data.len()).map_err(|_| libc::EINVAL)?;
        let command = Command::Write {
            offset_bytes,
            len_bytes,
            fua: false,
        };
        self.call(command, data).map(drop)
    }

    /// Does what carries no data, waiting.
    ///
    /// # Errors
    /// As [`Request::complete`]; EINVAL for a command that carries data.
    pub fn perform(&self, command: Command) -> Result<(), i32> {
        if matches!(command, Command::Read { .. } | Command::Write { .. }) {
            return Err(libc::EINVAL);
        }
        self.call(command, Vec::new()).map(drop)
    }

    fn call(&self, command: Command, data: Vec<u8>) -> Result<Vec<u8>, i32> {
        let (done, answer) = mpsc::sync_channel(1);
        self.submit(Box::new(Awaited {
            command,
            data,
            done,
        }));
        answer.recv().unwrap_or(Err(libc::EIO))
    }

    /// Size of the export. Grows when a session finds it grown, and never shrinks.
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes.load(Ordering::Acquire)
    }

    /// Offsets and lengths must be multiples of this power of two.
    pub fn min_block_bytes(&self) -> u32 {
        self.shared.export.min_block_bytes
    }

    /// What the server likes best.
    pub fn preferred_block_bytes(&self) -> u32 {
        self.shared.export.preferred_block_bytes
    }

    /// What one read or write may carry.
    pub fn max_payload_bytes(&self) -> u32 {
        let whole_blocks = u32::MAX - (self.min_block_bytes() - 1);
        self.shared.export.max_payload_bytes.min(MAX_PAYLOAD_BYTES) & whole_blocks
    }

    /// Whether [`Command::Trim`] is more than a word.
    pub fn can_trim(&self) -> bool {
        self.shared.has(transmission::SEND_TRIM)
    }

    /// Whether [`Command::WriteZeroes`] is possible.
    pub fn can_write_zeroes(&self) -> bool {
        self.shared.has(transmission::SEND_WRITE_ZEROES)
    }

    /// Whether a single write can be made durable.
    pub fn has_fua(&self) -> bool {
        self.shared.has(transmission::SEND_FUA)
    }

    /// How it is doing.
    pub fn status(&self) -> Status {
        let shared = &*self.shared;
        let (state, connections) = match &*shared.lock() {
            Situation::Serving { connections } if shared.is_stalled.load(Ordering::Relaxed) => {
                (State::Stalled, *connections)
            }
            Situation::Serving { connections } => (State::Serving, *connections),
            Situation::Reconnecting { reason } => {
                let reason = reason.clone();
                (State::Reconnecting { reason }, 0)
            }
            Situation::Failed { reason } => {
                let reason = reason.clone();
                (State::Failed { reason }, 0)
            }
        };
        Status {
            state,
            reconnects: shared.reconnects.load(Ordering::Relaxed),
            connections,
            is_encrypted: shared.options.tls.is_some(),
        }
    }

    fn check(&self, command: &Command) -> Result<(), i32> {
        let shared = &*self.shared;
        if shared.is_failed.load(Ordering::Acquire) {
            return Err(libc::EIO);
        }
        if command.writes() && shared.options.read_only {
            return Err(libc::EROFS);
        }
        let Some((offset_bytes, len_bytes)) = command.range() else {
            return Ok(());
        };
        let block_mask = u64::from(self.min_block_bytes() - 1);
        let is_inside = offset_bytes
            .checked_add(u64::from(len_bytes))
            .is_some_and(|end| end <= self.size_bytes());
        let is_aligned = (offset_bytes | u64::from(len_bytes)) & block_mask == 0;
        if !is_inside || !is_aligned || len_bytes == 0 {
            return Err(libc::EINVAL);
        }
        match command {
            Command::Read { .. } | Command::Write { .. }
                if len_bytes > self.max_payload_bytes() =>
            {
                Err(libc::EINVAL)
            }
            Command::WriteZeroes { .. } if !self.can_write_zeroes() => Err(libc::EOPNOTSUPP),
            _ => Ok(()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let situation = self.shared.lock();
        self.shared.is_closing.store(true, Ordering::SeqCst);
        self.shared.stop_session.store(true, Ordering::SeqCst);
        self.shared.closing.notify_all();
        drop(situation);
        for inbox in &self.shared.inboxes {
            inbox.wake();
        }
    }
}

impl Shared {
    fn has(&self, flag: u16) -> bool {
        self.export.flags & flag != 0
    }

    fn lock(&self) -> MutexGuard<'_, Situation> {
        self.situation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Acquire)
    }

    /// False when the client is closed instead.
    fn pause(&self, duration: Duration) -> bool {
        let situation = self.lock();
        let waited = self
            .closing
            .wait_timeout_while(situation, duration, |_| !self.is_closing());
        drop(waited);
        !self.is_closing()
    }

    /// Requests of connections that this session does not have go to one that it has.
    fn gather(&self, active: usize) {
        self.active_inboxes.store(active, Ordering::Release);
        for inbox in &self.inboxes[active..] {
            for request in inbox.take_all() {
                self.inboxes[0].push(request);
            }
        }
    }

    fn fail_waiting(&self, errno: i32) {
        for inbox in &self.inboxes {
            for request in inbox.take_all() {
                request.complete(Err(errno));
            }
        }
    }
}

/// Opens session after session.
struct Supervisor {
    shared: Arc<Shared>,
    owner: Owner,
    boot_id: Option<BootId>,
    name: String,
}

impl Supervisor {
    fn run(mut self, first: Session) {
        let mut session = first;
        loop {
            let lost = match self.shared.serve(session, &self.name) {
                Outcome::Stopped => return self.shared.fail_for_good(libc::ESHUTDOWN),
                Outcome::Fenced => {
                    return self.fail("the server says that another owner has taken over".into());
                }
                Outcome::Lost(error) => error,
            };
            self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                disk = self.name,
                "NBD connection lost: {lost}; connecting again"
            );
            session = match self.reconnect(lost.to_string()) {
                Some(session) => session,
                None => return,
            };
            tracing::info!(
                disk = self.name,
                connections = session.links.len(),
                "NBD connection restored"
            );
        }
    }

    /// `None` when there will be no further session.
    fn reconnect(&mut self, mut reason: String) -> Option<Session> {
        let shared = Arc::clone(&self.shared);
        self.owner.epoch += 1;
        let mut pause = FIRST_PAUSE;
        loop {
            *shared.lock() = Situation::Reconnecting {
                reason: reason.clone(),
            };
            if shared.is_closing() {
                shared.fail_for_good(libc::ESHUTDOWN);
                return None;
            }
            shared.stop_session.store(false, Ordering::SeqCst);
            let attempt = self
                .owner
                .open_session()
                .and_then(|session| self.accept(session));
            let error = match attempt {
                Ok(session) => {
                    // Closing may have come between.
                    if shared.is_closing() {
                        shared.stop_session.store(true, Ordering::SeqCst);
                    }
                    return Some(session);
                }
                Err(error) => error,
            };
            if error.is_final() {
                self.fail(error.describe());
                return None;
            }
            if error.describe() != reason {
                reason = error.describe();
                tracing::warn!(disk = self.name, "{reason}; trying again");
            }
            // Many disks of one server do not come back in step.
            let [random] = random_bytes();
            let jitter = 0.75 + f64::from(random) / 512.0;
            if !shared.pause(pause.mul_f64(jitter)) {
                shared.fail_for_good(libc::ESHUTDOWN);
                return None;
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Looks whether it is still the disk that the guest knows.
    fn accept(&mut self, session: Session) -> Result<Session, ConnectError> {
        let (was, is) = (&self.shared.export, &session.export);
        let was_bytes = self.shared.size_bytes.load(Ordering::Acquire);
        if is.size_bytes < was_bytes {
            return Err(ConnectError::Shrunk {
                was_bytes,
                is_bytes: is.size_bytes,
            });
        }
        let relied_on = transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_TRIM
            | transmission::SEND_WRITE_ZEROES;
        if was.flags & relied_on & !is.flags != 0 {
            return Err(ConnectError::Changed("flush, FUA, trim or write zeroes"));
        }
        if is.min_block_bytes > was.min_block_bytes
            || is.max_payload_bytes < was.max_payload_bytes.min(MAX_PAYLOAD_BYTES)
        {
            return Err(ConnectError::Changed("requests as small or as large"));
        }
        self.shared
            .size_bytes
            .store(is.size_bytes, Ordering::Release);
        if session.boot_id != self.boot_id && self.shared.ledger.host_restarted() {
            tracing::error!(
                disk = self.name,
                "the NBD server's host restarted and lost writes that were answered but not \
                 flushed; flushes fail from now on: check the file system and attach the disk \
                 again"
            );
        }
        self.boot_id = session.boot_id;
        Ok(session)
    }

    fn fail(&self, reason: String) {
        tracing::error!(disk = self.name, "NBD disk failed for good: {reason}");
        *self.shared.lock() = Situation::Failed { reason };
        self.shared.fail_for_good(libc::EIO);
    }
}

impl Shared {
    /// Serves requests until a connection of the session ends, and ends the others.
    fn serve(&self, session: Session, name: &str) -> Outcome {
        self.gather(session.links.len());
        *self.lock() = Situation::Serving {
            connections: session.links.len(),
        };
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let mut links = session.links.into_iter().enumerate();
            let first = links.next();
            let others: Vec<_> = links
                .map(|(index, link)| {
                    std::thread::Builder::new()
                        .name(thread_name(name))
                        .spawn_scoped(scope, move || self.serve_link(index, link))
                })
                .collect();
            let mut outcomes: Vec<_> = first
                .map(|(index, link)| self.serve_link(index, link))
                .into_iter()
                .collect();
            for other in others {
                outcomes.push(match other.map(|thread| thread.join()) {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_)) => Outcome::Lost(io::Error::other("a thread panicked")),
                    Err(error) => Outcome::Lost(error),
                });
            }
            outcomes
        });
        if self.is_closing() {
            return Outcome::Stopped;
        }
        let rank = |outcome: &Outcome| match outcome {
            Outcome::Fenced => 2,
            Outcome::Lost(_) => 1,
            Outcome::Stopped => 0,
        };
        match outcomes.into_iter().max_by_key(rank) {
            Some(Outcome::Stopped) | None => {
                Outcome::Lost(io::Error::other("the session ended by itself"))
            }
            Some(outcome) => outcome,
        }
    }

    fn serve_link(&self, index: usize, link: Established) -> Outcome {
        let terms = link::Terms {
            inbox: &self.inboxes[index],
            ledger: &self.ledger,
            stop: &self.stop_session,
            is_closing: &self.is_closing,
            is_stalled: &self.is_stalled,
            flags: link.export.flags,
            structured_replies: link.structured_replies,
            is_claimed: link.boot_id.is_some(),
            every_write_durable: self.options.every_write_durable,
            stall_timeout: self.options.stall_timeout,
        };
        let outcome = link::run(link.channel, &terms);
        self.stop_session.store(true, Ordering::SeqCst);
        for inbox in &self.inboxes {
            inbox.wake();
        }
        outcome
    }

    /// Answers what waits, and lets `submit` answer what comes.
    fn fail_for_good(&self, errno: i32) {
        self.is_failed.store(true, Ordering::SeqCst);
        self.fail_waiting(errno);
    }
}
