//! The initramfs goes as high below the PCI hole as the kernel allows.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, LoadedKernel};
use crate::memory::GuestRam;

const PAGE_BYTES: u64 = 4096;
/// Kernels without a setup header reach this far with their early page tables.
const DEFAULT_ADDR_MAX: u64 = 0x7fff_ffff;

/// Where the initramfs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Loads `file` above `kernel`.
pub(super) fn load(
    file: &mut File,
    path: &Path,
    kernel: &LoadedKernel,
    ram: &GuestRam,
) -> Result<Placement, BootError> {
    let failed = |source| BootError::Read {
        what: "initramfs",
        path: path.into(),
        source,
    };
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let addr_max = kernel
        .setup_header
        .as_ref()
        .map_or(DEFAULT_ADDR_MAX, |header| header.initrd_addr_max());
    let start = place(len, kernel.end, ram.low_end().min(addr_max + 1)).ok_or_else(|| {
        BootError::InitramfsTooLarge {
            path: path.into(),
            size_mib: len.div_ceil(1 << 20),
            memory_mib: ram.low_end() >> 20,
        }
    })?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(start), file, len as usize)?;
    Ok(Placement { start, len })
}

/// The highest page at which `len` bytes lie between `lowest` and `end`.
fn place(len: u64, lowest: u64, end: u64) -> Option<u64> {
    let start = end.checked_sub(len)? & !(PAGE_BYTES - 1);
    (start >= lowest).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initramfs_ends_in_the_last_page_or_is_refused() {
        assert_eq!(place(0x1801, 0x10_0000, 0x100_0000), Some(0xff_e000));
        assert_eq!(place(0xf0_0000, 0x10_0000, 0x100_0000), Some(0x10_0000));
        assert_eq!(place(0xf0_0001, 0x10_0000, 0x100_0000), None);
        assert_eq!(place(u64::MAX, 0, 0x100_0000), None);
    }
}
