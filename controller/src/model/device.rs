//! Devices as hosts see them, in the API's words; and what is told about their outages.

use api::{controller as pb, node, vmm};

/// A device of this type with what its host says of it, if it says anything.
pub fn device(seen: Option<&node::DeviceDetails>, kind: &str, is_paused: bool) -> pb::Device {
    let inactive = pb::Device {
        r#type: kind.to_owned(),
        state: pb::DeviceState::Inactive as i32,
        ..Default::default()
    };
    let Some(seen) = seen else {
        return inactive;
    };
    let health = seen.health.clone().unwrap_or_default();
    pb::Device {
        state: state(seen, is_paused) as i32,
        stalled_since: health.stalled_since,
        in_flight: health.in_flight,
        storage_wait_ms: seen.storage_wait_ms,
        incarnations: health.incarnations,
        last_recovery_us: health.last_recovery_us,
        outages_total: health.outages_total,
        outages: health.outages.iter().map(outage).collect(),
        not_guaranteed: health.not_guaranteed,
        last_error: match health.stalled_since {
            // What the daemon says is nearer to the cause than what its absence looks like.
            Some(_) if !seen.last_error.is_empty() => seen.last_error.clone(),
            _ if health.last_error.is_empty() => seen.last_error.clone(),
            _ => health.last_error,
        },
        driver_ok: health.driver_ok,
        daemon: seen.daemon.clone(),
        version: seen.version.clone(),
        pid: seen.pid,
        restarts: seen.restarts,
        hangs: seen.hangs,
        queues: health.queues.iter().map(queue).collect(),
        ..inactive
    }
}

fn state(seen: &node::DeviceDetails, is_paused: bool) -> pb::DeviceState {
    let Some(health) = &seen.health else {
        return pb::DeviceState::Inactive;
    };
    let pauses = seen
        .outage_policy
        .as_ref()
        .is_some_and(|policy| policy.action() == node::OutageAction::PauseVm);
    match health.connection() {
        _ if seen.failing_requests => pb::DeviceState::Failing,
        vmm::DeviceConnection::Connected => pb::DeviceState::Connected,
        _ if is_paused && pauses => pb::DeviceState::Pausing,
        vmm::DeviceConnection::Replaying => pb::DeviceState::Replaying,
        vmm::DeviceConnection::Reconnecting | vmm::DeviceConnection::Unspecified => {
            pb::DeviceState::Reconnecting
        }
    }
}

fn queue(queue: &vmm::QueueProgress) -> pb::QueueProgress {
    pb::QueueProgress {
        index: queue.index,
        avail_idx: queue.avail_idx,
        used_idx: queue.used_idx,
        due: queue.due,
        in_flight: queue.in_flight,
    }
}

fn outage(outage: &vmm::Outage) -> pb::DeviceOutage {
    pb::DeviceOutage {
        number: outage.number,
        start_time: outage.start_time,
        cause: outage.cause.clone(),
        in_flight: outage.in_flight,
        connected_us: outage.connected_us,
        replayed_us: outage.replayed_us,
        first_completion_us: outage.first_completion_us,
        incarnation: outage.incarnation,
    }
}

/// What of a device's health is kept with its VM: changes of it are events.
pub fn noted_device(device: &pb::DeviceHealth) -> pb::DeviceHealth {
    pb::DeviceHealth {
        name: device.name.clone(),
        outages_total: device.outages_total,
        stalled_since: device.stalled_since,
        failing_requests: device.failing_requests,
        ..Default::default()
    }
}

/// What happened to the devices of `vm` between two looks.
pub fn device_events(vm: &str, before: &pb::VmStatus, status: &pb::VmStatus) -> Vec<pb::Event> {
    let mut events = Vec::new();
    for device in &status.devices {
        let known = before
            .devices
            .iter()
            .find(|known| known.name == device.name);
        let noted = known.cloned().unwrap_or_default();
        let target = format!("{vm}/devices/{}", device.name);
        let mut tell = |reason: &str, message: String, warning: bool| {
            let mut event = super::new_event(&target, reason, message);
            event.warning = warning;
            events.push(event);
        };
        // Counted anew with each start of the VM.
        let is_new = device.outages_total > noted.outages_total;
        if is_new {
            let outages = match device.outages_total - noted.outages_total {
                1 => String::new(),
                more => format!("{more} times since the last look; "),
            };
            let in_flight = device.last_outage_in_flight;
            let message = format!(
                "{outages}{in_flight} requests in flight: {}",
                device.last_error
            );
            tell("DEVICE_STALLED", message, true);
        }
        if device.failing_requests && !noted.failing_requests {
            let message = "its outage policy's time is over: requests fail until a daemon is back";
            tell("DEVICE_FAILING_REQUESTS", message.to_owned(), true);
        }
        let was_out = is_new || noted.stalled_since.is_some() || noted.failing_requests;
        if was_out && device.stalled_since.is_none() && !device.failing_requests {
            let ms = device.last_recovery_us as f64 / 1000.0;
            tell("DEVICE_RECOVERED", format!("after {ms:.1} ms"), false);
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(devices: Vec<pb::DeviceHealth>) -> pb::VmStatus {
        pb::VmStatus {
            devices,
            ..Default::default()
        }
    }

    fn disk(outages_total: u64, is_out: bool, failing_requests: bool) -> pb::DeviceHealth {
        pb::DeviceHealth {
            name: "root".into(),
            outages_total,
            stalled_since: is_out.then(crate::model::now),
            failing_requests,
            last_recovery_us: 43_000,
            ..Default::default()
        }
    }

    fn reasons(before: pb::DeviceHealth, after: pb::DeviceHealth) -> Vec<String> {
        let (before, after) = (status(vec![noted_device(&before)]), status(vec![after]));
        let events = device_events("projects/p/vms/web", &before, &after);
        events.into_iter().map(|event| event.reason).collect()
    }

    #[test]
    fn outages_are_told_once_each_with_their_ends() {
        let none: [&str; 0] = [];
        assert_eq!(reasons(disk(1, false, false), disk(1, false, false)), none);
        assert_eq!(
            reasons(disk(0, false, false), disk(1, true, false)),
            ["DEVICE_STALLED"]
        );
        assert_eq!(reasons(disk(1, true, false), disk(1, true, false)), none);
        assert_eq!(
            reasons(disk(1, true, false), disk(1, false, true)),
            ["DEVICE_FAILING_REQUESTS"]
        );
        assert_eq!(
            reasons(disk(1, false, true), disk(2, false, false)),
            ["DEVICE_STALLED", "DEVICE_RECOVERED"]
        );
        assert_eq!(
            reasons(disk(1, true, false), disk(1, false, false)),
            ["DEVICE_RECOVERED"]
        );
        // Too short to be seen from here.
        assert_eq!(
            reasons(disk(1, false, false), disk(4, false, false)),
            ["DEVICE_STALLED", "DEVICE_RECOVERED"]
        );
    }
}
