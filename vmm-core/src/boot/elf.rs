//! ELF kernels (`vmlinux`), by PVH or by the Linux 64-bit protocol.

use std::fs::File;
use std::path::Path;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, ElfProtocol, LoadedKernel, Protocol};
use crate::layout::HIGH_MEMORY_START;
use crate::memory::GuestRam;

/// Loads the segments of `file` where they want to be.
pub(super) fn load(
    file: &mut File,
    path: &Path,
    wanted: ElfProtocol,
    ram: &GuestRam,
) -> Result<LoadedKernel, BootError> {
    let loaded = Elf::load(
        ram.memory(),
        None,
        file,
        Some(GuestAddress(HIGH_MEMORY_START)),
    )
    .map_err(|source| BootError::Load {
        path: path.into(),
        source,
    })?;
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
        _ => None,
    };
    let (protocol, rip) = match (wanted, pvh_entry) {
        (ElfProtocol::Auto | ElfProtocol::Pvh, Some(entry)) => (Protocol::Pvh, entry),
        (ElfProtocol::Pvh, None) => return Err(BootError::NoPvhEntry { path: path.into() }),
        (ElfProtocol::Auto | ElfProtocol::Linux64, _) => (Protocol::Linux64, loaded.kernel_load.0),
    };
    Ok(LoadedKernel {
        protocol,
        rip,
        end: loaded.kernel_end,
        setup_header: None,
    })
}
