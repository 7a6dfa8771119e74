//! A writer that does not know that its time is over.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use nbd::Generation;
use nbd::client::{Client, Dial, Options, connect};

use crate::guest::BLOCK_BYTES;
use crate::machine::Machine;

struct Dialer {
    /// Where it is, if not here.
    from: Option<Arc<Machine>>,
    address: String,
}

impl Dial for Dialer {
    fn dial(&mut self, _: Instant) -> io::Result<OwnedFd> {
        let Some(from) = &self.from else {
            return TcpStream::connect(&self.address).map(OwnedFd::from);
        };
        let stream = from.inside(|| TcpStream::connect(&self.address));
        stream.map_err(io::Error::other)?.map(OwnedFd::from)
    }
}

/// A client of the disk's server.
pub struct Stale(Client);

impl Stale {
    /// Opens the disk as the owner of a generation.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn open(
        from: Option<&Arc<Machine>>,
        address: &str,
        export: &str,
        generation: u64,
    ) -> Result<Self> {
        let dialer = Dialer {
            from: from.cloned(),
            address: address.to_owned(),
        };
        let options = Options {
            export: export.to_owned(),
            generation: Some(Generation(generation)),
            ..Options::default()
        };
        let connected = connect(Box::new(dialer), options).context("the disk's server")?;
        Ok(Self(connected.start("stale")?))
    }

    /// Spoils the first block; whether it was let.
    pub fn write(&self) -> bool {
        self.0.write_at(0, vec![0xff; BLOCK_BYTES]).is_ok()
    }
}
