//! The frontend's memory table, mapped into this process.
//!
//! A [`MemoryTable`] is immutable: adding or removing a region makes a new table that shares the
//! [`Mapping`]s of the old one. Whoever holds a table (a ring, a request in flight) keeps its
//! mappings alive, so a table change never unmaps memory under a running request.
//!
//! A file that its owner can truncate is [guarded](MemoryTable::guard): losing a page of it ends a
//! session, not the process.

mod guard;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::sync::{Arc, OnceLock};

use crate::eventfd::EventFd;
use guard::Guard;

/// ADD_MEM_REG takes this many regions at most (QEMU's own limit).
pub const MAX_REGIONS: usize = 509;

/// Why a memory region or table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region has no bytes, or its end does not fit in 64 bits.
    #[error("memory region at guest address {gpa:#x}: size {len_bytes:#x} is zero or overflows")]
    BadSize {
        /// Guest physical address of the region.
        gpa: u64,
        /// Its size.
        len_bytes: u64,
    },
    /// Two regions share guest or frontend addresses.
    #[error("memory region at guest address {gpa:#x} overlaps another one")]
    Overlap {
        /// Guest physical address of the region.
        gpa: u64,
    },
    /// More regions than [`MAX_REGIONS`].
    #[error("memory table has more than {MAX_REGIONS} regions")]
    TooMany,
    /// The file ends before the region does.
    #[error(
        "memory region at guest address {gpa:#x}: its file has {file_len_bytes:#x} bytes, {needed_bytes:#x} are needed"
    )]
    FileTooShort {
        /// Guest physical address of the region.
        gpa: u64,
        /// Size of the file that was passed.
        file_len_bytes: u64,
        /// Offset plus size of the region.
        needed_bytes: u64,
    },
    /// mmap refused.
    #[error("memory region at guest address {gpa:#x} cannot be mapped")]
    Map {
        /// Guest physical address of the region.
        gpa: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// REM_MEM_REG named a region that is not in the table.
    #[error("no memory region at guest address {gpa:#x} with this size and frontend address")]
    Unknown {
        /// Guest physical address that was named.
        gpa: u64,
    },
}

/// A shared mapping of part of a file, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len_bytes: usize,
    offset_in_page: usize,
    /// None inside: guarding was tried in vain.
    guard: OnceLock<Option<Guard>>,
}

// SAFETY: the mapping is plain memory; it is only reached through raw pointers whose users
// (rings, in-flight regions, copies) bring their own synchronisation.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len_bytes` of `file` from `offset`, shared, readable and writable. `offset` need
    /// not be a multiple of the page size.
    ///
    /// # Errors
    /// What mmap says, or `InvalidInput` for sizes that do not fit.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len_bytes: u64) -> io::Result<Mapping> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let page_bytes = page_size_bytes();
        let offset_in_page = offset % page_bytes;
        let map_offset = i64::try_from(offset - offset_in_page).map_err(|_| invalid())?;
        let map_len = len_bytes.checked_add(offset_in_page).ok_or_else(invalid)?;
        let map_len = usize::try_from(map_len).map_err(|_| invalid())?;
        if map_len == 0 || isize::try_from(map_len).is_err() {
            return Err(invalid());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                map_offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            base: NonNull::new(base.cast()).ok_or_else(invalid)?,
            len_bytes: map_len,
            offset_in_page: offset_in_page as usize,
            guard: OnceLock::new(),
        })
    }

    /// The first byte that was asked for.
    pub fn as_ptr(&self) -> NonNull<u8> {
        // SAFETY: `offset_in_page` is less than `len_bytes`, so the result is in the mapping.
        unsafe { self.base.add(self.offset_in_page) }
    }

    /// Makes the loss of a page ring `truncated` instead of killing the process.
    pub fn guard(&self, truncated: &Arc<EventFd>) {
        self.guard.get_or_init(|| {
            let guard = Guard::new(self.base, self.len_bytes, Arc::clone(truncated));
            let warn = |error: &io::Error| {
                tracing::warn!(%error, "shared memory is not guarded against truncation");
            };
            guard.inspect_err(warn).ok()
        });
    }

    /// Bytes from [`Mapping::as_ptr`] to the end.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes - self.offset_in_page
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard.take();
        // SAFETY: `base` and `len_bytes` are what mmap returned, and nobody else unmaps them.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len_bytes) };
    }
}

/// Where a region lies; the fields of the protocol's memory region description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// Guest physical address.
    pub gpa: u64,
    /// Size in bytes.
    pub len_bytes: u64,
    /// The frontend's own address of the region; ring addresses are given in these terms.
    pub user_addr: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
}

/// A mapped memory region.
#[derive(Clone, Debug)]
pub struct Region {
    layout: RegionLayout,
    host: NonNull<u8>,
    mapping: Arc<Mapping>,
    /// Device and inode.
    file_id: (u64, u64),
    sealed: bool,
}

