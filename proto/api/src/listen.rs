//! Sockets to listen on: Unix sockets nobody else may open, TCP addresses, and errors that name the
//! address and the remedy. [`Address`] is how command lines write both; [`Sweeper`] cleans up after
//! a start that failed.

mod sweeper;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;

pub use sweeper::Sweeper;

/// Connections that may wait to be accepted. More than a host has controllers and people.
const BACKLOG: i32 = 128;

/// A bound socket, ready for [`crate::serve`] or [`crate::metrics`].
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket with mode 0600; its file goes away with the listener.
    Unix(UnixListener, SocketFile),
    /// A TCP socket.
    Tcp(TcpListener),
    /// A TCP socket on which TLS is spoken.
    Tls(TcpListener),
}

impl Listener {
    /// The file, of a Unix socket.
    pub fn socket_file(&self) -> Option<&SocketFile> {
        match self {
            Self::Unix(_, file) => Some(file),
            Self::Tcp(_) | Self::Tls(_) => None,
        }
    }

    /// Binds either kind.
    ///
    /// # Errors
    /// See [`unix`] and [`tcp`].
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        match address {
            Address::Unix(path) => unix(path),
            Address::Tcp(addr) => tcp_socket(addr).map(Self::Tcp),
            Address::Tls(addr) => tcp_socket(addr).map(Self::Tls),
        }
    }

    /// The address as it is now: with the port that the kernel chose when 0 was asked for.
    pub fn address(&self) -> Address {
        let bound = |listener: &TcpListener| {
            let addr = listener.local_addr();
            addr.map(|addr| addr.to_string()).unwrap_or_default()
        };
        match self {
            Self::Unix(_, file) => Address::Unix(file.path.clone()),
            Self::Tcp(listener) => Address::Tcp(bound(listener)),
            Self::Tls(listener) => Address::Tls(bound(listener)),
        }
    }
}

/// Binds a Unix socket at `path` with mode 0600. A socket file on which nobody listens any more is
/// replaced; anything else at `path` is left alone.
///
/// # Errors
/// When another process listens there, `path` is no socket or too long, or the directory refuses.
pub fn unix(path: &Path) -> Result<Listener, ListenError> {
    let (listener, file) = unix_socket(path)?;
    Ok(Listener::Unix(listener, file))
}

/// As [`unix`], for callers that speak something else than gRPC on the socket.
///
/// # Errors
/// As [`unix`].
pub fn unix_socket(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let err = |source: io::Error| ListenError::Unix {
        path: path.to_owned(),
        source,
    };
    let addr = UnixAddr::new(path).map_err(|_| ListenError::PathTooLong {
        path: path.to_owned(),
        len_bytes: path.as_os_str().len(),
    })?;
    remove_stale(path)?;
    let fd = stream_socket().map_err(err)?;
    // The mode of the socket itself becomes the file's (less the umask), so at no moment can
    // another user connect.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| err(errno.into()))?;
    match bind(fd.as_raw_fd(), &addr) {
        Ok(()) => {}
        Err(nix::errno::Errno::EADDRINUSE) => {
            return Err(ListenError::UnixInUse {
                path: path.to_owned(),
            });
        }
        Err(errno) => return Err(err(errno.into())),
    }
    let file = SocketFile::adopt(path).map_err(err)?;
    let backlog = Backlog::new(BACKLOG).map_err(|errno| err(errno.into()))?;
    listen(&fd, backlog).map_err(|errno| err(errno.into()))?;
    Ok((UnixListener::from(fd), file))
}

/// Binds a TCP address, `HOST:PORT`; port 0 lets the kernel choose.
///
/// # Errors
/// When the port is taken, the address is not this host's, or it cannot be parsed.
pub fn tcp(addr: &str) -> Result<Listener, ListenError> {
    tcp_socket(addr).map(Listener::Tcp)
}

fn tcp_socket(addr: &str) -> Result<TcpListener, ListenError> {
    let err = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::TcpInUse {
            addr: addr.to_owned(),
        },
        _ => ListenError::Tcp {
            addr: addr.to_owned(),
            source,
        },
    };
    let resolved: Vec<SocketAddr> = addr.to_socket_addrs().map_err(err)?.collect();
    TcpListener::bind(resolved.as_slice()).map_err(err)
}

/// Removes `path` if it is a socket on which nobody listens.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let err = |source: io::Error| ListenError::Unix {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(err(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ListenError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    if answers(path) {
        return Err(ListenError::UnixInUse {
            path: path.to_owned(),
        });
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(err(error)),
        _ => Ok(()),
    }
}

/// Whether a process listens on the Unix socket at `path`. Never blocks: a full backlog counts as
/// an answer.
pub fn answers(path: &Path) -> bool {
    let (Ok(addr), Ok(fd)) = (UnixAddr::new(path), stream_socket()) else {
        return false;
    };
    match connect(fd.as_raw_fd(), &addr) {
        Ok(()) | Err(nix::errno::Errno::EAGAIN) => true,
        // EACCES and the like: somebody else's; binding will report it.
        Err(errno) => !matches!(
            errno,
            nix::errno::Errno::ECONNREFUSED | nix::errno::Errno::ENOENT
        ),
    }
}

/// A non-blocking Unix stream socket that children do not inherit.
pub(crate) fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

/// The file of a bound Unix socket; dropping removes it unless another socket took its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Which file of a name: inode numbers alone are used again at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    inode: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Self {
            inode: meta.ino(),
            // Nobody writes to the file of a socket.
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

