//! One file of a chain, read and written in whole sectors whatever mode its description is in.
//!
//! Data and metadata use the same description, so they are either both in the page cache or
//! both past it: a table written through one and read through the other could be stale.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::fcntl::{FallocateFlags, fallocate};

/// The unit of direct I/O.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Alignment of buffers that suits every disk.
const ALIGN_BYTES: usize = 4096;

/// Zeroed heap memory at a page boundary.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// Never grown, so its bytes stay where they are.
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGN_BYTES];
        let start = memory.as_ptr().align_offset(ALIGN_BYTES);
        Self { memory, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// A file or block device.
#[derive(Clone, Debug)]
pub(crate) struct Storage {
    file: Arc<File>,
    /// What direct I/O demands of buffers; `None` when the page cache is used.
    mem_align_bytes: Option<usize>,
    is_block_device: bool,
    /// A flush of the page cache failed: what was written before may be lost, and the kernel
    /// says so only once.
    has_lost_writes: Arc<AtomicBool>,
    /// Held while the header is changed.
    header: Arc<Mutex<()>>,
}

impl Storage {
    pub(crate) fn new(file: Arc<File>, mem_align_bytes: Option<usize>) -> io::Result<Self> {
        let is_block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            file,
            mem_align_bytes,
            is_block_device,
            has_lost_writes: Arc::default(),
            header: Arc::default(),
        })
    }

    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The turn of whoever changes the header.
    pub(crate) fn header_turn(&self) -> &Mutex<()> {
        &self.header
    }

    pub(crate) fn mem_align_bytes(&self) -> Option<usize> {
        self.mem_align_bytes
    }

    pub(crate) fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    pub(crate) fn len_bytes(&self) -> io::Result<u64> {
        if self.is_block_device {
            use std::io::{Seek, SeekFrom};
            (&*self.file).seek(SeekFrom::End(0))
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    /// Reads whole sectors; what lies behind the end of the file is zeroes.
    pub(crate) fn read(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        debug_assert!(is_whole_sectors(offset, into.len()));
        if self.takes(into) {
            return read_zero_filled(&self.file, into, offset);
        }
        let mut bounce = Buffer::new(into.len());
        read_zero_filled(&self.file, &mut bounce, offset)?;
        into.copy_from_slice(&bounce);
        Ok(())
    }

    /// Reads whole sectors into fresh memory.
    pub(crate) fn read_new(&self, offset: u64, len: usize) -> io::Result<Buffer> {
        let mut buffer = Buffer::new(len);
        self.read(&mut buffer, offset)?;
        Ok(buffer)
    }

    /// Writes whole sectors.
    pub(crate) fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        debug_assert!(is_whole_sectors(offset, data.len()));
        if self.takes(data) {
            return self.file.write_all_at(data, offset);
        }
        let mut bounce = Buffer::new(data.len());
        bounce.copy_from_slice(data);
        self.file.write_all_at(&bounce, offset)
    }

    /// Puts everything that was written on stable storage.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.has_lost_writes() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file
            .sync_data()
            .inspect_err(|_| self.note_failed_sync())
    }

    pub(crate) fn has_lost_writes(&self) -> bool {
        self.has_lost_writes.load(Ordering::Acquire)
    }

    /// Direct I/O leaves nothing behind that could get lost.
    pub(crate) fn note_failed_sync(&self) {
        if self.mem_align_bytes.is_none() && !self.has_lost_writes.swap(true, Ordering::AcqRel) {
            tracing::error!(
                "a flush failed; writes may be lost, so every flush fails until the image is \
                 opened again"
            );
        }
    }

    /// Makes the file at least this long; what is added reads zeroes.
    pub(crate) fn extend(&self, len_bytes: u64) -> io::Result<()> {
        if self.len_bytes()? >= len_bytes {
            return Ok(());
        }
        if self.is_block_device {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.file.set_len(len_bytes)
    }

    /// Gives a range back to the file system; it reads zeroes from then on. False where that
    /// is not possible.
    pub(crate) fn punch(&self, offset: u64, len_bytes: u64) -> io::Result<bool> {
        if self.is_block_device {
            return Ok(false);
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(flags, offset, len_bytes) {
            Ok(()) => Ok(true),
            Err(nix::Error::EOPNOTSUPP | nix::Error::ENOSYS | nix::Error::EINVAL) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes blocks of the file system for a range.
    pub(crate) fn allocate(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        Ok(self.fallocate(FallocateFlags::empty(), offset, len_bytes)?)
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len_bytes: u64) -> nix::Result<()> {
        let offset = i64::try_from(offset).map_err(|_| nix::Error::EFBIG)?;
        let len_bytes = i64::try_from(len_bytes).map_err(|_| nix::Error::EFBIG)?;
        loop {
            match fallocate(&self.file, flags, offset, len_bytes) {
                Err(nix::Error::EINTR) => {}
                result => return result,
            }
        }
    }

    fn takes(&self, memory: &[u8]) -> bool {
        self.mem_align_bytes
            .is_none_or(|align| memory.as_ptr().addr().is_multiple_of(align))
    }
}

fn is_whole_sectors(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(SECTOR_BYTES) && (len as u64).is_multiple_of(SECTOR_BYTES)
}

/// Reads until the end of the file, and takes the rest for zeroes.
fn read_zero_filled(file: &File, into: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // Direct I/O cannot go on inside a sector, and stops there only at the end of the file.
        if !(done as u64).is_multiple_of(SECTOR_BYTES) {
            break;
        }
    }
    into[done..].fill(0);
    Ok(())
}
