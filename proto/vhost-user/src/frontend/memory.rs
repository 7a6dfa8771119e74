//! Guest memory as the frontend describes it to a backend.
//!
//! A backend is told guest physical addresses as "user addresses" too: the protocol only needs
//! them to be consistent, and this process's own addresses are none of a backend's business.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionInfo;

/// One piece of guest memory, contiguous for the guest and in its file.
#[derive(Clone, Debug)]
pub struct MemoryRegion {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// The file that backs it, shared with backends.
    pub file: Arc<File>,
    /// Where the piece starts in the file.
    pub file_offset: u64,
}

/// All of the memory a backend may reach.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    regions: Vec<MemoryRegion>,
}

impl MemoryTable {
    /// A table of `regions`, which must not overlap.
    #[must_use]
    pub fn new(regions: Vec<MemoryRegion>) -> Self {
        Self { regions }
    }

    /// The regions in the order they were given.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Whether `[gpa, gpa + len)` lies in one region.
    #[must_use]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.find(gpa, len).is_some()
    }

    /// Reads a little-endian 16-bit field of a ring.
    ///
    /// Through the file and not a mapping: it is read once for each reconnect, and a file can
    /// be read without `unsafe`.
    ///
    /// # Errors
    /// `InvalidInput` when no region holds the address, or the read's error.
    pub fn read_u16(&self, gpa: u64) -> io::Result<u16> {
        let region = self.find(gpa, 2).ok_or(io::ErrorKind::InvalidInput)?;
        let mut bytes = [0; 2];
        region
            .file
            .read_exact_at(&mut bytes, region.file_offset + (gpa - region.gpa))?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(super) fn to_vhost(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.regions
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.gpa,
                memory_size: region.size_bytes,
                userspace_addr: region.gpa,
                mmap_offset: region.file_offset,
                mmap_handle: region.file.as_raw_fd(),
            })
            .collect()
    }

    fn find(&self, gpa: u64, len: u64) -> Option<&MemoryRegion> {
        let end = gpa.checked_add(len)?;
        self.regions
            .iter()
            .find(|region| region.gpa <= gpa && end <= region.gpa.saturating_add(region.size_bytes))
    }
}
