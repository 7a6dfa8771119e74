//! What is asked of a disk that is served; errors are answers to the caller.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use api::device::{
    Bitmap as BitmapInfo, Image as ImageInfo, StartBackupRequest, StartMirrorRequest, Target,
};
use tonic::Status;

use super::{Disk, Serving};
use crate::assembly::{block_bytes, refusal};
use crate::image::{Image, SECTOR_BYTES};
use crate::jobs::backup::Backup;
use crate::jobs::copy::{Fresh, UNIT_BYTES};
use crate::jobs::mirror::Mirror;
use crate::jobs::target::{self, Extent, TargetOptions};
use crate::jobs::{Control, Work};
use crate::tracking::{Bitmap, DEFAULT_GRANULARITY};

/// How long the guest's requests have to complete before something is changed behind the gate.
const GATE_PATIENCE: Duration = Duration::from_secs(10);

/// An image to write to, and what it reads as.
pub(crate) type OpenTarget = (Arc<dyn Image>, Fresh);

impl Disk {
    /// Format and sizes of what is served now.
    pub(crate) fn describe_image(&self) -> ImageInfo {
        describe(&*self.device.image())
    }

    /// Grows the disk and tells its frontend.
    pub(crate) fn resize(&self, capacity_bytes: u64) -> Result<(), Status> {
        self.jobs.exclude(|| {
            let now_bytes = self.device.image().capacity_sectors() * SECTOR_BYTES;
            if capacity_bytes < now_bytes {
                return Err(Status::invalid_argument(format!(
                    "capacity_bytes: the disk has {now_bytes} bytes, and disks only grow"
                )));
            }
            // Before a guest can write there.
            self.tracker.grow(capacity_bytes);
            self.device
                .resize(capacity_bytes / SECTOR_BYTES)
                .map_err(|error| refuse_resize(&error))?;
            self.device.backend().wake_queues();
            if let Serving::Running(server) = &*self.serving() {
                server.config_changed();
            }
            Ok(())
        })?
    }

    /// Begins to note writes at one instant. The same bitmap again is the one there is.
    pub(crate) fn create_bitmap(&self, name: &str, granularity: u32) -> Result<BitmapInfo, Status> {
        let granularity = match granularity {
            0 => DEFAULT_GRANULARITY,
            granularity => granularity,
        };
        if let Some(bitmap) = self.tracker.find(name) {
            if bitmap.granularity() == granularity {
                return Ok(tell(name, &bitmap));
            }
            return Err(Status::already_exists(format!(
                "the disk has a bitmap {name:?} of another granularity; delete it first"
            )));
        }
        self.device
            .backend()
            .quiesced(GATE_PATIENCE, |image| {
                let capacity_bytes = image.capacity_sectors() * SECTOR_BYTES;
                let bitmap = Arc::new(Bitmap::new(capacity_bytes, granularity));
                self.tracker
                    .add(name, Arc::clone(&bitmap))
                    .map_err(|error| Status::resource_exhausted(error.to_string()))?;
                Ok(tell(name, &bitmap))
            })
            .map_err(|error| Status::deadline_exceeded(error.to_string()))?
    }

    pub(crate) fn bitmaps(&self) -> Vec<BitmapInfo> {
        let named = self.tracker.named();
        named
            .iter()
            .map(|(name, bitmap)| tell(name, bitmap))
            .collect()
    }

    /// Copies the disk to `open`'s target, which takes its place in the end.
    pub(crate) fn start_mirror(
        &self,
        request: &StartMirrorRequest,
        open: impl FnOnce() -> Result<OpenTarget, Status>,
    ) -> Result<Arc<Control>, Status> {
        self.refuse_encrypted("mirrored")?;
        self.jobs.start(&request.job_id, "mirror", || {
            let (target, fresh) = open()?;
            let mirror = Mirror {
                backend: Arc::clone(self.device.backend()),
                tracker: Arc::clone(&self.tracker),
                target,
                fresh,
                initial: None,
                auto_complete: request.auto_complete,
                bytes_per_second: request.bytes_per_second,
            };
            Ok(Box::new(|control: &Control| mirror.run(control)) as Work)
        })
    }

