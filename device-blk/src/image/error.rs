//! Why an image cannot be served.

use std::io;

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// The path leads nowhere.
    #[error(
        "image {name}: no such file; create it first, for example with `qemu-img create -f raw {name} 10G`"
    )]
    Missing {
        /// The path.
        name: String,
    },
    /// The kernel refused.
    #[error("image {name}: cannot {action}")]
    Io {
        /// Name of the image.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Not something with blocks.
    #[error("image {name} is a {kind}; name a regular file or a block device")]
    WrongKind {
        /// Name of the image.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// Less than a sector.
    #[error(
        "image {name} has {len_bytes} bytes, and a disk needs 512 at least; grow it first, for example with `truncate -s 10G {name}`"
    )]
    TooSmall {
        /// Name of the image.
        name: String,
        /// Its length.
        len_bytes: u64,
    },
    /// The descriptor cannot be written.
    #[error(
        "image {name} is open for reading only; pass a descriptor opened for reading and writing, or attach the disk read-only"
    )]
    NotWritable {
        /// Name of the image.
        name: String,
    },
    /// The descriptor cannot be read.
    #[error("image {name} is not open for reading; pass a descriptor opened for reading")]
    NotReadable {
        /// Name of the image.
        name: String,
    },
    /// Somebody else's lock.
    #[error(
        "image {name} is in use by another process ({holder}); stop that process, or wait until it has closed the image"
    )]
    InUse {
        /// Name of the image.
        name: String,
        /// What the locks tell of the other side.
        holder: &'static str,
    },
    /// Locks are what keeps two writers apart, so nothing is served without them.
    #[error(
        "image {name}: its file system does not support locks; move the image to one that does (ext4, xfs, btrfs, NFSv4, ...)"
    )]
    NoLocks {
        /// Name of the image.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What is in it cannot be served.
    #[error("image {name} cannot be served")]
    Format {
        /// Name of the image.
        name: String,
        /// Why.
        #[source]
        source: qcow2::Error,
    },
    /// There is no passphrase to unlock it with.
    #[error("image {name} cannot be unlocked")]
    Key {
        /// Name of the image.
        name: String,
        /// Why.
        #[source]
        source: luks::PassphraseError,
    },
    /// Its volume cannot be unlocked.
    #[error("image {name} cannot be unlocked")]
    Locked {
        /// Name of the image.
        name: String,
        /// Why.
        #[source]
        source: luks::LuksError,
    },
    /// Requests could be smaller than what is encrypted as one.
    #[error(
        "image {name} is encrypted in sectors of {sector_bytes} bytes, and the disk has blocks of {block_bytes}; attach it with a block size of {sector_bytes}"
    )]
    SectorsTooLarge {
        /// Name of the image.
        name: String,
        /// Of the volume.
        sector_bytes: u32,
        /// Of the disk.
        block_bytes: u32,
    },
}
