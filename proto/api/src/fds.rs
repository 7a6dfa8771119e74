//! File descriptors for a daemon's requests. gRPC cannot carry them, so they travel beforehand over
//! a plain Unix stream socket: one message is a token and up to [`MAX_FDS`] descriptors, the
//! receiver answers one byte, and a later gRPC request names the token.
//!
//! Blocking code on one thread, fit for processes whose data path knows no async runtime. The
//! inbox's thread needs poll, accept4, recvmsg, sendto, close, setsockopt, read, futex and
//! clock_gettime once it is running.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, connect, sendmsg};
use thiserror::Error;

use crate::listen::{self, ListenError, SocketFile};

/// Descriptors in one message: a tap's queue pairs (16) fit twice.
pub const MAX_FDS: usize = 32;
/// Bytes of a token.
pub const MAX_TOKEN_BYTES: usize = 64;
/// Tokens an inbox holds at one time.
pub const MAX_TOKENS: usize = 64;
/// Descriptors that nobody asked for are closed after this.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(60);

/// A sender has this long to say what it wants, once connected.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two attempts to connect to a socket that is not there yet or whose backlog is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Room for one control message of [`MAX_FDS`] descriptors; with more the kernel truncates.
const CONTROL_BYTES: usize = 16 + MAX_FDS * size_of::<RawFd>();

const ANSWER_TAKEN: u8 = b'+';
const ANSWER_MALFORMED: u8 = b'?';
const ANSWER_DUPLICATE: u8 = b'=';
const ANSWER_FULL: u8 = b'#';

/// Sends `fds` under `token` to the inbox bound at `path` and waits for its answer.
///
/// # Errors
/// When the token or the number of descriptors is not allowed, when nobody answers by `deadline`,
/// or when the inbox refuses. The inbox then holds nothing of this message.
pub fn send(
    path: &Path,
    token: &str,
    fds: &[BorrowedFd<'_>],
    deadline: Duration,
) -> Result<(), SendError> {
    if !is_token(token.as_bytes()) {
        return Err(SendError::BadToken {
            token: token.to_owned(),
        });
    }
    if fds.is_empty() || fds.len() > MAX_FDS {
        return Err(SendError::BadCount { count: fds.len() });
    }
    let io = |source: io::Error| SendError::Io {
        path: path.to_owned(),
        source,
    };
    let until = Instant::now() + deadline;
    let stream = connect_by(path, until).map_err(io)?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(token.as_bytes())],
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(|errno| io(errno.into()))?;
    await_readable(stream.as_fd(), until).map_err(io)?;
    let mut answer = [0];
    match nix::unistd::read(&stream, &mut answer).map_err(|errno| io(errno.into()))? {
        0 => Err(io(io::ErrorKind::UnexpectedEof.into())),
        _ => match answer[0] {
            ANSWER_TAKEN => Ok(()),
            ANSWER_DUPLICATE => Err(SendError::Duplicate {
                token: token.to_owned(),
            }),
            ANSWER_FULL => Err(SendError::Full {
                path: path.to_owned(),
            }),
            _ => Err(SendError::Refused {
                path: path.to_owned(),
            }),
        },
    }
}

/// Where a daemon receives descriptors. Its thread and its socket file end with it.
#[derive(Debug)]
pub struct Inbox {
    held: Arc<Mutex<HashMap<String, Parcel>>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    _file: SocketFile,
}

#[derive(Debug)]
struct Parcel {
    fds: Vec<OwnedFd>,
    expires_at: Instant,
}

