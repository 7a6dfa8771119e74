//! One connection, from accept to hang-up: waits for whole requests, hands them to the
//! [`Session`], and says why it ended.
//!
//! The vhost crate reads with blocking calls that nothing can interrupt, so a request is only
//! handed over when all its bytes are there and the answer has room.

use std::fmt;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, VhostUserBackendReqHandlerMut};

use super::misbehaviour;
use super::session::Session;
use crate::eventfd::EventFd;

/// How long the rest of a begun request, or room for the answer, may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 5000 });

/// Interval of looks at a half-received request. Senders write requests whole, so this is rare.
const PARTIAL_POLL: Duration = Duration::from_millis(5);

pub(super) const HEADER_BYTES: usize = 12;
const MAX_PAYLOAD_BYTES: usize = 4096;
pub(super) const PROTOCOL_VERSION: u32 = 1;
pub(super) const FLAG_REPLY: u32 = 1 << 2;
pub(super) const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Why a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    HungUp,
    Stopped,
    MemoryTruncated,
    Truncated,
    Oversized {
        payload_bytes: usize,
    },
    AnswersNotRead,
    /// Refused, and the frontend had not asked for an acknowledgement.
    RefusedSilently,
    BadRequest(vhost::vhost_user::Error),
    Socket(io::Error),
    /// A fault was armed that ends it.
    Injected,
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::HungUp => write!(f, "the frontend hung up"),
            SessionEnd::Stopped => write!(f, "the server was stopped"),
            SessionEnd::MemoryTruncated => write!(
                f,
                "the frontend truncated the memory that it shares: seal it (F_SEAL_SHRINK)"
            ),
            SessionEnd::Truncated => write!(f, "a request was truncated"),
            SessionEnd::Oversized { payload_bytes } => {
                write!(
                    f,
                    "a request announced {payload_bytes} bytes, {MAX_PAYLOAD_BYTES} are allowed"
                )
            }
            SessionEnd::AnswersNotRead => write!(f, "the frontend does not read answers"),
            SessionEnd::RefusedSilently => {
                write!(
                    f,
                    "a request was refused and the frontend had not asked for an answer"
                )
            }
            SessionEnd::BadRequest(error) => write!(f, "a request could not be served: {error}"),
            SessionEnd::Socket(error) => write!(f, "the socket failed: {error}"),
            SessionEnd::Injected => write!(f, "a fault was armed that ends it"),
        }
    }
}

/// What a session hears from outside of its connection, when readable.
#[derive(Clone, Copy)]
pub(super) struct Interrupts<'a> {
    /// The server is to stop: the session ends.
    pub(super) stop: BorrowedFd<'a>,
    /// A page of the frontend's memory is gone: the session ends.
    pub(super) truncated: BorrowedFd<'a>,
    /// The device configuration changed: the frontend is told.
    pub(super) config_changed: &'a EventFd,
    /// A fault ends the session.
    pub(super) injected: Option<BorrowedFd<'a>>,
}

/// Positions in the poll set.
const POLL_CONNECTION: usize = 0;
const POLL_STOP: usize = 1;
const POLL_TRUNCATED: usize = 2;
const POLL_CONFIG_CHANGED: usize = 3;
const POLL_CHANNEL: usize = 4;
const POLL_INJECTED: usize = 5;

impl Interrupts<'_> {
    /// Waits for `events` of the connection, or what else concerns the session; what is ready of
    /// the connection, 0 when nothing is, or why the session ends.
    fn poll(
        &self,
        stream: &UnixStream,
        events: libc::c_short,
        session: &Mutex<Session>,
        timeout_ms: libc::c_int,
    ) -> Result<libc::c_short, SessionEnd> {
        // Only this thread replaces the channel, so the descriptor stays open during the poll.
        let channel = lock(session).notice().socket().map(|fd| fd.as_raw_fd());
        let entry = |fd: RawFd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let mut polls = [
            entry(stream.as_raw_fd(), events),
            entry(self.stop.as_raw_fd(), libc::POLLIN),
            entry(self.truncated.as_raw_fd(), libc::POLLIN),
            entry(self.config_changed.as_raw_fd(), libc::POLLIN),
            entry(channel.unwrap_or(-1), libc::POLLIN),
            entry(self.injected.map_or(-1, |fd| fd.as_raw_fd()), libc::POLLIN),
        ];
        // SAFETY: valid pollfds with descriptors that their owners keep open throughout.
        let ready =
            unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
        let is_ready = |position: usize| ready > 0 && polls[position].revents != 0;
        if is_ready(POLL_STOP) {
            return Err(SessionEnd::Stopped);
        }
        if is_ready(POLL_TRUNCATED) {
            return Err(SessionEnd::MemoryTruncated);
        }
        if is_ready(POLL_INJECTED) {
            return Err(SessionEnd::Injected);
        }
        if is_ready(POLL_CONFIG_CHANGED) {
            let _ = self.config_changed.take();
            lock(session).notice().changed();
        }
        if is_ready(POLL_CHANNEL) {
            lock(session).notice().hear();
        }
        Ok(if ready > 0 {
            polls[POLL_CONNECTION].revents
        } else {
            0
        })
    }
}

