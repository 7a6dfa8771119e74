//! Backup: copies a disk as it is at one instant, all of it or what a bitmap has, while the guest
//! goes on writing.
//!
//! At the instant, behind the closed gate, the bitmap's content is taken and the image is put behind
//! a [`Guarded`] one. A backup that fails gives the bitmap back what it had, so that the next one
//! misses nothing.

use std::sync::Arc;
use std::time::Duration;

use super::copy::{Copier, Fresh, Pace, flush};
use super::guarded::{Guarded, Saver};
use super::{Control, JobError};
use crate::engine::backend::Backend;
use crate::image::{Image, SECTOR_BYTES};
use crate::tracking::{Bitmap, Tracker};

/// How long the guest's requests have to complete before the instant, and before the end.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the target's host may be away: writes of the guest wait for it, too.
const TARGET_PATIENCE: Duration = Duration::from_secs(15);

/// What a backup needs.
pub(crate) struct Backup {
    pub(crate) backend: Arc<Backend>,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) target: Arc<dyn Image>,
    pub(crate) fresh: Fresh,
    /// Copy what this bitmap has, and let it begin anew.
    pub(crate) bitmap: Option<String>,
    /// Begin this one.
    pub(crate) new_bitmap: Option<String>,
    /// Unit of copying: a power of two that no target can make smaller.
    pub(crate) unit_bytes: u32,
    /// 0 for no limit.
    pub(crate) bytes_per_second: u64,
}

/// A backup whose instant has passed.
pub(crate) struct Begun {
    backup: Backup,
    saver: Arc<Saver>,
    /// What the bitmap had.
    taken: Option<Arc<Bitmap>>,
    is_complete: bool,
}

impl Backup {
    /// The instant.
    ///
    /// # Errors
    /// In words: the disk did not come to rest, or a bitmap is not there. Nothing was changed.
    pub(crate) fn begin(self) -> Result<Begun, String> {
        self.target.set_patience(Some(TARGET_PATIENCE));
        let begun = self.backend.quiesced(PATIENCE, |image| {
            let capacity_bytes = image.capacity_sectors() * SECTOR_BYTES;
            let taken = match &self.bitmap {
                Some(name) => Some(self.tracker.find(name).ok_or_else(|| {
                    format!("there is no bitmap {name:?}; begin with a full backup")
                })?),
                None => None,
            };
            let unit_bytes = taken.as_ref().map_or(self.unit_bytes, |bitmap| {
                bitmap.granularity().max(self.unit_bytes)
            });
            let pending = Bitmap::new(capacity_bytes, unit_bytes);
            match &taken {
                Some(bitmap) => pending.add_coarser(bitmap),
                None => pending.fill(),
            }
            for (name, granularity) in [
                (
                    &self.bitmap,
                    taken.as_ref().map(|bitmap| bitmap.granularity()),
                ),
                (&self.new_bitmap, None),
            ] {
                let Some(name) = name else { continue };
                let granularity = granularity.unwrap_or(crate::tracking::DEFAULT_GRANULARITY);
                let bitmap = Arc::new(Bitmap::new(capacity_bytes, granularity));
                if let Err(error) = self.tracker.add(name, bitmap) {
                    // What the emptied one had would be missing from every later backup.
                    if let (Some(name), Some(taken)) = (&self.bitmap, taken) {
                        let _ = self.tracker.add(name, taken);
                    }
                    return Err(error.to_string());
                }
            }
            let saver = Arc::new(Saver::new(
                Arc::clone(image),
                Arc::clone(&self.target),
                self.fresh,
                capacity_bytes,
                pending,
            ));
            *image = Arc::new(Guarded::new(Arc::clone(&saver)));
            Ok((saver, taken))
        });
        let (saver, taken) = begun.unwrap_or_else(|error| Err(error.to_string()))?;
        Ok(Begun {
            backup: self,
            saver,
            taken,
            is_complete: false,
        })
    }
}

impl Begun {
    /// Copies.
    pub(crate) fn run(mut self, control: &Control) -> Result<(), JobError> {
        control.lend(&self.backup.target)?;
        self.copy(control)?;
        self.is_complete = true;
        Ok(())
    }

    fn copy(&self, control: &Control) -> Result<(), JobError> {
        let mut copier = Copier::new();
        let mut pace = Pace::new(
            self.backup.bytes_per_second,
            self.backup.backend.allowance(),
        );
        control.add_total(self.saver.left_bytes());
        let total_bytes = self.saver.left_bytes();
        let mut from = 0;
        let mut done_bytes = 0;
        while let Some(index) = self.saver.next(from) {
            pace.wait(control, self.saver.unit())?;
            self.saver.save(index, &mut copier);
            self.check()?;
            from = index + 1;
            // Writers save blocks too.
            let now_done = total_bytes - self.saver.left_bytes();
            control.add_done(now_done - done_bytes);
            done_bytes = now_done;
        }
        // What writers are saving at this moment.
        while self.saver.left_bytes() > 0 {
            control.pause(Duration::from_millis(1))?;
            self.check()?;
        }
        control.add_done(total_bytes - done_bytes);
        self.check()?;
        pace.wait_for_leave(control)?;
        Ok(flush(&*self.backup.target)?)
    }

    fn check(&self) -> Result<(), JobError> {
        match self.saver.take_failure() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// The bitmap has again what it had, besides what was written since.
    fn give_back(&self) {
        if let (Some(name), Some(taken)) = (&self.backup.bitmap, &self.taken)
            && let Some(bitmap) = self.backup.tracker.find(name)
        {
            bitmap.add_all(taken);
        }
    }

    /// A disk that does not come to rest stays guarded, by a guard that lets everything through.
    fn unguard(&self) {
        let unguarded = self.backup.backend.quiesced(PATIENCE, |image| {
            *image = Arc::clone(self.saver.source());
        });
        if let Err(error) = unguarded {
            tracing::warn!(%error, "the disk stays on its slower path until the next switch");
        }
        self.backup.backend.close_retired();
    }
}

impl Drop for Begun {
    /// Whatever happened, the disk goes on without a guard.
    fn drop(&mut self) {
        if !self.is_complete {
            self.saver.give_up();
            self.backup.target.abandon();
            self.give_back();
        }
        self.unguard();
    }
}
