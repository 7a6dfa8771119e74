//! Why an image cannot be used.

use std::io;

/// What is wrong with an image, and what to do about it. The caller adds the image's name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("cannot {action}")]
    Io {
        /// What was tried, as in "read the header".
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The magic number is not there.
    #[error(
        "it is not in the qcow2 format; name its real format, or convert it: qemu-img convert -O qcow2 IMAGE IMAGE.qcow2"
    )]
    NotQcow2,
    /// Neither 2 nor 3.
    #[error("it is of qcow2 version {0}; versions 2 and 3 are served")]
    Version(u32),
    /// A header field or a table is impossible.
    #[error("its metadata is broken: {0}; look at it with `qemu-img check`, or restore the image")]
    Corrupt(String),
    /// A feature that changes what the bytes mean.
    #[error("it uses {feature}, which is not served; {remedy}")]
    Unsupported {
        /// The feature, as qcow2's specification calls it.
        feature: String,
        /// What gets rid of it.
        remedy: &'static str,
    },
    /// It must be repaired before it is written.
    #[error("it is marked {mark} and cannot be written; {remedy}")]
    NeedsRepair {
        /// The bit in the header.
        mark: &'static str,
        /// What clears it.
        remedy: &'static str,
    },
    /// Something that was asked for cannot be had.
    #[error("{0}")]
    Invalid(String),
    /// The images that its data is based on were not given.
    #[error(
        "it is based on {name:?}, and its chain of backing images ends before that; name the backing image"
    )]
    NoBacking {
        /// As the header has it.
        name: String,
    },
}

impl Error {
    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }

    /// For `map_err`.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io { source, .. } => source,
            other => io::Error::other(other),
        }
    }
}
