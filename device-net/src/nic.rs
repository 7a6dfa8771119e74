//! One NIC: from the parts of an attach request to a served virtio-net device.
//!
//! - [`device`]: features, configuration space, which queue does what
//! - [`header`]: the virtio-net header and the offloads that both sides agreed on
//! - [`tap`]: the kernel's end; [`steering`]: which of its queues take part
//! - [`rx`], [`tx`], [`ctrl`]: what serves each kind of ring
//! - [`stats`]: counters, of frames and bytes

mod ctrl;
mod device;
mod header;
mod mac;
mod rx;
mod stats;
mod steering;
mod tap;
mod tx;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::daemon::{Parts, ServedDevice};
use api::device::Device;
use api::device::attach_request::Device as DeviceConfig;
use tonic::Status;
use vhost_user::backend::{self, Server};

pub(crate) use device::MAX_QUEUE_PAIRS;
use device::NicDevice;
pub(crate) use mac::MacAddress;
pub(crate) use tap::Tap;

/// Nothing is ever in flight in a NIC beyond one system call; this bounds a stuck one.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts serving a NIC.
///
/// # Errors
/// `INVALID_ARGUMENT` when the request is for no NIC or the descriptors are no fitting taps.
pub(crate) fn attach(parts: Parts) -> Result<Arc<dyn ServedDevice>, Status> {
    let Some(DeviceConfig::Net(config)) = &parts.request.device else {
        return Err(Status::invalid_argument(
            "device: device-net serves NICs only; set net",
        ));
    };
    let mac = match config.mac.as_str() {
        "" => MacAddress::random(),
        text => text
            .parse()
            .map_err(|error| Status::invalid_argument(format!("net.mac: {error}")))?,
    };
    let mtu = match config.mtu {
        0 => None,
        bytes => Some(
            u16::try_from(bytes)
                .map_err(|_| Status::invalid_argument("net.mtu: must be below 65536"))?,
        ),
    };
    let tap = Tap::from_fds(parts.fds)
        .map_err(|error| Status::invalid_argument(format!("net.tap_fds: {error}")))?;
    let device = Arc::new(
        NicDevice::new(tap, mac, mtu).map_err(|error| Status::internal(error.to_string()))?,
    );
    let server = Server::spawn(&parts.request.id, parts.listener, device.clone())
        .map_err(|error| Status::resource_exhausted(format!("cannot serve the device: {error}")))?;
    tracing::info!(id = parts.request.id, tap = config.tap_name, %mac, "NIC attached");
    Ok(Arc::new(ServedNic {
        server: Mutex::new(Some(server)),
        device,
    }))
}

struct ServedNic {
    /// None once stopped.
    server: Mutex<Option<Server>>,
    device: Arc<NicDevice>,
}

impl ServedDevice for ServedNic {
    fn describe(&self) -> Device {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let status = server
            .as_ref()
            .map_or_else(backend::Status::default, Server::status);
        Device {
            r#type: "net".to_owned(),
            connected: status.connected,
            sessions: status.sessions,
            queues_running: status.queues_running,
            // Receive buffers that wait for a packet are no requests.
            inflight: 0,
            last_session_end: status.last_session_end.unwrap_or_default(),
            net: Some(self.device.stats()),
            ..Device::default()
        }
    }

    fn stop(&self) -> Result<(), Status> {
        let server = self
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match server.map(|server| server.stop(STOP_TIMEOUT)) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(Status::deadline_exceeded(error.to_string())),
        }
    }
}
