//! bzImage kernels: what lies in `/boot` (Linux `Documentation/x86/boot.rst`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, LoadedKernel, Protocol};
use crate::layout::HIGH_MEMORY_START;
use crate::memory::GuestRam;

/// Offset of the setup header, in the file and in the zero page.
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// Up to here the zero page has room for it.
pub(super) const SETUP_HEADER_MAX_END: usize = 0x290;
/// The 64-bit entry lies this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;

/// The setup header, byte for byte.
pub(super) struct SetupHeader(Vec<u8>);

impl SetupHeader {
    /// The header's length follows from the jump over it at offset 0x200.
    fn read(file: &File) -> std::io::Result<Self> {
        let mut jump_offset = [0];
        file.read_exact_at(&mut jump_offset, 0x201)?;
        let end = (0x202 + usize::from(jump_offset[0])).min(SETUP_HEADER_MAX_END);
        let mut bytes = vec![0; end - SETUP_HEADER];
        file.read_exact_at(&mut bytes, SETUP_HEADER as u64)?;
        Ok(Self(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The highest address at which the initramfs may end, inclusive.
    pub(super) fn initrd_addr_max(&self) -> u64 {
        // Version 2.03 introduced the field.
        let max = if self.u16_at(0x206) >= 0x203 {
            self.u32_at(0x22c)
        } else {
            0
        };
        if max == 0 { 0x37ff_ffff } else { max.into() }
    }

    fn is_64_bit(&self) -> bool {
        self.u16_at(0x206) >= 0x20c && self.u16_at(0x236) & XLF_KERNEL_64 != 0
    }

    /// One past what the kernel occupies while it unpacks itself.
    fn end(&self) -> u64 {
        let pref_address = u64::from(self.u32_at(0x258)) | u64::from(self.u32_at(0x25c)) << 32;
        pref_address.saturating_add(self.u32_at(0x260).into())
    }

    /// Fields that this header does not have read as 0.
    fn u16_at(&self, file_offset: usize) -> u16 {
        let at = file_offset - SETUP_HEADER;
        self.0
            .get(at..at + 2)
            .map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn u32_at(&self, file_offset: usize) -> u32 {
        u32::from(self.u16_at(file_offset)) | u32::from(self.u16_at(file_offset + 2)) << 16
    }
}

/// Loads the protected-mode kernel to 1 MiB.
pub(super) fn load(
    file: &mut File,
    path: &Path,
    ram: &GuestRam,
) -> Result<LoadedKernel, BootError> {
    let header = SetupHeader::read(file).map_err(|source| BootError::Read {
        what: "kernel",
        path: path.into(),
        source,
    })?;
    let start = GuestAddress(HIGH_MEMORY_START);
    let loaded = BzImage::load(ram.memory(), Some(start), file, Some(start)).map_err(|source| {
        BootError::Load {
            path: path.into(),
            source,
        }
    })?;
    let (protocol, rip) = match header.is_64_bit() {
        true => (Protocol::Linux64, loaded.kernel_load.0 + ENTRY_64),
        false => (Protocol::Linux32, loaded.kernel_load.0),
    };
    let end = loaded.kernel_end.max(header.end());
    Ok(LoadedKernel {
        protocol,
        rip,
        end,
        setup_header: Some(header),
    })
}
