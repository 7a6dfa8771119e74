//! A raw image: opened, checked, locked and measured.
//!
//! Guest sector N is bytes `512 * N` of the file, so queues work on the file by themselves
//! ([`Image::plain_file`]); only jobs ask [`Image::perform`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::direct::{self, DirectIo};
use super::{Access, Buffers, Image, ImageError, Place, SECTOR_BYTES, Task, lock};
use crate::engine::buffer::AlignedBuffer;

/// Zeroes written at a time where the file system cannot zero by itself.
const ZEROES_BYTES: usize = 64 << 10;

/// Opens the image file at `path`.
pub(crate) fn open_file(path: &Path, read_only: bool) -> Result<File, ImageError> {
    let name = path.display().to_string();
    File::options()
        .read(true)
        .write(!read_only)
        // A FIFO must not make us wait for its other end.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing { name },
            io::ErrorKind::IsADirectory => ImageError::WrongKind {
                name,
                kind: "directory",
            },
            _ => {
                let action = if read_only {
                    "be opened for reading"
                } else {
                    "be opened for writing"
                };
                ImageError::Io {
                    name,
                    action,
                    source,
                }
            }
        })
}

/// How an image is to be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenOptions {
    pub(crate) read_only: bool,
    /// Use the page cache even where `O_DIRECT` works.
    pub(crate) page_cache: bool,
    /// What requests are multiples of: 512 or 4096.
    pub(crate) block_bytes: u32,
    /// How long the image's lock is waited for.
    pub(crate) lock_patience: Duration,
}

/// A locked raw image. Dropping it closes the file and, with the last request, its locks.
#[derive(Debug)]
pub(crate) struct RawImage {
    file: File,
    name: String,
    read_only: bool,
    capacity_sectors: AtomicU64,
    physical_block_bytes: u32,
    direct: Option<DirectIo>,
    is_in_memory: bool,
    punches_holes: bool,
    /// A flush of the page cache failed.
    has_lost_writes: AtomicBool,
}

