//! Interrupts and doorbells without exits: irqfd with MSI routes, ioeventfd.
//!
//! The trait is what the PCI side needs of KVM; tests give it a recorder.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An MSI message: what the device would write to raise the interrupt (PCI 3.0 section 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address; bits 63:32 are the upper address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Index of a global system interrupt that was reserved for an MSI route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiRoute(pub u32);

/// What a PCI function needs of the machine to be interrupt- and doorbell-driven.
pub trait InterruptFabric: Send + Sync {
    /// Reserves a route (a GSI above the IOAPIC's pins) for `irqfd`. It starts masked.
    ///
    /// # Errors
    /// The KVM ioctl's error, or `StorageFull` when all routes are taken.
    fn add_msi_route(&self, irqfd: &EventFd) -> io::Result<MsiRoute>;
    /// Points the route at `message` and ties `irqfd` to it; `None` masks the route.
    ///
    /// While it is masked nobody may read `irqfd` (on KVM: it is deassigned, not merely left
    /// without a routing entry): signals stay counted in it, which is what makes an MSI-X
    /// vector pending. Unmasking delivers them, once (on KVM: assigning an irqfd that is
    /// readable injects).
    ///
    /// # Errors
    /// The KVM ioctl's error.
    fn set_msi_route(
        &self,
        route: MsiRoute,
        irqfd: &EventFd,
        message: Option<MsiMessage>,
    ) -> io::Result<()>;
    /// Makes any write (of any width) to MMIO address `gpa` signal `doorbell` without an exit.
    ///
    /// # Errors
    /// The KVM ioctl's error.
    fn add_doorbell(&self, gpa: u64, doorbell: &EventFd) -> io::Result<()>;
    /// Undoes [`InterruptFabric::add_doorbell`].
    ///
    /// # Errors
    /// The KVM ioctl's error.
    fn remove_doorbell(&self, gpa: u64, doorbell: &EventFd) -> io::Result<()>;
}
