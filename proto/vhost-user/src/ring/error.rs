//! Why a ring stops.

use std::io;

use super::MAX_RING_SIZE;
use crate::memory::MAX_REGIONS;

/// The driver broke the ring, or the device cannot go on serving it. The ring stops; nothing else
/// does.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Not a power of two up to [`MAX_RING_SIZE`].
    #[error("ring size {size} is not a power of two up to {MAX_RING_SIZE}")]
    BadSize {
        /// The size.
        size: u32,
    },
    /// One of the three areas is not in the memory table, or misaligned.
    #[error("{area} at frontend address {user_addr:#x} is misaligned or outside the memory table")]
    BadArea {
        /// Which area.
        area: &'static str,
        /// Where it was said to be.
        user_addr: u64,
    },
    /// `avail->idx` is more than a ring ahead.
    #[error("avail index {avail_idx} is more than {size} ahead of {next_avail}")]
    AvailIdxJump {
        /// What the driver wrote.
        avail_idx: u16,
        /// The next entry the device would take.
        next_avail: u16,
        /// Ring size.
        size: u16,
    },
    /// A head in the available ring is no descriptor index.
    #[error("descriptor head {head} is not below the ring size")]
    BadHead {
        /// The head.
        head: u16,
    },
    /// A head was made available again before its chain was completed.
    #[error("descriptor head {head} was made available while it is in flight")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A `next` field is no descriptor index.
    #[error("chain {head}: next descriptor {next} is not below the table size")]
    BadNext {
        /// The chain.
        head: u16,
        /// The field.
        next: u16,
    },
    /// The chain has more descriptors than its table: it loops.
    #[error("chain {head}: more descriptors than the table has, it loops")]
    Loop {
        /// The chain.
        head: u16,
    },
    /// An indirect descriptor that is not allowed here or has an impossible table.
    #[error("chain {head}: {reason}")]
    BadIndirect {
        /// The chain.
        head: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("chain {head}: readable descriptor after a writable one")]
    ReadableAfterWritable {
        /// The chain.
        head: u16,
    },
    /// A buffer or table is not entirely in guest memory.
    #[error("chain {head}: {len_bytes:#x} bytes at guest address {gpa:#x} are not all memory")]
    BadAddress {
        /// The chain.
        head: u16,
        /// Where the buffer starts.
        gpa: u64,
        /// Its length.
        len_bytes: u32,
    },
    /// The buffers of one direction add up to 4 GiB or more.
    #[error("chain {head}: buffers add up to 4 GiB or more")]
    TooManyBytes {
        /// The chain.
        head: u16,
    },
    /// The buffers cross so many borders between memory regions that they must overlap.
    #[error("chain {head}: buffers cross more than {MAX_REGIONS} borders of memory regions")]
    TooScattered {
        /// The chain.
        head: u16,
    },
    /// The in-flight region has no place for this ring.
    #[error("the in-flight region has no place for ring {index} of {size} descriptors")]
    NoInflightSlot {
        /// Queue index.
        index: u16,
        /// Ring size.
        size: u16,
    },
    /// The device, not the driver, failed.
    #[error("the device cannot go on serving the ring")]
    Device(#[source] io::Error),
}