impl RawImage {
    /// Takes over an image that somebody else opened. The description should be a fresh one:
    /// its lock and its `O_DIRECT` flag are this image's.
    pub(crate) fn from_file(
        file: File,
        name: String,
        options: OpenOptions,
    ) -> Result<Self, ImageError> {
        check_access(&file, &name, options.read_only)?;
        lock::acquire(&file, &name, options.read_only, options.lock_patience)?;
        let io_error = |action| {
            let name = name.clone();
            move |source| ImageError::Io {
                name,
                action,
                source,
            }
        };
        let len_bytes = measure(&file).map_err(io_error("be measured"))?;
        let capacity_sectors = len_bytes / SECTOR_BYTES;
        if capacity_sectors == 0 {
            return Err(ImageError::TooSmall { name, len_bytes });
        }
        let is_in_memory = direct::is_in_memory(&file);
        let direct = if options.page_cache || is_in_memory {
            direct::disable(&file).map_err(io_error("be switched to the page cache"))?;
            None
        } else {
            direct::enable(&file, options.block_bytes)
                .map_err(io_error("be switched to direct I/O"))?
        };
        let block_bytes = file.metadata().map_err(io_error("be inspected"))?.blksize();
        let image = Self {
            punches_holes: !options.read_only && punches_holes(&file, len_bytes),
            physical_block_bytes: if block_bytes.is_power_of_two() {
                block_bytes.clamp(SECTOR_BYTES, 4096) as u32
            } else {
                SECTOR_BYTES as u32
            },
            file,
            name,
            read_only: options.read_only,
            capacity_sectors: AtomicU64::new(capacity_sectors),
            direct,
            is_in_memory,
            has_lost_writes: AtomicBool::new(false),
        };
        image.warn_of_surprises(len_bytes);
        Ok(image)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Things that are served as asked, though they may not be what was meant.
    fn warn_of_surprises(&self, len_bytes: u64) {
        let tail_bytes = len_bytes % SECTOR_BYTES;
        if tail_bytes != 0 {
            tracing::warn!(
                image = %self.name,
                "the last {tail_bytes} bytes do not fill a sector and are not served; \
                 round the image up to a multiple of 512 bytes"
            );
        }
        let mut sector = AlignedBuffer::new(4096);
        let head = sector.as_mut_slice();
        if self
            .file
            .read_exact_at(&mut head[..SECTOR_BYTES as usize], 0)
            .is_ok()
            && let Some(format) = known_format(head)
        {
            tracing::warn!(
                image = %self.name,
                "this looks like a {format} image and is served as raw bytes; if that is not \
                 meant, convert it: qemu-img convert -O raw IMAGE IMAGE.raw"
            );
        }
    }
}

impl Image for RawImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> &'static str {
        "raw"
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Acquire)
    }

    fn physical_block_bytes(&self) -> u32 {
        self.physical_block_bytes
    }

    fn punches_holes(&self) -> bool {
        self.punches_holes
    }

    fn direct(&self) -> Option<DirectIo> {
        self.direct
    }

    fn locate(&self, _: Access, offset_bytes: u64, len_bytes: u64) -> Place {
        Place::File {
            fd: self.file.as_raw_fd(),
            offset_bytes,
            len_bytes,
            ticket: None,
        }
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        let fd = self.file.as_raw_fd();
        let all_of = |moved: usize, len_bytes: usize| match moved == len_bytes {
            true => Ok(()),
            // The image was truncated, or the storage is full.
            false => Err(libc::EIO),
        };
        match task {
            Task::Read {
                offset_bytes,
                buffers,
            } => all_of(buffers.read_from(fd, *offset_bytes)?, buffers.len_bytes()),
            Task::Write {
                offset_bytes,
                buffers,
            } => all_of(buffers.write_to(fd, *offset_bytes)?, buffers.len_bytes()),
            Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap,
            } => self.write_zeroes(*offset_bytes, *len_bytes, *unmap),
            Task::Discard {
                offset_bytes,
                len_bytes,
            } => match fallocate(fd, libc::FALLOC_FL_PUNCH_HOLE, *offset_bytes, *len_bytes) {
                // A discard is advice.
                Err(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => Ok(()),
                result => result,
            },
            Task::Flush => self.flush(),
        }
    }

    fn plain_file(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }

    fn layers(&self) -> io::Result<Vec<::qcow2::Layer>> {
        Ok(vec![::qcow2::Layer {
            file: Arc::new(self.file.try_clone()?),
            format: ::qcow2::Format::Raw,
            mem_align_bytes: self.direct.map(|direct| direct.mem_align_bytes),
        }])
    }

    fn is_in_memory(&self) -> bool {
        self.is_in_memory
    }

    fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        if capacity_sectors < self.capacity_sectors() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len_bytes = capacity_sectors
            .checked_mul(SECTOR_BYTES)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        if measure(&self.file)? < len_bytes {
            // A block device answers EINVAL: who owns it must have grown it before.
            self.file.set_len(len_bytes)?;
        }
        self.capacity_sectors
            .store(capacity_sectors, Ordering::Release);
        Ok(())
    }

    fn has_lost_writes(&self) -> bool {
        self.has_lost_writes.load(Ordering::Acquire)
    }

    /// The kernel then takes the pages for clean and the next flush would say that all is well.
    /// Direct I/O has no such pages.
    fn note_failed_flush(&self) {
        if self.direct.is_none() && !self.has_lost_writes.swap(true, Ordering::AcqRel) {
            tracing::error!(
                image = %self.name,
                "a flush failed; writes may be lost, so every flush fails until the disk is \
                 attached again"
            );
        }
    }
}

