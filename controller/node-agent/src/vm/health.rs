//! How a running machine is: what `vmm-core` said last, and what the agent adds to it about devices.

use std::time::{Duration, SystemTime};

use api::{
    node::DeviceStatus,
    vmm::{DeviceConnection, DeviceHealth, VmmInfo, VmmState},
};

use super::machine::Machine;

/// What `vmm-core` said last.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    pub(super) paused: bool,
    pub(super) resets: u64,
    pub(super) first_console_byte_ms: u64,
    pub(super) devices: Vec<DeviceHealth>,
    pub(super) sandbox: Vec<String>,
}

impl Health {
    pub(super) fn from_info(info: VmmInfo) -> Self {
        Self {
            paused: info.state() == VmmState::Paused,
            resets: info.resets,
            first_console_byte_ms: info.first_console_byte_ms,
            sandbox: info.sandbox,
            devices: info.devices,
        }
    }

    pub(super) fn device(&self, name: &str) -> Option<&DeviceHealth> {
        self.devices.iter().find(|device| device.tag == name)
    }
}

impl Machine {
    /// For the status.
    pub(super) fn devices(&self) -> Vec<DeviceStatus> {
        self.health
            .devices
            .iter()
            .map(|device| self.device(device))
            .collect()
    }

    fn device(&self, device: &DeviceHealth) -> DeviceStatus {
        let storage_wait = self
            .daemons
            .iter()
            .map(|daemon| &daemon.watch)
            .chain([&self.foreign])
            .find_map(|watch| watch.storage_wait(&device.tag));
        DeviceStatus {
            name: device.tag.clone(),
            r#type: device.r#type.clone(),
            connected: device.connection() == DeviceConnection::Connected,
            incarnations: device.incarnations,
            last_error: device.last_error.clone(),
            driver_ok: device.driver_ok,
            failing_requests: self.is_failing(&device.tag),
            stalled_since: device.stalled_since,
            outages_total: device.outages_total,
            last_recovery_us: device.last_recovery_us,
            last_outage_in_flight: device.last_outage_in_flight,
            storage_wait_since: storage_wait.map(|waited| ago(waited).into()),
        }
    }
}

/// To whole seconds, so that it stays the same from one look to the next.
fn ago(waited: Duration) -> SystemTime {
    let now = SystemTime::now() - waited;
    let since_epoch = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since_epoch.as_secs())
}
