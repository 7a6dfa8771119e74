//! Disks whose image consists of layers: putting one on top, merging the top one into the next,
//! checking and describing them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ::qcow2::{BackingRef, CreateOptions, Format, Layer, Repair, TopExtent};
use api::device::{CheckResult, Image as ImageInfo};
use nix::sys::stat::fstat;
use tonic::Status;

use super::Disk;
use super::operations::GATE_PATIENCE;
use crate::assembly::{block_bytes, refusal};
use crate::engine::allowance::Allowance;
use crate::image::qcow2::Backing;
use crate::image::{
    Image, ImageError, OpenOptions, Qcow2Image, RawImage, SECTOR_BYTES, Task, lock,
};
use crate::jobs::copy::{Fresh, Pace};
use crate::jobs::mirror::{Initial, Mirror};
use crate::jobs::{Control, JobError, Work};
use crate::tracking::Bitmap;

/// Makes `overlay` the top of what is served, at one instant.
pub(super) fn put_overlay(
    disk: &Disk,
    overlay: OwnedFd,
    name: &str,
    lock_patience: Duration,
) -> Result<(), Status> {
    let below = disk.device.image();
    if below.is_read_only() {
        return Err(Status::failed_precondition(
            "the disk is read-only: nothing is written that an overlay could take",
        ));
    }
    if let Err(error) = below.layers() {
        return Err(Status::failed_precondition(format!(
            "image {} cannot be put below an overlay: {error}",
            below.name()
        )));
    }
    let overlay = File::from(overlay);
    let create = CreateOptions {
        capacity_bytes: below.capacity_sectors() * SECTOR_BYTES,
        backing: Some(BackingRef {
            name: below.name().to_owned(),
            format: Some(below.format().to_owned()),
        }),
        ..CreateOptions::default()
    };
    ::qcow2::create(&overlay, &create)
        .map_err(|error| Status::invalid_argument(format!("overlay_fd: {}", chain_of(&error))))?;
    let name = if name.is_empty() { "overlay" } else { name };
    let options = options(disk, lock_patience);
    lock::keep_waiting(&overlay, name, disk.attachment).map_err(|error| refusal(&error))?;
    // What the guest flushes later must be there too. Most of it is done before it waits.
    flush(&*below)?;
    drop(below);
    let put = disk
        .device
        .backend()
        .quiesced(GATE_PATIENCE, |image| {
            if let Some(qcow2) = image.as_qcow2() {
                qcow2.chain().settle().map_err(|error| {
                    Status::internal(format!("cannot settle the image: {error}"))
                })?;
            }
            flush(&**image)?;
            let top = Qcow2Image::over(&**image, overlay, name.to_owned(), options)
                .map_err(|error| refusal(&error))?;
            let old_top = top.chain().layers().nth(1).map(|layer| layer.file.clone());
            *image = Arc::new(top);
            if let Some(Err(error)) = old_top.map(|file| lock::downgrade(&file)) {
                tracing::warn!(%error, "others cannot read the image below the overlay");
            }
            Ok(())
        })
        .map_err(|error| Status::deadline_exceeded(error.to_string()))
        .flatten();
    disk.device.backend().close_retired();
    put
}

/// Opens the image below the top one for writing and makes the job that merges into it: a mirror of
/// what the top has.
pub(super) fn prepare_commit(
    disk: &Disk,
    base: Option<OwnedFd>,
    lock_patience: Duration,
) -> Result<Work, Status> {
    let top = disk.device.image();
    let refuse = |what: &str| Err(Status::failed_precondition(what.to_owned()));
    let Some(qcow2) = top.as_qcow2() else {
        return refuse("the image is not based on another one that it could be merged into");
    };
    if top.is_read_only() {
        return refuse("the disk is read-only");
    }
    let layers: Vec<Layer> = qcow2.chain().layers().cloned().collect();
    let Some(below) = layers.get(1) else {
        return refuse("the image is not based on another one that it could be merged into");
    };
    let name = qcow2
        .chain()
        .info()
        .backing
        .map_or_else(|| "base".to_owned(), |backing| backing.name);
    let reader = Arc::clone(&below.file);
    let opened = open_base(disk, &layers, base, name, lock_patience);
    let target = opened.inspect_err(|_| read_again(&reader))?;
    let tracker = Arc::clone(&disk.tracker);
    let mirror = Mirror {
        backend: Arc::clone(disk.device.backend()),
        tracker,
        target,
        fresh: Fresh::InUse,
        initial: Some(what_top_has(Arc::clone(&top))),
        auto_complete: true,
        bytes_per_second: 0,
    };
    drop(top);
    Ok(Box::new(move |control: &Control| {
        let merged = mirror.run(control);
        if merged.is_err() {
            read_again(&reader);
        }
        merged
    }))
}

