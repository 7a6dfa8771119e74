//! Daemons that are killed under verified load, and how they come back.
//!
//! - [`guest`]: a driver that keeps rings full and verifies everything; outlives backends.
//! - [`transport`]: its connection, made again and replayed.
//! - [`host`]: who starts daemons and holds what outlives them.
//! - [`fence`]: when the last request of a dead process is over.
//! - [`storm`]: kills at random instants, and what each of them cost.
//! - [`upgrade`]: one process hands a disk over to the next, and back.
//! - [`nic`]: the same for a NIC, under TCP.
//! - [`bystander`]: what a storm does to a disk of another process.

pub mod bystander;
pub mod fence;
pub mod guest;
pub mod host;
pub mod memory;
pub mod nic;
pub mod random;
pub mod ring;
pub mod storm;
pub mod tap;
pub mod transport;
pub mod upgrade;
