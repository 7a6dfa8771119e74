//! `vmm-core` runs one virtual machine: its vCPUs, its memory and its interrupt controllers.
//!
//! Everything a guest would call a device, apart from the serial console, is another process
//! that shares the guest's memory: this crate knows no disk, no packet and no controller.
//!
//! `cli` turns arguments into a configuration, `machine` assembles the parts, `lifecycle` owns
//! the machine's state, `control` serves it over gRPC.

pub mod bus;
pub mod kvm;
pub mod layout;
pub mod memory;
