//! Port I/O and MMIO dispatch: which device answers which address.

use std::sync::Arc;

/// A device that answers reads and writes of the guest in a range of addresses.
///
/// Called on the vCPU threads, several at once; must not wait for any other process.
pub trait BusDevice: Send + Sync {
    /// Fills `data` (1, 2, 4 or 8 bytes) from `offset` within the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` within the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Ranges of one address space, sorted, not overlapping. Fixed once the machine is built.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}
