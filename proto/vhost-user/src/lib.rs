//! The vhost-user protocol, both ends, and everything a device daemon shares.
//!
//! - [`backend`]: listening socket, sessions, ring workers. A daemon implements [`backend::Device`].
//! - [`frontend`]: one connection with deadlines, and replay of a whole handshake.
//! - [`ring`]: split virtqueues as seen by the device.
//! - [`memory`]: the frontend's memory table, mapped.
//! - [`inflight`]: the shared in-flight region, laid out as in the specification.
//! - [`log_limit`]: how often a peer's mistake is worth a line in the log.

pub mod backend;
#[cfg(any(test, feature = "driver"))]
pub mod driver;
pub mod eventfd;
pub mod frontend;
pub mod inflight;
pub mod log_limit;
pub mod memory;
pub mod ring;
