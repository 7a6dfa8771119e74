//! The listening socket: bound by path, or inherited.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt,
};

/// Why a path or descriptor does not serve as a listening socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("another process listens on {}: stop it or choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket is there.
    #[error("{} exists and is not a socket: remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot listen on {}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An inherited descriptor is no listening Unix stream socket.
    #[error("descriptor {fd} is not a listening Unix stream socket")]
    NotListening {
        /// The descriptor.
        fd: i32,
    },
}

/// Listens on `path`, readable and writable by the owner only. A socket that a dead process left
/// there is replaced, one that answers is not.
///
/// # Errors
/// [`BindError`].
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let io_error = |source| BindError::Io {
        path: path.to_owned(),
        source,
    };
    match path.symlink_metadata() {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) if is_answered(path).map_err(io_error)? => {
            return Err(BindError::InUse {
                path: path.to_owned(),
            });
        }
        Ok(_) => std::fs::remove_file(path).map_err(io_error)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(error)),
    }
    let listener = UnixListener::bind(path).map_err(io_error)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io_error)?;
    Ok(listener)
}

/// Takes an inherited or received descriptor.
///
/// # Errors
/// [`BindError::NotListening`].
pub fn listener_from_fd(fd: OwnedFd) -> Result<UnixListener, BindError> {
    let is_listening = getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false)
        && getsockopt(&fd, sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream);
    let listener = UnixListener::from(fd);
    if !is_listening || listener.local_addr().is_err() {
        return Err(BindError::NotListening {
            fd: listener.as_raw_fd(),
        });
    }
    Ok(listener)
}

/// Whether a connect is accepted; never waits, even when the backlog is full.
fn is_answered(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(nix::Error::ECONNREFUSED) => Ok(false),
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
