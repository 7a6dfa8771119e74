//! `vmm-core` runs one virtual machine: its vCPUs, its memory and its interrupt controllers.
//!
//! Everything a guest would call a device, apart from the serial console, is another process
//! that shares the guest's memory: this crate knows no disk, no packet and no controller.
//!
//! [`cli`] turns arguments into a configuration, [`machine`] assembles the parts, [`lifecycle`]
//! owns the machine's state, [`control`] and [`stdio`] serve it to others. [`app`] joins them.

pub mod acpi;
pub mod app;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config_ports;
pub mod confinement;
pub mod console;
pub mod control;
pub mod error;
pub mod kvm;
pub mod layout;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod power;
pub mod seccomp;
pub mod serial;
pub mod stdio;
pub mod vcpu;
pub mod virtio_pci;
