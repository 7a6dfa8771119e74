//! `struct boot_params`, the "zero page" of the Linux protocols (Linux
//! `Documentation/x86/zero-page.rst` and `boot.rst`).

use std::ffi::CStr;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::bzimage::{SETUP_HEADER, SetupHeader};
use super::initramfs::Placement;
use super::memory_map;
use crate::layout::{CMDLINE, ZERO_PAGE};
use crate::memory::GuestRam;

const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_LEN: usize = 20;

const BOOT_FLAG_MAGIC: u16 = 0xaa55;
/// What an ELF kernel, which brings no header, is told.
const PROTOCOL_2_12: u16 = 0x20c;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;

/// Writes the zero page and returns its address.
pub(super) fn write(
    header: Option<&SetupHeader>,
    cmdline: &CStr,
    initramfs: Option<Placement>,
    ram: &GuestRam,
    rsdp: u64,
) -> Result<u64, GuestMemoryError> {
    let mut page = [0; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    match header {
        Some(header) => put(SETUP_HEADER, header.bytes()),
        None => {
            put(BOOT_FLAG, &BOOT_FLAG_MAGIC.to_le_bytes());
            put(HEADER, b"HdrS");
            put(VERSION, &PROTOCOL_2_12.to_le_bytes());
            put(LOADFLAGS, &[LOADED_HIGH]);
            put(KERNEL_ALIGNMENT, &0x100_0000u32.to_le_bytes());
        }
    }
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(CMD_LINE_PTR, &(CMDLINE as u32).to_le_bytes());
    put(CMDLINE_SIZE, &(cmdline.count_bytes() as u32).to_le_bytes());
    if let Some(initramfs) = initramfs {
        // It lies below 4 GiB: see `initramfs::load`.
        put(RAMDISK_IMAGE, &(initramfs.start as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(initramfs.len as u32).to_le_bytes());
    }
    put(ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
    let map = memory_map(ram);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (index, entry) in map.iter().enumerate() {
        let at = E820_TABLE + index * E820_ENTRY_LEN;
        put(at, &entry.start.to_le_bytes());
        put(at + 8, &entry.len.to_le_bytes());
        put(at + 16, &(entry.kind as u32).to_le_bytes());
    }
    ram.memory().write_slice(&page, GuestAddress(ZERO_PAGE))?;
    Ok(ZERO_PAGE)
}
