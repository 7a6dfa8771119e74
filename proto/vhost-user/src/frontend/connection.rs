//! One connection to a backend on which no request can last for ever.
//!
//! After any error but [`RequestError::Refused`] the stream is out of step or dead, and the
//! connection must be dropped.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use faults::{DeviceFaults, Point};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::channel::RequestChannel;
use super::memory::MemoryTable;
use super::{misbehaviour, watchdog};

/// Rings of one device: the index travels in 8 bits of a message.
pub const MAX_QUEUES: u16 = 256;
/// How long to wait before a full backlog is tried again.
const BACKLOG_RETRY: Duration = Duration::from_millis(5);

/// No connection could be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {socket}", socket = .socket.display())]
pub struct ConnectError {
    /// Where the backend should listen.
    pub socket: PathBuf,
    /// The system call's error; `WouldBlock` when the backlog stayed full.
    #[source]
    pub source: io::Error,
}

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No answer came in time; the socket was shut down.
    #[error("the backend did not answer {request} within {timeout_ms} ms")]
    Timeout {
        /// Which request.
        request: &'static str,
        /// How long it was given.
        timeout_ms: u128,
    },
    /// The backend answered with an error code. The connection can go on.
    #[error("the backend refused {request}")]
    Refused {
        /// Which request.
        request: &'static str,
    },
    /// The backend hung up, or broke the protocol.
    #[error("{request} failed")]
    Failed {
        /// Which request.
        request: &'static str,
        /// What the protocol layer says.
        #[source]
        source: vhost::Error,
    },
}

type Result<T> = std::result::Result<T, RequestError>;

/// One connection to a backend; requests are made one at a time.
pub struct Connection {
    frontend: Frontend,
    stream: Arc<UnixStream>,
    timeout: Duration,
    channel: Option<RequestChannel>,
    /// REPLY_ACK is in force.
    acknowledged: bool,
    faults: Arc<DeviceFaults>,
}

impl Connection {
    /// Connects to the listener at `path`. A full backlog is retried until `timeout` has passed;
    /// every other failure is reported at once. Requests are given `timeout` each.
    ///
    /// # Errors
    /// The system call's error.
    pub fn connect(path: &Path, timeout: Duration) -> std::result::Result<Self, ConnectError> {
        let deadline = Instant::now() + timeout;
        let stream = connect_stream(path, deadline).map_err(|source| ConnectError {
            socket: path.to_owned(),
            source,
        })?;
        Self::from_stream(stream, timeout).map_err(|source| ConnectError {
            socket: path.to_owned(),
            source,
        })
    }

