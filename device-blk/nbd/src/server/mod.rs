//! Serves one disk to clients that come and go.
//!
//! ```text
//! Server::run ─ accept ─► connection thread: handshake ─► Fence::admit ─► transmission
//!                                                                          │      ▲
//!                                                                        Task   Answer
//!                                                                          ▼      │
//!                                                                     Pool: Lease, Export
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | `handshake` | options, TLS, who is let in |
//! | [`Fence`] | the order of owners |
//! | `connection` | requests off the stream, answers onto it |
//! | `task`, `pool` | one request, carried out |
//! | [`Export`] | the disk |

mod connection;
mod export;
mod fence;
mod handshake;
mod pool;
mod task;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, SockFlag};

pub use export::{Export, Extent, FileExport, Zeroing};
pub use fence::{Fence, Refusals};

use crate::inbox::Inbox;
use crate::tls::TlsServer;
use pool::Pool;
use task::Answer;

/// For one client, from its connection to its first request.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// After a failed accept, for want of descriptors most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a disk is served.
#[derive(Debug)]
pub struct Options {
    /// Of the export.
    pub name: String,
    /// Demanded of every client if set.
    pub tls: Option<TlsServer>,
    /// Orders owners if set: then every client has to present a generation.
    pub fence: Option<Fence>,
    /// At a time. Each holds up to 32 MiB of data, or one request.
    pub max_connections: usize,
    /// Requests carried out at a time, over all connections.
    pub disk_threads: usize,
    /// Changes with each start of the host, for example from `/proc/sys/kernel/random/boot_id`.
    pub boot_id: [u8; 16],
}

/// Serves one disk.
pub struct Server {
    served: Arc<Served>,
    connections: Arc<Connections>,
    stop: EventFd,
}

struct Served {
    export: Arc<dyn Export>,
    options: Options,
    pool: Pool,
}

#[derive(Default)]
struct Connections {
    /// By number, how each is woken.
    open: Mutex<BTreeMap<u64, Arc<Inbox<Answer>>>>,
    closed: Condvar,
    is_stopping: AtomicBool,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("options", &self.served.options)
            .field("connections", &self.connections.lock().len())
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Prepares to serve `export`; its threads start here.
    ///
    /// # Errors
    /// No threads or descriptors left.
    pub fn new(export: Arc<dyn Export>, options: Options) -> io::Result<Self> {
        let pool = Pool::start(options.disk_threads.max(1))?;
        Ok(Self {
            served: Arc::new(Served {
                export,
                options,
                pool,
            }),
            connections: Arc::default(),
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// Accepts clients on `listener`, a Unix or TCP socket that listens, until
    /// [`Self::stop`]. Call it on as many threads as there are listeners.
    ///
    /// # Errors
    /// The listener is none.
    pub fn run(&self, listener: OwnedFd) -> io::Result<()> {
        let mut next_number = 0;
        loop {
            let mut fds = [
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            if self.connections.is_stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            match accept(&listener) {
                Ok(socket) => {
                    self.welcome(socket, next_number);
                    next_number += 1;
                }
                Err(error) if is_passing(&error) => std::thread::sleep(ACCEPT_PAUSE),
                Err(error) => return Err(error),
            }
        }
    }

    /// Clients now.
    pub fn connections(&self) -> usize {
        self.connections.lock().len()
    }

    /// The order of owners, if there is one.
    pub fn fence(&self) -> Option<&Fence> {
        self.served.options.fence.as_ref()
    }

    /// Takes no further requests, completes what is under way and says goodbye to everybody;
    /// false if that took longer than `patience`. The disk is let go with the server, once
    /// [`Self::run`] has returned.
    pub fn stop(&self, patience: Duration) -> bool {
        self.connections.is_stopping.store(true, Ordering::SeqCst);
        // Stays readable, for every thread in `run`.
        let _ = self.stop.write(1);
        let deadline = Instant::now() + patience;
        let mut open = self.connections.lock();
        for answers in open.values() {
            answers.wake();
        }
        while !open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            open = self
                .connections
                .closed
                .wait_timeout(open, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    fn welcome(&self, socket: OwnedFd, number: u64) {
        let Ok(answers) = Inbox::new().map(Arc::new) else {
            return tracing::warn!("no descriptors left for a client");
        };
        let mut open = self.connections.lock();
        if open.len() >= self.served.options.max_connections {
            return tracing::warn!(
                "a client was turned away: {} are connected, which is the limit",
                open.len()
            );
        }
        open.insert(number, Arc::clone(&answers));
        drop(open);
        let (served, connections) = (Arc::clone(&self.served), Arc::clone(&self.connections));
        let started = std::thread::Builder::new()
            .name(format!("nbd-conn-{number}"))
            .spawn(move || {
                let _leaving = Leaving {
                    connections: &connections,
                    number,
                };
                // Gives its share of the disk back before it has left.
                attend(socket, served, &answers, &connections.is_stopping);
            });
        if let Err(error) = started {
            tracing::warn!("no thread for a client: {error}");
            self.connections.leave(number);
        }
    }
}

/// One client, from hello to goodbye.
fn attend(socket: OwnedFd, served: Arc<Served>, answers: &Arc<Inbox<Answer>>, stop: &AtomicBool) {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let agreed = match handshake::shake_hands(socket, &served, deadline) {
        Ok(agreed) => agreed,
        Err(handshake::Ended::Aborted) => return,
        // Somebody looked whether there is a server.
        Err(handshake::Ended::Io(error)) => {
            return tracing::debug!("a client has left before its first request: {error}");
        }
        Err(error) => {
            let cause = std::error::Error::source(&error)
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            return tracing::warn!("a client was not let in: {error}{cause}");
        }
    };
    tracing::info!(
        encrypted = agreed.channel.is_encrypted(),
        fenced = agreed.lease.is_some(),
        "a client is connected"
    );
    match connection::serve(agreed, &served, answers, stop) {
        Ok(()) => tracing::info!("a client has left"),
        Err(error) => tracing::warn!("a client was lost: {error}"),
    }
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Inbox<Answer>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, number: u64) {
        self.lock().remove(&number);
        self.closed.notify_all();
    }
}

/// Also when a connection's thread panics.
struct Leaving<'a> {
    connections: &'a Connections,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.connections.leave(self.number);
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let fd = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made it, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let is_tcp = socket::getsockname::<socket::SockaddrStorage>(fd)?
        .as_unix_addr()
        .is_none();
    if is_tcp {
        let stream = TcpStream::from(socket);
        crate::watch_peer(&stream)?;
        return Ok(stream.into());
    }
    Ok(socket)
}

/// Not the listener's fault.
fn is_passing(error: &io::Error) -> bool {
    !matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)
    )
}
