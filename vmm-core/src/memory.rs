//! Guest RAM: one sealed memfd, mapped in two pieces around the PCI hole.
//!
//! The memfd is what device processes map; its seals keep every holder from truncating memory
//! under the others. Pages are taken when they are first touched.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user::frontend::{MemoryRegion, MemoryTable};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::layout::{HIGH_RAM_START, PCI_HOLE_START, PCI_MMIO64_ALIGN};

/// The least RAM a machine can have: boot structures, a kernel and an initramfs must fit.
pub const MIN_SIZE_BYTES: u64 = 16 << 20;
const PAGE_BYTES: u64 = 4096;

/// All RAM of the machine.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    file: Arc<File>,
    size_bytes: u64,
}

/// One piece of RAM, contiguous for guest, host and memfd alike.
#[derive(Clone, Debug)]
pub struct RamRegion {
    /// Guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Address in this process.
    pub hva: u64,
    /// The memfd.
    pub file: Arc<File>,
    /// Where the piece starts in the memfd.
    pub file_offset: u64,
}

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size asked for is no multiple of the page size, or less than [`MIN_SIZE_BYTES`].
    #[error(
        "memory size {0} bytes is not possible: give a multiple of 4 KiB of at least 16 MiB, for example --memory 512M"
    )]
    Size(u64),
    /// The host could never back it.
    #[error(
        "memory size {wanted_mib} MiB is more than this host has ({host_mib} MiB of RAM and swap): give a smaller --memory"
    )]
    MoreThanHost {
        /// What was asked for.
        wanted_mib: u64,
        /// RAM and swap of the host.
        host_mib: u64,
    },
    /// The memfd could not be made, sized or sealed.
    #[error(
        "cannot make a memfd of {size_mib} MiB for guest RAM: free memory, or give a smaller --memory"
    )]
    Memfd {
        /// What was asked for.
        size_mib: u64,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
    /// The memfd could not be mapped.
    #[error(
        "cannot map {size_mib} MiB of guest RAM: raise the address space limit (ulimit -v), or give a smaller --memory"
    )]
    Map {
        /// What was asked for.
        size_mib: u64,
        /// The system call's error.
        #[source]
        source: MmapRegionError,
    },
}

impl GuestRam {
    /// Makes `size_bytes` of zeroed RAM.
    ///
    /// # Errors
    /// The size is impossible, or the host cannot give that much.
    pub fn new(size_bytes: u64) -> Result<Self, MemoryError> {
        if size_bytes < MIN_SIZE_BYTES || !size_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Size(size_bytes));
        }
        refuse_more_than_host(size_bytes)?;
        let file = Arc::new(
            sealed_memfd(size_bytes).map_err(|source| MemoryError::Memfd {
                size_mib: mib(size_bytes),
                source,
            })?,
        );
        let regions = pieces(size_bytes)
            .into_iter()
            .map(|(gpa, len, offset)| map_piece(&file, gpa, len, offset))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| MemoryError::Map {
                size_mib: mib(size_bytes),
                source,
            })?;
        let memory = GuestMemoryMmap::from_regions(regions).expect("pieces are sorted and apart");
        Ok(Self {
            memory,
            file,
            size_bytes,
        })
    }

    /// For reading and writing guest memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The pieces, lowest address first.
    pub fn regions(&self) -> Vec<RamRegion> {
        self.memory
            .iter()
            .map(|region| RamRegion {
                gpa: region.start_addr().0,
                size_bytes: region.len(),
                hva: region.as_ptr() as u64,
                file: self.file.clone(),
                file_offset: region.file_offset().map_or(0, FileOffset::start),
            })
            .collect()
    }

    /// What device processes are given.
    pub fn memory_table(&self) -> MemoryTable {
        let share = |region: RamRegion| MemoryRegion {
            gpa: region.gpa,
            size_bytes: region.size_bytes,
            file: region.file,
            file_offset: region.file_offset,
        };
        MemoryTable::new(self.regions().into_iter().map(share).collect())
    }

    /// Zeroes all RAM and gives its pages back to the host, as a power cycle does.
    ///
    /// # Errors
    /// The system call's error.
    pub fn clear(&self) -> io::Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(
            &*self.file,
            punch,
            0,
            self.size_bytes as libc::off_t,
        )?)
    }

    /// Size of all RAM.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// One past the last byte of RAM below the PCI hole.
    pub fn low_end(&self) -> u64 {
        self.size_bytes.min(PCI_HOLE_START)
    }

    /// One past the last byte of RAM from 4 GiB; 4 GiB when there is none.
    pub fn high_end(&self) -> u64 {
        HIGH_RAM_START + self.size_bytes.saturating_sub(PCI_HOLE_START)
    }

    /// Where the 64-bit PCI window starts.
    pub fn mmio64_start(&self) -> u64 {
        self.high_end().next_multiple_of(PCI_MMIO64_ALIGN)
    }
}