impl RawImage {
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> Result<(), i32> {
        let fd = self.file.as_raw_fd();
        let how = if unmap && self.punches_holes {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        match fallocate(fd, how, offset_bytes, len_bytes) {
            Err(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {}
            result => return result,
        }
        let zeroes = AlignedBuffer::new(ZEROES_BYTES);
        let mut done = 0;
        while done < len_bytes {
            let len = (len_bytes - done).min(ZEROES_BYTES as u64) as usize;
            let iovec = libc::iovec {
                iov_base: zeroes.as_ptr().cast(),
                iov_len: len,
            };
            // SAFETY: the buffer is longer than `len` and nobody else's; writing only reads it.
            let buffers = unsafe { Buffers::new(std::slice::from_ref(&iovec)) };
            if buffers.write_to(fd, offset_bytes + done)? < len {
                return Err(libc::EIO);
            }
            done += len as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), i32> {
        if self.has_lost_writes() {
            return Err(libc::EIO);
        }
        self.file.sync_data().map_err(|error| {
            self.note_failed_flush();
            error.raw_os_error().unwrap_or(libc::EIO)
        })
    }
}

fn fallocate(fd: RawFd, how: i32, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
    let (Ok(offset), Ok(len)) = (
        libc::off_t::try_from(offset_bytes),
        libc::off_t::try_from(len_bytes),
    ) else {
        return Err(libc::EFBIG);
    };
    loop {
        // SAFETY: fallocate takes integers and touches no memory of ours.
        let result = unsafe { libc::fallocate(fd, how | libc::FALLOC_FL_KEEP_SIZE, offset, len) };
        match io::Error::last_os_error().raw_os_error() {
            _ if result == 0 => return Ok(()),
            Some(libc::EINTR) => {}
            errno => return Err(errno.unwrap_or(libc::EIO)),
        }
    }
}

pub(super) fn check_access(file: &File, name: &str, read_only: bool) -> Result<(), ImageError> {
    // SAFETY: F_GETFL takes no argument and touches no memory.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let meta = file.metadata().map_err(|source| ImageError::Io {
        name: name.to_owned(),
        action: "be inspected",
        source,
    })?;
    let kind = meta.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let kind = if kind.is_dir() {
            "directory"
        } else if kind.is_char_device() {
            "character device"
        } else {
            "pipe or socket"
        };
        return Err(ImageError::WrongKind {
            name: name.to_owned(),
            kind,
        });
    }
    match flags & libc::O_ACCMODE {
        libc::O_RDONLY if !read_only => Err(ImageError::NotWritable {
            name: name.to_owned(),
        }),
        libc::O_WRONLY => Err(ImageError::NotReadable {
            name: name.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Length in bytes of a file or block device.
fn measure(file: &File) -> io::Result<u64> {
    // SAFETY: lseek takes integers; the file's position is used by nobody.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}

/// Tries a hole behind the end of the image, where it changes nothing.
fn punches_holes(file: &File, len_bytes: u64) -> bool {
    let Ok(offset) = libc::off_t::try_from(len_bytes.next_multiple_of(4096)) else {
        return false;
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes integers and touches no memory.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, 4096) };
    // A block device answers EINVAL behind its end, and does discard.
    result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// Formats that are mistaken for raw most often.
fn known_format(head: &[u8]) -> Option<&'static str> {
    const MAGICS: [(&[u8], &str); 5] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "VMDK"),
        (b"conectix", "VHD"),
        (b"vhdxfile", "VHDX"),
        (b"<<< ", "VDI"),
    ];
    MAGICS
        .iter()
        .find(|(magic, _)| head.starts_with(magic))
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, options: OpenOptions) -> Result<RawImage, ImageError> {
        let file = open_file(path, options.read_only)?;
        RawImage::from_file(file, path.display().to_string(), options)
    }

    const OPTIONS: OpenOptions = OpenOptions {
        read_only: false,
        page_cache: false,
        block_bytes: 512,
        lock_patience: Duration::ZERO,
    };

    fn image_of(len_bytes: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(len_bytes).unwrap();
        image
    }

    #[test]
    fn capacity_is_rounded_down_to_sectors() {
        let file = image_of(4096 + 100);
        let image = open(file.path(), OPTIONS).unwrap();
        assert_eq!(image.capacity_sectors(), 8);
    }

    #[test]
    fn images_below_a_sector_are_refused() {
        for len_bytes in [0, 511] {
            let file = image_of(len_bytes);
            let error = open(file.path(), OPTIONS).unwrap_err();
            assert!(matches!(error, ImageError::TooSmall { .. }), "{error}");
        }
    }

    #[test]
    fn missing_files_directories_and_devices_are_refused_by_kind() {
        let dir = tempfile::tempdir().unwrap();
        let missing = open(&dir.path().join("none"), OPTIONS).unwrap_err();
        assert!(matches!(missing, ImageError::Missing { .. }), "{missing}");
        let read_only = OpenOptions {
            read_only: true,
            ..OPTIONS
        };
        for options in [OPTIONS, read_only] {
            let directory = open(dir.path(), options).unwrap_err();
            assert!(matches!(
                directory,
                ImageError::WrongKind {
                    kind: "directory",
                    ..
                }
            ));
        }
        let device = open(Path::new("/dev/null"), OPTIONS).unwrap_err();
        assert!(matches!(
            device,
            ImageError::WrongKind {
                kind: "character device",
                ..
            }
        ));
    }

    #[test]
    fn read_only_descriptor_cannot_back_a_writable_disk() {
        let file = image_of(4096);
        let error =
            RawImage::from_file(File::open(file.path()).unwrap(), "x".into(), OPTIONS).unwrap_err();
        assert!(matches!(error, ImageError::NotWritable { .. }), "{error}");
    }

    #[test]
    fn passed_direct_descriptor_is_switched_to_the_page_cache_when_asked() {
        let file = image_of(4096);
        let Ok(passed) = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(file.path())
        else {
            return;
        };
        let options = OpenOptions {
            page_cache: true,
            ..OPTIONS
        };
        let image = RawImage::from_file(passed, "x".into(), options).unwrap();
        // SAFETY: F_GETFL takes no argument and touches no memory.
        let flags = unsafe { libc::fcntl(image.file.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_DIRECT, 0);
    }
}
