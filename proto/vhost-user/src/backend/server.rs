//! The server of one device: sessions one after another on one listening socket.
//!
//! The socket is never closed, unlinked or bound anew between sessions, so that a frontend that
//! reconnects never meets a gap. A second frontend waits in the backlog. A session's workers and
//! their I/O are over before the next frontend is accepted.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Device;
use super::connection::{self, Interrupts};
use super::misbehaviour::Disconnector;
use super::session::Session;
use super::worker::QueueStats;
use crate::eventfd::EventFd;
use crate::log_limit::LogLimit;

/// Pause after a failed accept (descriptors short), lest the thread spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A device being served.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    /// Closed when the serving thread ends.
    ended: Receiver<()>,
}

/// How a device's server is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// A frontend is connected.
    pub connected: bool,
    /// Sessions begun so far, this one included.
    pub sessions: u64,
    /// Rings being served.
    pub queues_running: u32,
    /// Requests taken and not completed.
    pub inflight: u32,
    /// Requests completed since the server started.
    pub completed: u64,
    /// Why the last session ended, in words.
    pub last_session_end: Option<String>,
    /// The connected frontend's memory can not be truncated under this process. None without
    /// memory.
    pub memory_sealed: Option<bool>,
    /// Of the rings being served.
    pub queues: Vec<QueueHealth>,
}

/// How a ring is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueHealth {
    /// Index of the virtqueue.
    pub index: u16,
    /// Requests taken and not completed.
    pub inflight: u32,
    /// Requests completed since the server started.
    pub completed: u64,
    /// How long its thread has not answered [`Server::status`]; zero for one that does.
    pub unresponsive: Duration,
}

/// The server could not complete everything in time.
#[derive(Debug, thiserror::Error)]
#[error("device {name}: {inflight} requests were not completed in time")]
pub struct StopError {
    /// The device.
    pub name: String,
    /// Requests not completed. The frontend's in-flight region, if it has one, holds them for the
    /// next incarnation.
    pub inflight: u32,
    /// Whether the server's threads are gone. If not, a device does not return from its work.
    pub has_ended: bool,
}

impl Server {
    /// Serves `device` on `listener` in a thread of its own. `name` appears in logs and thread
    /// names.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
    pub fn spawn(
        name: &str,
        listener: UnixListener,
        device: Arc<dyn Device>,
    ) -> io::Result<Server> {
        // Another incarnation may poll the same socket and win the race for a connection.
        listener.set_nonblocking(true)?;
        let queues = (0..device.num_queues()).map(|_| Arc::default()).collect();
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            stop: EventFd::new()?,
            config_changed: EventFd::new()?,
            queues,
            sessions: Mutex::default(),
            complaints: Mutex::default(),
        });
        let (alive, ended) = sync_channel(0);
        let serving = Arc::clone(&shared);
        thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || {
                serve(&serving, &listener, &device);
                // Only then may whoever waits bind or pass on the socket.
                drop(listener);
                drop(alive);
            })?;
        Ok(Server { shared, ended })
    }

    /// Ends the session, letting requests in flight complete within `deadline`, and frees the
    /// listening socket.
    ///
    /// # Errors
    /// [`StopError`] when requests remain or a thread does not end.
    pub fn stop(self, deadline: Duration) -> Result<(), StopError> {
        self.shared.sessions().drain_until = Some(Instant::now() + deadline);
        self.shared.stop.ring();
        let ended = self.ended.recv_timeout(deadline + Duration::from_secs(1));
        let has_ended = ended != Err(RecvTimeoutError::Timeout);
        match self.status().inflight {
            0 if has_ended => Ok(()),
            inflight => Err(StopError {
                name: self.shared.name.clone(),
                inflight,
                has_ended,
            }),
        }
    }

    /// What [`Device::config`] answers is no longer what it was: tells the frontend, if it takes
    /// such messages (CONFIG_CHANGE_MSG). Never waits for it.
    pub fn config_changed(&self) {
        self.shared.config_changed.ring();
    }

    /// How it is doing.
    pub fn status(&self) -> Status {
        self.shared.status()
    }
}

impl Drop for Server {
    /// Lets the thread end by itself; [`Server::stop`] waits for it.
    fn drop(&mut self) {
        self.shared.stop.ring();
    }
}

