//! What a server serves.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Written where the file system cannot zero by itself.
const ZEROES_BYTES: usize = 1 << 20;
/// Ranges told in one answer about allocation.
const MAX_EXTENTS: usize = 1024;

/// A disk. Everything is called on threads of the server, many at a time, and may block.
///
/// Ranges lie inside the disk; the server has checked them.
pub trait Export: Send + Sync {
    /// Its size; may grow.
    fn size_bytes(&self) -> u64;

    /// Whether writing is refused.
    fn is_read_only(&self) -> bool;

    /// The smallest and the best block, powers of two; what is not whole blocks of the smallest
    /// is refused.
    fn block_bytes(&self) -> (u32, u32);

    /// Fills `into`.
    ///
    /// # Errors
    /// Told to the client by number.
    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<()>;

    /// Writes all of `data`.
    ///
    /// # Errors
    /// See [`Self::read_at`].
    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()>;

    /// Writes zeroes, at best without moving any.
    ///
    /// # Errors
    /// EOPNOTSUPP if it has to be fast and would not be; see [`Self::read_at`].
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, how: Zeroing) -> io::Result<()>;

    /// Gives space back, if that is possible.
    ///
    /// # Errors
    /// See [`Self::read_at`].
    fn trim(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()>;

    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// See [`Self::read_at`].
    fn flush(&self) -> io::Result<()>;

    /// What is where, from `offset_bytes` on; at least the first extent, none empty, in total at
    /// most `len_bytes`.
    ///
    /// # Errors
    /// See [`Self::read_at`].
    fn extents(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<Vec<Extent>> {
        let _ = offset_bytes;
        Ok(vec![Extent {
            len_bytes,
            is_hole: false,
        }])
    }
}

/// How zeroes come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroing {
    /// Space may be given back.
    pub may_unmap: bool,
    /// Rather fail than write them out.
    pub fast_only: bool,
}

/// A stretch of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Not 0.
    pub len_bytes: u64,
    /// Takes no space and reads as zeroes.
    pub is_hole: bool,
}

/// A raw image.
#[derive(Debug)]
pub struct FileExport {
    file: File,
    size_bytes: u64,
    is_read_only: bool,
    /// A failed fdatasync may have dropped pages: no later one tells the truth.
    has_lost_writes: AtomicBool,
}

impl FileExport {
    /// Serves the first `size_bytes` of `file`, which is open for writing unless read-only, and
    /// is not in direct mode.
    pub fn new(file: File, size_bytes: u64, is_read_only: bool) -> Self {
        Self {
            file,
            size_bytes,
            is_read_only,
            has_lost_writes: AtomicBool::new(false),
        }
    }

    fn fallocate(&self, mode: i32, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (offset_bytes as libc::off_t, len_bytes as libc::off_t);
        loop {
            // SAFETY: takes integers alone.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// `None` when there is nothing of the kind up to the end of the file.
    fn seek(&self, offset_bytes: u64, whence: i32) -> io::Result<Option<u64>> {
        // SAFETY: takes integers alone. Moving the position matters to nobody: all I/O names
        // its offset.
        let found =
            unsafe { libc::lseek(self.file.as_raw_fd(), offset_bytes as libc::off_t, whence) };
        if found >= 0 {
            return Ok(Some(found as u64));
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        }
    }
}

/// Neither possible here nor wrong.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

impl Export for FileExport {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn block_bytes(&self) -> (u32, u32) {
        (1, 4096)
    }

    fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_exact_at(into, offset_bytes)
    }

    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset_bytes)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, how: Zeroing) -> io::Result<()> {
        let modes: &[i32] = if how.may_unmap {
            &[libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE]
        } else {
            &[libc::FALLOC_FL_ZERO_RANGE]
        };
        for mode in modes {
            match self.fallocate(*mode, offset_bytes, len_bytes) {
                Err(error) if is_unsupported(&error) => (),
                answer => return answer,
            }
        }
        if how.fast_only {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let zeroes = vec![0; ZEROES_BYTES.min(len_bytes as usize)];
        let mut done = 0;
        while done < len_bytes {
            let len = (len_bytes - done).min(ZEROES_BYTES as u64) as usize;
            self.file
                .write_all_at(&zeroes[..len], offset_bytes + done)?;
            done += len as u64;
        }
        Ok(())
    }

    fn trim(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE, offset_bytes, len_bytes) {
            Err(error) if is_unsupported(&error) => Ok(()),
            answer => answer,
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.has_lost_writes.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.sync_data().inspect_err(|error| {
            self.has_lost_writes.store(true, Ordering::Release);
            tracing::error!(
                "a flush failed ({error}); writes may be lost, so every flush fails until the \
                 server is started again"
            );
        })
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<Vec<Extent>> {
        let end = offset_bytes + len_bytes;
        let mut extents = Vec::new();
        let mut at = offset_bytes;
        while at < end && extents.len() < MAX_EXTENTS {
            let data = self.seek(at, libc::SEEK_DATA)?.unwrap_or(end).min(end);
            let (until, is_hole) = if data > at {
                (data, true)
            } else {
                let hole = self.seek(at, libc::SEEK_HOLE)?.unwrap_or(end);
                // Somebody may write meanwhile: data is always a safe answer.
                (hole.clamp(at + 1, end), false)
            };
            extents.push(Extent {
                len_bytes: until - at,
                is_hole,
            });
            at = until;
        }
        Ok(extents)
    }
}
