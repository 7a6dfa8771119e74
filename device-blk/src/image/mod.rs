//! Disk images.
//!
//! An [`Image`] is the content of a disk, whatever it is stored as; all queues of the disk share
//! it. The engine asks [`Image::locate`] where the next stretch of a request is, and does the I/O
//! of stretches that lie in a file by itself. What has to be thought about first (allocation,
//! metadata that is not loaded, another host) goes to a worker thread, which may block:
//!
//! ```text
//! request ─► locate ─┬─► File: io_uring on the queue's thread
//!                    ├─► Zeroes: filled in
//!                    └─► Worker: perform, on a worker thread of the disk
//! ```
//!
//! - [`raw`]: guest sector N is bytes `512 * N` of the file; opening and measuring;
//! - [`qcow2`]: an overlay or a whole chain of images;
//! - [`chain`]: opening the files that a chain's headers name;
//! - [`luks`]: an encrypted volume in a raw image;
//! - [`key`]: reading its passphrase;
//! - [`nbd`]: a disk on another host;
//! - [`place`]: where a stretch is, and what keeps it there;
//! - [`task`]: what a worker thread is asked to do;
//! - [`direct`]: whether, and with which alignment, a file takes `O_DIRECT`;
//! - [`lock`]: keeping a second writer out;
//! - [`failing`]: one that answers every request with an error;
//! - [`error`]: why an image cannot be served.

pub(crate) mod chain;
pub(crate) mod direct;
pub(crate) mod error;
pub(crate) mod failing;
pub(crate) mod key;
pub(crate) mod lock;
pub(crate) mod luks;
pub(crate) mod nbd;
pub(crate) mod place;
pub(crate) mod qcow2;
pub(crate) mod raw;
pub(crate) mod task;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

pub(crate) use self::qcow2::Qcow2Image;
pub(crate) use direct::DirectIo;
pub(crate) use error::ImageError;
pub(crate) use place::{Access, Place, Ticket, TicketIssuer};
pub(crate) use raw::{OpenOptions, RawImage};
pub(crate) use request::SECTOR_BYTES;
pub(crate) use task::{Buffers, Executor, PendingTask, Task};

/// Threads that wait for one image at most, unless it says otherwise.
const DEFAULT_MAX_WORKERS: usize = 4;

/// The content of a disk.
///
/// Offsets are the disk's, in bytes; requests were checked against the capacity and are whole
/// sectors.
pub(crate) trait Image: Send + Sync + fmt::Debug {
    /// For logs and metrics.
    fn name(&self) -> &str;

    /// `raw`, `qcow2`, ...
    fn format(&self) -> &'static str;

    fn is_read_only(&self) -> bool;

    /// Grows by [`Image::resize`] alone.
    fn capacity_sectors(&self) -> u64;

    /// A power of two from 512 to 4096: what the storage below likes to be written in.
    fn physical_block_bytes(&self) -> u32;

    /// Whether discarded blocks are given back.
    fn punches_holes(&self) -> bool;

    /// What the files that [`Place::File`] names demand of buffers; `None` when they go through
    /// the page cache.
    fn direct(&self) -> Option<DirectIo>;

    /// Where the first stretch of at most `len_bytes` from `offset_bytes` on is; `len_bytes` is
    /// not 0, and neither is the stretch. Called for every request on the queue's thread: never
    /// blocks, not for long on a lock either.
    fn locate(&self, access: Access, offset_bytes: u64, len_bytes: u64) -> Place;

    /// Does what `locate` answered [`Place::Worker`] for, and whatever the queue does not do by
    /// itself: see [`Image::plain_file`] and [`Image::flush_file`]. Blocks; runs on a worker thread
    /// of the disk, or on a job's. Several run at once.
    ///
    /// # Errors
    /// The error number; the guest gets IOERR.
    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32>;

    /// When the disk's bytes are exactly those of one file: that file. Then the queue does not
    /// ask `locate`, and zeroes, discards and flushes by itself.
    fn plain_file(&self) -> Option<RawFd> {
        None
    }

    /// When a flush is no more than `fdatasync` of one file: that file. Otherwise flushes are
    /// [`Task::Flush`].
    fn flush_file(&self) -> Option<RawFd> {
        self.plain_file()
    }

    /// Whether reads never wait for a medium (tmpfs): then they are done at once, on the queue's
    /// thread.
    fn is_in_memory(&self) -> bool {
        false
    }

    /// When what is stored is not what the guest sees: data passes a buffer in between, decrypted
    /// after reads and encrypted before writes, wherever it is stored. Not applied to
    /// [`Place::Zeroes`], [`Task::WriteZeroes`] and [`Task::Discard`].
    fn cipher(&self) -> Option<&dyn SectorCipher> {
        None
    }

    /// An image with threads of its own, which takes many tasks at a time: they are handed over
    /// there, and no worker waits for them. [`Image::perform`] works as well, for jobs.
    fn executor(&self) -> Option<&dyn Executor> {
        None
    }

    /// How the connection to the host that has the image is doing.
    fn remote_status(&self) -> Option<::nbd::client::Status> {
        None
    }

    /// How long [`Image::perform`] waits for another host before it gives the image up
    /// ([`Image::abandon`]); for ever at first, and with `None`.
    fn set_patience(&self, patience: Option<Duration>) {
        let _ = patience;
    }

    /// Lets go of another host: what waits for it fails, nothing is sent to it any more, and
    /// nothing can be done with the image afterwards. Nothing happens to files.
    fn abandon(&self) {}

    /// Tasks that the image can work on at the same time; a bound for its threads.
    fn max_workers(&self) -> usize {
        DEFAULT_MAX_WORKERS
    }

    /// The files it consists of, topmost first, for making it the backing image of an overlay.
    ///
    /// # Errors
    /// It cannot be one, or there are no descriptors left.
    fn layers(&self) -> io::Result<Vec<::qcow2::Layer>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// For what only qcow2 images can do.
    fn as_qcow2(&self) -> Option<&Qcow2Image> {
        None
    }

    /// Grows the image to `capacity_sectors`. Blocks. Requests go on meanwhile; those beyond the
    /// old end come only after it returned.
    ///
    /// # Errors
    /// What the storage said, or `Unsupported`.
    fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        let _ = capacity_sectors;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether writes that were answered with success may never reach the storage: no flush can
    /// succeed any more.
    fn has_lost_writes(&self) -> bool {
        false
    }

    /// A flush of [`Image::flush_file`] failed.
    fn note_failed_flush(&self) {}
}

/// Encryption of a disk's sectors, in place.
pub(crate) trait SectorCipher: Send + Sync {
    /// `offset_bytes` is the disk's, of the first byte; whole sectors.
    fn encrypt(&self, offset_bytes: u64, sectors: &mut [u8]);
    /// As [`SectorCipher::encrypt`].
    fn decrypt(&self, offset_bytes: u64, sectors: &mut [u8]);
}
