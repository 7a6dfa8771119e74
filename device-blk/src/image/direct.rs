//! Whether a file takes `O_DIRECT`, and how buffers must be aligned for it.
//!
//! Guests see 512-byte sectors, because partition tables depend on the sector size and images
//! are moved between hosts. A file whose direct I/O is coarser than that (a native 4 KiB disk,
//! some file systems) is therefore served through the page cache, which reads and writes any
//! sector correctly; a disk with blocks of 4096 bytes needs no such detour. Coarse *memory*
//! alignment is no obstacle: such buffers are bounced.
//!
//! Files in memory (tmpfs) take `O_DIRECT` since Linux 6.6, and copy all the same.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::SECTOR_BYTES;
use crate::engine::buffer::AlignedBuffer;

/// How `O_DIRECT` requests must be aligned. Their offsets and lengths are whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectIo {
    /// Alignment of buffers in memory, a power of two.
    pub(crate) mem_align_bytes: usize,
    /// What lengths are multiples of: 512 or 4096.
    pub(crate) block_bytes: usize,
}

/// Sets `O_DIRECT` on the description when the file takes it with blocks of `block_bytes`.
pub(crate) fn enable(file: &File, block_bytes: u32) -> io::Result<Option<DirectIo>> {
    let from_kernel = statx_alignment(file);
    if let Some(Alignment { offset_bytes, .. }) = from_kernel
        && (offset_bytes == 0 || offset_bytes > block_bytes)
    {
        set(file, false)?;
        return Ok(None);
    }
    if set(file, true).is_err() {
        return Ok(None);
    }
    let mem_align_bytes = match from_kernel {
        Some(Alignment { mem_bytes, .. }) => Some(mem_bytes as usize),
        None => probe(file, block_bytes as usize),
    };
    match mem_align_bytes {
        Some(align) if align.is_power_of_two() && align <= AlignedBuffer::ALIGN_BYTES => {
            Ok(Some(DirectIo {
                mem_align_bytes: align,
                block_bytes: block_bytes as usize,
            }))
        }
        _ => {
            set(file, false)?;
            Ok(None)
        }
    }
}

/// Clears `O_DIRECT`, which a passed descriptor may carry.
pub(crate) fn disable(file: &File) -> io::Result<()> {
    set(file, false)
}

/// Whether the file is on a file system without a medium.
pub(crate) fn is_in_memory(file: &File) -> bool {
    // SAFETY: `statfs` is plain data, for which all zeroes is a value.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a valid buffer for the call.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &mut info) };
    result == 0 && matches!(info.f_type, libc::TMPFS_MAGIC | RAMFS_MAGIC)
}

/// Linux's `include/uapi/linux/magic.h`.
const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;

/// Also clears what a passed descriptor must not carry: with `O_NONBLOCK` io_uring would answer
/// EAGAIN instead of waiting for the disk, and with `O_APPEND` every write would go to the end.
fn set(file: &File, on: bool) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument and touches no memory.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    let base = flags & !(libc::O_DIRECT | libc::O_NONBLOCK | libc::O_APPEND);
    let wanted = if on { base | libc::O_DIRECT } else { base };
    // SAFETY: F_SETFL takes an integer and touches no memory.
    if wanted != flags && unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, wanted) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

struct Alignment {
    mem_bytes: u32,
    /// 0 where direct I/O is not supported.
    offset_bytes: u32,
}

/// `STATX_DIOALIGN`, since Linux 6.1 and not for every file system.
fn statx_alignment(file: &File) -> Option<Alignment> {
    // SAFETY: `statx` is plain data, for which all zeroes is a value.
    let mut info: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a NUL-terminated constant and `info` a valid buffer for the call.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut info,
        )
    };
    (result == 0 && info.stx_mask & libc::STATX_DIOALIGN != 0).then_some(Alignment {
        mem_bytes: info.stx_dio_mem_align,
        offset_bytes: info.stx_dio_offset_align,
    })
}

/// Asks by reading one block into ever coarser buffers; `None` when blocks cannot be read.
fn probe(file: &File, block_bytes: usize) -> Option<usize> {
    let buffer = AlignedBuffer::new(2 * AlignedBuffer::ALIGN_BYTES);
    [SECTOR_BYTES as usize, AlignedBuffer::ALIGN_BYTES]
        .into_iter()
        .find(|&align| {
            // SAFETY: the buffer is two alignment units long, so a block fits behind `align`. An
            // image of a single block reads nothing at the second one.
            let read = unsafe {
                libc::pread(
                    file.as_raw_fd(),
                    buffer.as_ptr().add(align).cast(),
                    block_bytes,
                    block_bytes as libc::off_t,
                )
            };
            read >= 0
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appending_descriptor_writes_where_it_is_told_to() {
        use std::os::unix::fs::FileExt;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8192).unwrap();
        let open = || {
            let options = &mut File::options();
            options.read(true).append(true).open(image.path()).unwrap()
        };
        for page_cache in [true, false] {
            let passed = open();
            if page_cache {
                disable(&passed).unwrap();
            } else {
                enable(&passed, 512).unwrap();
                disable(&passed).unwrap();
            }
            passed.write_all_at(&[7; 512], 0).unwrap();
            assert_eq!(image.as_file().metadata().unwrap().len(), 8192);
        }
    }

    #[test]
    fn direct_io_on_this_file_system_takes_sectors_or_is_off() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let direct = enable(image.as_file(), 512).unwrap();
        // SAFETY: F_GETFL takes no argument and touches no memory.
        let flags = unsafe { libc::fcntl(image.as_file().as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_DIRECT != 0, direct.is_some());
        if direct.is_some() {
            let buffer = AlignedBuffer::new(4096);
            // SAFETY: the buffer holds 512 bytes.
            let read = unsafe {
                libc::pread(
                    image.as_file().as_raw_fd(),
                    buffer.as_ptr().cast(),
                    512,
                    512,
                )
            };
            assert_eq!(read, 512);
        }
        disable(image.as_file()).unwrap();
    }
}
