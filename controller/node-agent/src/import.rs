//! Making volumes of files that were brought here: [`uploads`] takes them, [`convert`] has qemu-img
//! read them, [`confine`] keeps it in.
//!
//! The files come from anywhere. Their names are checked before they are used, their checksums
//! before they are read, and qemu-img, which parses them, sees nothing of the host but them.

pub(crate) mod confine;
mod convert;
mod uploads;

use std::{io, path::PathBuf};

use tonic::Code;

pub(crate) use self::{
    convert::find_qemu_img,
    uploads::{Imports, Upload, UploadFile},
};

/// What a volume is made from.
#[derive(Clone, Debug)]
pub(crate) struct ImportRequest {
    /// Id of the upload.
    pub(crate) upload: String,
    /// As qemu-img calls it.
    pub(crate) format: String,
    /// The image; the upload's other files belong to it.
    pub(crate) file: String,
    /// Of every file of the upload.
    pub(crate) sha256: Vec<Vec<u8>>,
}

/// Why files cannot be taken or made into a volume.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// No such upload.
    #[error(
        "there is no upload {id:?}: it was finished, expired or failed its checksum; begin the import again"
    )]
    NoUpload {
        /// As asked for.
        id: String,
    },
    /// The id belongs to other files.
    #[error("upload {id:?} has other files; choose another id, or delete it first")]
    OtherFiles {
        /// The upload.
        id: String,
    },
    /// Too many at once.
    #[error(
        "this host has {count} unfinished uploads already; finish some, or wait a day until they expire"
    )]
    TooMany {
        /// Uploads that are there.
        count: usize,
    },
    /// They will not fit.
    #[error("the files need {needed_mib} MiB, {free_mib} MiB are free in {dir}; delete volumes first", dir = .dir.display())]
    NoSpace {
        /// For all of them.
        needed_mib: u64,
        /// What is left.
        free_mib: u64,
        /// Where.
        dir: PathBuf,
    },
    /// The upload has no such file.
    #[error("upload {id:?} has no file {file}")]
    NoFile {
        /// The upload.
        id: String,
        /// Name or number.
        file: String,
    },
    /// A chunk for another place.
    #[error(
        "file {file:?} ends at byte {end}, and this is for byte {offset}; ask how much has arrived and go on from there"
    )]
    Offset {
        /// The file.
        file: String,
        /// Where it ends.
        end: u64,
        /// As given.
        offset: u64,
    },
    /// More than was announced.
    #[error("file {file:?} was announced with {size_bytes} bytes and is longer")]
    TooLong {
        /// The file.
        file: String,
        /// As announced.
        size_bytes: u64,
    },
    /// Not all has arrived.
    #[error(
        "{received_bytes} of {size_bytes} bytes of file {file:?} have arrived; send the rest first"
    )]
    Incomplete {
        /// The file.
        file: String,
        /// What is here.
        received_bytes: u64,
        /// As announced.
        size_bytes: u64,
    },
    /// What arrived is not what was sent.
    #[error(
        "the checksum of file {file:?} is {found}, and {wanted} was expected: it was damaged on its way or changed meanwhile; begin the import again"
    )]
    Checksum {
        /// The file.
        file: String,
        /// Of what is here.
        found: String,
        /// As given.
        wanted: String,
    },
    /// No converter.
    #[error(
        "converting needs qemu-img, which is neither beside node-agent nor in PATH: install it (Debian: qemu-utils), or name it with --qemu-img"
    )]
    NoProgram,
    /// The converter could not be run.
    #[error("running {program}", program = .program.display())]
    Run {
        /// Where it is.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The converter refused.
    #[error("the image cannot be read as {format}: {message}")]
    Refused {
        /// As given.
        format: String,
        /// Its last words.
        message: String,
    },
    /// The image is not complete in itself.
    #[error("the image refers to {what} {name:?}, which is not followed; {remedy}")]
    Reference {
        /// A backing file, a data file ...
        what: &'static str,
        /// As the image has it.
        name: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The image's content needs a passphrase.
    #[error("the image is encrypted; decrypt it first: qemu-img convert with --object secret")]
    Encrypted,
    /// The converter stopped moving.
    #[error(
        "qemu-img made no progress for {minutes} minutes and was stopped; try again when the host has less to do"
    )]
    Stuck {
        /// How long.
        minutes: u64,
    },
    /// A record could not be kept.
    #[error(transparent)]
    Record(#[from] crate::record::RecordError),
    /// A file could not be handled.
    #[error("{action} {path}", path = .path.display())]
    Io {
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl ImportError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NoUpload { .. } => Code::NotFound,
            Self::OtherFiles { .. } => Code::AlreadyExists,
            Self::TooMany { .. } | Self::NoSpace { .. } => Code::ResourceExhausted,
            Self::NoFile { .. } | Self::TooLong { .. } => Code::InvalidArgument,
            Self::Offset { .. } => Code::OutOfRange,
            Self::Checksum { .. } => Code::DataLoss,
            Self::Incomplete { .. } | Self::NoProgram | Self::Stuck { .. } => {
                Code::FailedPrecondition
            }
            Self::Refused { .. } | Self::Reference { .. } | Self::Encrypted => {
                Code::InvalidArgument
            }
            Self::Io { source, .. } if crate::volumes::is_full(source) => Code::ResourceExhausted,
            Self::Run { .. } | Self::Record(_) | Self::Io { .. } => Code::Internal,
        }
    }
}

/// For `map_err`: a file could not be handled.
fn io_error(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> ImportError {
    let path = path.to_owned();
    move |source| ImportError::Io {
        action,
        path,
        source,
    }
}
