//! An image whose blocks are saved elsewhere before they are overwritten, so that what it was at
//! one instant can be copied while it is used.
//!
//! ```text
//!            job or writer: claim           saved
//!  pending ───────────────────────► claimed ──────► (gone): writes go through
//!                                      ▲
//!                       other writers wait for it
//! ```
//!
//! Writes to pending blocks are sent to a worker thread of the disk, which saves the old content
//! first; all others, and reads, go their usual way. A target that fails breaks the copy, never the
//! guest's write.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::nbd::client::Status as RemoteStatus;

use super::copy::{Copier, CopyError, Fresh};
use crate::image::{Access, DirectIo, Image, Place, Qcow2Image, SectorCipher, Task};
use crate::tracking::Bitmap;

/// A writer looks this often whether the copy was given up.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Where the blocks go, and which are still to go there.
pub(crate) struct Saver {
    source: Arc<dyn Image>,
    target: Arc<dyn Image>,
    fresh: Fresh,
    capacity_bytes: u64,
    /// Not saved yet.
    pending: Bitmap,
    /// Somebody saves it, or has.
    claimed: Bitmap,
    /// Nothing is saved any more.
    is_over: AtomicBool,
    failure: Mutex<Option<CopyError>>,
    saved: Condvar,
}

impl Saver {
    /// `pending` has the blocks to save.
    pub(crate) fn new(
        source: Arc<dyn Image>,
        target: Arc<dyn Image>,
        fresh: Fresh,
        capacity_bytes: u64,
        pending: Bitmap,
    ) -> Self {
        Self {
            source,
            target,
            fresh,
            capacity_bytes,
            claimed: Bitmap::new(capacity_bytes, pending.granularity()),
            pending,
            is_over: AtomicBool::new(false),
            failure: Mutex::new(None),
            saved: Condvar::new(),
        }
    }

    pub(crate) fn source(&self) -> &Arc<dyn Image> {
        &self.source
    }

    pub(crate) fn left_bytes(&self) -> u64 {
        self.pending.count() * self.unit()
    }

    pub(crate) fn unit(&self) -> u64 {
        u64::from(self.pending.granularity())
    }

    /// The first block from `index` on that nobody has begun to save.
    pub(crate) fn next(&self, mut index: u64) -> Option<u64> {
        loop {
            index = self.pending.next(index)?;
            if !self.claimed.contains(index) {
                return Some(index);
            }
            index += 1;
        }
    }

    /// Saves block `index` unless somebody else does; returns the bytes it has.
    pub(crate) fn save(&self, index: u64, copier: &mut Copier) -> u64 {
        if !self.claimed.put(index) {
            return 0;
        }
        let offset_bytes = index * self.unit();
        let len_bytes = self.unit().min(self.capacity_bytes - offset_bytes);
        let mut at = offset_bytes;
        while at < offset_bytes + len_bytes && !self.is_over() {
            let part = (offset_bytes + len_bytes - at).min(super::copy::BLOCK_BYTES);
            let copied = copier.copy(&*self.source, &*self.target, at, part, self.fresh);
            if let Err(error) = copied {
                self.fail(error);
            }
            at += part;
        }
        let _failure = self.failure();
        self.pending.take(index);
        self.saved.notify_all();
        len_bytes
    }

    /// Blocks until these bytes are saved, by this thread if need be.
    fn save_range(&self, offset_bytes: u64, len_bytes: u64) {
        if len_bytes == 0 {
            return;
        }
        let mut copier = None;
        let last = (offset_bytes + len_bytes - 1) / self.unit();
        let mut from = offset_bytes / self.unit();
        while let Some(index) = self.pending.next(from).filter(|index| *index <= last) {
            if self.is_over() {
                return;
            }
            self.save(index, copier.get_or_insert_with(Copier::new));
            self.await_saved(index);
            from = index + 1;
        }
    }

    fn await_saved(&self, index: u64) {
        let mut failure = self.failure();
        while self.pending.contains(index) && !self.is_over() {
            failure = self
                .saved
                .wait_timeout(failure, LOOK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn is_saved(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        self.is_over() || !self.pending.has_any(offset_bytes, len_bytes)
    }

    /// Lets writes through from now on.
    pub(crate) fn give_up(&self) {
        self.is_over.store(true, Ordering::Release);
        let _failure = self.failure();
        self.saved.notify_all();
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    fn fail(&self, error: CopyError) {
        self.failure().get_or_insert(error);
        self.give_up();
    }

    /// Why it was given up, if something failed.
    pub(crate) fn take_failure(&self) -> Option<CopyError> {
        self.failure().take()
    }

    fn failure(&self) -> MutexGuard<'_, Option<CopyError>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Saver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Saver")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// The image that is served while its blocks are saved.
#[derive(Debug)]
pub(crate) struct Guarded {
    inner: Arc<dyn Image>,
    saver: Arc<Saver>,
}

impl Guarded {
    pub(crate) fn new(saver: Arc<Saver>) -> Self {
        Self {
            inner: Arc::clone(saver.source()),
            saver,
        }
    }
}

impl Image for Guarded {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn format(&self) -> &'static str {
        self.inner.format()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn capacity_sectors(&self) -> u64 {
        self.inner.capacity_sectors()
    }

    fn physical_block_bytes(&self) -> u32 {
        self.inner.physical_block_bytes()
    }

    fn punches_holes(&self) -> bool {
        self.inner.punches_holes()
    }

    fn direct(&self) -> Option<DirectIo> {
        self.inner.direct()
    }

    fn locate(&self, access: Access, offset_bytes: u64, len_bytes: u64) -> Place {
        if access == Access::Write && !self.saver.is_saved(offset_bytes, len_bytes) {
            return Place::Worker { len_bytes };
        }
        self.inner.locate(access, offset_bytes, len_bytes)
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        match &*task {
            Task::Write {
                offset_bytes,
                buffers,
            } => self
                .saver
                .save_range(*offset_bytes, buffers.len_bytes() as u64),
            Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                ..
            }
            | Task::Discard {
                offset_bytes,
                len_bytes,
            } => self.saver.save_range(*offset_bytes, *len_bytes),
            Task::Read { .. } | Task::Flush => {}
        }
        self.inner.perform(task)
    }

    fn flush_file(&self) -> Option<RawFd> {
        self.inner.flush_file()
    }

    fn is_in_memory(&self) -> bool {
        self.inner.is_in_memory()
    }

    fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.inner.cipher()
    }

    fn max_workers(&self) -> usize {
        self.inner.max_workers()
    }

    fn remote_status(&self) -> Option<RemoteStatus> {
        self.inner.remote_status()
    }

    fn abandon(&self) {
        self.inner.abandon();
    }

    fn as_qcow2(&self) -> Option<&Qcow2Image> {
        self.inner.as_qcow2()
    }

    fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        self.inner.resize(capacity_sectors)
    }

    fn has_lost_writes(&self) -> bool {
        self.inner.has_lost_writes()
    }

    fn note_failed_flush(&self) {
        self.inner.note_failed_flush();
    }
}
