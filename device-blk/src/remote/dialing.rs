//! Asking the connector for connections.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nbd::Address;
use nbd::client::Dial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr,
};
use nix::unistd::{ForkResult, fork};

use super::connector::{self, Allowed, CONNECT_TIMEOUT, MAX_MESSAGE_BYTES};

/// How long a connection made ahead may wait for its use: servers close those that say nothing.
const AHEAD_LIFETIME: Duration = Duration::from_secs(5);

/// Our end of the way to the connector.
#[derive(Debug)]
pub(super) struct Connector {
    requests: OwnedFd,
    /// At most one for each disk of the command line.
    ahead: Mutex<Vec<Ahead>>,
}

/// A connection that nobody has used yet.
#[derive(Debug)]
struct Ahead {
    address: String,
    connection: OwnedFd,
    made_at: Instant,
}

impl Connector {
    /// See [`super::start_connector`].
    pub(super) fn start(allowed: Allowed) -> io::Result<Self> {
        let (ours, its) = socket::socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        // SAFETY: the process has a single thread, so the child may do what its parent could.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok(Self {
                requests: ours,
                ahead: Mutex::default(),
            }),
            ForkResult::Child => {
                drop(ours);
                let status = match connector::run(&its, allowed) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!("the connector ends: {error}");
                        1
                    }
                };
                std::process::exit(status)
            }
        }
    }

    /// Connects now, for the first who asks for `address`.
    pub(super) fn connect_ahead(&self, address: &Address) -> io::Result<()> {
        let address = address.to_string();
        let connection = self.connect(&address, Instant::now() + CONNECT_TIMEOUT)?;
        self.ahead().push(Ahead {
            address,
            connection,
            made_at: Instant::now(),
        });
        Ok(())
    }

    fn take_ahead(&self, address: &str) -> Option<OwnedFd> {
        let mut ahead = self.ahead();
        ahead.retain(|one| one.made_at.elapsed() < AHEAD_LIFETIME);
        let index = ahead.iter().position(|one| one.address == address)?;
        Some(ahead.remove(index).connection)
    }

    fn ahead(&self) -> MutexGuard<'_, Vec<Ahead>> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self, address: &str, deadline: Instant) -> io::Result<OwnedFd> {
        let (answer, its) = UnixStream::pair()?;
        let fds = [its.as_raw_fd()];
        socket::sendmsg::<UnixAddr>(
            self.requests.as_raw_fd(),
            &[IoSlice::new(address.as_bytes())],
            &[ControlMessage::ScmRights(&fds)],
            // A connector that takes no requests is as good as none.
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )
        .map_err(|error| io::Error::other(format!("the connector is gone ({error})")))?;
        drop(its);
        await_readable(&answer, deadline)?;
        let mut text = [0; MAX_MESSAGE_BYTES];
        let (len, fds) = connector::receive_with_fds(answer.as_raw_fd(), &mut text)?;
        match (&text[..len], fds.into_iter().next()) {
            ([b'+'], Some(connection)) => Ok(connection),
            ([b'-', why @ ..], _) => Err(io::Error::other(String::from_utf8_lossy(why))),
            _ => Err(io::Error::other("the connector is gone")),
        }
    }
}

fn await_readable(answer: &UnixStream, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(answer.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// Connections to one server.
#[derive(Debug)]
pub(super) struct Dialer {
    connector: &'static Connector,
    address: String,
}

impl Dialer {
    pub(super) fn new(connector: &'static Connector, address: &Address) -> Self {
        Self {
            connector,
            address: address.to_string(),
        }
    }
}

impl Dial for Dialer {
    fn dial(&mut self, deadline: Instant) -> io::Result<OwnedFd> {
        match self.connector.take_ahead(&self.address) {
            Some(connection) => Ok(connection),
            None => self.connector.connect(&self.address, deadline),
        }
    }
}
