//! What is asked of a disk that is served; errors are answers to the caller.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use api::device::{
    Bitmap as BitmapInfo, Image as ImageInfo, NbdSource, StartBackupRequest, StartMirrorRequest,
    Target,
};
use tonic::Status;

use super::{Disk, Serving, layers};
use crate::assembly::{block_bytes, refusal};
use crate::image::{Image, SECTOR_BYTES, lock};
use crate::jobs::backup::Backup;
use crate::jobs::copy::{Fresh, UNIT_BYTES};
use crate::jobs::mirror::Mirror;
use crate::jobs::target::{self, Extent, TargetOptions};
use crate::jobs::{Control, Work};
use crate::remote;
use crate::tracking::{Bitmap, DEFAULT_GRANULARITY};

/// How long the guest's requests have to complete before something is changed behind the gate.
pub(super) const GATE_PATIENCE: Duration = Duration::from_secs(10);

/// Descriptors of a [`Target`].
#[derive(Debug, Default)]
pub(crate) struct TargetFds {
    pub(crate) image: Option<OwnedFd>,
    pub(crate) nbd_tls: Option<OwnedFd>,
    pub(crate) key: Option<OwnedFd>,
}

/// An image to write to, and what it reads as.
pub(crate) type OpenTarget = (Arc<dyn Image>, Fresh);

impl Disk {
    /// Format and sizes of what is served now.
    pub(crate) fn describe_image(&self) -> ImageInfo {
        layers::describe(&*self.device.image())
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
        self.refuse_plain_target(request.target.as_ref())?;
        if self.device.image().is_read_only() {
            return Err(Status::failed_precondition(
                "the disk is read-only, and its copy would not be; copy the image file and attach \
                 that",
            ));
        }
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
        self.refuse_plain_target(request.target.as_ref())?;
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
        if self.device.image().cipher().is_some() {
            return Err(Status::failed_precondition(
                "an encrypted disk is not put below an overlay, which would not be encrypted; take \
                 a backup to an encrypted target instead (target.key_fd)",
            ));
        }
        self.jobs
            .exclude(|| layers::put_overlay(self, overlay, overlay_name, lock_patience))?
    }

    /// Merges the top image into the one below, and goes on with that.
    pub(crate) fn start_commit(
        &self,
        job_id: &str,
        base: Option<OwnedFd>,
        lock_patience: Duration,
    ) -> Result<Arc<Control>, Status> {
        self.jobs.start(job_id, "commit", || {
            layers::prepare_commit(self, base, lock_patience)
        })
    }

    /// Looks for errors in the format's metadata.
    pub(crate) fn start_check(
        &self,
        job_id: &str,
        repair_leaks: bool,
    ) -> Result<Arc<Control>, Status> {
        let image = self.device.image();
        if image.as_qcow2().is_none() {
            return Err(Status::failed_precondition(format!(
                "a {} image has no metadata that could be checked",
                image.format()
            )));
        }
        if repair_leaks && image.is_read_only() {
            return Err(Status::failed_precondition(
                "repair_leaks: the disk is read-only",
            ));
        }
        let backend = Arc::clone(self.device.backend());
        let work = move |control: &Control| {
            layers::check(&*image, repair_leaks, backend.allowance(), control)
        };
        self.jobs
            .start(job_id, "check", || Ok(Box::new(work) as Work))
    }

    /// Opens what a job is to write to.
    pub(crate) fn open_target(
        &self,
        target: &Target,
        fds: TargetFds,
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
        let name = match target.name.as_str() {
            "" => "target".to_owned(),
            name => name.to_owned(),
        };
        if let Some(source) = &target.nbd {
            return self.open_remote(source, fds.nbd_tls, &name, options);
        }
        let fd = fds
            .image
            .ok_or_else(|| Status::invalid_argument("target.image_fd: missing"))?;
        // A mirror makes it the disk's image, and a snapshot that a backing image.
        let fd = File::from(fd);
        lock::keep_waiting(&fd, &name, self.attachment).map_err(|error| refusal(&error))?;
        let fd = OwnedFd::from(fd);
        let opened = match (target.format.as_str(), fds.key) {
            (_, Some(key)) => target::encrypted(fd, name, key, options),
            ("" | "raw", None) => target::raw(fd, name, options),
            (_, None) => target::qcow2(fd, name, options),
        };
        opened.map_err(|error| refusal(&error))
    }

    fn open_remote(
        &self,
        source: &NbdSource,
        tls: Option<OwnedFd>,
        name: &str,
        options: TargetOptions,
    ) -> Result<OpenTarget, Status> {
        let how = remote::Use {
            name,
            read_only: false,
            block_bytes: options.block_bytes,
            connections: 1,
        };
        let image = remote::open(source, tls, how).map_err(|error| Status::from(&error))?;
        let has_bytes = image.capacity_sectors() * SECTOR_BYTES;
        if has_bytes < options.capacity_bytes {
            return Err(Status::failed_precondition(format!(
                "target.nbd: the export has {has_bytes} bytes, and the disk {}; grow the export",
                options.capacity_bytes
            )));
        }
        Ok((image, Fresh::Unknown))
    }

    /// What a job reads is plain, and would be so on its target.
    fn refuse_plain_target(&self, target: Option<&Target>) -> Result<(), Status> {
        let has_key = target.is_some_and(|target| target.key_fd.is_some());
        if self.device.image().cipher().is_some() && !has_key {
            return Err(Status::failed_precondition(
                "target.key_fd: missing; an encrypted disk is copied to an encrypted target only. \
                 Make one of at least the disk's size (cryptsetup luksFormat FILE) and pass its key",
            ));
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