/// The image below the top one, as one that is written.
fn open_base(
    disk: &Disk,
    layers: &[Layer],
    base: Option<OwnedFd>,
    name: String,
    lock_patience: Duration,
) -> Result<Arc<dyn Image>, Status> {
    let below = &layers[1];
    let file = match base {
        Some(base) => {
            let base = File::from(base);
            let identity = |file: &File| fstat(file).map(|stat| (stat.st_dev, stat.st_ino));
            if identity(&base).is_err() || identity(&base) != identity(&below.file) {
                return Err(Status::invalid_argument(
                    "base_fd: is not the image below the top one",
                ));
            }
            // The lock goes over to the description that can write.
            lock::release(&below.file);
            let marked = lock::keep_waiting(&base, &name, disk.attachment);
            marked.map_err(|error| refusal(&error))?;
            base
        }
        None => below
            .file
            .try_clone()
            .map_err(|error| Status::resource_exhausted(error.to_string()))?,
    };
    let options = options(disk, lock_patience);
    let image: Result<Arc<dyn Image>, ImageError> = match below.format {
        Format::Raw => {
            RawImage::from_file(file, name, options).map(|image| Arc::new(image) as Arc<dyn Image>)
        }
        Format::Qcow2 => layers[2..]
            .iter()
            .map(as_backing)
            .collect::<Result<Vec<_>, _>>()
            .and_then(|backing| Qcow2Image::open(file, name, backing, options))
            .map(|image| Arc::new(image) as Arc<dyn Image>),
    };
    let image = image.map_err(|error| match error {
        ImageError::NotWritable { .. } => Status::failed_precondition(
            "base_fd: the image below is open for reading only; pass a description that can be \
             written",
        ),
        error => refusal(&error),
    })?;
    let capacity_sectors = disk.device.image().capacity_sectors();
    if image.capacity_sectors() < capacity_sectors {
        image.resize(capacity_sectors).map_err(|error| {
            Status::failed_precondition(format!("the image below cannot be grown: {error}"))
        })?;
    }
    Ok(image)
}

fn as_backing(layer: &Layer) -> Result<Backing, ImageError> {
    let name = "base of the base".to_owned();
    match layer.file.try_clone() {
        Ok(file) => Ok(Backing {
            file,
            format: layer.format,
            name,
        }),
        Err(source) => Err(ImageError::Io {
            name,
            action: "be opened again",
            source,
        }),
    }
}

/// The image below is only read again. Its lock was given up for the merge.
fn read_again(reader: &File) {
    // Another description's lock is gone by now, this one's may be a writer's.
    let _ = lock::downgrade(reader);
    if let Err(error) = lock::acquire(reader, "base", true, Duration::from_secs(1)) {
        tracing::warn!(%error, "the image below the top one is not locked any more");
    }
}

/// Puts in what the top of `image` has of its own.
fn what_top_has(image: Arc<dyn Image>) -> Initial {
    Box::new(move |due: &Bitmap| {
        let Some(qcow2) = image.as_qcow2() else {
            return Err(JobError::Failed("the image was exchanged".into()));
        };
        let capacity_bytes = qcow2.chain().capacity_bytes();
        let mut offset_bytes = 0;
        while offset_bytes < capacity_bytes {
            let (kind, len_bytes) = qcow2
                .chain()
                .top_extent(offset_bytes, capacity_bytes - offset_bytes)
                .map_err(|error| {
                    JobError::Failed(format!("cannot read the image's map: {error}"))
                })?;
            if kind != TopExtent::Absent {
                due.mark(offset_bytes, len_bytes);
            }
            offset_bytes += len_bytes.max(SECTOR_BYTES);
        }
        Ok(())
    })
}

