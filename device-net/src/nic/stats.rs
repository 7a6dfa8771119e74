//! Counters and latencies of one queue pair. Each direction is written by one thread at a time.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::daemon::DeviceHistogram;
use api::device::{NetQueueStats, NetStats};
use api::latency::{Distribution, Histogram};

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
    /// On purpose.
    Fault,
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
    const ALL: [Self; 12] = [
        Self::Malformed,
        Self::NoBuffers,
        Self::Unwanted,
        Self::LinkDown,
        Self::Refused,
        Self::Guarded,
        Self::Fault,
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
            Self::Fault => "fault",
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
    /// Of frames that got through; made with the first.
    latency: OnceLock<Box<Histogram>>,
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

    /// So many frames of a batch took `elapsed` within this process. Only one thread at a time may
    /// say so.
    #[inline]
    pub(crate) fn record_latency(&self, elapsed: Duration, frames: u64) {
        if frames > 0 {
            let latency = self.latency.get_or_init(Box::default);
            latency.record_many(elapsed.as_nanos() as u64, frames);
        }
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
    let rx = pairs.iter().filter_map(|pair| pair.rx.0.latency.get());
    let tx = pairs.iter().filter_map(|pair| pair.tx.0.latency.get());
    total.rx_latency = Some(Distribution::of(rx.map(|latency| &**latency)).summary());
    total.tx_latency = Some(Distribution::of(tx.map(|latency| &**latency)).summary());
    total
}

/// How long frames of each pair take, both ways.
pub(crate) fn histograms(pairs: &[PairStats]) -> Vec<DeviceHistogram> {
    let mut histograms = Vec::new();
    for (number, pair) in (0..).zip(pairs) {
        for (op, direction) in [("rx", &pair.rx.0), ("tx", &pair.tx.0)] {
            let Some(latency) = direction.latency.get() else {
                continue;
            };
            let latency = Distribution::of([&**latency]);
            histograms.push(DeviceHistogram {
                queue: number,
                op,
                buckets: latency.metric_buckets(),
                sum_seconds: latency.sum_seconds(),
            });
        }
    }
    histograms
}

fn add_drops(by_reason: &mut BTreeMap<String, u64>, direction: &Direction) {
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
