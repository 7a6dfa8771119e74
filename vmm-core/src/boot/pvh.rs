//! `hvm_start_info` and what it points to (Xen `public/arch-x86/hvm/start_info.h`).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::initramfs::Placement;
use super::memory_map;
use crate::layout::{CMDLINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
/// With the memory map fields.
const VERSION: u32 = 1;

/// Writes the structures and returns the address of `hvm_start_info`.
pub(super) fn write_start_info(
    ram: &GuestRam,
    initramfs: Option<Placement>,
    rsdp: u64,
) -> Result<u64, GuestMemoryError> {
    let map = memory_map(ram);
    let mut map_bytes = Vec::new();
    for entry in &map {
        map_bytes.extend(entry.start.to_le_bytes());
        map_bytes.extend(entry.len.to_le_bytes());
        map_bytes.extend((entry.kind as u32).to_le_bytes());
        map_bytes.extend(0u32.to_le_bytes());
    }
    let modules: Vec<u8> = initramfs
        .iter()
        .flat_map(|module| [module.start, module.len, 0, 0])
        .flat_map(u64::to_le_bytes)
        .collect();
    let mut info = Vec::new();
    for word in [MAGIC, VERSION, 0, initramfs.is_some().into()] {
        info.extend(word.to_le_bytes());
    }
    for address in [PVH_MODULES, CMDLINE, rsdp, PVH_MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());

    let memory = ram.memory();
    memory.write_slice(&map_bytes, GuestAddress(PVH_MEMORY_MAP))?;
    memory.write_slice(&modules, GuestAddress(PVH_MODULES))?;
    memory.write_slice(&info, GuestAddress(PVH_START_INFO))?;
    Ok(PVH_START_INFO)
}