    /// Uses a stream that is connected already, for instance one end of a pair.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn from_stream(stream: UnixStream, timeout: Duration) -> io::Result<Self> {
        let duplicate = stream.try_clone()?;
        Ok(Self {
            frontend: Frontend::from_stream(duplicate, u64::from(MAX_QUEUES)),
            stream: Arc::new(stream),
            timeout,
            channel: None,
            acknowledged: false,
            faults: DeviceFaults::none(),
        })
    }

    /// Gives later requests `timeout` each.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Lets later requests go wrong on purpose.
    pub fn use_faults(&mut self, faults: &Arc<DeviceFaults>) {
        self.faults = Arc::clone(faults);
    }

    /// A handle that can hang up from another thread.
    #[must_use]
    pub fn hang_up_handle(&self) -> HangUp {
        HangUp(Arc::clone(&self.stream))
    }

    /// SET_OWNER.
    ///
    /// # Errors
    /// See [`RequestError`]; so for all the requests.
    pub fn set_owner(&mut self) -> Result<()> {
        self.request("SET_OWNER", |frontend| frontend.set_owner())
    }

    /// GET_FEATURES.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn features(&mut self) -> Result<u64> {
        self.request("GET_FEATURES", |frontend| frontend.get_features())
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.request("SET_FEATURES", |frontend| frontend.set_features(features))
    }

    /// GET_PROTOCOL_FEATURES; bits that this implementation does not know are dropped.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        self.request("GET_PROTOCOL_FEATURES", Frontend::get_protocol_features)
    }

    /// SET_PROTOCOL_FEATURES. From then on requests ask for replies if REPLY_ACK is among them.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_protocol_features(&mut self, features: VhostUserProtocolFeatures) -> Result<()> {
        self.request("SET_PROTOCOL_FEATURES", |frontend| {
            frontend.set_protocol_features(features)
        })?;
        if features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            self.acknowledged = true;
        }
        Ok(())
    }

    /// SET_BACKEND_REQ_FD: the backend may say from then on that its configuration changed. One
    /// that refuses is left in peace.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn open_channel(&mut self) -> Result<()> {
        const REQUEST: &str = "SET_BACKEND_REQ_FD";
        let (channel, theirs) = RequestChannel::new().map_err(|source| RequestError::Failed {
            request: REQUEST,
            source: vhost::Error::IOError(source),
        })?;
        match self.request(REQUEST, |frontend| frontend.set_backend_request_fd(&theirs)) {
            Ok(()) => self.channel = Some(channel),
            Err(RequestError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// What the backend asks for by itself.
    pub(super) fn channel(&self) -> Option<&RequestChannel> {
        self.channel.as_ref()
    }

    pub(super) fn channel_mut(&mut self) -> &mut Option<RequestChannel> {
        &mut self.channel
    }

    /// GET_QUEUE_NUM: a number of rings, or of ring pairs for network devices.
    ///
    /// Exchanged by hand, because [`Frontend`] takes the answer for its own limit on ring indexes
    /// and would then refuse the second ring of a network device that has one pair.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn queue_num(&mut self) -> Result<u64> {
        let stream = Arc::clone(&self.stream);
        self.request("GET_QUEUE_NUM", move |_| {
            exchange_u64(&stream, FrontendReq::GET_QUEUE_NUM).map_err(vhost::Error::IOError)
        })
    }

    /// GET_CONFIG of the first `len` bytes of the device configuration space.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn config(&mut self, len: u16) -> Result<Vec<u8>> {
        let request = vec![0; usize::from(len)];
        self.request("GET_CONFIG", |frontend| {
            let flags = VhostUserConfigFlags::empty();
            frontend
                .get_config(0, u32::from(len), flags, &request)
                .map(|(_, config)| config)
        })
    }

    /// SET_CONFIG.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.request("SET_CONFIG", |frontend| {
            frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
        })
    }

    /// SET_MEM_TABLE.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_mem_table(&mut self, memory: &MemoryTable) -> Result<()> {
        let regions = memory.to_vhost();
        self.request("SET_MEM_TABLE", |frontend| {
            frontend.set_mem_table(&regions).map(drop)
        })
    }

    /// ADD_MEM_REG for each region.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn add_mem_regions(&mut self, memory: &MemoryTable) -> Result<()> {
        for region in memory.to_vhost() {
            self.request("ADD_MEM_REG", |frontend| {
                frontend.add_mem_region(&region).map(drop)
            })?;
        }
        Ok(())
    }

    /// GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn inflight_fd(
        &mut self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(VhostUserInflight, File)> {
        let request = VhostUserInflight::new(0, 0, num_queues, queue_size);
        self.request("GET_INFLIGHT_FD", |frontend| {
            let (description, file) = frontend.get_inflight_fd(&request)?;
            set_close_on_exec(&file)?;
            Ok((description, file))
        })
    }

    /// SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_inflight_fd(&mut self, description: &VhostUserInflight, file: &File) -> Result<()> {
        self.request("SET_INFLIGHT_FD", |frontend| {
            frontend.set_inflight_fd(description, file.as_raw_fd())
        })
    }

    /// SET_VRING_NUM.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_num(&mut self, index: u16, size: u16) -> Result<()> {
        self.request("SET_VRING_NUM", |frontend| {
            frontend.set_vring_num(index.into(), size)
        })
    }

    /// SET_VRING_BASE; a packed ring's base has two halves.
    ///
    /// Exchanged by hand, because [`Frontend`] has no room for the upper half.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_base(&mut self, index: u16, base: u32) -> Result<()> {
        let (stream, acknowledged) = (Arc::clone(&self.stream), self.acknowledged);
        self.request("SET_VRING_BASE", move |_| {
            let body = [u32::from(index), base].map(u32::to_le_bytes).concat();
            let refused = exchange_set(&stream, FrontendReq::SET_VRING_BASE, &body, acknowledged)
                .map_err(vhost::Error::IOError)?;
            match refused {
                true => Err(ProtocolError::BackendInternalError.into()),
                false => Ok(()),
            }
        })
    }

    /// SET_VRING_ADDR.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_addr(&mut self, index: u16, addresses: &VringConfigData) -> Result<()> {
        self.request("SET_VRING_ADDR", |frontend| {
            frontend.set_vring_addr(index.into(), addresses)
        })
    }

    /// SET_VRING_ERR.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_err(&mut self, index: u16, err: &EventFd) -> Result<()> {
        self.request("SET_VRING_ERR", |frontend| {
            frontend.set_vring_err(index.into(), err)
        })
    }

    /// SET_VRING_CALL.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_call(&mut self, index: u16, call: &EventFd) -> Result<()> {
        self.request("SET_VRING_CALL", |frontend| {
            frontend.set_vring_call(index.into(), call)
        })
    }

    /// SET_VRING_KICK: the ring starts.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_kick(&mut self, index: u16, kick: &EventFd) -> Result<()> {
        self.request("SET_VRING_KICK", |frontend| {
            frontend.set_vring_kick(index.into(), kick)
        })
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn set_vring_enable(&mut self, index: u16, enable: bool) -> Result<()> {
        self.request("SET_VRING_ENABLE", |frontend| {
            frontend.set_vring_enable(index.into(), enable)
        })
    }

    /// GET_VRING_BASE: the ring stops; where it would go on.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn vring_base(&mut self, index: u16) -> Result<u32> {
        self.request("GET_VRING_BASE", |frontend| {
            frontend.get_vring_base(index.into())
        })
    }

    /// RESET_DEVICE.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn reset_device(&mut self) -> Result<()> {
        self.request("RESET_DEVICE", Frontend::reset_device)
    }

    /// Runs one request under the watchdog.
    fn request<T>(
        &mut self,
        request: &'static str,
        run: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        if self.faults.is_armed(Point::Message) {
            let stream = self.stream.as_fd();
            misbehaviour::before_request(&self.faults, request, stream).map_err(|source| {
                RequestError::Failed {
                    request,
                    source: vhost::Error::IOError(source),
                }
            })?;
        }
        let watch =
            watchdog::watch(&self.stream, Instant::now() + self.timeout).map_err(|source| {
                RequestError::Failed {
                    request,
                    source: vhost::Error::IOError(source),
                }
            })?;
        let outcome = run(&mut self.frontend);
        if watch.finish() {
            return Err(RequestError::Timeout {
                request,
                timeout_ms: self.timeout.as_millis(),
            });
        }
        outcome.map_err(|source| match source {
            vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError) => {
                RequestError::Refused { request }
            }
            source => RequestError::Failed { request, source },
        })
    }
}

