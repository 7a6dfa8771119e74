//! Page tables for entering a kernel in long mode: the first 4 GiB, identity-mapped with 2 MiB
//! pages (Intel SDM volume 3, 4.5).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::BOOT_PAGE_TABLES;

const TABLE_BYTES: u64 = 4096;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SHIFT: u32 = 21;

/// Writes one PML4, one PDPT and four page directories to [`BOOT_PAGE_TABLES`].
pub(super) fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let pdpt = BOOT_PAGE_TABLES + TABLE_BYTES;
    let first_directory = pdpt + TABLE_BYTES;
    let mut pml4_entries = vec![0; ENTRIES as usize];
    pml4_entries[0] = pdpt | PRESENT_WRITABLE;
    let mut pdpt_entries: Vec<u64> = (0..DIRECTORIES)
        .map(|index| (first_directory + index * TABLE_BYTES) | PRESENT_WRITABLE)
        .collect();
    pdpt_entries.resize(ENTRIES as usize, 0);
    let pages = (0..DIRECTORIES * ENTRIES)
        .map(|page| page << LARGE_PAGE_SHIFT | PRESENT_WRITABLE | LARGE_PAGE);
    let tables: Vec<u8> = pml4_entries
        .into_iter()
        .chain(pdpt_entries)
        .chain(pages)
        .flat_map(u64::to_le_bytes)
        .collect();
    memory.write_slice(&tables, GuestAddress(BOOT_PAGE_TABLES))
}
