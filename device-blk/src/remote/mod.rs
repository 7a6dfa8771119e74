//! Disks on other hosts, through a confined process that cannot reach other hosts.
//!
//! Connections come from the [`connector`], a process of its own, started before this one is
//! confined and only when the command line names a remote disk or `--remote`. It connects to the
//! addresses that the command line allows and passes each connection on; what then travels over
//! it, TLS included, it does not see.

pub(crate) mod connector;
mod dialing;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use api::device::{NbdSource, NbdStatus};
use nbd::client::{ConnectError, Connected, HandshakeError, Options, State};
use nbd::{Address, AddressError, Generation, MAX_PEM_BYTES, TlsClient, TlsError};
use tonic::Status;

use crate::image::nbd::NbdImage;
use crate::image::{Image, SECTOR_BYTES, key};
pub(crate) use connector::Allowed;
use dialing::{Connector, Dialer};

/// The one connector of this process.
static CONNECTOR: OnceLock<Connector> = OnceLock::new();

/// Starts the connector for `allowed` addresses. The process has a single thread, and is not
/// confined yet.
///
/// # Errors
/// No process or no socket can be had.
pub(crate) fn start_connector(allowed: Allowed) -> io::Result<()> {
    let connector = Connector::start(allowed)?;
    assert!(CONNECTOR.set(connector).is_ok(), "there is one connector");
    Ok(())
}

/// Connects to the server of `source` for the [`open`] that follows: that there is no server is
/// told before the process is confined, when it can still remove its sockets. Nothing is read
/// from the connection yet.
///
/// # Errors
/// No connection to be had.
pub(crate) fn connect_ahead(source: &NbdSource, name: &str) -> Result<(), RemoteError> {
    let address: Address = source.address.parse().map_err(RemoteError::Address)?;
    let connector = CONNECTOR.get().ok_or(RemoteError::NoConnector)?;
    connector
        .connect_ahead(&address)
        .map_err(|source| RemoteError::Connect {
            name: name.to_owned(),
            source: ConnectError::Dial(source),
        })
}

/// How a remote disk is used, besides where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use<'a> {
    /// For logs.
    pub(crate) name: &'a str,
    pub(crate) read_only: bool,
    /// That the guest sees.
    pub(crate) block_bytes: u32,
    /// Connections, if the server allows for several.
    pub(crate) connections: usize,
}

/// Why a remote disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    #[error("blk.nbd.address")]
    Address(#[source] AddressError),
    #[error(
        "disks on other hosts were not allowed for when this process was started; start it with \
         --remote ADDRESS (or --remote any)"
    )]
    NoConnector,
    #[error("blk.nbd.tls_fd")]
    Pem(#[source] io::Error),
    #[error("blk.nbd.tls_fd")]
    Tls(#[source] TlsError),
    #[error("remote disk {name}")]
    Connect {
        name: String,
        #[source]
        source: ConnectError,
    },
    #[error(
        "remote disk {name}: its server demands blocks of {server_bytes} bytes and the guest would \
         see blocks of {guest_bytes}; attach it with a block size of 4096, or let the server use \
         its page cache"
    )]
    Blocks {
        name: String,
        server_bytes: u32,
        guest_bytes: u32,
    },
    #[error("remote disk {name} has {size_bytes} bytes, and a disk needs 512 at least")]
    TooSmall { name: String, size_bytes: u64 },
}

/// Connects to a remote disk and starts the threads that serve it; so the process is confined
/// already. `tls` yields PEM.
///
/// # Errors
/// See [`RemoteError`].
pub(crate) fn open(
    source: &NbdSource,
    tls: Option<OwnedFd>,
    how: Use<'_>,
) -> Result<Arc<dyn Image>, RemoteError> {
    let address: Address = source.address.parse().map_err(RemoteError::Address)?;
    let connector = CONNECTOR.get().ok_or(RemoteError::NoConnector)?;
    let tls = tls.map(|fd| read_tls(fd, source, &address)).transpose()?;
    let is_encrypted = tls.is_some();
    let options = Options {
        export: source.export.clone(),
        generation: (source.generation != 0).then_some(Generation(source.generation)),
        tls,
        read_only: how.read_only,
        connections: how.connections.clamp(1, nbd::client::MAX_CONNECTIONS),
        ..Options::default()
    };
    let name = || how.name.to_owned();
    let failed = |source| RemoteError::Connect {
        name: name(),
        source,
    };
    let dialer = Dialer::new(connector, &address);
    let connected = nbd::client::connect(Box::new(dialer), options).map_err(failed)?;
    check(&connected, how)?;
    let client = connected.start(how.name).map_err(failed)?;
    tracing::info!(
        disk = how.name,
        server = %address,
        export = source.export,
        generation = source.generation,
        encrypted = is_encrypted,
        connections = client.status().connections,
        "connected"
    );
    Ok(Arc::new(NbdImage::new(
        client,
        format!("{address}/{}", source.export),
        how.read_only,
    )))
}

/// For the control socket.
pub(crate) fn describe(status: nbd::client::Status) -> NbdStatus {
    let (state, reason) = match status.state {
        State::Serving => ("serving", String::new()),
        State::Stalled => (
            "stalled",
            "the server owes answers and is silent".to_owned(),
        ),
        State::Reconnecting { reason } => ("reconnecting", reason),
        State::Failed { reason } => ("failed", reason),
    };
    NbdStatus {
        state: state.to_owned(),
        reason,
        reconnects: status.reconnects,
        connections: status.connections as u32,
        encrypted: status.is_encrypted,
    }
}

fn check(connected: &Connected, how: Use<'_>) -> Result<(), RemoteError> {
    let size_bytes = connected.size_bytes();
    if size_bytes < SECTOR_BYTES {
        return Err(RemoteError::TooSmall {
            name: how.name.to_owned(),
            size_bytes,
        });
    }
    let server_bytes = connected.min_block_bytes();
    if server_bytes > how.block_bytes {
        return Err(RemoteError::Blocks {
            name: how.name.to_owned(),
            server_bytes,
            guest_bytes: how.block_bytes,
        });
    }
    Ok(())
}

fn read_tls(fd: OwnedFd, source: &NbdSource, address: &Address) -> Result<TlsClient, RemoteError> {
    let pem = key::read_bytes(fd, MAX_PEM_BYTES).map_err(RemoteError::Pem)?;
    let host = match source.tls_hostname.as_str() {
        "" => address.host().unwrap_or("localhost"),
        given => given,
    };
    TlsClient::from_pem(&pem, host).map_err(RemoteError::Tls)
}

impl RemoteError {
    /// With its causes, for people.
    fn describe(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

impl From<&RemoteError> for Status {
    fn from(error: &RemoteError) -> Self {
        let message = error.describe();
        match error {
            RemoteError::Address(_) | RemoteError::Pem(_) | RemoteError::Tls(_) => {
                Self::invalid_argument(message)
            }
            RemoteError::Connect { source, .. } => match source {
                ConnectError::Dial(_) => Self::unavailable(message),
                ConnectError::Handshake(HandshakeError::NoExport { .. }) => {
                    Self::not_found(message)
                }
                ConnectError::Handshake(HandshakeError::Refused { .. }) => {
                    Self::failed_precondition(message)
                }
                ConnectError::Handshake(HandshakeError::Io { .. }) => Self::unavailable(message),
                ConnectError::Resources(_) => Self::resource_exhausted(message),
                _ => Self::failed_precondition(message),
            },
            RemoteError::NoConnector
            | RemoteError::Blocks { .. }
            | RemoteError::TooSmall { .. } => Self::failed_precondition(message),
        }
    }
}