/// Readable or hung up means that the session is over: a backend never speaks unasked here.
impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Ends a connection from any thread.
#[derive(Clone)]
pub struct HangUp(Arc<UnixStream>);

impl HangUp {
    /// Shuts the socket down: the request in progress fails, and so do all later ones.
    pub fn hang_up(&self) {
        // A socket that is down already is what is wanted.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn connect_stream(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            // A Unix socket gives no event when its peer's backlog has room again.
            Err(Errno::EAGAIN) if Instant::now() + BACKLOG_RETRY < deadline => {
                thread::sleep(BACKLOG_RETRY)
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Sends a request without a body and receives 64 bits.
fn exchange_u64(mut stream: &UnixStream, request: FrontendReq) -> io::Result<u64> {
    let header = [request as u32, VERSION, 0].map(u32::to_le_bytes).concat();
    stream.write_all(&header)?;
    receive_u64(stream, request)
}

/// Sends a request and awaits its acknowledgement, if there is one; whether it is a refusal.
fn exchange_set(
    mut stream: &UnixStream,
    request: FrontendReq,
    body: &[u8],
    acknowledged: bool,
) -> io::Result<bool> {
    let flags = VERSION | if acknowledged { FLAG_NEED_REPLY } else { 0 };
    let header = [request as u32, flags, body.len() as u32].map(u32::to_le_bytes);
    stream.write_all(&[&header.concat(), body].concat())?;
    Ok(acknowledged && receive_u64(stream, request)? != 0)
}

fn receive_u64(mut stream: &UnixStream, request: FrontendReq) -> io::Result<u64> {
    let mut reply = [0; 20];
    stream.read_exact(&mut reply)?;
    let expected = [request as u32, VERSION | FLAG_REPLY, 8].map(u32::to_le_bytes);
    if reply[..12] != expected.concat() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the reply is to another request or of another size",
        ));
    }
    Ok(u64::from_le_bytes(
        reply[12..].try_into().expect("20 bytes less 12"),
    ))
}

fn set_close_on_exec(file: &File) -> vhost::Result<()> {
    fcntl(file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map(drop)
        .map_err(|errno| vhost::Error::IOError(errno.into()))
}
