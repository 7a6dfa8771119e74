//! What is wrong with a request's buffers. The request is answered, and the ring goes on.

use crate::memory::MAX_REGIONS;

/// Why a chain is broken: see [`DescChain::fault`](super::DescChain::fault).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// A `next` field is no descriptor index.
    #[error("next descriptor {next} is not below the table size")]
    BadNext {
        /// The field.
        next: u16,
    },
    /// The chain has more descriptors than its table: it loops.
    #[error("more descriptors than the table has, it loops")]
    Loop,
    /// An indirect descriptor that is not allowed here or has an impossible table.
    #[error("{reason}")]
    BadIndirect {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A descriptor without bytes.
    #[error("descriptor without bytes")]
    EmptyBuffer,
    /// A device-readable descriptor follows a device-writable one.
    #[error("readable descriptor after a writable one")]
    ReadableAfterWritable,
    /// A buffer or table is not entirely in guest memory.
    #[error("{len_bytes:#x} bytes at guest address {gpa:#x} are not all memory")]
    BadAddress {
        /// Where the buffer starts.
        gpa: u64,
        /// Its length.
        len_bytes: u32,
    },
    /// The buffers of one direction add up to 4 GiB or more.
    #[error("buffers add up to 4 GiB or more")]
    TooManyBytes,
    /// The buffers cross so many borders between memory regions that they must overlap.
    #[error("buffers cross more than {MAX_REGIONS} borders of memory regions")]
    TooScattered,
    /// Nothing is: a fault was armed.
    #[error("treated as broken because of a fault that is armed")]
    Injected,
}
