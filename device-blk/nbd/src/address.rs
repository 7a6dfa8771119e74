//! Where a server listens, and how it is reached.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};

/// The port that NBD has from IANA.
pub const DEFAULT_PORT: u16 = 10809;
/// A host name cannot be longer, and a Unix socket's path is shorter.
const MAX_ADDRESS_BYTES: usize = 300;

/// A quiet peer is asked whether it lives after this long,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// again after this long,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// and is given up after this many questions.
const KEEPALIVE_PROBES: u32 = 3;
/// How long sent data may stay unacknowledged.
const USER_TIMEOUT: Duration = Duration::from_secs(25);

/// `HOST:PORT` (`[...]:PORT` for IPv6 addresses) or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host's name or number, and a port.
    Tcp {
        /// Without brackets.
        host: String,
        /// Not 0.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address {0:?} is neither HOST:PORT (or [IPv6]:PORT) nor unix:/PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = || AddressError(text.chars().take(MAX_ADDRESS_BYTES).collect());
        if text.len() > MAX_ADDRESS_BYTES || text.contains('\0') {
            return Err(refused());
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            // Also checks the length.
            UnixAddr::new(&path).map_err(|_| refused())?;
            return path
                .is_absolute()
                .then_some(Self::Unix(path))
                .ok_or_else(refused);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
        let port = port.parse().ok().filter(|port| *port != 0);
        let host = match host.strip_prefix('[') {
            Some(rest) => rest
                .strip_suffix(']')
                .filter(|host| host.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6())),
            None => Some(host).filter(|host| is_host(host)),
        };
        match (host, port) {
            (Some(host), Some(port)) => Ok(Self::Tcp {
                host: host.to_owned(),
                port,
            }),
            _ => Err(refused()),
        }
    }
}

/// An IPv4 address or a DNS name.
fn is_host(host: &str) -> bool {
    let is_label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !label.is_empty() && label.len() <= 63 && label.bytes().all(allowed)
    };
    host.len() <= 253 && host.trim_end_matches('.').split('.').all(is_label)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// The name that a server's certificate has to bear, unless told otherwise.
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Tcp { host, .. } => Some(host),
            Self::Unix(_) => None,
        }
    }

    /// Connects, trying each address of a name in turn. The socket is ready for
    /// [`crate::client::Dial`]: it notices a peer that has gone.
    ///
    /// # Errors
    /// What the last address tried answered.
    pub fn connect(&self, deadline: Instant) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp { host, port } => connect_tcp(host, *port, deadline),
            Self::Unix(path) => connect_unix(&UnixAddr::new(path)?),
        }
    }
}

fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<OwnedFd> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match connect_ip(address, deadline) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_ip(address: SocketAddr, deadline: Instant) -> io::Result<OwnedFd> {
    let patience = deadline.saturating_duration_since(Instant::now());
    if patience.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let socket = TcpStream::connect_timeout(&address, patience)?;
    watch_peer(&socket)?;
    Ok(socket.into())
}

/// Makes a TCP socket send at once and notice when its peer has gone without a word.
///
/// # Errors
/// It is no TCP socket.
pub fn watch_peer(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket::setsockopt(socket, sockopt::KeepAlive, &true)?;
    socket::setsockopt(
        socket,
        sockopt::TcpKeepIdle,
        &(KEEPALIVE_IDLE.as_secs() as u32),
    )?;
    socket::setsockopt(
        socket,
        sockopt::TcpKeepInterval,
        &(KEEPALIVE_INTERVAL.as_secs() as u32),
    )?;
    socket::setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    let user_timeout_ms = USER_TIMEOUT.as_millis() as u32;
    Ok(socket::setsockopt(
        socket,
        sockopt::TcpUserTimeout,
        &user_timeout_ms,
    )?)
}

/// A listener with a full backlog is told as an error, not waited for: the caller tries again.
fn connect_unix(path: &UnixAddr) -> io::Result<OwnedFd> {
    let socket = socket::socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    socket::connect(socket.as_raw_fd(), path)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_told() {
        for text in [
            "10.0.0.1:10809",
            "disks.example.org:1",
            "[fd00::1]:10809",
            "unix:/run/nbd.sock",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("unix:/{}", "x".repeat(200));
        for text in [
            "",
            "host",
            "host:",
            "host:0",
            "host:70000",
            ":10809",
            "fd00::1:10809",
            "[10.0.0.1]:1",
            "[fd00::1:1",
            "a b:1",
            "a..b:1",
            "unix:",
            "unix:relative",
            "unix:/a\0b",
            &long,
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
