//! The process that connects to other hosts, and does nothing else.
//!
//! ```text
//! device-blk ── "ADDRESS" + one end of a fresh socket pair ──► connector: a thread for each
//!            ◄─ a connection, or why there is none ──────────── request (resolve, connect)
//! ```
//!
//! It is forked before device-blk is confined and opens nothing but connections: files are denied
//! but for those that name resolution reads, and its system calls are few. What it connects to is
//! on a list from the command line, so a device-blk that a guest has taken over reaches the
//! storage it could reach anyway, and nobody else. It ends when device-blk does.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbd::Address;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{self, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr};
use sandbox::seccomp::{Arg, Profile, Syscalls, sets};
use sandbox::{Access, Achieved};

/// Connections that are being made at a time.
const MAX_REQUESTS: usize = 64;
/// For one connection, resolving the name included.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest address, and the longest reason for there being no connection.
pub(super) const MAX_MESSAGE_BYTES: usize = 512;

/// Where connections may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Allowed {
    Any,
    Only(Vec<Address>),
}

impl Allowed {
    fn allows(&self, address: &Address) -> bool {
        match self {
            Self::Any => true,
            Self::Only(list) => list.contains(address),
        }
    }
}

/// Serves requests that come over `requests` until its other end closes.
///
/// # Errors
/// The process cannot be confined.
pub(super) fn run(requests: &OwnedFd, allowed: Allowed) -> io::Result<()> {
    // Ends with device-blk, which drains first.
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: ignoring a signal installs no code.
        unsafe { signal(ignored, SigHandler::SigIgn) }?;
    }
    let achieved = confine(requests.as_raw_fd()).map_err(io::Error::other)?;
    for missing in achieved.missing_names() {
        tracing::warn!("the sandbox of the connector lacks {missing}");
    }
    let allowed = Arc::new(allowed);
    let under_way = Arc::new(AtomicUsize::new(0));
    while let Some((text, reply)) = receive(requests)? {
        let place = Place::take(&under_way);
        let Some(place) = place else {
            refuse(&reply, "too many connections are being made");
            continue;
        };
        let allowed = Arc::clone(&allowed);
        let started = thread::Builder::new().spawn(move || {
            answer(&text, &allowed, &reply);
            drop(place);
        });
        if let Err(error) = started {
            tracing::warn!("the connector has no thread for a request: {error}");
        }
    }
    Ok(())
}

fn answer(text: &str, allowed: &Allowed, reply: &UnixStream) {
    let address: Address = match text.parse() {
        Ok(address) => address,
        Err(error) => return refuse(reply, &format!("{error}")),
    };
    if !allowed.allows(&address) {
        return refuse(
            reply,
            &format!("{address} is not among the addresses that --remote allows"),
        );
    }
    match address.connect(Instant::now() + CONNECT_TIMEOUT) {
        Ok(connection) => {
            let fds = [connection.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&fds)];
            // Whoever asked may have lost patience.
            let _ = socket::sendmsg::<UnixAddr>(
                reply.as_raw_fd(),
                &[IoSlice::new(b"+")],
                &control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
        }
        Err(error) => refuse(reply, &format!("{address}: {error}")),
    }
}

fn refuse(reply: &UnixStream, why: &str) {
    let mut text = format!("-{why}").into_bytes();
    text.truncate(MAX_MESSAGE_BYTES);
    let _ = socket::send(reply.as_raw_fd(), &text, MsgFlags::MSG_NOSIGNAL);
}

/// One request: an address, and where the answer goes. `None` when there will be no more.
fn receive(requests: &OwnedFd) -> io::Result<Option<(String, UnixStream)>> {
    loop {
        let mut text = [0; MAX_MESSAGE_BYTES];
        let (len, fds) = receive_with_fds(requests.as_raw_fd(), &mut text)?;
        if len == 0 && fds.is_empty() {
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&text[..len]).into_owned();
        if let Some(reply) = fds.into_iter().next() {
            return Ok(Some((text, UnixStream::from(reply))));
        }
    }
}

/// Receives a message and at most four descriptors, each closed on exec.
pub(super) fn receive_with_fds(from: RawFd, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut slices = [IoSliceMut::new(into)];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let message = loop {
        match socket::recvmsg::<UnixAddr>(
            from,
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
            fds.extend(
                received
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((message.bytes, fds))
}

/// One of [`MAX_REQUESTS`].
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(under_way: &Arc<AtomicUsize>) -> Option<Self> {
        if under_way.fetch_add(1, Ordering::AcqRel) < MAX_REQUESTS {
            return Some(Self(Arc::clone(under_way)));
        }
        under_way.fetch_sub(1, Ordering::AcqRel);
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The network stays; all else goes.
fn confine(requests: RawFd) -> Result<Achieved, sandbox::ConfinementError> {
    let mut achieved = sandbox::no_core_dumps()?;
    achieved += sandbox::close_other_fds(&[requests])?;
    // What name resolution reads; on a host without one of them it does without.
    let readable: Vec<_> = [
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/host.conf",
        "/etc/nsswitch.conf",
        "/etc/gai.conf",
        "/etc/services",
        "/run/systemd/resolve",
    ]
    .into_iter()
    .filter(|path| Path::new(path).exists())
    .map(|path| (path.into(), Access::Read))
    .collect();
    // Without any of them, an empty root would also hide Unix sockets.
    if !readable.is_empty() {
        achieved += sandbox::deny_filesystem(&readable)?;
    }
    achieved += sandbox::drop_capabilities(&[])?;
    achieved += sandbox::no_new_privs()?;
    achieved += Profile::new("device-blk-connector", syscalls()).apply_to_all_threads()?;
    Ok(achieved)
}

/// Threads, connecting, and asking name servers (datagrams, and the kernel for our addresses).
fn syscalls() -> Syscalls {
    let family = |family: i32| Arg::Int(0, family as u32);
    sets::base()
        .with(sets::open_sockets())
        .allow(&[
            libc::SYS_connect,
            libc::SYS_sendmmsg,
            libc::SYS_recvmmsg,
            // Of netlink sockets, and what files are denied.
            libc::SYS_bind,
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_newfstatat,
            libc::SYS_stat,
            libc::SYS_statx,
            libc::SYS_access,
            libc::SYS_faccessat,
            libc::SYS_uname,
        ])
        .allow_if(libc::SYS_socket, &[family(libc::AF_INET)])
        .allow_if(libc::SYS_socket, &[family(libc::AF_INET6)])
        .allow_if(libc::SYS_socket, &[family(libc::AF_UNIX)])
        .allow_if(libc::SYS_socket, &[family(libc::AF_NETLINK)])
}