impl Inbox {
    /// Binds `path` (mode 0600) and starts receiving.
    ///
    /// # Errors
    /// When the socket cannot be bound or the thread cannot be started.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = listen::unix_socket(path)?;
        Self::start(listener, file, TOKEN_LIFETIME)
    }

    /// Starts receiving on a socket bound before by [`listen::unix_socket`]: a process that
    /// confines itself has no other thread until it has done so.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn on(listener: UnixListener, file: SocketFile) -> Result<Self, BindError> {
        Self::start(listener, file, TOKEN_LIFETIME)
    }

    fn start(
        listener: UnixListener,
        file: SocketFile,
        lifetime: Duration,
    ) -> Result<Self, BindError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| BindError::Thread(errno.into()))?;
        let stop = Arc::new(stop);
        let held = Arc::new(Mutex::new(HashMap::new()));
        let receiver = Receiver {
            listener,
            stop: stop.clone(),
            held: held.clone(),
            lifetime,
        };
        let thread = std::thread::Builder::new()
            .name("fd-inbox".into())
            .spawn(move || receiver.run())
            .map_err(BindError::Thread)?;
        Ok(Self {
            held,
            stop,
            thread: Some(thread),
            _file: file,
        })
    }

    /// The descriptors sent under `token`, once.
    pub fn take(&self, token: &str) -> Option<Vec<OwnedFd>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let parcel = held.remove(token)?;
        (parcel.expires_at > Instant::now()).then_some(parcel.fds)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The inbox's thread.
struct Receiver {
    listener: UnixListener,
    stop: Arc<EventFd>,
    held: Arc<Mutex<HashMap<String, Parcel>>>,
    lifetime: Duration,
}

impl Receiver {
    fn run(self) {
        loop {
            let timeout = self.drop_expired();
            let mut ready = [
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "descriptor inbox: cannot poll");
                    return;
                }
            }
            if ready[0].any().unwrap_or(false) {
                return;
            }
            if ready[1].any().unwrap_or(false) {
                match self.listener.accept() {
                    Ok((stream, _)) => self.receive(stream),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => {
                        tracing::warn!(%error, "descriptor inbox: cannot accept");
                        std::thread::sleep(RETRY_INTERVAL);
                    }
                }
            }
        }
    }

    /// Closes what nobody asked for in time; answers how long until the next is due.
    fn drop_expired(&self) -> PollTimeout {
        let now = Instant::now();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, parcel| parcel.expires_at > now);
        match held.values().map(|parcel| parcel.expires_at).min() {
            None => PollTimeout::NONE,
            Some(due) => poll_timeout(due.saturating_duration_since(now)),
        }
    }

    fn receive(&self, stream: UnixStream) {
        let answer = match receive_message(&stream) {
            Ok(Some((token, fds))) => self.hold(token, fds),
            Ok(None) => ANSWER_MALFORMED,
            Err(error) => {
                tracing::warn!(%error, "descriptor inbox: cannot receive");
                return;
            }
        };
        // A sender that no longer waits for the answer needs none.
        let _ = nix::sys::socket::send(stream.as_raw_fd(), &[answer], MsgFlags::MSG_NOSIGNAL);
    }

    fn hold(&self, token: String, fds: Vec<OwnedFd>) -> u8 {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.contains_key(&token) {
            return ANSWER_DUPLICATE;
        }
        if held.len() >= MAX_TOKENS {
            return ANSWER_FULL;
        }
        held.insert(
            token,
            Parcel {
                fds,
                expires_at: Instant::now() + self.lifetime,
            },
        );
        ANSWER_TAKEN
    }
}

/// One message; `None` if it is malformed. Whatever descriptors came with it are then closed.
fn receive_message(stream: &UnixStream) -> io::Result<Option<(String, Vec<OwnedFd>)>> {
    stream.set_nonblocking(true)?;
    await_readable(stream.as_fd(), Instant::now() + MESSAGE_TIMEOUT)?;
    // One byte more than a token may have shows that it is too long.
    let mut bytes = [0; MAX_TOKEN_BYTES + 1];
    let (len, fds, whole) = receive_with_descriptors(stream, &mut bytes)?;
    let token = &bytes[..len];
    if !whole || fds.is_empty() || fds.len() > MAX_FDS || !is_token(token) {
        return Ok(None);
    }
    Ok(Some((String::from_utf8_lossy(token).into_owned(), fds)))
}