/// `(gpa, len, offset in the memfd)` of each piece.
fn pieces(size_bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = size_bytes.min(PCI_HOLE_START);
    let mut pieces = vec![(0, low, 0)];
    if size_bytes > low {
        pieces.push((HIGH_RAM_START, size_bytes - low, low));
    }
    pieces
}

fn map_piece(
    file: &Arc<File>,
    gpa: u64,
    len: u64,
    offset: u64,
) -> Result<GuestRegionMmap, MmapRegionError> {
    let mapping = MmapRegion::from_file(FileOffset::from_arc(file.clone(), offset), len as usize)?;
    Ok(GuestRegionMmap::new(mapping, GuestAddress(gpa))
        .expect("RAM ends below the end of the address space"))
}

fn sealed_memfd(size_bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(
        c"mortise-ram",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    file.set_len(size_bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// A memfd takes no page before it is touched, so that a far too large one would succeed and the
/// guest be killed later: what can never fit is refused here.
fn refuse_more_than_host(size_bytes: u64) -> Result<(), MemoryError> {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match host_capacity_bytes(&meminfo) {
        Some(host) if size_bytes > host => Err(MemoryError::MoreThanHost {
            wanted_mib: mib(size_bytes),
            host_mib: mib(host),
        }),
        _ => Ok(()),
    }
}

/// RAM and swap according to `/proc/meminfo`.
fn host_capacity_bytes(meminfo: &str) -> Option<u64> {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    Some(field("MemTotal:")?.saturating_add(field("SwapTotal:").unwrap_or(0)))
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_of_more_than_3_gib_continues_at_4_gib() {
        let gib = 1 << 30;
        assert_eq!(pieces(512 << 20), [(0, 512 << 20, 0)]);
        assert_eq!(pieces(3 * gib), [(0, 3 * gib, 0)]);
        assert_eq!(
            pieces(5 * gib),
            [(0, 3 * gib, 0), (4 * gib, 2 * gib, 3 * gib)]
        );
    }

    #[test]
    fn what_is_written_through_memory_is_in_the_memfd() {
        use std::os::unix::fs::FileExt;
        let ram = GuestRam::new(MIN_SIZE_BYTES).unwrap();
        ram.memory()
            .write_slice(b"mortise", GuestAddress(0x1234))
            .unwrap();
        let region = &ram.regions()[0];
        let mut copy = [0; 7];
        region
            .file
            .read_exact_at(&mut copy, region.file_offset + 0x1234)
            .unwrap();
        assert_eq!(&copy, b"mortise");
    }

    #[test]
    fn memfd_refuses_to_be_resized_or_sealed_again() {
        let ram = GuestRam::new(MIN_SIZE_BYTES).unwrap();
        let file = &ram.regions()[0].file;
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(2 * MIN_SIZE_BYTES).is_err());
        assert!(fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }

    #[test]
    fn cleared_ram_is_zero_and_takes_no_page() {
        use std::os::unix::fs::MetadataExt;
        let ram = GuestRam::new(MIN_SIZE_BYTES).unwrap();
        ram.memory()
            .write_slice(&[7; 8192], GuestAddress(0x1000))
            .unwrap();
        ram.clear().unwrap();
        assert_eq!(
            ram.memory().read_obj::<u64>(GuestAddress(0x1000)).unwrap(),
            0
        );
        let used_bytes = ram.file.metadata().unwrap().blocks() * 512;
        assert!(
            used_bytes <= PAGE_BYTES,
            "the page that was read: {used_bytes}"
        );
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(matches!(GuestRam::new(0), Err(MemoryError::Size(0))));
        assert!(matches!(
            GuestRam::new(MIN_SIZE_BYTES + 1),
            Err(MemoryError::Size(_))
        ));
        assert!(matches!(
            GuestRam::new(1 << 50),
            Err(MemoryError::MoreThanHost { .. })
        ));
    }

    #[test]
    fn capacity_counts_ram_and_swap() {
        let meminfo = "MemTotal:       1024 kB\nMemFree: 1 kB\nSwapTotal:      512 kB\n";
        assert_eq!(host_capacity_bytes(meminfo), Some(1536 * 1024));
        assert_eq!(host_capacity_bytes("nonsense"), None);
    }
}
