//! The driver's end of vhost-user.
//!
//! - [`memory`]: the memory table as the frontend holds it.

pub mod memory;

pub use memory::{MemoryRegion, MemoryTable};
