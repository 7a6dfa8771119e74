//! Blocks from one image to another, through memory of ours: what an encrypted one has is plain
//! there, and nowhere else.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use api::rate::TokenBucket;

use super::{Control, JobError};
use crate::engine::allowance::Allowance;
use crate::engine::buffer::AlignedBuffer;
use crate::image::task::OwnIovec;
use crate::image::{Access, Buffers, Image, Place, SECTOR_BYTES, Task};

/// Bytes that a job moves at once, and all the memory it takes for that.
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;
/// Unit in which jobs keep track: a cluster of most images.
pub(crate) const UNIT_BYTES: u64 = 64 << 10;

/// What the target reads as where nothing was written yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fresh {
    /// Zeroes, so that zeroes need not be written.
    Zeroes,
    /// Anything.
    Unknown,
    /// Anything, and somebody else reads it: nothing may be given back.
    InUse,
    /// Zeroes now, but an older copy is to be put below it.
    Overlay,
}

/// Something failed on one of the two sides.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {image} at byte {offset_bytes}: {source}")]
pub(crate) struct CopyError {
    action: &'static str,
    image: String,
    offset_bytes: u64,
    source: std::io::Error,
}

impl From<CopyError> for JobError {
    fn from(error: CopyError) -> Self {
        JobError::Failed(error.to_string())
    }
}

impl CopyError {
    fn new(action: &'static str, image: &dyn Image, offset_bytes: u64, errno: i32) -> Self {
        Self {
            action,
            image: image.name().to_owned(),
            offset_bytes,
            source: std::io::Error::from_raw_os_error(errno),
        }
    }
}

/// A buffer and what to do with it.
pub(crate) struct Copier {
    buffer: AlignedBuffer,
}

impl Copier {
    pub(crate) fn new() -> Self {
        Self {
            buffer: AlignedBuffer::new(BLOCK_BYTES as usize),
        }
    }

    /// Copies bytes, at most [`BLOCK_BYTES`]; zeroes stay holes where they can.
    ///
    /// # Errors
    /// Which side failed, and where.
    pub(crate) fn copy(
        &mut self,
        source: &dyn Image,
        target: &dyn Image,
        offset_bytes: u64,
        len_bytes: u64,
        fresh: Fresh,
    ) -> Result<(), CopyError> {
        let buffer = &mut self.buffer.as_mut_slice()[..len_bytes as usize];
        let is_hole = reads_as_zeroes(source, offset_bytes, len_bytes);
        if is_hole && fresh == Fresh::Overlay {
            buffer.fill(0);
        }
        let is_zero = is_hole || {
            let mut memory = OwnIovec::new(buffer);
            let mut task = Task::Read {
                offset_bytes,
                buffers: Buffers::of_iovec(&mut memory),
            };
            source
                .perform(&mut task)
                .map_err(|errno| CopyError::new("read", source, offset_bytes, errno))?;
            if let Some(cipher) = source.cipher() {
                cipher.decrypt(offset_bytes, buffer);
            }
            buffer.iter().all(|&byte| byte == 0)
        };
        let mut memory;
        let mut task = match (is_zero, fresh) {
            (true, Fresh::Zeroes) => return Ok(()),
            (true, Fresh::Unknown | Fresh::InUse) => Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap: fresh == Fresh::Unknown,
            },
            (false, _) | (true, Fresh::Overlay) => {
                if let Some(cipher) = target.cipher() {
                    cipher.encrypt(offset_bytes, buffer);
                }
                memory = OwnIovec::new(buffer);
                Task::Write {
                    offset_bytes,
                    buffers: Buffers::of_iovec(&mut memory),
                }
            }
        };
        target
            .perform(&mut task)
            .map_err(|errno| CopyError::new("write", target, offset_bytes, errno))
    }
}

/// Puts what was copied on stable storage.
///
/// # Errors
/// The target failed.
pub(crate) fn flush(target: &dyn Image) -> Result<(), CopyError> {
    target
        .perform(&mut Task::Flush)
        .map_err(|errno| CopyError::new("flush", target, 0, errno))
}

/// Whether it is known, without reading, that there is nothing.
fn reads_as_zeroes(image: &dyn Image, offset_bytes: u64, len_bytes: u64) -> bool {
    if let Some(fd) = image.plain_file() {
        return next_data(fd, offset_bytes).is_some_and(|at| at >= offset_bytes + len_bytes);
    }
    let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
    while at < end {
        match image.locate(Access::Read, at, end - at) {
            Place::Zeroes { len_bytes } => at += len_bytes.max(SECTOR_BYTES),
            Place::File { .. } | Place::Worker { .. } => return false,
        }
    }
    true
}

/// Where the next data of a file is; `None` when the file does not tell.
fn next_data(fd: RawFd, offset_bytes: u64) -> Option<u64> {
    let offset = libc::off_t::try_from(offset_bytes).ok()?;
    // SAFETY: lseek takes integers; the file's position is used by nobody.
    let at = unsafe { libc::lseek(fd, offset, libc::SEEK_DATA) };
    match u64::try_from(at) {
        Ok(at) => Some(at),
        Err(_) => match std::io::Error::last_os_error().raw_os_error() {
            // Only a hole is left.
            Some(libc::ENXIO) => Some(u64::MAX),
            _ => None,
        },
    }
}

/// Between two looks whether the disk may do I/O again.
const LEAVE_INTERVAL: Duration = Duration::from_millis(20);

/// How fast a job may copy, and until when.
#[derive(Debug)]
pub(crate) struct Pace<'a> {
    bucket: Option<TokenBucket>,
    began: Instant,
    allowance: &'a Allowance,
}

impl<'a> Pace<'a> {
    /// 0 for no limit; `allowance` is the disk's.
    pub(crate) fn new(bytes_per_second: u64, allowance: &'a Allowance) -> Self {
        let bucket = |rate| TokenBucket::full(rate, BLOCK_BYTES);
        Self {
            bucket: (bytes_per_second > 0).then(|| bucket(bytes_per_second)),
            began: Instant::now(),
            allowance,
        }
    }

    /// Waits until so much may be copied.
    ///
    /// # Errors
    /// The job is to end.
    pub(crate) fn wait(&mut self, control: &Control, len_bytes: u64) -> Result<(), JobError> {
        self.wait_for_rate(control, len_bytes)?;
        self.wait_for_leave(control)
    }

    /// Waits for as long as the time is over that the disk was allowed.
    ///
    /// # Errors
    /// The job is to end.
    pub(crate) fn wait_for_leave(&self, control: &Control) -> Result<(), JobError> {
        while self.allowance.is_over() {
            control.check_cancelled()?;
            std::thread::sleep(LEAVE_INTERVAL);
        }
        control.check_cancelled()
    }

    fn wait_for_rate(&mut self, control: &Control, len_bytes: u64) -> Result<(), JobError> {
        control.check_cancelled()?;
        let Some(bucket) = &mut self.bucket else {
            return Ok(());
        };
        let now_ns = || self.began.elapsed().as_nanos() as u64;
        let ready_ns = bucket.reserve(len_bytes, now_ns());
        loop {
            let left_ns = ready_ns.saturating_sub(now_ns());
            // Whoever completes the job wants it done.
            if left_ns == 0 || control.completes() {
                return control.check_cancelled();
            }
            control.pause(Duration::from_nanos(left_ns))?;
        }
    }
}
