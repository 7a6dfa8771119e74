//! Where a job writes: a file that was passed, made ready.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use super::copy::Fresh;
use crate::image::luks::LuksImage;
use crate::image::{Image, ImageError, OpenOptions, Qcow2Image, RawImage, SECTOR_BYTES, key, lock};

/// What the target is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The whole disk: what the target had before is gone.
    Whole,
    /// Blocks that are to be laid over an older copy, in the target already or put below it later.
    Changes,
}

/// How the target is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TargetOptions {
    pub(crate) capacity_bytes: u64,
    pub(crate) extent: Extent,
    pub(crate) page_cache: bool,
    pub(crate) block_bytes: u32,
    /// How long a target that is in use is waited for.
    pub(crate) lock_patience: Duration,
}

impl TargetOptions {
    fn for_image(&self) -> OpenOptions {
        OpenOptions {
            read_only: false,
            page_cache: self.page_cache,
            block_bytes: self.block_bytes,
            lock_patience: self.lock_patience,
        }
    }
}

/// A raw target, brought to the disk's size.
///
/// # Errors
/// It is in use, too small, or cannot be written.
pub(crate) fn raw(
    fd: OwnedFd,
    name: String,
    options: TargetOptions,
) -> Result<(Arc<dyn Image>, Fresh), ImageError> {
    let file = File::from(fd);
    // Nothing is truncated that somebody else uses: the source of the copy, for example.
    lock::acquire(&file, &name, false, options.lock_patience)?;
    let io_error = |action| {
        let name = name.clone();
        move |source| ImageError::Io {
            name,
            action,
            source,
        }
    };
    let meta = file.metadata().map_err(io_error("be inspected"))?;
    let mut fresh = Fresh::Unknown;
    if meta.is_file() {
        if options.extent == Extent::Whole {
            file.set_len(0).map_err(io_error("be emptied"))?;
            fresh = Fresh::Zeroes;
        }
        if meta.len() < options.capacity_bytes || options.extent == Extent::Whole {
            file.set_len(options.capacity_bytes)
                .map_err(io_error("be brought to size"))?;
        }
    } else if !meta.file_type().is_block_device() {
        return Err(ImageError::WrongKind {
            name,
            kind: "pipe, socket or directory",
        });
    }
    let image = RawImage::from_file(file, name.clone(), options.for_image())?;
    let len_bytes = image.capacity_sectors() * SECTOR_BYTES;
    if len_bytes < options.capacity_bytes {
        return Err(ImageError::TooSmall { name, len_bytes });
    }
    Ok((Arc::new(image), fresh))
}

/// A LUKS volume that is there already, of at least the disk's size. Takes the time that unlocking
/// it takes.
///
/// # Errors
/// It is in use, too small, or the key does not fit.
pub(crate) fn encrypted(
    fd: OwnedFd,
    name: String,
    key: OwnedFd,
    options: TargetOptions,
) -> Result<(Arc<dyn Image>, Fresh), ImageError> {
    let passphrase = key::read(key).map_err(|source| ImageError::Key {
        name: name.clone(),
        source,
    })?;
    let raw = RawImage::from_file(File::from(fd), name.clone(), options.for_image())?;
    let image = LuksImage::unlock(raw, &passphrase, options.block_bytes)?;
    let len_bytes = image.capacity_sectors() * SECTOR_BYTES;
    if len_bytes < options.capacity_bytes {
        return Err(ImageError::TooSmall { name, len_bytes });
    }
    // A hole reads as noise.
    Ok((Arc::new(image), Fresh::Unknown))
}

/// A qcow2 target, made of an empty file.
///
/// # Errors
/// It is in use, not empty, or cannot be written.
pub(crate) fn qcow2(
    fd: OwnedFd,
    name: String,
    options: TargetOptions,
) -> Result<(Arc<dyn Image>, Fresh), ImageError> {
    let file = File::from(fd);
    let create = ::qcow2::CreateOptions {
        capacity_bytes: options.capacity_bytes,
        ..::qcow2::CreateOptions::default()
    };
    ::qcow2::create(&file, &create).map_err(|source| ImageError::Format {
        name: name.clone(),
        source,
    })?;
    let image = Qcow2Image::open(file, name, Vec::new(), options.for_image())?;
    let fresh = match options.extent {
        Extent::Whole => Fresh::Zeroes,
        Extent::Changes => Fresh::Overlay,
    };
    Ok((Arc::new(image), fresh))
}
