//! Makes a disk's image of what was opened for it, on the command line and by Attach alike.

use std::error::Error as _;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use api::device::BlkConfig;
use luks::LuksError;
use tonic::Status;

use crate::image::lock::{self, Attachment};
use crate::image::luks::LuksImage;
use crate::image::qcow2::Backing;
use crate::image::{Image, ImageError, OpenOptions, Qcow2Image, RawImage, SECTOR_BYTES, key};
use crate::remote::{self, RemoteError};

/// The open files of a disk.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// None when the disk is on another host.
    pub(crate) image: Option<File>,
    /// As many as `BlkConfig::backing` has.
    pub(crate) backing: Vec<File>,
    /// Yields the passphrase.
    pub(crate) key: Option<OwnedFd>,
    /// Yields certificates.
    pub(crate) nbd_tls: Option<OwnedFd>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AssemblyError {
    /// One of the files.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The other host.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// Not all descriptors came.
    #[error("{field}: missing")]
    Missing {
        /// Field of the request.
        field: &'static str,
    },
    /// Asked for together, but not served together.
    #[error("{what}")]
    Unsupported {
        /// What, and what to do instead.
        what: &'static str,
    },
}

impl Files {
    /// Sorts descriptors that came in the order of [`api::daemon::Parts::fds`].
    pub(crate) fn of_request(config: &BlkConfig, fds: Vec<OwnedFd>) -> Self {
        let mut fds = fds.into_iter();
        let image = config.image_fd.as_ref().and_then(|_| fds.next());
        let backing = fds.by_ref().take(config.backing.len());
        Self {
            image: image.map(File::from),
            backing: backing.map(File::from).collect(),
            key: config.key_fd.as_ref().and_then(|_| fds.next()),
            nbd_tls: fds.next(),
        }
    }
}

/// Checks, locks and combines `files`. A disk with an `attachment` waits for requests of its last
/// daemon. Starts no thread, for the process may not be confined yet,
/// unless the disk is on another host.
///
/// # Errors
/// What is wrong with which file, or with the combination.
pub(crate) fn assemble(
    config: &BlkConfig,
    name: &str,
    files: Files,
    attachment: Option<Attachment>,
    lock_patience: Duration,
) -> Result<Arc<dyn Image>, AssemblyError> {
    if let Some(source) = &config.nbd {
        let how = remote::Use {
            name,
            read_only: config.read_only,
            block_bytes: block_bytes(config),
            connections: config.num_queues as usize,
        };
        return Ok(remote::open(source, files.nbd_tls, how)?);
    }
    let file = files.image.ok_or(AssemblyError::Missing {
        field: "blk.image_fd",
    })?;
    // Also of a file that is locked for writing: a snapshot makes a backing file of it.
    if let Some(attachment) = attachment {
        for file in files.backing.iter().chain([&file]) {
            lock::fence(file, name, attachment, lock_patience)?;
        }
    }
    let options = OpenOptions {
        read_only: config.read_only,
        page_cache: config.page_cache,
        block_bytes: block_bytes(config),
        lock_patience,
    };
    match (config.format.as_str(), files.key) {
        ("" | "raw", None) => Ok(Arc::new(RawImage::from_file(
            file,
            name.to_owned(),
            options,
        )?)),
        ("" | "raw", Some(key)) => {
            let passphrase = key::read(key).map_err(|source| ImageError::Key {
                name: name.to_owned(),
                source,
            })?;
            let raw = RawImage::from_file(file, name.to_owned(), options)?;
            Ok(Arc::new(LuksImage::unlock(
                raw,
                &passphrase,
                options.block_bytes,
            )?))
        }
        (_, Some(_)) => Err(AssemblyError::Unsupported {
            what: "only raw images can be encrypted; convert the image first: \
                   qemu-img convert -O raw IMAGE IMAGE.raw",
        }),
        ("qcow2", None) => {
            let backing = backing(config, files.backing)?;
            let image = Qcow2Image::open(file, name.to_owned(), backing, options)?;
            image.chain().map_streams_ahead();
            Ok(Arc::new(image))
        }
        _ => Err(AssemblyError::Unsupported {
            what: "raw and qcow2 are the formats that are served; convert the image: \
                   qemu-img convert -O qcow2 IMAGE IMAGE.qcow2",
        }),
    }
}

/// What the image is based on, as the request describes it.
fn backing(config: &BlkConfig, files: Vec<File>) -> Result<Vec<Backing>, AssemblyError> {
    if files.len() != config.backing.len() {
        return Err(AssemblyError::Missing {
            field: "blk.backing.image_fd",
        });
    }
    config
        .backing
        .iter()
        .zip(files)
        .map(|(image, file)| {
            let format = match image.format.as_str() {
                "raw" => qcow2::Format::Raw,
                "qcow2" => qcow2::Format::Qcow2,
                _ => {
                    return Err(AssemblyError::Unsupported {
                        what: "raw and qcow2 are the formats that backing images may have; \
                               convert it: qemu-img convert -O qcow2 IMAGE IMAGE.qcow2",
                    });
                }
            };
            Ok(Backing {
                file,
                format,
                name: image.name.clone(),
            })
        })
        .collect()
}

/// The logical block size that guests see.
pub(crate) fn block_bytes(config: &BlkConfig) -> u32 {
    match config.block_size {
        0 => SECTOR_BYTES as u32,
        bytes => bytes,
    }
}

impl From<AssemblyError> for Status {
    fn from(error: AssemblyError) -> Self {
        match error {
            AssemblyError::Image(error) => refusal(&error),
            AssemblyError::Remote(error) => Self::from(&error),
            AssemblyError::Missing { .. } => Status::invalid_argument(error.to_string()),
            AssemblyError::Unsupported { .. } => Status::unimplemented(error.to_string()),
        }
    }
}

/// How an image's fault is told over gRPC.
pub(crate) fn refusal(error: &ImageError) -> Status {
    let message = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    match error {
        ImageError::Missing { .. } => Status::not_found(message),
        ImageError::WrongKind { .. }
        | ImageError::TooSmall { .. }
        | ImageError::NotWritable { .. }
        | ImageError::NotReadable { .. }
        | ImageError::Format { .. }
        | ImageError::Key { .. }
        | ImageError::SectorsTooLarge { .. } => Status::invalid_argument(message),
        ImageError::Locked {
            source: LuksError::WrongPassphrase,
            ..
        } => Status::permission_denied(message),
        ImageError::Locked { .. } => Status::invalid_argument(message),
        ImageError::InUse { .. } | ImageError::NoLocks { .. } => {
            Status::failed_precondition(message)
        }
        ImageError::Io { .. } => Status::internal(message),
    }
}
