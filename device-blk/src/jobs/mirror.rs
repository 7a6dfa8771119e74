//! Mirror: copies a disk to another image while it is used, then goes on with the copy.
//!
//! Writes are noted when they are over ([`crate::tracking`]), so a block that is written while it is
//! copied is copied again:
//!
//! ```text
//!   all blocks are due ─► copy what is due ─► little is due: READY ─► gate closed: copy the rest,
//!                              ▲   │                                  flush, exchange the image
//!                              └───┘ the guest writes
//! ```
//!
//! A commit is the same onto the image below the top one: what is due at first is what the top
//! image has.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use super::copy::{BLOCK_BYTES, Copier, Fresh, Pace, UNIT_BYTES, flush};
use super::{Control, JobError};
use crate::engine::backend::Backend;
use crate::image::{Image, SECTOR_BYTES};
use crate::tracking::{Bitmap, Tracker};

/// What may be left to copy while the guest waits: some tens of milliseconds on a plain disk.
const MAX_LEFT_BYTES: u64 = 8 << 20;
/// How long the guest's requests have to complete before the switch.
const SWITCH_PATIENCE: Duration = Duration::from_secs(10);
/// How long the guest waits for the rest to be copied, then.
const REST_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// How long the target's host may be away. The disk is served from where it is meanwhile.
const TARGET_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what is due once the copy keeps up.
const IDLE_PAUSE: Duration = Duration::from_millis(50);

/// See [`Mirror::initial`].
pub(crate) type Initial = Box<dyn FnOnce(&Bitmap) -> Result<(), JobError> + Send>;

/// What a mirror needs.
pub(crate) struct Mirror {
    pub(crate) backend: Arc<Backend>,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) target: Arc<dyn Image>,
    pub(crate) fresh: Fresh,
    /// Puts in what is copied at first; all when there is none. Called when writes are noted
    /// already.
    pub(crate) initial: Option<Initial>,
    /// Switch over without CompleteJob.
    pub(crate) auto_complete: bool,
    /// 0 for no limit.
    pub(crate) bytes_per_second: u64,
}

impl Mirror {
    /// Runs to the end.
    pub(crate) fn run(mut self, control: &Control) -> Result<(), JobError> {
        self.target.set_patience(Some(TARGET_PATIENCE));
        control.lend(&self.target)?;
        let capacity_bytes = self.backend.image().capacity_sectors() * SECTOR_BYTES;
        let due = Arc::new(Bitmap::new(capacity_bytes, UNIT_BYTES as u32));
        self.tracker
            .add("", Arc::clone(&due))
            .map_err(|error| JobError::Failed(error.to_string()))?;
        let initial = match self.initial.take() {
            Some(initial) => initial(&due),
            None => {
                due.fill();
                Ok(())
            }
        };
        let result = initial.and_then(|()| self.copy_and_switch(control, &due, capacity_bytes));
        if result.is_err() {
            self.target.abandon();
        }
        self.tracker.remove(&due);
        self.backend.close_retired();
        result
    }

    fn copy_and_switch(
        &self,
        control: &Control,
        due: &Arc<Bitmap>,
        capacity_bytes: u64,
    ) -> Result<(), JobError> {
        let mut pass = Pass {
            control,
            due,
            source: self.backend.image(),
            target: &*self.target,
            capacity_bytes,
            fresh: self.fresh,
            copier: Copier::new(),
            pace: Pace::new(self.bytes_per_second, self.backend.allowance()),
        };
        // Only while nothing was written to the target do zeroes need no writing.
        pass.run()?;
        pass.fresh = match self.fresh {
            Fresh::Zeroes => Fresh::Unknown,
            other => other,
        };
        loop {
            if due.count() * UNIT_BYTES > MAX_LEFT_BYTES {
                control.set_running();
                pass.run()?;
                continue;
            }
            if control.state() != api::device::JobState::Ready {
                control.set_ready();
            }
            if self.auto_complete || control.completes() {
                // What the guest has flushed must be on the target's storage after the switch.
                // Most of that is done before the guest has to wait.
                pass.pace.wait_for_leave(control)?;
                flush(&*self.target)?;
                if due.count() * UNIT_BYTES <= MAX_LEFT_BYTES {
                    return self.switch(&mut pass);
                }
            }
            pass.run()?;
            control.pause(IDLE_PAUSE)?;
        }
    }

    fn switch(&self, pass: &mut Pass<'_>) -> Result<(), JobError> {
        let switched = self.backend.quiesced(SWITCH_PATIENCE, |image| {
            let rest = Rest {
                due: Arc::clone(pass.due),
                source: Arc::clone(&pass.source),
                target: Arc::clone(&self.target),
                capacity_bytes: pass.capacity_bytes,
                fresh: pass.fresh,
                backend: Arc::clone(&self.backend),
            };
            rest.copy_within(REST_PATIENCE)?;
            check_leave(&self.backend)?;
            pass.control.take_back()?;
            self.target.set_patience(None);
            mark_as_current(&*self.target);
            *image = Arc::clone(&self.target);
            Ok(())
        });
        switched.unwrap_or_else(|error| Err(JobError::Failed(error.to_string())))
    }
}

