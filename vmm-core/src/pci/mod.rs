//! PCI: bus 0 with a host bridge at 00:00.0, configuration space through ECAM, 64-bit memory
//! BARs, MSI-X.
//!
//! [`RootBus`] owns addresses and dispatch; a device implements [`Function`]. The guest may move
//! BARs within the windows: an MMIO access goes to the function whose BAR is there *now*.
//! There are no bridges, no I/O BARs and no INTx.

pub mod config_space;
pub mod msix;
mod root_bus;

#[cfg(test)]
mod tests;

pub use config_space::{ConfigSpace, Identity};
pub use msix::{Msix, MsixState};
pub use root_bus::{BusFull, BusRange, Layout, MmioWindow, RootBus, Slot};

/// A PCI function that sits in a slot of [`RootBus`].
///
/// Called on the vCPU threads, several at once; must not wait for any other process.
pub trait Function: Send + Sync {
    /// Fills `data` from its configuration space; the access lies within one dword.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Takes a write to its configuration space; the access lies within one dword.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// Length of its one memory BAR (BAR0 and BAR1, 64 bit), a power of two.
    fn bar_len(&self) -> u64;
    /// Tells it where the firmware (that is us) put the BAR; memory decoding is switched on.
    fn place_bar(&self, gpa: u64);
    /// Where the BAR is now, `None` while memory decoding is off.
    fn bar_gpa(&self) -> Option<u64>;
    /// Fills `data` from its BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);
    /// Takes a write to its BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);
}
