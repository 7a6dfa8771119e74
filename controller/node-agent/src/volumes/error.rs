//! Why a volume cannot be made, changed or removed.

use std::{io, path::PathBuf};

use tonic::Code;

use crate::{image::ImageError, record::RecordError};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// No number of sectors.
    #[error(
        "volume {id:?}: the size must be a multiple of 512 bytes, at least 512 and at most 16 TiB, not {size_bytes}"
    )]
    Size {
        /// The volume.
        id: String,
        /// As asked for.
        size_bytes: u64,
    },
    /// The source does not fit.
    #[error(
        "volume {id:?}: {size_bytes} bytes are too small for the source of {source_bytes} bytes; ask for at least that, or for 0 to take its size"
    )]
    TooSmall {
        /// The volume.
        id: String,
        /// As asked for.
        size_bytes: u64,
        /// Of the source.
        source_bytes: u64,
    },
    /// Volumes grow only.
    #[error("volume {id:?} has {size_bytes} bytes; it cannot be made smaller")]
    Shrink {
        /// The volume.
        id: String,
        /// As it is.
        size_bytes: u64,
    },
    /// Another one of this name.
    #[error(
        "volume {id:?} exists already with {size_bytes} bytes; choose another name or delete it"
    )]
    Exists {
        /// The volume.
        id: String,
        /// Its size.
        size_bytes: u64,
    },
    /// No such volume.
    #[error("volume {id:?} does not exist on this host; vmctl volume list shows which do")]
    Missing {
        /// The volume.
        id: String,
    },
    /// A VM has it.
    #[error("volume {id:?} is attached to VM {vm:?}; delete the VM or detach the volume first")]
    Attached {
        /// The volume.
        id: String,
        /// The VM.
        vm: String,
    },
    /// Linked clones need it as it is.
    #[error("volume {id:?} is the base of {clones}; delete these first")]
    HasClones {
        /// The volume.
        id: String,
        /// Their ids.
        clones: String,
    },
    /// A clone's base is wanted for writing.
    #[error(
        "volume {id:?} is read-only while it is the base of {clones}; attach it with readonly, or attach a clone of it: vmctl volume clone {id} NAME"
    )]
    Frozen {
        /// The volume.
        id: String,
        /// Their ids.
        clones: String,
    },
    /// Somebody has it by now.
    #[error(
        "volume {id:?}: attachment {given} is over, the volume was attached anew as {highest}; read the VM and apply again"
    )]
    Superseded {
        /// The volume.
        id: String,
        /// As given.
        given: u64,
        /// The highest that has been here.
        highest: u64,
    },
    /// Too many images on top of one another.
    #[error(
        "volume {id:?} has {layers} layers, at most {max} can be; merge some: vmctl disk commit, or vmctl disk mirror"
    )]
    Layers {
        /// The volume.
        id: String,
        /// As it would be.
        layers: usize,
        /// The limit.
        max: usize,
    },
    /// No such snapshot.
    #[error(
        "volume {id:?} has no snapshot {snapshot:?}; vmctl volume show {id} lists those it has"
    )]
    NoSnapshot {
        /// The volume.
        id: String,
        /// As asked for.
        snapshot: String,
    },
    /// The snapshot's name is taken.
    #[error("volume {id:?} has a snapshot {snapshot:?} already; choose another name")]
    SnapshotExists {
        /// The volume.
        id: String,
        /// As asked for.
        snapshot: String,
    },
    /// What cannot be done to an encrypted volume.
    #[error("volume {id:?} is encrypted: {what} would keep data in the clear, which is refused")]
    Encrypted {
        /// The volume.
        id: String,
        /// A snapshot, a linked clone ...
        what: &'static str,
    },
    /// The passphrase is not here.
    #[error(
        "volume {id:?} is encrypted and this host does not have its key (a reboot forgets it): vmctl volume key set {id} --key-file FILE"
    )]
    NoKey {
        /// The volume.
        id: String,
    },
    /// The passphrase is another one.
    #[error("volume {id:?}: encryption: {problem}")]
    Luks {
        /// The volume.
        id: String,
        /// What is wrong.
        problem: String,
    },
    /// Its layers are being changed.
    #[error("volume {id:?} is being changed by another operation; wait for it: vmctl op list")]
    Busy {
        /// The volume.
        id: String,
    },
    /// A qcow2 file is not as it should be, or cannot be made.
    #[error("volume {id:?}: {action} {path}", path = .path.display())]
    Qcow2 {
        /// The volume.
        id: String,
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: qcow2::Error,
    },
    /// The uploaded files cannot be made into a volume.
    #[error("volume {id:?}: importing")]
    Import {
        /// The volume.
        id: String,
        /// Why not.
        #[source]
        source: crate::import::ImportError,
    },
    /// The source, or the volume itself, is in use or not usable.
    #[error("volume {id:?}")]
    Image {
        /// The volume.
        id: String,
        /// What is wrong.
        #[source]
        source: ImageError,
    },
    /// The disk is full.
    #[error("volume {id:?}: no space left in {dir} ({free_mib} MiB are free); delete volumes or ask for less", dir = .dir.display())]
    NoSpace {
        /// The volume.
        id: String,
        /// The pool.
        dir: PathBuf,
        /// What is left.
        free_mib: u64,
    },
    /// A file could not be handled.
    #[error("volume {id:?}: {action}")]
    Io {
        /// The volume.
        id: String,
        /// What was done.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A record could not be kept or read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The pool cannot be opened.
    #[error("opening the pool {dir}", dir = .dir.display())]
    Pool {
        /// The pool.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl VolumeError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Size { .. } | Self::TooSmall { .. } | Self::Shrink { .. } => {
                Code::InvalidArgument
            }
            Self::Exists { .. } | Self::SnapshotExists { .. } => Code::AlreadyExists,
            Self::Missing { .. } | Self::NoSnapshot { .. } => Code::NotFound,
            Self::Attached { .. }
            | Self::HasClones { .. }
            | Self::Frozen { .. }
            | Self::Superseded { .. }
            | Self::Layers { .. }
            | Self::Encrypted { .. }
            | Self::NoKey { .. }
            | Self::Luks { .. } => Code::FailedPrecondition,
            // Tried again by whoever wants it.
            Self::Busy { .. } => Code::Unavailable,
            Self::Image { source, .. } => source.code(),
            Self::Import { source, .. } => source.code(),
            Self::NoSpace { .. } => Code::ResourceExhausted,
            Self::Qcow2 { .. } => Code::FailedPrecondition,
            Self::Io { .. } | Self::Record(_) | Self::Pool { .. } => Code::Internal,
        }
    }
}

/// For `map_err`: a file of volume `id` could not be handled.
pub(crate) fn io_error(id: &str, action: &'static str) -> impl FnOnce(io::Error) -> VolumeError {
    let id = id.to_owned();
    move |source| VolumeError::Io { id, action, source }
}

/// Whether it means that the file system has no room.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
    )
}