// SAFETY: `host` points into `mapping`, which is Send and kept alive by this struct.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a region after checking it against its file.
    ///
    /// # Errors
    /// [`MemoryError`] when sizes overflow, the file is too short or mmap refuses.
    pub fn map(layout: RegionLayout, file: &File) -> Result<Region, MemoryError> {
        let RegionLayout {
            gpa,
            len_bytes,
            user_addr,
            mmap_offset,
        } = layout;
        let ends = [gpa, user_addr, mmap_offset].map(|start| start.checked_add(len_bytes));
        if len_bytes == 0 || ends.contains(&None) || isize::try_from(len_bytes).is_err() {
            return Err(MemoryError::BadSize { gpa, len_bytes });
        }
        let map_error = |source| MemoryError::Map { gpa, source };
        let metadata = file.metadata().map_err(map_error)?;
        let needed_bytes = mmap_offset + len_bytes;
        if metadata.is_file() && metadata.len() < needed_bytes {
            let file_len_bytes = metadata.len();
            return Err(MemoryError::FileTooShort {
                gpa,
                file_len_bytes,
                needed_bytes,
            });
        }
        let mapping = Mapping::new(file.as_fd(), mmap_offset, len_bytes).map_err(map_error)?;
        Ok(Region {
            layout,
            host: mapping.as_ptr(),
            mapping: Arc::new(mapping),
            file_id: (metadata.dev(), metadata.ino()),
            sealed: is_sealed_against_shrinking(file.as_fd()),
        })
    }

    /// Where the region lies.
    pub fn layout(&self) -> RegionLayout {
        self.layout
    }

    /// Whether no peer can truncate the file under us.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Keeps the region's memory mapped for as long as it is held.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    fn gpa_end(&self) -> u64 {
        self.layout.gpa + self.layout.len_bytes
    }

    fn user_end(&self) -> u64 {
        self.layout.user_addr + self.layout.len_bytes
    }

    /// Host address of byte `offset`, and how many bytes follow it in the region.
    fn at(&self, offset: u64) -> (NonNull<u8>, u64) {
        debug_assert!(offset < self.layout.len_bytes);
        // SAFETY: callers pass an offset inside the region, and the mapping is that long.
        (
            unsafe { self.host.add(offset as usize) },
            self.layout.len_bytes - offset,
        )
    }
}

/// All memory regions of one frontend, ordered by guest address.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// A table of `regions`, in any order.
    ///
    /// # Errors
    /// [`MemoryError`] for overlaps and too many regions.
    pub fn new(mut regions: Vec<Region>) -> Result<MemoryTable, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        regions.sort_by_key(|region| region.layout.user_addr);
        for pair in regions.windows(2) {
            if pair[0].user_end() > pair[1].layout.user_addr {
                return Err(MemoryError::Overlap {
                    gpa: pair[1].layout.gpa,
                });
            }
        }
        regions.sort_by_key(|region| region.layout.gpa);
        for pair in regions.windows(2) {
            if pair[0].gpa_end() > pair[1].layout.gpa {
                return Err(MemoryError::Overlap {
                    gpa: pair[1].layout.gpa,
                });
            }
        }
        Ok(MemoryTable { regions })
    }

    /// This table and one more region. A region that is in it already changes nothing: QEMU before
    /// 8.0 adds all regions once for each queue pair of a network device.
    ///
    /// # Errors
    /// As [`MemoryTable::new`].
    pub fn with(&self, region: Region) -> Result<MemoryTable, MemoryError> {
        let mut regions = self.regions.clone();
        let is_same =
            |known: &Region| known.layout == region.layout && known.file_id == region.file_id;
        if !regions.iter().any(is_same) {
            regions.push(region);
        }
        MemoryTable::new(regions)
    }

    /// This table less the region at `layout` (its file offset does not matter).
    ///
    /// # Errors
    /// [`MemoryError::Unknown`] when there is no such region.
    pub fn without(&self, layout: &RegionLayout) -> Result<MemoryTable, MemoryError> {
        let is_named = |region: &Region| {
            region.layout.gpa == layout.gpa
                && region.layout.len_bytes == layout.len_bytes
                && region.layout.user_addr == layout.user_addr
        };
        if !self.regions.iter().any(is_named) {
            return Err(MemoryError::Unknown { gpa: layout.gpa });
        }
        let regions = self
            .regions
            .iter()
            .filter(|region| !is_named(region))
            .cloned()
            .collect();
        Ok(MemoryTable { regions })
    }

    /// Guards every region whose file can be truncated: see [`Mapping::guard`].
    pub fn guard(&self, truncated: &Arc<EventFd>) {
        for region in self.regions.iter().filter(|region| !region.sealed) {
            region.mapping.guard(truncated);
        }
    }

    /// The regions by rising guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Host address of guest address `gpa` and how many bytes follow it in its region. `hint`
    /// is the region that matched last; it saves the search for neighbouring addresses.
    #[inline]
    pub fn translate(&self, gpa: u64, hint: &mut usize) -> Option<(NonNull<u8>, u64)> {
        let contains =
            |region: &Region| gpa.wrapping_sub(region.layout.gpa) < region.layout.len_bytes;
        if let Some(region) = self.regions.get(*hint).filter(|region| contains(region)) {
            return Some(region.at(gpa - region.layout.gpa));
        }
        let index = self
            .regions
            .partition_point(|region| region.layout.gpa <= gpa)
            .checked_sub(1)?;
        let region = &self.regions[index];
        if !contains(region) {
            return None;
        }
        *hint = index;
        Some(region.at(gpa - region.layout.gpa))
    }

    /// Host address of `len_bytes` bytes at the frontend's address `user_addr`, when they lie in
    /// one region.
    pub fn translate_user(&self, user_addr: u64, len_bytes: u64) -> Option<NonNull<u8>> {
        let region = self.regions.iter().find(|region| {
            user_addr.wrapping_sub(region.layout.user_addr) < region.layout.len_bytes
        })?;
        let (host, following_bytes) = region.at(user_addr - region.layout.user_addr);
        (following_bytes >= len_bytes).then_some(host)
    }
}

/// Whether the file behind `fd` can no longer be truncated by anybody (`F_SEAL_SHRINK`).
pub fn is_sealed_against_shrinking(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: F_GET_SEALS takes no argument and only reads the descriptor's state.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

fn page_size_bytes() -> u64 {
    // SAFETY: sysconf has no memory-safety requirements.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}