/// What serving thread, workers and [`Server`] share.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    stop: EventFd,
    config_changed: EventFd,
    queues: Vec<Arc<QueueStats>>,
    sessions: Mutex<Sessions>,
    /// About requests that are refused: a frontend can make any number of them.
    complaints: Mutex<LogLimit>,
}

#[derive(Debug, Default)]
struct Sessions {
    connected: bool,
    count: u64,
    last_end: Option<String>,
    memory_sealed: Option<bool>,
    /// Set by [`Server::stop`].
    drain_until: Option<Instant>,
}

impl Shared {
    pub(super) fn queue(&self, index: u16) -> Arc<QueueStats> {
        Arc::clone(&self.queues[usize::from(index)])
    }

    /// Whether to write a line about a refused request, and how many were withheld.
    pub(super) fn admit_complaint(&self) -> Option<u64> {
        let mut complaints = self
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        complaints.admit()
    }

    pub(super) fn set_memory_sealed(&self, sealed: bool) {
        self.sessions().memory_sealed = Some(sealed);
    }

    /// How long a drain may take because the server is being stopped.
    pub(super) fn drain_limit(&self) -> Option<Duration> {
        self.sessions()
            .drain_until
            .map(|until| until.saturating_duration_since(Instant::now()))
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Status {
        let sessions = self.sessions();
        let queues = self.queues.iter();
        Status {
            connected: sessions.connected,
            sessions: sessions.count,
            queues_running: queues
                .clone()
                .filter(|queue| queue.running.load(Ordering::Relaxed))
                .count() as u32,
            inflight: queues
                .clone()
                .map(|queue| queue.in_flight.load(Ordering::Relaxed))
                .sum(),
            completed: queues
                .map(|queue| queue.completed_total.load(Ordering::Relaxed))
                .sum(),
            last_session_end: sessions.last_end.clone(),
            memory_sealed: sessions.memory_sealed,
            queues: self.queue_healths(),
        }
    }
}

impl Shared {
    fn queue_healths(&self) -> Vec<QueueHealth> {
        let running = (0..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.running.load(Ordering::Relaxed));
        running
            .map(|(index, queue)| QueueHealth {
                index,
                inflight: queue.in_flight.load(Ordering::Relaxed),
                completed: queue.completed_total.load(Ordering::Relaxed),
                unresponsive: queue.unresponsive(),
            })
            .collect()
    }
}

/// The serving thread.
fn serve(shared: &Arc<Shared>, listener: &UnixListener, device: &Arc<dyn Device>) {
    while await_connection(shared, listener) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                tracing::warn!(device = shared.name, %error, "cannot accept a frontend, trying again");
                thread::sleep(ACCEPT_RETRY);
                continue;
            }
        };
        {
            let mut sessions = shared.sessions();
            sessions.connected = true;
            sessions.count += 1;
            tracing::info!(
                device = shared.name,
                session = sessions.count,
                "frontend connected"
            );
        }
        let truncated = match EventFd::new() {
            Ok(event) => Arc::new(event),
            Err(error) => {
                tracing::warn!(device = shared.name, %error, "no descriptors left for a session");
                thread::sleep(ACCEPT_RETRY);
                continue;
            }
        };
        let disconnector = device
            .faults()
            .and_then(|faults| Disconnector::new(faults).ok());
        let interrupts = Interrupts {
            stop: shared.stop.as_fd(),
            truncated: truncated.as_fd(),
            config_changed: &shared.config_changed,
            injected: disconnector.as_deref().map(AsFd::as_fd),
        };
        // This frontend has yet to read the configuration.
        let _ = shared.config_changed.take();
        let session = Session::new(
            &shared.name,
            Arc::clone(device),
            Arc::clone(shared),
            Arc::clone(&truncated),
        );
        let (end, mut session) = connection::serve(stream, session, interrupts);
        tracing::info!(device = shared.name, %end, "session ended");
        {
            let mut sessions = shared.sessions();
            sessions.connected = false;
            sessions.last_end = Some(end.to_string());
        }
        session.end();
        shared.sessions().memory_sealed = None;
    }
}

/// Waits for a frontend; false when the server is to stop.
fn await_connection(shared: &Shared, listener: &UnixListener) -> bool {
    let mut polls = [shared.stop.as_fd(), listener.as_fd()].map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: two valid pollfds with descriptors that are open throughout.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
        if ready > 0 {
            return polls[0].revents == 0;
        }
    }
}
