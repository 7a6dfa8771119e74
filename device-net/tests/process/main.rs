//! The real binary with a real tap, driven by a driver of our own over vhost-user, and by the
//! kernel's network stack from the tap's other side.
//!
//! Each test runs in a network namespace of its own, so that taps and addresses never meet. Where
//! that is not permitted, a test says so and passes.

mod control;
mod daemon;
mod features;
mod frame;
mod guarded;
mod guest;
mod host;
mod hostile;
mod injected;
mod leased;
mod packed;
mod packet;
mod queues;
mod scene;
mod start;
mod switch;
mod traffic;