impl SocketFile {
    fn adopt(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: Identity::of(path)?,
        })
    }

    /// For whoever outlives this process.
    fn again(&self) -> Self {
        Self {
            path: self.path.clone(),
            identity: self.identity,
        }
    }

    fn remove(&self) {
        // A sandboxed process may not be allowed to; then the next one to bind finds it stale.
        if Identity::of(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Where a server listens, as written on a command line: `https://HOST:PORT` with TLS, `HOST:PORT`
/// without, or `unix:PATH`. `http://` in front of the second is understood too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`
    Tcp(String),
    /// `https://HOST:PORT`
    Tls(String),
    /// `unix:PATH`
    Unix(PathBuf),
}

impl Address {
    /// Whether only this host can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(addr) | Self::Tls(addr) => addr
                .to_socket_addrs()
                .is_ok_and(|mut all| all.all(|addr| addr.ip().is_loopback())),
        }
    }

    /// Whether TLS is spoken there.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Whether what is said there stays on this host or is kept secret by TLS.
    pub fn is_private(&self) -> bool {
        self.is_tls() || self.is_local()
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError {
            text: text.to_owned(),
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() {
                Err(error())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let (addr, tls) = match text.strip_prefix("https://") {
            Some(addr) => (addr, true),
            None => (text.strip_prefix("http://").unwrap_or(text), false),
        };
        let addr = addr.trim_end_matches('/');
        let (host, port) = addr.rsplit_once(':').ok_or_else(error)?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(error());
        }
        Ok(match tls {
            true => Self::Tls(addr.to_owned()),
            false => Self::Tcp(addr.to_owned()),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => f.write_str(addr),
            Self::Tls(addr) => write!(f, "https://{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// An address nobody can parse.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is no address: write HOST:PORT (127.0.0.1:7070), https://HOST:PORT or unix:PATH")]
pub struct AddressError {
    text: String,
}

/// Why a socket could not be bound.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another process has the port.
    #[error(
        "cannot listen on {addr}: another process does already; stop it or choose another port"
    )]
    TcpInUse {
        /// As asked for.
        addr: String,
    },
    /// Another process listens on the socket.
    #[error("cannot listen on {path}: another process does already; stop it or choose another path", path = path.display())]
    UnixInUse {
        /// As asked for.
        path: PathBuf,
    },
    /// Something that is no socket stands in the way.
    #[error("cannot listen on {path}: a file that is no socket is there; move it away or choose another path", path = path.display())]
    NotASocket {
        /// As asked for.
        path: PathBuf,
    },
    /// `sun_path` is short.
    #[error("cannot listen on {path}: {len_bytes} bytes are too long for a Unix socket (107 at most); choose a shorter directory", path = path.display())]
    PathTooLong {
        /// As asked for.
        path: PathBuf,
        /// Its length.
        len_bytes: usize,
    },
    /// Anything else about a Unix socket: no such directory, no permission.
    #[error("cannot listen on {path}", path = path.display())]
    Unix {
        /// As asked for.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Anything else about a TCP address.
    #[error("cannot listen on {addr}")]
    Tcp {
        /// As asked for.
        addr: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn unix_socket_is_private_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = unix(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind");
        let _listener = unix(&path).unwrap();
        assert!(answers(&path));
    }

    #[test]
    fn socket_in_use_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = unix(&path).unwrap();
        let error = unix(&path).unwrap_err();
        assert!(matches!(error, ListenError::UnixInUse { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
        assert!(answers(&path));
    }

    #[test]
    fn regular_file_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(unix(&path), Err(ListenError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn replaced_socket_file_survives_the_old_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let old = unix(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _new = unix(&path).unwrap();
        drop(old);
        assert!(path.exists());
    }

    #[test]
    fn over_long_path_says_so() {
        let path = PathBuf::from("/tmp").join("x".repeat(120));
        let error = unix(&path).unwrap_err().to_string();
        assert!(error.contains("107 at most"), "{error}");
    }

    #[test]
    fn port_in_use_names_address_and_remedy() {
        let first = tcp("127.0.0.1:0").unwrap();
        let addr = first.address().to_string();
        let error = tcp(&addr).unwrap_err().to_string();
        assert!(
            error.contains(&addr) && error.contains("choose another port"),
            "{error}"
        );
    }

    #[test]
    fn addresses_parse_and_print() {
        for (text, printed) in [
            ("127.0.0.1:7070", "127.0.0.1:7070"),
            ("http://127.0.0.1:7070/", "127.0.0.1:7070"),
            ("[::1]:7070", "[::1]:7070"),
            ("https://host:1/", "https://host:1"),
            ("unix:/run/x", "unix:/run/x"),
            ("unix:///run/x", "unix:/run/x"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), printed);
        }
        for bad in ["", "7070", ":7070", "host:99999", "unix:", "https://x"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn loopback_and_unix_are_local() {
        assert!("127.0.0.1:1".parse::<Address>().unwrap().is_local());
        assert!("unix:/x".parse::<Address>().unwrap().is_local());
        let open = "0.0.0.0:1".parse::<Address>().unwrap();
        assert!(!open.is_local() && !open.is_private());
        let secret = "https://0.0.0.0:1".parse::<Address>().unwrap();
        assert!(!secret.is_local() && secret.is_private());
    }
}
