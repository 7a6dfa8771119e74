//! One connection, from accept to hang-up: waits for whole requests, hands them to the
//! [`Session`], and says why it ended.
//!
//! The vhost crate reads with blocking calls that nothing can interrupt, so a request is only
//! handed over when all its bytes are there and the answer has room.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::BackendReqHandler;

use super::session::Session;

/// How long the rest of a begun request, or room for the answer, may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 5000 });

/// Interval of looks at a half-received request. Senders write requests whole, so this is rare.
const PARTIAL_POLL: Duration = Duration::from_millis(5);

const HEADER_BYTES: usize = 12;
const MAX_PAYLOAD_BYTES: usize = 4096;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Why a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    HungUp,
    Stopped,
    Truncated,
    Oversized {
        payload_bytes: usize,
    },
    AnswersNotRead,
    /// Refused, and the frontend had not asked for an acknowledgement.
    RefusedSilently,
    BadRequest(vhost::vhost_user::Error),
    Socket(io::Error),
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::HungUp => write!(f, "the frontend hung up"),
            SessionEnd::Stopped => write!(f, "the server was stopped"),
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
        }
    }
}

/// Serves requests until the frontend hangs up, breaks the protocol, or `stop` is readable.
pub(super) fn serve(
    stream: UnixStream,
    session: Session,
    stop: BorrowedFd<'_>,
) -> (SessionEnd, Session) {
    let session = Arc::new(Mutex::new(session));
    let end = match stream.try_clone() {
        Ok(requests) => serve_requests(&stream, requests, &session, stop),
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
    stop: BorrowedFd<'_>,
) -> SessionEnd {
    let mut handler = BackendReqHandler::from_stream(requests, Arc::clone(session));
    loop {
        let header = match await_request(stream, stop) {
            Ok(header) => header,
            Err(end) => return end,
        };
        let Err(error) = handler.handle_request() else {
            continue;
        };
        let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
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

/// What matters here of a request's header.
struct Header {
    needs_reply: bool,
    /// It is answered by an acknowledgement at most, so that a refusal can be told.
    is_set_request: bool,
}

/// Waits until a whole request has arrived and an answer can be sent.
fn await_request(stream: &UnixStream, stop: BorrowedFd<'_>) -> Result<Header, SessionEnd> {
    wait_for(stream, libc::POLLIN, stop, None)?;
    let deadline = Instant::now() + MESSAGE_TIMEOUT;
    let header = loop {
        match peek_request(stream)? {
            Some(header) => break header,
            None if Instant::now() >= deadline => return Err(SessionEnd::Truncated),
            None => await_rest(stream, stop)?,
        }
    };
    wait_for(stream, libc::POLLOUT, stop, Some(deadline))?;
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
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
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
        needs_reply: flags & FLAG_NEED_REPLY != 0,
        is_set_request: is_set_request(request),
    }))
}

/// Requests whose only answer is the acknowledgement of REPLY_ACK.
fn is_set_request(request: u32) -> bool {
    use vhost::vhost_user::message::FrontendReq as Request;
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

/// Waits for `events` on the connection, or for the server's stop.
fn wait_for(
    stream: &UnixStream,
    events: libc::c_short,
    stop: BorrowedFd<'_>,
    deadline: Option<Instant>,
) -> Result<(), SessionEnd> {
    loop {
        let timeout_ms = deadline.map_or(-1, |deadline| {
            deadline
                .saturating_duration_since(Instant::now())
                .as_millis() as libc::c_int
        });
        let mut polls =
            [(stream.as_fd(), events), (stop, libc::POLLIN)].map(|(fd, events)| libc::pollfd {
                fd: fd.as_raw_fd(),
                events,
                revents: 0,
            });
        // SAFETY: two valid pollfds with descriptors that are open throughout.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, timeout_ms) };
        if ready < 0 {
            continue;
        }
        if polls[1].revents != 0 {
            return Err(SessionEnd::Stopped);
        }
        if polls[0].revents & events != 0 {
            return Ok(());
        }
        if polls[0].revents != 0 {
            return Err(SessionEnd::HungUp);
        }
        if ready == 0 {
            return Err(SessionEnd::AnswersNotRead);
        }
    }
}

/// A part of a request is there: POLLIN would return at once, so look again a little later.
fn await_rest(stream: &UnixStream, stop: BorrowedFd<'_>) -> Result<(), SessionEnd> {
    let mut polls =
        [(stream.as_fd(), libc::POLLRDHUP), (stop, libc::POLLIN)].map(|(fd, events)| {
            libc::pollfd {
                fd: fd.as_raw_fd(),
                events,
                revents: 0,
            }
        });
    // SAFETY: two valid pollfds with descriptors that are open throughout.
    unsafe {
        libc::poll(
            polls.as_mut_ptr(),
            2,
            PARTIAL_POLL.as_millis() as libc::c_int,
        )
    };
    if polls[1].revents != 0 {
        return Err(SessionEnd::Stopped);
    }
    if polls[0].revents == 0 {
        return Ok(());
    }
    // The peer is gone. What it sent before may be whole by now.
    match peek_request(stream)? {
        Some(_) => Ok(()),
        None => Err(SessionEnd::Truncated),
    }
}
