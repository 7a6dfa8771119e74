//! Counters of one queue pair. Each direction is written by one thread alone.

use std::sync::atomic::{AtomicU64, Ordering};

use api::device::NetStats;

/// One direction of one queue pair.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    drops: AtomicU64,
}

impl Direction {
    /// A frame of this length, without its virtio-net header, got through.
    pub(crate) fn count(&self, frame_len_bytes: usize) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .fetch_add(frame_len_bytes as u64, Ordering::Relaxed);
    }

    /// A frame was dropped.
    pub(crate) fn count_drop(&self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
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

/// The sum over all pairs.
pub(crate) fn sum<'a>(pairs: impl Iterator<Item = &'a PairStats>) -> NetStats {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    pairs.fold(NetStats::default(), |mut total, pair| {
        let (rx, tx) = (&pair.rx.0, &pair.tx.0);
        total.rx_packets += read(&rx.packets);
        total.rx_bytes += read(&rx.bytes);
        total.rx_drops += read(&rx.drops);
        total.tx_packets += read(&tx.packets);
        total.tx_bytes += read(&tx.bytes);
        total.tx_drops += read(&tx.drops);
        total
    })
}
