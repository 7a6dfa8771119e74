//! A daemon's devices as Prometheus metrics.

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::DeviceHistogram;
use crate::device::Device;

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
    registry.register(
        "blk_request_duration_seconds",
        "From the ring to the ring",
        Durations::new(daemon, histograms),
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

/// Histograms whose buckets were counted elsewhere; the client library's own can only be fed value
/// by value.
#[derive(Debug)]
struct Durations(Vec<(QueueLabels, DeviceHistogram)>);

impl Durations {
    fn new(daemon: &str, of_devices: Vec<(String, Vec<DeviceHistogram>)>) -> Self {
        let labelled = of_devices.into_iter().flat_map(|(device, histograms)| {
            histograms.into_iter().map(move |histogram| {
                let labels = QueueLabels {
                    daemon: daemon.to_owned(),
                    device: device.clone(),
                    queue: histogram.queue,
                    op: histogram.op,
                };
                (labels, histogram)
            })
        });
        Self(labelled.collect())
    }
}

impl EncodeMetric for Durations {
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
