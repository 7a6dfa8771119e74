//! A daemon's devices as Prometheus metrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::device::Device;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Labels {
    daemon: String,
    device: String,
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
pub(super) fn render(daemon: &str, devices: &[Device]) -> String {
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
