//! Devices' health in the API's words.

use std::time::Duration;

use api::vmm::{DeviceConnection, DeviceHealth, Outage, QueueProgress};
use prost_types::Timestamp;
use vhost_user::frontend;

use crate::machine::Devices;
use crate::virtio_pci;

/// What a crash of a daemon without an in-flight region can cost.
const NO_INFLIGHT_REGION: &str = "requests in flight when the daemon dies: it keeps no in-flight region \
     (INFLIGHT_SHMFD), so the next one takes up what the rings show and may skip or repeat requests that were \
     completed out of order";

/// All of them, each with its last `max_outages` outages.
pub(super) fn devices(devices: &Devices, max_outages: usize) -> Vec<DeviceHealth> {
    let health = devices.health(max_outages);
    health.into_iter().map(device).collect()
}

fn device(health: virtio_pci::DeviceHealth) -> DeviceHealth {
    let link = &health.link;
    let connection = match (link.connected, link.replaying) {
        (true, _) => DeviceConnection::Connected,
        (false, true) => DeviceConnection::Replaying,
        (false, false) => DeviceConnection::Reconnecting,
    };
    let is_known = link.incarnations > 0;
    let not_guaranteed =
        (is_known && !link.inflight_tracking).then(|| NO_INFLIGHT_REGION.to_owned());
    DeviceHealth {
        connection: connection.into(),
        incarnations: link.incarnations,
        last_error: link.last_error.clone(),
        driver_ok: health.driver_ok,
        inflight_tracking: link.inflight_tracking,
        stalled_since: link.stalled_since.map(Timestamp::from),
        in_flight: health.in_flight(),
        queues: health.queues.iter().map(queue).collect(),
        outages_total: link.outages_total,
        outages: health.outages.iter().map(outage).collect(),
        last_outage_in_flight: link.last_outage_in_flight.into(),
        last_recovery_us: link.last_recovery.map_or(0, micros),
        not_guaranteed: not_guaranteed.into_iter().collect(),
        tag: health.tag,
        r#type: health.device_type,
        socket: health.socket,
    }
}

fn queue(queue: &frontend::QueueProgress) -> QueueProgress {
    QueueProgress {
        index: queue.index.into(),
        avail_idx: queue.avail_idx.into(),
        used_idx: queue.used_idx.into(),
        due: queue.due.into(),
        in_flight: queue.in_flight.map(u32::from),
    }
}

fn outage(outage: &frontend::Outage) -> Outage {
    Outage {
        number: outage.number,
        start_time: Some(outage.began.into()),
        cause: outage.cause.clone(),
        in_flight: outage.in_flight.into(),
        connected_us: outage.connected_after.map(micros),
        replayed_us: outage.replayed_after.map(micros),
        first_completion_us: outage.first_completion_after.map(micros),
        incarnation: outage.incarnation,
    }
}

/// 584,000 years fit.
fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
