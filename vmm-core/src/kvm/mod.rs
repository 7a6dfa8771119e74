//! The kernel's virtual machine monitor: opening it, the VM, interrupt routes and doorbells.

pub mod interrupts;
