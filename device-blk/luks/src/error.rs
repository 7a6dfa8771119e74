//! Why a volume cannot be unlocked or made.

use std::io;

/// Why a volume cannot be unlocked or made.
#[derive(Debug, thiserror::Error)]
pub enum LuksError {
    /// The kernel refused.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no header at all.
    #[error("there is no LUKS header; the image is not encrypted, or its header was overwritten")]
    NoHeader,
    /// Neither copy of the header has the checksum it should have.
    #[error(
        "both copies of the LUKS2 header are damaged; restore them from a backup with \
         `cryptsetup luksHeaderRestore`"
    )]
    Damaged,
    /// The header contradicts itself or the file.
    #[error("the LUKS header is wrong: {what}")]
    Malformed {
        /// Which field, and why.
        what: String,
    },
    /// A valid volume of a kind that is not read here.
    #[error("the LUKS volume uses {what}, and only {supported} can be used here")]
    Unsupported {
        /// What it uses.
        what: String,
        /// What can be used instead.
        supported: &'static str,
    },
    /// A key slot wants more memory or time than is granted.
    #[error(
        "a key slot wants {what}, above the limit of {limit}; add a key slot with a lower cost \
         with `cryptsetup luksConvertKey`, or raise the limit"
    )]
    TooExpensive {
        /// What it wants.
        what: String,
        /// What it may have.
        limit: String,
    },
    /// No key slot opens with this passphrase.
    #[error("no key slot opens with this passphrase; check the key, a trailing line feed included")]
    WrongPassphrase,
    /// The file ends before the volume's data.
    #[error(
        "the file has {len_bytes} bytes, and the encrypted data begins at {payload_offset_bytes}; \
         the file was cut off, or is not meant to hold this volume"
    )]
    TooSmall {
        /// Length of the file.
        len_bytes: u64,
        /// Where data should begin.
        payload_offset_bytes: u64,
    },
    /// What is asked for cannot be made.
    #[error("cannot make such a volume: {what}")]
    Options {
        /// Which option, and what is possible.
        what: &'static str,
    },
}

impl LuksError {
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }

    pub(crate) fn malformed(what: impl Into<String>) -> Self {
        Self::Malformed { what: what.into() }
    }
}
