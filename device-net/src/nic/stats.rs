//! Counters of one queue pair. Each direction is written by one thread at a time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use api::device::{NetQueueStats, NetStats};

/// Why a frame was dropped; reasons of the guard are counted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropReason {
    /// No frame, or one whose virtio-net header contradicts it or asks for what was not agreed on.
    Malformed,
    /// The driver supplied no buffers, or none that it fits into.
    NoBuffers,
    /// The driver does not want it: see [`super::receive_filter`].
    Unwanted,
    /// The cable is out.
    LinkDown,
    /// The kernel refused it: the interface is down, gone or full.
    Refused,
    /// The guard refused it.
    Guarded,
    /// Not of a VLAN that the port may use.
    Vlan,
    /// Too many frames for everybody: see [`crate::switch`].
    Storm,
    /// From an address that belongs to another port of the switch.
    TakenAddress,
    /// The switch has no port for it, or none whose ring runs.
    NoPort,
    /// The driver's buffer is too short for it, and it takes no frames in parts.
    TooLong,
}

impl DropReason {
    const ALL: [Self; 11] = [
        Self::Malformed,
        Self::NoBuffers,
        Self::Unwanted,
        Self::LinkDown,
        Self::Refused,
        Self::Guarded,
        Self::Vlan,
        Self::Storm,
        Self::TakenAddress,
        Self::NoPort,
        Self::TooLong,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoBuffers => "no_buffers",
            Self::Unwanted => "unwanted",
            Self::LinkDown => "link_down",
            Self::Refused => "refused",
            Self::Guarded => "guarded",
            Self::Vlan => "vlan",
            Self::Storm => "storm",
            Self::TakenAddress => "taken_address",
            Self::NoPort => "no_port",
            Self::TooLong => "too_long",
        }
    }
}

/// One direction of one queue pair.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    drops: [AtomicU64; DropReason::ALL.len()],
}

impl Direction {
    /// A frame of this length, without its virtio-net header, got through.
    #[inline]
    pub(crate) fn count(&self, frame_len_bytes: usize) {
        self.count_many(1, frame_len_bytes as u64);
    }

    /// So many frames got through.
    #[inline]
    pub(crate) fn count_many(&self, frames: u64, bytes: u64) {
        self.packets.fetch_add(frames, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A frame was dropped.
    pub(crate) fn count_drop(&self, reason: DropReason) {
        self.drops[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn drops(&self) -> u64 {
        self.drops.iter().map(read).sum()
    }
}

/// Both directions, each on cache lines of its own.
#[derive(Debug, Default)]
pub(crate) struct PairStats {
    pub(crate) rx: Padded,
    pub(crate) tx: Padded,
}

/// Keeps what two threads write off one another's cache line (and off the one prefetched with it).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded(pub(crate) Direction);

/// Each pair, and the sum over all of them.
pub(crate) fn sum(pairs: &[PairStats]) -> NetStats {
    let mut total = NetStats::default();
    for (number, pair) in (0..).zip(pairs) {
        let (rx, tx) = (&pair.rx.0, &pair.tx.0);
        let queue = NetQueueStats {
            pair: number,
            rx_packets: read(&rx.packets),
            rx_bytes: read(&rx.bytes),
            rx_drops: rx.drops(),
            tx_packets: read(&tx.packets),
            tx_bytes: read(&tx.bytes),
            tx_drops: tx.drops(),
        };
        total.rx_packets += queue.rx_packets;
        total.rx_bytes += queue.rx_bytes;
        total.rx_drops += queue.rx_drops;
        total.tx_packets += queue.tx_packets;
        total.tx_bytes += queue.tx_bytes;
        total.tx_drops += queue.tx_drops;
        total.queues.push(queue);
        add_drops(&mut total.rx_drops_by_reason, rx);
        add_drops(&mut total.tx_drops_by_reason, tx);
    }
    total
}

fn add_drops(by_reason: &mut HashMap<String, u64>, direction: &Direction) {
    for reason in DropReason::ALL {
        // The guard tells its own reasons.
        if reason == DropReason::Guarded {
            continue;
        }
        let count = read(&direction.drops[reason as usize]);
        if count > 0 {
            *by_reason.entry(reason.name().to_owned()).or_default() += count;
        }
    }
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
