//! A tap: an Ethernet interface of the kernel whose other end is a descriptor for each queue.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::nic::MAX_QUEUE_PAIRS;
use crate::nic::header::{MAX_HEADER_LEN_BYTES, Offloads};

/// What a tap must be opened with; with several queues also `IFF_MULTI_QUEUE`.
const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// How long a killed process may take to close its descriptors.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(1);

/// All queues of a tap.
#[derive(Debug)]
pub(crate) struct Tap {
    queues: Vec<OwnedFd>,
    is_multi_queue: bool,
    has_uso: bool,
}

impl Tap {
    /// Opens the tap `name`, or creates it, with a descriptor for each queue pair, and brings it
    /// up if that is permitted.
    ///
    /// # Errors
    /// [`TapError`], with the command that helps.
    pub(crate) fn open(name: &str, queue_pairs: u16) -> Result<Vec<OwnedFd>, TapError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', ' ', '%']) {
            return Err(TapError::BadName(name.to_owned()));
        }
        let mut request = interface_request(name);
        let multi_queue = if queue_pairs > 1 {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        };
        request.ifr_ifru.ifru_flags = (TAP_FLAGS | multi_queue) as libc::c_short;
        let queues = (0..queue_pairs)
            .map(|_| {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open("/dev/net/tun")
                    .map_err(TapError::OpenTun)?;
                claim(&file, &mut request)
                    .map_err(|source| TapError::open(name, queue_pairs, source))?;
                Ok(OwnedFd::from(file))
            })
            .collect::<Result<Vec<_>, TapError>>()?;
        if let Err(error) = bring_up(name) {
            tracing::warn!(
                tap = name,
                %error,
                "cannot bring the tap up; do so with: ip link set {name} up"
            );
        }
        Ok(queues)
    }

    /// Takes descriptors of one tap, one for each queue pair.
    ///
    /// # Errors
    /// [`TapError`] when they are something else.
    pub(crate) fn from_fds(queues: Vec<OwnedFd>) -> Result<Self, TapError> {
        if queues.is_empty() || queues.len() > usize::from(MAX_QUEUE_PAIRS) {
            return Err(TapError::BadCount(queues.len()));
        }
        let names = queues
            .iter()
            .map(|fd| adopt(fd, queues.len() > 1))
            .collect::<Result<Vec<_>, _>>()?;
        if names.iter().any(|name| *name != names[0]) {
            return Err(TapError::SeveralTaps);
        }
        let mut tap = Self {
            is_multi_queue: queues.len() > 1,
            queues,
            has_uso: false,
        };
        tap.set_header_len(MAX_HEADER_LEN_BYTES)
            .map_err(TapError::Ioctl)?;
        // Linux 6.2 and newer.
        let uso = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        tap.has_uso = tap.set_offload_flags(uso).is_ok();
        tap.set_offload_flags(0).map_err(TapError::Ioctl)?;
        Ok(tap)
    }

    /// One for each queue pair.
    pub(super) fn num_queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Whether the kernel segments UDP.
    pub(super) fn has_uso(&self) -> bool {
        self.has_uso
    }

    /// The descriptor of one queue.
    pub(crate) fn queue(&self, pair: u16) -> &OwnedFd {
        &self.queues[usize::from(pair)]
    }

    /// What frames that come out of the tap may leave unfinished.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let flags = offloads.tun_flags();
        // A kernel that does not know a flag refuses all of them.
        self.set_offload_flags(match self.has_uso {
            true => flags,
            false => flags & !(libc::TUN_F_USO4 | libc::TUN_F_USO6),
        })
    }

    /// Shows the host a cable that is in or out (Linux 5.0).
    pub(super) fn set_carrier(&self, is_up: bool) -> io::Result<()> {
        let carrier = libc::c_int::from(is_up);
        // SAFETY: TUNSETCARRIER reads one live int.
        check(unsafe { libc::ioctl(self.raw(0), libc::TUNSETCARRIER, &carrier) })
    }

    /// Length of the header before each frame, both ways.
    fn set_header_len(&self, len_bytes: usize) -> io::Result<()> {
        let len_bytes = len_bytes as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one live int.
        check(unsafe { libc::ioctl(self.raw(0), libc::TUNSETVNETHDRSZ, &len_bytes) })
    }

    /// Lets the kernel put frames into this queue, or keeps it from doing so. A tap with a single
    /// queue keeps it.
    pub(super) fn set_queue_attached(&self, pair: u16, attached: bool) -> io::Result<()> {
        if !self.is_multi_queue {
            return Ok(());
        }
        let mut request = interface_request("");
        request.ifr_ifru.ifru_flags = if attached {
            libc::IFF_ATTACH_QUEUE as libc::c_short
        } else {
            libc::IFF_DETACH_QUEUE as libc::c_short
        };
        // SAFETY: TUNSETQUEUE reads one live ifreq.
        check(unsafe { libc::ioctl(self.raw(pair), libc::TUNSETQUEUE, &request) })
    }

    fn set_offload_flags(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes an integer.
        check(unsafe { libc::ioctl(self.raw(0), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn raw(&self, pair: u16) -> RawFd {
        self.queue(pair).as_raw_fd()
    }
}

/// TUNSETIFF. A predecessor that was killed a moment ago may not have let go of the tap yet.
fn claim(file: &File, request: &mut libc::ifreq) -> io::Result<()> {
    let until = Instant::now() + PREDECESSOR_TIMEOUT;
    loop {
        // SAFETY: `request` is a live ifreq, which TUNSETIFF reads and writes.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut *request) };
        match check(answer) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Checks that `fd` is a tap's queue with what this daemon needs, makes it non-blocking, and
/// returns the tap's name.
fn adopt(fd: &OwnedFd, is_multi_queue: bool) -> Result<[libc::c_char; libc::IFNAMSIZ], TapError> {
    let mut request = interface_request("");
    // SAFETY: TUNGETIFF writes one live ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) })
        .map_err(TapError::NoTap)?;
    // SAFETY: TUNGETIFF filled in the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let wanted = if is_multi_queue {
        TAP_FLAGS | libc::IFF_MULTI_QUEUE
    } else {
        TAP_FLAGS
    };
    if flags & wanted != wanted {
        return Err(TapError::BadFlags {
            flags: flags as u16,
            wanted: wanted as u16,
        });
    }
    // SAFETY: F_GETFL and F_SETFL take and return integers.
    check(unsafe {
        let status = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, status | libc::O_NONBLOCK)
    })
    .map_err(TapError::Ioctl)?;
    Ok(request.ifr_name)
}

fn bring_up(name: &str) -> io::Result<()> {
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut request = interface_request(name);
    // SAFETY: SIOCGIFFLAGS reads and writes one live ifreq and fills in the flags.
    let flags = unsafe {
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS,
            &mut request,
        ))?;
        libc::c_int::from(request.ifr_ifru.ifru_flags)
    };
    if flags & libc::IFF_UP != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = (flags | libc::IFF_UP) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one live ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, valid when all zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A tap that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    #[error("{0:?} is no name for an interface; at most 15 characters, without / % and spaces")]
    BadName(String),
    #[error(
        "cannot open /dev/net/tun; load its module (modprobe tun) and let this user open it (chmod 666, as Debian has it)"
    )]
    OpenTun(#[source] io::Error),
    #[error(
        "not permitted to open the tap {name:?}; create it beforehand, as root: \
         ip tuntap add {name} mode tap user $USER vnet_hdr{multi_queue} && ip link set {name} up"
    )]
    NotPermitted {
        name: String,
        multi_queue: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the tap {name:?} is in use by another process; stop it or choose another tap")]
    InUse {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "{name:?} is no tap, or one with a different number of queues; recreate it with: \
         ip link del {name}; ip tuntap add {name} mode tap vnet_hdr{multi_queue}"
    )]
    Mismatch {
        name: String,
        multi_queue: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot open the tap {name:?}")]
    Open {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{0} descriptors; give one for each queue pair, {MAX_QUEUE_PAIRS} at most")]
    BadCount(usize),
    #[error("the descriptor is no tap; open /dev/net/tun and use TUNSETIFF")]
    NoTap(#[source] io::Error),
    #[error(
        "the tap was opened with flags {flags:#06x}, {wanted:#06x} are needed \
         (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, and IFF_MULTI_QUEUE for several queue pairs)"
    )]
    BadFlags { flags: u16, wanted: u16 },
    #[error("the descriptors belong to different taps")]
    SeveralTaps,
    #[error("the kernel refuses to set up the tap")]
    Ioctl(#[source] io::Error),
    #[error("no descriptors left to tell the tap's queues of changes")]
    Event(#[source] io::Error),
}

impl TapError {
    fn open(name: &str, queue_pairs: u16, source: io::Error) -> Self {
        let name = name.to_owned();
        let multi_queue = if queue_pairs > 1 { " multi_queue" } else { "" };
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted {
                name,
                multi_queue,
                source,
            },
            Some(libc::EBUSY) => Self::InUse { name, source },
            Some(libc::EINVAL) => Self::Mismatch {
                name,
                multi_queue,
                source,
            },
            _ => Self::Open { name, source },
        }
    }
}
