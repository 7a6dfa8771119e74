//! NICs between users' messages and hosts' messages.

use api::controller as pb;
use api::{device, node};

/// For a host.
pub(super) fn node_limits(limits: &pb::NicLimits) -> device::NetLimits {
    let limit = |limit: &Option<pb::NicLimit>| {
        limit.map(|limit| device::NetLimit {
            bits_per_second: limit.bits_per_second,
            packets_per_second: limit.packets_per_second,
            burst_bits: limit.burst_bits,
            burst_packets: limit.burst_packets,
        })
    };
    device::NetLimits {
        ingress: limit(&limits.ingress),
        egress: limit(&limits.egress),
    }
}

fn limits(limits: &device::NetLimits) -> pb::NicLimits {
    let limit = |limit: &Option<device::NetLimit>| {
        limit.map(|limit| pb::NicLimit {
            bits_per_second: limit.bits_per_second,
            packets_per_second: limit.packets_per_second,
            burst_bits: limit.burst_bits,
            burst_packets: limit.burst_packets,
        })
    };
    pb::NicLimits {
        ingress: limit(&limits.ingress),
        egress: limit(&limits.egress),
    }
}

/// What users are told about a NIC that a host reports.
pub fn nic_status(seen: &node::NicStatus) -> pb::NicStatus {
    let mut status = pb::NicStatus {
        daemon: seen.daemon.clone(),
        mac: seen.mac.clone(),
        ..Default::default()
    };
    let Some(nic) = &seen.nic else {
        return status;
    };
    status.served = true;
    status.limits = nic.limits.as_ref().map(limits);
    status.ingress_throttled = nic.ingress_throttled;
    status.egress_throttled = nic.egress_throttled;
    status.flows = nic.flows;
    status.captures = nic.captures;
    let Some(stats) = nic.stats.clone() else {
        return status;
    };
    let rx_latency = stats.rx_latency.unwrap_or_default();
    let tx_latency = stats.tx_latency.unwrap_or_default();
    pb::NicStatus {
        backend: stats.backend,
        link_up: stats.link_up,
        rx_packets: stats.rx_packets,
        rx_bytes: stats.rx_bytes,
        rx_drops: stats.rx_drops,
        tx_packets: stats.tx_packets,
        tx_bytes: stats.tx_bytes,
        tx_drops: stats.tx_drops,
        rx_drops_by_reason: stats.rx_drops_by_reason,
        tx_drops_by_reason: stats.tx_drops_by_reason,
        rx_latency_p50_us: rx_latency.p50_us,
        rx_latency_p99_us: rx_latency.p99_us,
        tx_latency_p50_us: tx_latency.p50_us,
        tx_latency_p99_us: tx_latency.p99_us,
        ..status
    }
}

/// A connection, as users see it.
pub fn flow(seen: device::Flow) -> pb::Flow {
    pb::Flow {
        outgoing: seen.direction() == device::Direction::Egress,
        protocol: seen.protocol,
        local_address: seen.local_address,
        local_port: seen.local_port,
        remote_address: seen.remote_address,
        remote_port: seen.remote_port,
        vlan: seen.vlan,
        state: seen.state,
        rx_packets: seen.ingress_packets,
        rx_bytes: seen.ingress_bytes,
        tx_packets: seen.egress_packets,
        tx_bytes: seen.egress_bytes,
        age_ms: seen.age_ms,
        idle_ms: seen.idle_ms,
    }
}

/// What a daemon is asked to capture.
pub fn capture(nic: String, wanted: &pb::CaptureNicRequest) -> device::CaptureRequest {
    let direction = match wanted.direction() {
        pb::CaptureDirection::Unspecified => device::Direction::Unspecified,
        pb::CaptureDirection::Ingress => device::Direction::Ingress,
        pb::CaptureDirection::Egress => device::Direction::Egress,
    };
    let frames = match wanted.frames() {
        pb::CapturedFrames::Unspecified | pb::CapturedFrames::All => device::CapturedFrames::All,
        pb::CapturedFrames::Dropped => device::CapturedFrames::Dropped,
        pb::CapturedFrames::Passed => device::CapturedFrames::Passed,
    };
    device::CaptureRequest {
        id: nic,
        filter: wanted.filter.clone(),
        snaplen: wanted.snaplen,
        direction: direction as i32,
        frames: frames as i32,
        max_packets: wanted.max_packets,
        max_bytes: wanted.max_bytes,
        max_duration_ms: wanted.max_duration_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nic_of_passt_has_no_figures() {
        let status = nic_status(&node::NicStatus {
            daemon: "passt".into(),
            mac: "52:54:00:00:00:01".into(),
            ..Default::default()
        });
        assert_eq!((status.served, status.daemon.as_str()), (false, "passt"));
    }

    #[test]
    fn figures_come_through() {
        let status = nic_status(&node::NicStatus {
            nic: Some(device::Nic {
                egress_throttled: 3,
                stats: Some(device::NetStats {
                    link_up: true,
                    tx_drops_by_reason: [("spoofed".to_owned(), 2)].into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        assert!(status.served && status.link_up);
        assert_eq!(
            (
                status.egress_throttled,
                status.tx_drops_by_reason["spoofed"]
            ),
            (3, 2)
        );
    }
}
