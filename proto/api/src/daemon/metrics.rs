//! A daemon's devices as Prometheus metrics.

use std::fmt::Debug;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::DeviceHistogram;
use crate::device::{Device, NetQueueStats};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    daemon: String,
    device: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OpLabels {
    daemon: String,
    device: String,
    op: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct QueueLabels {
    daemon: String,
    device: String,
    queue: u16,
    op: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PairLabels {
    daemon: String,
    device: String,
    pair: u32,
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DropLabels {
    daemon: String,
    device: String,
    direction: &'static str,
    reason: String,
}

/// A metric's name, its help text, and where it is found in a [`Device`] of the right kind.
type Row = (&'static str, &'static str, fn(&Device) -> Option<u64>);

const GAUGES: &[Row] = &[
    ("device_connected", "A frontend is connected", |d| {
        Some(d.connected.into())
    }),
    ("device_queues_running", "Rings being served", |d| {
        Some(d.queues_running.into())
    }),
    (
        "device_inflight_requests",
        "Requests popped and not completed",
        |d| Some(d.inflight),
    ),
    ("blk_capacity_bytes", "Size of the disk", |d| {
        Some(d.blk.as_ref()?.capacity_bytes)
    }),
];

const COUNTERS: &[Row] = &[
    ("device_sessions", "Frontends served since attach", |d| {
        Some(d.sessions)
    }),
    ("blk_read_requests", "Reads completed", |d| {
        Some(d.blk.as_ref()?.read_requests)
    }),
    ("blk_read_bytes", "Bytes read", |d| {
        Some(d.blk.as_ref()?.read_bytes)
    }),
    ("blk_write_requests", "Writes completed", |d| {
        Some(d.blk.as_ref()?.write_requests)
    }),
    ("blk_write_bytes", "Bytes written", |d| {
        Some(d.blk.as_ref()?.write_bytes)
    }),
    ("blk_flush_requests", "Flushes completed", |d| {
        Some(d.blk.as_ref()?.flush_requests)
    }),
    ("blk_discard_requests", "Discards completed", |d| {
        Some(d.blk.as_ref()?.discard_requests)
    }),
    ("blk_write_zeroes_requests", "Write-zeroes completed", |d| {
        Some(d.blk.as_ref()?.write_zeroes_requests)
    }),
    ("blk_errors", "Requests completed with an error", |d| {
        Some(d.blk.as_ref()?.errors)
    }),
    (
        "blk_throttled_requests",
        "Requests that waited for a rate limit",
        |d| Some(d.blk.as_ref()?.throttled),
    ),
    (
        "blk_slow_requests",
        "Requests slower than the threshold of the log",
        |d| Some(d.blk.as_ref()?.slow_requests),
    ),
    ("net_rx_packets", "Packets delivered to the guest", |d| {
        Some(d.net.as_ref()?.rx_packets)
    }),
    ("net_rx_bytes", "Bytes delivered to the guest", |d| {
        Some(d.net.as_ref()?.rx_bytes)
    }),
    ("net_rx_drops", "Packets for the guest dropped", |d| {
        Some(d.net.as_ref()?.rx_drops)
    }),
    ("net_tx_packets", "Packets sent by the guest", |d| {
        Some(d.net.as_ref()?.tx_packets)
    }),
    ("net_tx_bytes", "Bytes sent by the guest", |d| {
        Some(d.net.as_ref()?.tx_bytes)
    }),
    ("net_tx_drops", "Packets of the guest dropped", |d| {
        Some(d.net.as_ref()?.tx_drops)
    }),
];

const RX: &str = "rx";
const TX: &str = "tx";

/// As [`Row`], of a queue pair: what was received, and what was sent.
type PairRow = (&'static str, &'static str, fn(&NetQueueStats) -> [u64; 2]);

const PAIR_COUNTERS: &[PairRow] = &[
    (
        "net_queue_packets",
        "Packets of a queue pair, by direction as the guest sees it",
        |pair| [pair.rx_packets, pair.tx_packets],
    ),
    ("net_queue_bytes", "Bytes of a queue pair", |pair| {
        [pair.rx_bytes, pair.tx_bytes]
    }),
    (
        "net_queue_drops",
        "Packets of a queue pair dropped",
        |pair| [pair.rx_drops, pair.tx_drops],
    ),
];

/// The counters of the devices themselves are the truth; a registry is built for each scrape.
/// `histograms` come with the ids of their devices.
pub(super) fn render(
    daemon: &str,
    devices: &[Device],
    histograms: Vec<(String, Vec<DeviceHistogram>)>,
) -> String {
    let mut registry = Registry::with_prefix("mortise");
    for &(name, help, read) in GAUGES {
        let family = Family::<Labels, Gauge>::default();
        for (labels, value) in rows(daemon, devices, read) {
            family
                .get_or_create(&labels)
                .set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        registry.register(name, help, family);
    }
    for &(name, help, read) in COUNTERS {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in rows(daemon, devices, read) {
            family.get_or_create(&labels).inc_by(value);
        }
        registry.register(name, help, family);
    }
    registry.register(
        "blk_errors_by_op",
        "Requests completed with an error, by their type",
        errors_by_op(daemon, devices),
    );
    for &(name, help, read) in PAIR_COUNTERS {
        registry.register(name, help, by_pair(daemon, devices, read));
    }
    registry.register(
        "net_drops_by_reason",
        "Packets dropped, by direction and reason",
        drops_by_reason(daemon, devices),
    );
    let (of_nics, of_disks) = histograms.into_iter().partition(|(id, _)| {
        let mut nics = devices.iter().filter(|device| device.net.is_some());
        nics.any(|device| device.id == *id)
    });
    registry.register(
        "blk_request_duration_seconds",
        "From the ring to the ring",
        Durations::new(daemon, of_disks, |daemon, device, histogram| QueueLabels {
            daemon,
            device,
            queue: histogram.queue,
            op: histogram.op,
        }),
    );
    registry.register(
        "net_frame_duration_seconds",
        "How long frames take within the daemon",
        Durations::new(daemon, of_nics, |daemon, device, histogram| PairLabels {
            daemon,
            device,
            pair: histogram.queue.into(),
            direction: histogram.op,
        }),
    );
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a String cannot fail");
    text
}

fn rows<'a>(
    daemon: &'a str,
    devices: &'a [Device],
    read: fn(&Device) -> Option<u64>,
) -> impl Iterator<Item = (Labels, u64)> + 'a {
    devices.iter().filter_map(move |device| {
        let labels = Labels {
            daemon: daemon.to_owned(),
            device: device.id.clone(),
        };
        Some((labels, read(device)?))
    })
}

fn errors_by_op(daemon: &str, devices: &[Device]) -> Family<OpLabels, Counter> {
    let family = Family::<OpLabels, Counter>::default();
    for device in devices {
        let by_op = device.blk.iter().flat_map(|blk| &blk.errors_by_op);
        for (op, &errors) in by_op {
            let labels = OpLabels {
                daemon: daemon.to_owned(),
                device: device.id.clone(),
                op: op.clone(),
            };
            family.get_or_create(&labels).inc_by(errors);
        }
    }
    family
}

fn by_pair(
    daemon: &str,
    devices: &[Device],
    read: fn(&NetQueueStats) -> [u64; 2],
) -> Family<PairLabels, Counter> {
    let family = Family::<PairLabels, Counter>::default();
    for device in devices {
        for pair in device.net.iter().flat_map(|net| &net.queues) {
            for (direction, count) in [RX, TX].into_iter().zip(read(pair)) {
                let labels = PairLabels {
                    daemon: daemon.to_owned(),
                    device: device.id.clone(),
                    pair: pair.pair,
                    direction,
                };
                family.get_or_create(&labels).inc_by(count);
            }
        }
    }
    family
}

fn drops_by_reason(daemon: &str, devices: &[Device]) -> Family<DropLabels, Counter> {
    let family = Family::<DropLabels, Counter>::default();
    for (device, net) in devices.iter().filter_map(|d| Some((d, d.net.as_ref()?))) {
        for (direction, drops) in [(RX, &net.rx_drops_by_reason), (TX, &net.tx_drops_by_reason)] {
            for (reason, &count) in drops {
                let labels = DropLabels {
                    daemon: daemon.to_owned(),
                    device: device.id.clone(),
                    direction,
                    reason: reason.clone(),
                };
                family.get_or_create(&labels).inc_by(count);
            }
        }
    }
    family
}

/// Histograms whose buckets were counted elsewhere; the client library's own can only be fed value
/// by value.
#[derive(Debug)]
struct Durations<L>(Vec<(L, DeviceHistogram)>);

impl<L> Durations<L> {
    fn new(
        daemon: &str,
        of_devices: Vec<(String, Vec<DeviceHistogram>)>,
        labels: impl Fn(String, String, &DeviceHistogram) -> L,
    ) -> Self {
        let mut labelled = Vec::new();
        for (device, histograms) in of_devices {
            for histogram in histograms {
                let labels = labels(daemon.to_owned(), device.clone(), &histogram);
                labelled.push((labels, histogram));
            }
        }
        Self(labelled)
    }
}

impl<L: EncodeLabelSet + Debug + Send + Sync + 'static> EncodeMetric for Durations<L> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (labels, histogram) in &self.0 {
            let count = histogram.buckets.iter().map(|(_, count)| count).sum();
            encoder
                .encode_family(labels)?
                .encode_histogram::<NoLabelSet>(
                    histogram.sum_seconds,
                    count,
                    &histogram.buckets,
                    None,
                )?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
