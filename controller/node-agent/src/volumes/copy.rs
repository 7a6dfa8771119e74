//! Copying an image's content: holes stay holes, and file systems that can share blocks do.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::atomic::{AtomicU64, Ordering},
};

/// Copied between two reports of progress.
const COPY_CHUNK_BYTES: u64 = 16 << 20;

/// Copies what is not a hole, by reference where the file system can.
///
/// # Errors
/// When reading or writing fails, or the source is shorter than `len_bytes`.
pub(super) fn copy_data(
    source: &File,
    target: &File,
    len_bytes: u64,
    copied: &AtomicU64,
) -> io::Result<()> {
    let mut at = 0;
    while at < len_bytes {
        let Some(data) = seek(source, at, libc::SEEK_DATA)? else {
            break;
        };
        let hole = seek(source, data, libc::SEEK_HOLE)?
            .unwrap_or(len_bytes)
            .min(len_bytes);
        at = data;
        while at < hole {
            copied.store(at, Ordering::Relaxed);
            at += copy_chunk(source, target, at, (hole - at).min(COPY_CHUNK_BYTES))?;
        }
    }
    copied.store(len_bytes, Ordering::Relaxed);
    Ok(())
}

fn copy_chunk(source: &File, target: &File, at: u64, len_bytes: u64) -> io::Result<u64> {
    let (mut from, mut to) = (at as i64, at as i64);
    // SAFETY: copy_file_range reads and writes the two offsets, which live across the call.
    let copied = unsafe {
        libc::copy_file_range(
            source.as_raw_fd(),
            &mut from,
            target.as_raw_fd(),
            &mut to,
            len_bytes as usize,
            0,
        )
    };
    match copied {
        1.. => return Ok(copied as u64),
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ => {}
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Block devices, and file systems that copy only within themselves.
        Some(libc::EINVAL | libc::EXDEV | libc::EOPNOTSUPP | libc::ENOSYS) => {
            copy_by_hand(source, target, at, len_bytes)
        }
        _ => Err(error),
    }
}

fn copy_by_hand(source: &File, target: &File, at: u64, len_bytes: u64) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; len_bytes.min(1 << 20) as usize];
    let read = source.read_at(&mut buffer, at)?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    target.write_all_at(&buffer[..read], at)?;
    Ok(read as u64)
}

/// `None` beyond the last data.
fn seek(file: &File, at: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: lseek takes its arguments by value.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        // A file that cannot tell is all data.
        Some(libc::EINVAL) => Ok((whence == libc::SEEK_DATA).then_some(at)),
        _ => Err(error),
    }
}