/// Serves requests until the frontend hangs up, breaks the protocol, or `stop` is readable.
pub(super) fn serve(
    stream: UnixStream,
    session: Session,
    interrupts: Interrupts<'_>,
) -> (SessionEnd, Session) {
    let session = Arc::new(Mutex::new(session));
    let end = match stream.try_clone() {
        Ok(requests) => serve_requests(&stream, requests, &session, interrupts),
        Err(error) => SessionEnd::Socket(error),
    };
    // The request handler, the only other owner, is gone.
    let session = Arc::into_inner(session).expect("one owner of the session is left");
    (
        end,
        session.into_inner().unwrap_or_else(PoisonError::into_inner),
    )
}

fn serve_requests(
    stream: &UnixStream,
    requests: UnixStream,
    session: &Arc<Mutex<Session>>,
    interrupts: Interrupts<'_>,
) -> SessionEnd {
    let mut handler = BackendReqHandler::from_stream(requests, Arc::clone(session));
    loop {
        let header = match await_request(stream, interrupts, session) {
            Ok(header) => header,
            Err(end) => return end,
        };
        if let Some(faults) = lock(session).message_faults()
            && !misbehaviour::before_message(&faults, header.request, interrupts.stop)
        {
            return SessionEnd::Injected;
        }
        if header.request == u32::from(FrontendReq::SET_VRING_ENABLE)
            && lock(session).may_enable_before_features()
        {
            match serve_early_enable(stream, &mut lock(session), header.needs_reply) {
                Ok(()) => continue,
                Err(end) => return end,
            }
        }
        if header.request == u32::from(FrontendReq::SET_BACKEND_REQ_FD)
            && lock(session).has_channel()
        {
            match serve_channel(stream, &mut lock(session), header.needs_reply) {
                Ok(()) => continue,
                Err(end) => return end,
            }
        }
        let Err(error) = handler.handle_request() else {
            continue;
        };
        let mut session = lock(session);
        match (
            session.take_refusal(),
            header.needs_reply && session.acknowledges(),
        ) {
            (true, true) if header.is_set_request => {}
            (true, false) if header.is_set_request => return SessionEnd::RefusedSilently,
            _ => return SessionEnd::BadRequest(error),
        }
    }
}

fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves a SET_VRING_ENABLE that comes before SET_FEATURES: QEMU's vhost-user-net enables its
/// first queue pair when it connects, and the vhost crate ends the session there. The request is
/// whole (see [`await_request`]).
fn serve_early_enable(
    mut stream: &UnixStream,
    session: &mut Session,
    needs_reply: bool,
) -> Result<(), SessionEnd> {
    const PAYLOAD_BYTES: usize = 8;
    let mut bytes = [0; HEADER_BYTES + PAYLOAD_BYTES];
    stream.read_exact(&mut bytes).map_err(SessionEnd::Socket)?;
    let word = |at: usize| word_at(&bytes, at);
    let (payload_bytes, index, enable) = (word(8), word(12), word(16));
    if payload_bytes as usize != PAYLOAD_BYTES || enable > 1 {
        return Err(SessionEnd::BadRequest(
            vhost::vhost_user::Error::InvalidMessage,
        ));
    }
    let refused = session.set_vring_enable(index, enable == 1).is_err();
    session.take_refusal();
    let request = FrontendReq::SET_VRING_ENABLE;
    acknowledge(stream, session, request, needs_reply, refused)
}

/// Serves a SET_BACKEND_REQ_FD: the vhost crate makes something of the descriptor that cannot tell
/// of a changed configuration. The request is whole (see [`await_request`]).
fn serve_channel(
    stream: &UnixStream,
    session: &mut Session,
    needs_reply: bool,
) -> Result<(), SessionEnd> {
    let bad_request = || SessionEnd::BadRequest(vhost::vhost_user::Error::InvalidMessage);
    let mut header = [0; HEADER_BYTES];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let mut iov = [IoSliceMut::new(&mut header)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut control), flags);
    let received = received.map_err(|error| SessionEnd::Socket(error.into()))?;
    let mut sockets = Vec::new();
    for message in received.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel just installed them for this process, and nobody else knows.
            sockets.extend(
                fds.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let is_whole = received.bytes == HEADER_BYTES
        && !received.flags.contains(MsgFlags::MSG_CTRUNC)
        && sockets.len() == 1;
    let Some(socket) = sockets.pop().filter(|_| is_whole) else {
        return Err(bad_request());
    };
    if word_at(&header, 8) != 0 {
        return Err(bad_request());
    }
    let refused = session.open_channel(socket).is_err();
    let request = FrontendReq::SET_BACKEND_REQ_FD;
    acknowledge(stream, session, request, needs_reply, refused)
}