/// Checks the top image, once and as long as `allowance` lets it be written: what is repaired is written.
pub(super) fn check(
    image: &dyn Image,
    repair_leaks: bool,
    allowance: &Allowance,
    control: &Control,
) -> Result<(), JobError> {
    Pace::new(0, allowance).wait_for_leave(control)?;
    let Some(qcow2) = image.as_qcow2() else {
        return Err(JobError::Failed("not a qcow2 image".into()));
    };
    let repair = if repair_leaks {
        Repair::Leaks
    } else {
        Repair::Nothing
    };
    let report = qcow2
        .chain()
        .check(repair, &|| !allowance.is_over())
        .map_err(|error| JobError::Failed(chain_of(&error)))?;
    control.set_check(CheckResult {
        corruptions: report.corruptions,
        leaked_clusters: report.leaked_clusters,
        repaired_clusters: report.repaired_clusters,
        findings: report.findings,
    });
    Ok(())
}

/// What `image` is and what it is based on.
pub(super) fn describe(image: &dyn Image) -> ImageInfo {
    let file = image.plain_file().or_else(|| image.flush_file());
    // SAFETY: `image` keeps its file open.
    let file = file.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    let mut info = ImageInfo {
        name: image.name().to_owned(),
        format: image.format().to_owned(),
        capacity_bytes: image.capacity_sectors() * SECTOR_BYTES,
        allocated_bytes: file.map_or(0, allocated_bytes),
        cluster_bytes: 0,
        encrypted: image.cipher().is_some(),
        backing: Vec::new(),
    };
    let Some(qcow2) = image.as_qcow2() else {
        return info;
    };
    let chain = qcow2.chain().info();
    info.cluster_bytes = chain.cluster_bytes as u32;
    let mut name = chain.backing.map(|backing| backing.name);
    for layer in qcow2.chain().layers().skip(1) {
        let header = match layer.format {
            Format::Raw => None,
            Format::Qcow2 => ::qcow2::Header::read(&layer.file).ok(),
        };
        let file = layer.file.as_fd();
        let len_bytes = || layer.file.metadata().map_or(0, |meta| meta.len());
        info.backing.push(ImageInfo {
            name: name.take().unwrap_or_default(),
            format: match layer.format {
                Format::Raw => "raw".to_owned(),
                Format::Qcow2 => "qcow2".to_owned(),
            },
            capacity_bytes: header
                .as_ref()
                .map_or_else(len_bytes, |h| h.capacity_bytes()),
            allocated_bytes: allocated_bytes(file),
            cluster_bytes: header.as_ref().map_or(0, |h| h.cluster_bytes() as u32),
            encrypted: false,
            backing: Vec::new(),
        });
        name = header.and_then(|header| Some(header.backing()?.name.clone()));
    }
    info
}

fn options(disk: &Disk, lock_patience: Duration) -> OpenOptions {
    OpenOptions {
        read_only: false,
        page_cache: disk.config.page_cache,
        block_bytes: block_bytes(&disk.config),
        lock_patience,
    }
}

fn flush(image: &dyn Image) -> Result<(), Status> {
    image.perform(&mut Task::Flush).map_err(|errno| {
        let error = std::io::Error::from_raw_os_error(errno);
        Status::internal(format!("image {} cannot be flushed: {error}", image.name()))
    })
}

fn allocated_bytes(file: BorrowedFd<'_>) -> u64 {
    /// Unit of `st_blocks`.
    const STAT_BLOCK_BYTES: u64 = 512;
    fstat(file).map_or(0, |stat| stat.st_blocks as u64 * STAT_BLOCK_BYTES)
}

/// An error with its causes.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
