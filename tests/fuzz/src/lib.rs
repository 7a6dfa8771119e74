//! What untrusted bytes may not do to us, one function a target: it panics when a promise is broken.
//!
//! `cargo lab fuzz` lets libFuzzer look for such bytes. The corpus is run by this crate's own test as
//! well.

pub mod block_request;
pub mod frames;
pub mod images;
pub mod inflight;
mod input;
pub mod messages;
pub mod ring;

/// A target's name, as its program's and its corpus', and what it does with one input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 6] = [
    ("messages", messages::run),
    ("ring", ring::run),
    ("inflight", inflight::run),
    ("block_request", block_request::run),
    ("images", images::run),
    ("frames", frames::run),
];
