//! The memory map the kernel is given: E820 entries, which PVH uses as well.

use crate::layout::{CONVENTIONAL_END, ECAM_LEN, ECAM_START, HIGH_MEMORY_START, HIGH_RAM_START};
use crate::memory::GuestRam;

/// What a range of the memory map is (ACPI 6.5 table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeType {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeType,
}

/// The map of a machine with `ram`. From the end of conventional memory to 1 MiB all is
/// reserved: the ACPI tables and the reset vector lie there.
pub fn memory_map(ram: &GuestRam) -> Vec<MapEntry> {
    use RangeType::{Ram, Reserved};
    let range = |start, end, kind| MapEntry {
        start,
        len: end - start,
        kind,
    };
    let mut map = vec![
        range(0, CONVENTIONAL_END, Ram),
        range(CONVENTIONAL_END, HIGH_MEMORY_START, Reserved),
        range(HIGH_MEMORY_START, ram.low_end(), Ram),
        range(ECAM_START, ECAM_START + ECAM_LEN, Reserved),
    ];
    if ram.high_end() > HIGH_RAM_START {
        map.push(range(HIGH_RAM_START, ram.high_end(), Ram));
    }
    map
}