/// Going through what is due.
struct Pass<'a> {
    control: &'a Control,
    due: &'a Arc<Bitmap>,
    source: Arc<dyn Image>,
    target: &'a dyn Image,
    capacity_bytes: u64,
    fresh: Fresh,
    copier: Copier,
    pace: Pace<'a>,
}

impl Pass<'_> {
    /// Copies what is due, from the first byte to the last.
    fn run(&mut self) -> Result<(), JobError> {
        let mut from = 0;
        while let Some((offset_bytes, len_bytes)) = take(self.due, from, self.capacity_bytes) {
            let copied = self
                .pace
                .wait(self.control, len_bytes)
                .and_then(|()| self.copy(offset_bytes, len_bytes));
            if copied.is_err() {
                self.due.mark(offset_bytes, len_bytes);
            }
            copied?;
            from = (offset_bytes + len_bytes).div_ceil(UNIT_BYTES);
        }
        Ok(())
    }

    fn copy(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), JobError> {
        self.copier.copy(
            &*self.source,
            self.target,
            offset_bytes,
            len_bytes,
            self.fresh,
        )?;
        self.control.add_done(len_bytes);
        self.control.set_left(self.due.count() * UNIT_BYTES);
        Ok(())
    }
}

/// The next stretch from block `from` on that is due, taken out.
fn take(due: &Bitmap, from: u64, capacity_bytes: u64) -> Option<(u64, u64)> {
    let first = due.next(from)?;
    let mut end = first;
    while end - first < BLOCK_BYTES / UNIT_BYTES && end < due.num_blocks() && due.take(end) {
        end += 1;
    }
    // Somebody else takes nothing out, so the first was there.
    let offset_bytes = first * UNIT_BYTES;
    let end_bytes = (end * UNIT_BYTES).min(capacity_bytes);
    Some((offset_bytes, end_bytes.saturating_sub(offset_bytes)))
}

/// What is copied while the guest waits.
struct Rest {
    due: Arc<Bitmap>,
    source: Arc<dyn Image>,
    target: Arc<dyn Image>,
    capacity_bytes: u64,
    fresh: Fresh,
    backend: Arc<Backend>,
}

impl Rest {
    /// On a thread of its own, which is left alone when it takes longer: storage that hangs would
    /// keep the guest for ever. What that thread still writes to the target harms nobody, since
    /// the disk stays where it is.
    fn copy_within(self, patience: Duration) -> Result<(), JobError> {
        let name = self.target.name().to_owned();
        let (done, result) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("job/rest".into())
            .spawn(move || done.try_send(self.copy()))
            .map_err(|error| JobError::Failed(format!("no thread for the switch: {error}")))?;
        result.recv_timeout(patience).unwrap_or_else(|_| {
            Err(JobError::Failed(format!(
                "{name} did not take the rest within {patience:?}, and the guest cannot wait; the \
                 disk stays where it was. Mirror it again when the target answers"
            )))
        })
    }

    /// No pace, and no look at cancellation.
    fn copy(&self) -> Result<(), JobError> {
        let mut copier = Copier::new();
        let (source, target) = (&*self.source, &*self.target);
        while let Some((offset_bytes, len_bytes)) = take(&self.due, 0, self.capacity_bytes) {
            check_leave(&self.backend)?;
            copier.copy(source, target, offset_bytes, len_bytes, self.fresh)?;
        }
        check_leave(&self.backend)?;
        Ok(flush(target)?)
    }
}

/// While the guest waits nobody waits for more time: the disk stays where it is.
fn check_leave(backend: &Backend) -> Result<(), JobError> {
    match backend.allowance().is_over() {
        true => Err(JobError::Failed(
            "the time that the disk was allowed is over; mirror it again when its host is back"
                .into(),
        )),
        false => Ok(()),
    }
}

/// Leaves a mark on the file that is written from now on: whoever manages the images must know
/// after a crash which one is the disk. A file system without attributes has nobody to tell.
fn mark_as_current(image: &dyn Image) {
    const NAME: &std::ffi::CStr = c"user.mortise.current";
    const VALUE: &[u8] = b"1";
    let Some(fd) = image.plain_file().or_else(|| image.flush_file()) else {
        return;
    };
    // SAFETY: the name ends with NUL, and the value is of the length given.
    let set = unsafe { libc::fsetxattr(fd, NAME.as_ptr(), VALUE.as_ptr().cast(), VALUE.len(), 0) };
    if set != 0 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
            tracing::warn!(image = image.name(), %error, "cannot mark the image as the current one");
        }
        return;
    }
    // A flush of data alone, which is what guests ask for, need not include it: a host that loses
    // power would come back with the image that was left.
    // SAFETY: `image` keeps its file open.
    if unsafe { libc::fsync(fd) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(image = image.name(), %error, "the mark of the current image may get lost");
    }
}

#[cfg(test)]
mod tests;
