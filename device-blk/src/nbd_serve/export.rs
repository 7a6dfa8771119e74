//! An [`Image`] as what an NBD server serves.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nbd::server::{Export, Extent, Zeroing};

use crate::image::task::OwnIovec;
use crate::image::{Access, Buffers, Image, Place, SECTOR_BYTES, Task};

/// Ranges told in one answer about allocation.
const MAX_EXTENTS: usize = 1024;

/// A duplicate of the one file whose bytes are exactly the disk's, if there is one.
///
/// # Errors
/// No descriptors left.
pub(super) fn plain_file(image: &dyn Image) -> io::Result<Option<File>> {
    let Some(fd) = image.plain_file() else {
        return Ok(None);
    };
    // SAFETY: the image keeps its file open for its life, which is longer than this call.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map(|fd| Some(File::from(fd)))
}

/// Any image, sector by sector. It must go through the page cache: buffers here have no alignment.
#[derive(Debug)]
pub(super) struct ImageExport {
    image: Arc<dyn Image>,
}

impl ImageExport {
    pub(super) fn new(image: Arc<dyn Image>) -> Self {
        Self { image }
    }

    fn perform(&self, mut task: Task<'_>) -> io::Result<()> {
        self.image
            .perform(&mut task)
            .map_err(io::Error::from_raw_os_error)
    }
}

impl Export for ImageExport {
    fn size_bytes(&self) -> u64 {
        self.image.capacity_sectors() * SECTOR_BYTES
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn block_bytes(&self) -> (u32, u32) {
        (SECTOR_BYTES as u32, 4096)
    }

    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let mut memory = OwnIovec::new(into);
        self.perform(Task::Read {
            offset_bytes,
            buffers: Buffers::of_iovec(&mut memory),
        })?;
        if let Some(cipher) = self.image.cipher() {
            cipher.decrypt(offset_bytes, into);
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        let mut data = data.to_vec();
        if let Some(cipher) = self.image.cipher() {
            cipher.encrypt(offset_bytes, &mut data);
        }
        let mut memory = OwnIovec::new(&mut data);
        self.perform(Task::Write {
            offset_bytes,
            buffers: Buffers::of_iovec(&mut memory),
        })
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, how: Zeroing) -> io::Result<()> {
        // Nobody knows beforehand whether it will be fast.
        if how.fast_only {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        self.perform(Task::WriteZeroes {
            offset_bytes,
            len_bytes,
            unmap: how.may_unmap,
        })
    }

    fn trim(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.perform(Task::Discard {
            offset_bytes,
            len_bytes,
        })
    }

    fn flush(&self) -> io::Result<()> {
        if self.image.has_lost_writes() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let flushed = self.perform(Task::Flush);
        flushed.inspect_err(|_| self.image.note_failed_flush())
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
        while at < end && extents.len() < MAX_EXTENTS {
            let (len_bytes, is_hole) = match self.image.locate(Access::Read, at, end - at) {
                Place::Zeroes { len_bytes } => (len_bytes, true),
                Place::File { len_bytes, .. } | Place::Worker { len_bytes } => (len_bytes, false),
            };
            let len_bytes = len_bytes.clamp(1, end - at);
            match extents.last_mut() {
                Some(last) if last.is_hole == is_hole => last.len_bytes += len_bytes,
                _ => extents.push(Extent { len_bytes, is_hole }),
            }
            at += len_bytes;
        }
        Ok(extents)
    }
}
