//! One NIC: from the parts of an attach request to a served virtio-net device.
//!
//! - [`device`]: features, configuration space, which queue does what
//! - [`backend`]: the other end, which brings what serves the receive and transmit rings;
//!   [`ctrl`] serves the control ring
//! - [`header`]: the virtio-net header and the offloads that both sides agreed on
//! - [`state`]: what driver and manager set, with the [`receive_filter`]
//! - [`stats`]: counters, of frames and bytes

pub(crate) mod backend;
mod ctrl;
mod device;
pub(crate) mod header;
mod link_flap;
mod mac;
pub(crate) mod receive_filter;
pub(crate) mod state;
pub(crate) mod stats;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::daemon::{DeviceHistogram, Parts, ServedDevice};
use api::device::attach_request::Device as DeviceConfig;
use api::device::{Device, NetConfig, NetStats, Polling as PollingConfig, QueueHealth};
use faults::{DeviceFaults, Faults, Wake};
use tonic::Status;
use vhost_user::backend::{Polling, Server, Status as ServerStatus};

pub(crate) use device::MAX_QUEUE_PAIRS;
use device::NicDevice;
use link_flap::LinkFlap;
pub(crate) use mac::MacAddress;

use self::backend::Backend;
use self::state::NicState;
use crate::kernel::KernelBackend;
use crate::leases::Clock;
use crate::switch;

/// Nothing is ever in flight in a NIC beyond one system call; this bounds a stuck one.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts serving a NIC.
///
/// # Errors
/// `INVALID_ARGUMENT` when the request is for no NIC or the descriptors are no fitting taps.
pub(crate) fn attach(
    parts: Parts,
    faults: Option<&Arc<Faults>>,
    leases: &Arc<Clock>,
) -> Result<Arc<dyn ServedDevice>, Status> {
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
    let backend = connect(config, mac, parts.fds)?;
    let faults = faults.map_or_else(DeviceFaults::none, |faults| {
        faults.device(&parts.request.id)
    });
    let nic = NicState::new(mac, backend.num_pairs(), !config.link_down, faults);
    nic.guard
        .set_policy(config.policy.clone())
        .map_err(|error| Status::invalid_argument(format!("net.{error}")))?;
    nic.guard.set_limits(config.limits.unwrap_or_default());
    if config.leased {
        nic.guard.lease(config.io_until_boottime_ns);
        leases.watch(&nic.guard)?;
    }
    backend.set_link(!config.link_down);
    let device = Arc::new(NicDevice::new(nic, backend, mtu));
    let server = Server::spawn(&parts.request.id, parts.listener, device.clone())
        .map_err(|error| Status::resource_exhausted(format!("cannot serve the device: {error}")))?;
    tracing::info!(id = parts.request.id, tap = config.tap_name, %mac, "NIC attached");
    let faults = Arc::clone(&device.nic().faults);
    let nic = Arc::new_cyclic(|nic| ServedNic {
        server: Mutex::new(Some(server)),
        device,
        link_flap: LinkFlap::watch(&faults, nic),
    });
    // What was armed before.
    nic.link_flap.wake();
    Ok(nic)
}

/// What the request names as the NIC's other end.
fn connect(
    config: &NetConfig,
    mac: MacAddress,
    fds: Vec<OwnedFd>,
) -> Result<Arc<dyn Backend>, Status> {
    if let Some(port) = &config.switch_port {
        let pairs = u16::try_from(config.queue_pairs.max(1))
            .ok()
            .filter(|pairs| *pairs <= MAX_QUEUE_PAIRS)
            .ok_or_else(|| {
                Status::invalid_argument(format!(
                    "net.queue_pairs: {} is more than {MAX_QUEUE_PAIRS}",
                    config.queue_pairs
                ))
            })?;
        return Ok(switch::connect(port, pairs, mac, polling(config))?);
    }
    if !config.packet_fds.is_empty() {
        let sockets = KernelBackend::packet(fds, polling(config))
            .map_err(|error| Status::invalid_argument(format!("net.packet_fds: {error}")))?;
        return Ok(Arc::new(sockets));
    }
    let tap = KernelBackend::tap(fds, polling(config))
        .map_err(|error| Status::invalid_argument(format!("net.tap_fds: {error}")))?;
    Ok(Arc::new(tap))
}

/// Whether transmit rings look for work by themselves. Unlike a disk's, a NIC's driver seldom waits
/// for an answer, so that looking wins little unless somebody asks for it.
fn polling(config: &NetConfig) -> Polling {
    match config.polling() {
        PollingConfig::Unspecified | PollingConfig::Never => Polling::Never,
        PollingConfig::Adaptive => Polling::Adaptive,
        PollingConfig::Always => Polling::Always,
    }
}

/// A NIC that is attached.
pub(crate) struct ServedNic {
    /// None once stopped.
    server: Mutex<Option<Server>>,
    device: Arc<NicDevice>,
    /// Hears of faults for as long as the NIC is there.
    link_flap: Arc<dyn Wake>,
}

impl ServedNic {
    /// Plugs the cable in or out, and tells the driver.
    pub(crate) fn set_link(&self, is_up: bool) {
        self.device.nic().set_link(is_up);
        self.device.backend().set_link(is_up);
        self.config_changed();
    }

    /// What its rings share.
    pub(crate) fn state(&self) -> &NicState {
        self.device.nic()
    }

    /// Counters and what is set now.
    pub(crate) fn stats(&self) -> NetStats {
        self.device.stats()
    }

    fn config_changed(&self) {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = &*server {
            server.config_changed();
        }
    }
}

impl ServedDevice for ServedNic {
    fn describe(&self) -> Device {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let status = server
            .as_ref()
            .map_or_else(ServerStatus::default, Server::status);
        Device {
            r#type: "net".to_owned(),
            connected: status.connected,
            sessions: status.sessions,
            queues_running: status.queues_running,
            queues: status
                .queues
                .iter()
                .map(|queue| QueueHealth {
                    index: queue.index.into(),
                    in_flight: queue.inflight.into(),
                    completed_total: queue.completed,
                    unresponsive_ms: queue.unresponsive.as_millis() as u64,
                })
                .collect(),
            // Receive buffers that wait for a packet are no requests.
            inflight: 0,
            last_session_end: status.last_session_end.unwrap_or_default(),
            net: Some(self.device.stats()),
            io_stopped: self.state().guard.is_over(),
            ..Device::default()
        }
    }

    fn histograms(&self) -> Vec<DeviceHistogram> {
        stats::histograms(&self.state().stats)
    }

    fn stop(&self, drain: Duration) -> Result<(), Status> {
        let server = self
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let stopped = server.map(|server| server.stop(drain.min(STOP_TIMEOUT)));
        self.device.backend().detach();
        self.state().guard.close();
        match stopped {
            None | Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(Status::deadline_exceeded(error.to_string())),
        }
    }
}