/// Answers a request that was not handed to the vhost crate.
fn acknowledge(
    mut stream: &UnixStream,
    session: &Session,
    request: FrontendReq,
    needs_reply: bool,
    refused: bool,
) -> Result<(), SessionEnd> {
    if !(needs_reply && session.acknowledges()) {
        return match refused {
            true => Err(SessionEnd::RefusedSilently),
            false => Ok(()),
        };
    }
    let header = [u32::from(request), PROTOCOL_VERSION | FLAG_REPLY, 8].map(u32::to_ne_bytes);
    let answer = [&header.concat()[..], &u64::from(refused).to_ne_bytes()].concat();
    stream.write_all(&answer).map_err(SessionEnd::Socket)
}

pub(super) fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What matters here of a request's header.
struct Header {
    request: u32,
    needs_reply: bool,
    /// It is answered by an acknowledgement at most, so that a refusal can be told.
    is_set_request: bool,
}

/// Waits until a whole request has arrived and an answer can be sent.
fn await_request(
    stream: &UnixStream,
    interrupts: Interrupts<'_>,
    session: &Mutex<Session>,
) -> Result<Header, SessionEnd> {
    wait_for(stream, libc::POLLIN, interrupts, session, None)?;
    let deadline = Instant::now() + MESSAGE_TIMEOUT;
    let header = loop {
        match peek_request(stream)? {
            Some(header) => break header,
            None if Instant::now() >= deadline => return Err(SessionEnd::Truncated),
            None => await_rest(stream, interrupts, session)?,
        }
    };
    wait_for(stream, libc::POLLOUT, interrupts, session, Some(deadline))?;
    Ok(header)
}

/// Looks at the next request; None when a part of it has yet to arrive.
fn peek_request(stream: &UnixStream) -> Result<Option<Header>, SessionEnd> {
    let mut bytes = [0u8; HEADER_BYTES];
    // SAFETY: the buffer is ours and of the length given.
    let received = unsafe {
        libc::recv(
            stream.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    match received {
        0 => return Err(SessionEnd::HungUp),
        1.. if received as usize == HEADER_BYTES => {}
        1.. => return Ok(None),
        _ => {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                io::ErrorKind::ConnectionReset => Err(SessionEnd::HungUp),
                _ => Err(SessionEnd::Socket(error)),
            };
        }
    }
    let word = |at: usize| word_at(&bytes, at);
    let (request, flags, payload_bytes) = (word(0), word(4), word(8) as usize);
    if payload_bytes > MAX_PAYLOAD_BYTES {
        return Err(SessionEnd::Oversized { payload_bytes });
    }
    let mut waiting_bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &mut waiting_bytes) } < 0 {
        return Err(SessionEnd::Socket(io::Error::last_os_error()));
    }
    let is_whole = waiting_bytes as usize >= HEADER_BYTES + payload_bytes;
    Ok(is_whole.then(|| Header {
        request,
        needs_reply: flags & FLAG_NEED_REPLY != 0,
        is_set_request: is_set_request(request),
    }))
}

/// Requests whose only answer is the acknowledgement of REPLY_ACK.
fn is_set_request(request: u32) -> bool {
    use FrontendReq as Request;
    const SET_REQUESTS: &[Request] = &[
        Request::SET_FEATURES,
        Request::SET_OWNER,
        Request::RESET_OWNER,
        Request::SET_MEM_TABLE,
        Request::SET_VRING_NUM,
        Request::SET_VRING_ADDR,
        Request::SET_VRING_BASE,
        Request::SET_VRING_KICK,
        Request::SET_VRING_CALL,
        Request::SET_VRING_ERR,
        Request::SET_PROTOCOL_FEATURES,
        Request::SET_VRING_ENABLE,
        Request::SET_CONFIG,
        Request::SET_INFLIGHT_FD,
        Request::RESET_DEVICE,
        Request::ADD_MEM_REG,
        Request::REM_MEM_REG,
        Request::GPU_SET_SOCKET,
    ];
    SET_REQUESTS.iter().any(|set| u32::from(*set) == request)
}

/// Waits for `events` on the connection, or for the session's end.
fn wait_for(
    stream: &UnixStream,
    events: libc::c_short,
    interrupts: Interrupts<'_>,
    session: &Mutex<Session>,
    deadline: Option<Instant>,
) -> Result<(), SessionEnd> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout_ms = left.map_or(-1, |left| left.as_millis() as libc::c_int);
        match interrupts.poll(stream, events, session, timeout_ms)? {
            0 if left.is_some_and(|left| left.is_zero()) => return Err(SessionEnd::AnswersNotRead),
            0 => {}
            ready if ready & events != 0 => return Ok(()),
            _ => return Err(SessionEnd::HungUp),
        }
    }
}

/// A part of a request is there: POLLIN would return at once, so look again a little later.
fn await_rest(
    stream: &UnixStream,
    interrupts: Interrupts<'_>,
    session: &Mutex<Session>,
) -> Result<(), SessionEnd> {
    let timeout_ms = PARTIAL_POLL.as_millis() as libc::c_int;
    if interrupts.poll(stream, libc::POLLRDHUP, session, timeout_ms)? == 0 {
        return Ok(());
    }
    // The peer is gone. What it sent before may be whole by now.
    match peek_request(stream)? {
        Some(_) => Ok(()),
        None => Err(SessionEnd::Truncated),
    }
}
