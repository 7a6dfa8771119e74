//! Reading and writing parts of the file in a way that works with `O_DIRECT` too.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use zeroize::Zeroizing;

use crate::error::LuksError;

/// Every file system and block device takes direct I/O in this unit.
const ALIGN_BYTES: u64 = 4096;

/// The `len_bytes` at `offset_bytes`.
///
/// # Errors
/// The kernel refused, or the file ends before.
pub(crate) fn read(
    file: &File,
    offset_bytes: u64,
    len_bytes: usize,
    action: &'static str,
) -> Result<Zeroizing<Vec<u8>>, LuksError> {
    let skip = (offset_bytes % ALIGN_BYTES) as usize;
    let mut buffer = Aligned::new(skip + len_bytes);
    let mut filled = 0;
    let room = buffer.as_mut_slice();
    while filled < skip + len_bytes {
        let at = offset_bytes - skip as u64 + filled as u64;
        match file.read_at(&mut room[filled..], at) {
            Ok(0) => {
                return Err(LuksError::Io {
                    action,
                    source: io::ErrorKind::UnexpectedEof.into(),
                });
            }
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(LuksError::Io { action, source }),
        }
    }
    Ok(Zeroizing::new(room[skip..skip + len_bytes].to_vec()))
}

/// Writes `data`, a multiple of 4096 bytes, at such a multiple.
pub(crate) fn write(
    file: &File,
    offset_bytes: u64,
    data: &[u8],
    action: &'static str,
) -> Result<(), LuksError> {
    debug_assert!(offset_bytes.is_multiple_of(ALIGN_BYTES));
    debug_assert!(data.len().is_multiple_of(ALIGN_BYTES as usize));
    let mut buffer = Aligned::new(data.len());
    let source = &mut buffer.as_mut_slice()[..data.len()];
    source.copy_from_slice(data);
    file.write_all_at(source, offset_bytes)
        .map_err(LuksError::io(action))
}

/// Length in bytes of a file or block device.
pub(crate) fn file_len(file: &File) -> Result<u64, LuksError> {
    // SAFETY: lseek takes integers; the file's position is used by nobody here.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| LuksError::io("measure the image")(io::Error::last_os_error()))
}

/// A buffer that begins at a multiple of 4096 and has such a length.
struct Aligned {
    bytes: Zeroizing<Vec<u8>>,
    start: usize,
    len_bytes: usize,
}

impl Aligned {
    fn new(at_least_bytes: usize) -> Self {
        let align = ALIGN_BYTES as usize;
        let len_bytes = at_least_bytes.next_multiple_of(align);
        let bytes = Zeroizing::new(vec![0; len_bytes + align]);
        let start = bytes.as_ptr().align_offset(align);
        Self {
            bytes,
            start,
            len_bytes,
        }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len_bytes]
    }
}
