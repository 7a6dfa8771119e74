//! The shared in-flight region (vhost-user: inflight I/O tracking).
//!
//! One file holds a [`QueueInflight`] per ring, [split] or [packed]. It says which requests the
//! backend took and did not complete yet, so that the next incarnation of a backend can resubmit
//! exactly these, in order. The frontend keeps the file while no backend is connected.
//!
//! The frontend shares this memory, so everything read from it is checked before use.

mod packed;
mod split;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::Arc;

use crate::eventfd::EventFd;
use crate::memory::Mapping;
use crate::ring::RingFormat;
pub(crate) use packed::{PackedInflight, PackedRecovered, StoredDesc};
pub(crate) use split::SplitInflight;

const REGION_ALIGN_BYTES: u64 = 64;
const VERSION: u16 = 1;

/// Why an in-flight region was refused.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// Zero or too many queues or descriptors.
    #[error("in-flight region for {num_queues} queues of {queue_size} descriptors is not possible")]
    BadShape {
        /// Queues it was to describe.
        num_queues: u16,
        /// Descriptors per queue.
        queue_size: u16,
    },
    /// The file or the mapping that was announced is shorter than the queues need.
    #[error("in-flight region has {len_bytes} bytes, its queues need {needed_bytes}")]
    TooShort {
        /// What there is.
        len_bytes: u64,
        /// What the queues need.
        needed_bytes: u64,
    },
    /// The region cannot be created or mapped.
    #[error("in-flight region cannot be mapped")]
    Map(#[source] io::Error),
}

/// The mapped region of all queues of a device.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    mapping: Arc<Mapping>,
    format: RingFormat,
    num_queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Bytes a region needs.
    pub fn needed_bytes(format: RingFormat, num_queues: u16, queue_size: u16) -> u64 {
        u64::from(num_queues) * queue_stride_bytes(format, queue_size)
    }

    /// A fresh region in a memfd whose size is sealed.
    ///
    /// # Errors
    /// [`InflightError`] for impossible shapes or when the kernel refuses.
    pub fn create(
        format: RingFormat,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(InflightRegion, File), InflightError> {
        check_shape(num_queues, queue_size)?;
        let len_bytes = Self::needed_bytes(format, num_queues, queue_size);
        let file = sealed_memfd(len_bytes).map_err(InflightError::Map)?;
        let region = Self::map(&file, 0, len_bytes, format, num_queues, queue_size)?;
        Ok((region, file))
    }

    /// Maps a region that the frontend kept.
    ///
    /// # Errors
    /// [`InflightError`] when shape, announced size and file do not fit together.
    pub fn map(
        file: &File,
        mmap_offset: u64,
        mmap_len_bytes: u64,
        format: RingFormat,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<InflightRegion, InflightError> {
        check_shape(num_queues, queue_size)?;
        let needed_bytes = Self::needed_bytes(format, num_queues, queue_size);
        let file_len_bytes = file.metadata().map_err(InflightError::Map)?.len();
        let len_bytes = mmap_len_bytes.min(file_len_bytes.saturating_sub(mmap_offset));
        if len_bytes < needed_bytes {
            return Err(InflightError::TooShort {
                len_bytes,
                needed_bytes,
            });
        }
        if !mmap_offset.is_multiple_of(REGION_ALIGN_BYTES) {
            return Err(InflightError::Map(io::Error::from(
                io::ErrorKind::InvalidInput,
            )));
        }
        let mapping =
            Mapping::new(file.as_fd(), mmap_offset, needed_bytes).map_err(InflightError::Map)?;
        Ok(InflightRegion {
            mapping: Arc::new(mapping),
            format,
            num_queues,
            queue_size,
        })
    }

    /// Guards the region in case its file can be truncated: see [`Mapping::guard`].
    pub fn guard(&self, truncated: &Arc<EventFd>) {
        self.mapping.guard(truncated);
    }

    /// The rings it is for.
    pub fn format(&self) -> RingFormat {
        self.format
    }

    /// The part of one queue, for rings of at most `queue_size` descriptors.
    pub fn queue(&self, index: u16, ring_size: u16) -> Option<QueueInflight> {
        if index >= self.num_queues || ring_size > self.queue_size {
            return None;
        }
        let offset = u64::from(index) * queue_stride_bytes(self.format, self.queue_size);
        // SAFETY: `index` is below `num_queues`, so the queue's region is within the mapping,
        // whose length `map` checked.
        let base = unsafe { self.mapping.as_ptr().add(offset as usize) };
        let mapping = Arc::clone(&self.mapping);
        Some(match self.format {
            RingFormat::Split => {
                // SAFETY: the stride counts header and entries, and is a multiple of 64 bytes, as
                // is the region's place in its file.
                QueueInflight::Split(unsafe { SplitInflight::new(base, ring_size, mapping) })
            }
            RingFormat::Packed => {
                // SAFETY: as above.
                QueueInflight::Packed(unsafe { PackedInflight::new(base, ring_size, mapping) })
            }
        })
    }
}

/// The in-flight entries of one ring.
#[derive(Debug)]
pub enum QueueInflight {
    /// Of a split one.
    Split(SplitInflight),
    /// Of a packed one.
    Packed(PackedInflight),
}

fn check_shape(num_queues: u16, queue_size: u16) -> Result<(), InflightError> {
    if num_queues == 0 || queue_size == 0 || queue_size > crate::ring::MAX_RING_SIZE {
        return Err(InflightError::BadShape {
            num_queues,
            queue_size,
        });
    }
    Ok(())
}

fn queue_stride_bytes(format: RingFormat, queue_size: u16) -> u64 {
    let len_bytes = match format {
        RingFormat::Split => split::region_bytes(queue_size),
        RingFormat::Packed => packed::region_bytes(queue_size),
    };
    (len_bytes as u64).next_multiple_of(REGION_ALIGN_BYTES)
}

fn sealed_memfd(len_bytes: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a NUL-terminated literal; the result is checked below.
    let fd = unsafe { libc::memfd_create(c"vhost-user-inflight".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
