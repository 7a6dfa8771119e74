//! What the user of a disk chooses: how it is to be used, and where connections come from.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::Generation;
use crate::tls::TlsClient;

/// Where connections come from. A confined process asks another one.
pub trait Dial: Send {
    /// A fresh connection to the server.
    ///
    /// # Errors
    /// Not this time.
    fn dial(&mut self, deadline: Instant) -> io::Result<OwnedFd>;
}

/// How a disk is to be used.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the export; may be empty for a server's only one.
    pub export: String,
    /// Presented to the server, which refuses stale owners. None: whoever else writes is the
    /// user's affair.
    pub generation: Option<Generation>,
    /// Encrypts; the server is verified.
    pub tls: Option<TlsClient>,
    /// Nothing will be written.
    pub read_only: bool,
    /// Opened if the server lets several connections see each other's writes.
    pub connections: usize,
    /// Each write is on stable storage before it is answered.
    pub every_write_durable: bool,
    /// For one connection, until it takes requests.
    pub handshake_timeout: Duration,
    /// How long a server may owe answers without a word.
    pub stall_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: String::new(),
            generation: None,
            tls: None,
            read_only: false,
            connections: 1,
            every_write_durable: false,
            handshake_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
        }
    }
}
