//! A fleet of real processes on one machine: hosts are network namespaces joined by cables, each with a
//! node agent and VMs on /dev/kvm, whose guests are a few instructions. One host is taken away, and what
//! becomes of its VM is looked at from outside:
//!
//! ```text
//!        core: controller, disk's server (device-blk nbd-serve)
//!          │ bridge
//!    ┌─────┴─────┐
//!   h1          h2     node-agent, vmm-core, device-blk
//! ```
//!
//! [`scenario`] tells the story; [`machine`] makes namespaces, [`fleet`] starts the processes, [`disk`]
//! knows what the [`guest`] writes and what must be found. [`nested`] is the same with emulated hosts, an
//! etcd, two controllers and real guests.

pub mod disk;
pub mod fleet;
pub mod guest;
pub mod machine;
pub mod nested;
pub mod scenario;
pub mod stale;

pub use scenario::{Loss, Report, Settings, run};
