//! The driver's end of vhost-user.
//!
//! - [`connection`]: one connection on which every request has a deadline.
//! - [`session`]: what a backend is told, replayed as one transaction on every connection.
//! - [`link`]: the thread that keeps a device's connection and reconnects without limit.
//! - `channel`: the backend's own requests: its configuration changed.
//! - [`progress`]: how far rings are, without asking anybody.
//! - `misbehaviour`: what goes wrong on purpose.
//! - [`memory`]: guest memory as it is described to a backend.

mod channel;
pub mod connection;
pub mod link;
pub mod memory;
mod misbehaviour;
pub mod progress;
pub mod session;
mod watchdog;

#[cfg(test)]
mod tests;

pub use link::{
    Connected, Endpoint, Events, Link, LinkError, LinkHealth, Outage, Timeouts, Wiring,
};
pub use memory::{MemoryRegion, MemoryTable};
pub use progress::QueueProgress;
pub use session::{Activation, Offer, QueueEvents, QueueState, first_base};