    /// Copies the disk as it is when this returns.
    pub(crate) fn start_backup(
        &self,
        request: &StartBackupRequest,
        open: impl FnOnce() -> Result<OpenTarget, Status>,
    ) -> Result<Arc<Control>, Status> {
        self.refuse_encrypted("backed up")?;
        let name = |name: &String| (!name.is_empty()).then(|| name.clone());
        if let Some(bitmap) = name(&request.bitmap)
            && self.tracker.find(&bitmap).is_none()
        {
            return Err(Status::failed_precondition(format!(
                "the disk has no bitmap {bitmap:?}; bitmaps end with the daemon's process, and \
                 the next backup is a full one then"
            )));
        }
        self.jobs.start(&request.job_id, "backup", || {
            let (target, fresh) = open()?;
            let backup = Backup {
                backend: Arc::clone(self.device.backend()),
                tracker: Arc::clone(&self.tracker),
                target,
                fresh,
                bitmap: name(&request.bitmap),
                new_bitmap: name(&request.new_bitmap),
                unit_bytes: UNIT_BYTES as u32,
                bytes_per_second: request.bytes_per_second,
            };
            let begun = backup.begin().map_err(Status::failed_precondition)?;
            Ok(Box::new(|control: &Control| begun.run(control)) as Work)
        })
    }

    /// Lets writes go to an overlay from one instant on.
    pub(crate) fn snapshot(
        &self,
        overlay: OwnedFd,
        overlay_name: &str,
        lock_patience: Duration,
    ) -> Result<(), Status> {
        let _ = (overlay, overlay_name, lock_patience);
        Err(Status::unimplemented(
            "overlays are not served by this version",
        ))
    }

    /// Merges the top image into the one below.
    pub(crate) fn start_commit(&self, job_id: &str) -> Result<Arc<Control>, Status> {
        let _ = job_id;
        Err(Status::failed_precondition(
            "the image is not based on another one that it could be merged into",
        ))
    }

    /// Looks for errors in the format's metadata.
    pub(crate) fn start_check(
        &self,
        job_id: &str,
        repair_leaks: bool,
    ) -> Result<Arc<Control>, Status> {
        let _ = (job_id, repair_leaks);
        Err(Status::failed_precondition(
            "a raw image has no metadata that could be checked",
        ))
    }

    /// Opens what a job is to write to.
    pub(crate) fn open_target(
        &self,
        target: &Target,
        fd: Option<OwnedFd>,
        extent: Extent,
        lock_patience: Duration,
    ) -> Result<OpenTarget, Status> {
        let options = TargetOptions {
            capacity_bytes: self.device.image().capacity_sectors() * SECTOR_BYTES,
            extent,
            page_cache: self.config.page_cache,
            block_bytes: block_bytes(&self.config),
            lock_patience,
        };
        let Some(fd) = fd else {
            return Err(Status::unimplemented(
                "target.nbd: targets on other hosts are not served by this version",
            ));
        };
        let name = match target.name.as_str() {
            "" => "target".to_owned(),
            name => name.to_owned(),
        };
        match target.format.as_str() {
            "" | "raw" => target::raw(fd, name, options).map_err(|error| refusal(&error)),
            _ => Err(Status::unimplemented(
                "target.format: qcow2 is not served by this version",
            )),
        }
    }

    /// What a job reads is plain, and would be so on its target.
    fn refuse_encrypted(&self, what: &str) -> Result<(), Status> {
        if self.device.image().cipher().is_some() {
            return Err(Status::failed_precondition(format!(
                "an encrypted disk is not {what} while it is served, since the copy would not be \
                 encrypted; copy the image file while the disk is detached"
            )));
        }
        Ok(())
    }
}

fn refuse_resize(error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::InvalidInput => Status::invalid_argument(
            "capacity_bytes: must be whole blocks, and a block device must have grown before",
        ),
        io::ErrorKind::Unsupported => {
            Status::failed_precondition("the image's format cannot be resized")
        }
        _ => Status::internal(format!("the image cannot be resized: {error}")),
    }
}

fn tell(name: &str, bitmap: &Bitmap) -> BitmapInfo {
    BitmapInfo {
        bitmap: name.to_owned(),
        granularity_bytes: bitmap.granularity(),
        dirty_bytes: bitmap.count() * u64::from(bitmap.granularity()),
    }
}

fn describe(image: &dyn Image) -> ImageInfo {
    let file = image.plain_file().or_else(|| image.flush_file());
    ImageInfo {
        name: image.name().to_owned(),
        format: image.format().to_owned(),
        capacity_bytes: image.capacity_sectors() * SECTOR_BYTES,
        // SAFETY: `image` keeps its file open.
        allocated_bytes: file.map_or(0, |fd| {
            allocated_bytes(unsafe { BorrowedFd::borrow_raw(fd) })
        }),
        cluster_bytes: 0,
        encrypted: image.cipher().is_some(),
        backing: Vec::new(),
    }
}

fn allocated_bytes(file: BorrowedFd<'_>) -> u64 {
    /// Unit of `st_blocks`.
    const STAT_BLOCK_BYTES: u64 = 512;
    nix::sys::stat::fstat(file).map_or(0, |stat| stat.st_blocks as u64 * STAT_BLOCK_BYTES)
}
