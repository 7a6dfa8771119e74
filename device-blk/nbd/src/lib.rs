//! Network block devices: the protocol, a client that reconnects, a server that fences.
//!
//! Protocol: `doc/proto.md` of the NBD project; fixed newstyle handshake, TLS, structured
//! replies. Both ends speak to QEMU, nbdkit and libnbd. What is ours is the [`Generation`]: a
//! client says which owner of the volume it acts for, and the server carries out the writes of
//! the latest owner alone.
//!
//! | module | what it does |
//! |---|---|
//! | [`client`] | a remote disk, with many requests under way, which survives its server |
//! | [`server`] | serves one disk, refuses and fences stale owners |
//! | [`Address`], [`TlsClient`], [`TlsServer`] | where servers are, and how they are trusted |
//! | `wire`, `channel` | messages; a socket with or without TLS |

mod address;
mod channel;
pub mod client;
mod inbox;
pub mod server;
mod tls;
mod wire;

use std::fmt;

pub use address::{Address, AddressError, DEFAULT_PORT, watch_peer};
pub use tls::{MAX_PEM_BYTES, TlsClient, TlsError, TlsServer};

/// Counts the owners of a volume: whoever gives a volume to somebody else raises it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
