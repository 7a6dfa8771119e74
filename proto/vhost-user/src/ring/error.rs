//! Why a ring stops.
//!
//! A single request that makes no sense is no reason: see [`ChainFault`](super::ChainFault).

use std::io;

use super::MAX_RING_SIZE;

/// The driver broke the ring, or the device cannot go on serving it. The ring stops; nothing else
/// does.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Zero or more than [`MAX_RING_SIZE`]; for a split ring also no power of two.
    #[error(
        "ring size {size} is not possible: up to {MAX_RING_SIZE}, a split ring's a power of two"
    )]
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
    /// A packed ring offers more descriptors than it has, without getting any back.
    #[error("more descriptors are available and in flight than the {size} that the ring has")]
    TooManyDescs {
        /// Ring size.
        size: u16,
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