/// Bytes received, descriptors received, and whether the kernel dropped none of either.
///
/// nix's `recvmsg` hides the control messages as soon as one descriptor had to be dropped, which
/// would leak the others.
fn receive_with_descriptors(
    stream: &UnixStream,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>, bool)> {
    // Of usize for a control message's alignment.
    let mut control = [0usize; CONTROL_BYTES.div_ceil(size_of::<usize>())];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a msghdr of zeroes is valid: no name, no vectors, no control buffer.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: the header points to buffers that live to the end of this function, with their true
    // lengths.
    let len = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the header and the control buffer, which both still live, with
    // well-formed control messages; the macros stay within msg_controllen. Descriptors are
    // read unaligned. The kernel just installed them in this process for us: nobody else knows
    // their numbers.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&header);
        while !message.is_null() {
            let rights = (*message).cmsg_level == libc::SOL_SOCKET
                && (*message).cmsg_type == libc::SCM_RIGHTS;
            if rights {
                let data_bytes = (*message).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                for index in 0..data_bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            message = libc::CMSG_NXTHDR(&header, message);
        }
    }
    let whole = header.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) == 0;
    Ok((len, fds, whole))
}

fn is_token(token: &[u8]) -> bool {
    (1..=MAX_TOKEN_BYTES).contains(&token.len())
        && token
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
}

/// A non-blocking connect, so that a full backlog cannot hold the caller past `until`.
fn connect_by(path: &Path, until: Instant) -> io::Result<OwnedFd> {
    let addr = UnixAddr::new(path)?;
    loop {
        let fd = listen::stream_socket()?;
        match connect(fd.as_raw_fd(), &addr) {
            Ok(()) => return Ok(fd),
            Err(errno @ (Errno::EAGAIN | Errno::ENOENT | Errno::ECONNREFUSED | Errno::EINTR)) => {
                if Instant::now() + RETRY_INTERVAL > until {
                    return Err(errno.into());
                }
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn await_readable(fd: BorrowedFd<'_>, until: Instant) -> io::Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut ready = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut ready, poll_timeout(left)) {
            Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Rounded up, so that a wait of less than a millisecond does not spin.
fn poll_timeout(left: Duration) -> PollTimeout {
    let millis = left.as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

/// Why descriptors were not delivered.
#[derive(Debug, Error)]
pub enum SendError {
    /// Tokens are 1 to 64 of `[a-zA-Z0-9-]`.
    #[error("{token:?} is no descriptor token: 1 to 64 letters, digits and hyphens")]
    BadToken {
        /// As given.
        token: String,
    },
    /// None or too many.
    #[error("{count} descriptors in one message; 1 to 32 are possible")]
    BadCount {
        /// As given.
        count: usize,
    },
    /// The token is in use.
    #[error("descriptors were already sent under the token {token:?}; choose another")]
    Duplicate {
        /// As given.
        token: String,
    },
    /// The receiver holds too many that nobody asked for.
    #[error("{path} holds 64 unused tokens; use them or wait a minute", path = path.display())]
    Full {
        /// The receiver's socket.
        path: PathBuf,
    },
    /// The receiver could not take the descriptors; it may be out of its own.
    #[error("{path} refused the descriptors; its log and its limit on open files may tell why", path = path.display())]
    Refused {
        /// The receiver's socket.
        path: PathBuf,
    },
    /// Nobody there, or no answer in time.
    #[error("cannot send descriptors to {path}", path = path.display())]
    Io {
        /// The receiver's socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Why an inbox could not be opened.
#[derive(Debug, Error)]
pub enum BindError {
    /// Its socket could not be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its thread could not be started.
    #[error("cannot start the thread that receives descriptors")]
    Thread(#[source] io::Error),
}

#[cfg(test)]
mod tests;
