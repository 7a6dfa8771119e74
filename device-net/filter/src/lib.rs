//! What a NIC lets pass, and what it shows of its frames.
//!
//! - [`packet`]: reads the headers of one frame, out of a bounded copy of its beginning
//! - [`policy`]: whom a guest may pose as ([`spoof`]), and what may pass at all ([`rules`])
//! - [`gate`]: judges frames by a policy; knows the flows ([`flow`]) and fragments ([`fragments`])
//!   that earlier frames opened
//! - [`expression`]: filters in a subset of tcpdump's language
//! - [`capture`]: frames that match a filter, as a pcap file that waits in a bounded buffer
//!
//! Nothing here does I/O, reads a clock or allocates for a frame. Directions are the guest's:
//! ingress is what it receives.

pub mod address;
pub mod capture;
pub mod expression;
pub mod flow;
mod fragments;
#[cfg(test)]
mod frames;
pub mod gate;
pub mod packet;
pub mod policy;
mod rules;
mod spoof;
mod verdict;

pub use verdict::{Direction, DropReason, Verdict};
