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
//!
//! # Where it is
//! | module | what it holds |
//! |---|---|
//! | `options` | what a disk's user chooses; where connections come from |
//! | `request` | what can be asked for |
//! | `session` | opening the connections of one session, with its `handshake`s |
//! | `supervisor` | session after session |
//! | `link` | the requests of one connection |
//! | `shared` | what the client, the supervisor and the links know together |
//! | `ledger` | which answered writes a flush has covered |
//! | `status`, `error` | how it is doing, and why it does not, for people |

mod error;
mod handshake;
mod ledger;
mod link;
mod options;
mod random;
mod request;
mod session;
mod shared;
mod status;
mod supervisor;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use handshake::is_export_name;
use request::Awaited;
use session::{Owner, Session};
use shared::{Shared, Situation};
use supervisor::Supervisor;

pub use error::ConnectError;
pub use handshake::HandshakeError;
pub use options::{Dial, Options};
pub use request::{Command, Request};
pub use status::{State, Status};

use crate::wire::transmission;

/// Connections of one session.
pub const MAX_CONNECTIONS: usize = 16;
/// What one request carries at most, whatever the server takes: it is one piece of a buffer.
const MAX_PAYLOAD_BYTES: u32 = 4 << 20;

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
    let mut owner = Owner::new(dialer, options);
    let session = owner.open_session()?;
    Ok(Connected { session, owner })
}

/// A session that stands; no thread has been started.
#[derive(Debug)]
pub struct Connected {
    session: Session,
    owner: Owner,
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
        let shared = Shared::new(&session, owner.options())
            .map(Arc::new)
            .map_err(ConnectError::Resources)?;
        Supervisor::start(Arc::clone(&shared), owner, session, name)
            .map_err(ConnectError::Resources)?;
        Ok(Client { shared })
    }
}

/// A remote disk. Dropping it ends the session; what is under way then answers ESHUTDOWN. What holds
/// a request that waits may hold the client, so whoever is through with it says
/// [`Client::abandon`].
pub struct Client {
    shared: Arc<Shared>,
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

    /// Ends the session whoever else holds the client: requests that have not ended answer
    /// ESHUTDOWN, those that come EIO. Nothing is sent any more when this returns, also to a
    /// server that comes back: an outage would otherwise keep the client for as long as it lasts,
    /// and carry out writes of a disk that is somebody else's by then.
    pub fn abandon(&self) {
        /// A session's threads end as soon as they look.
        const PATIENCE: Duration = Duration::from_secs(5);
        self.shared.close();
        self.shared.fail_for_good(libc::ESHUTDOWN);
        self.shared.await_disconnected(PATIENCE);
    }

    /// Answers requests that [are abandoned](Request::is_abandoned) with ECANCELED, unless a
    /// server has them: what it may still do is waited for. What a lost connection had is not
    /// carried out later than that.
    pub fn release_abandoned(&self) {
        self.shared.release_abandoned();
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
        self.shared.close();
    }
}
