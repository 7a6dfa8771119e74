//! Modern virtio-pci (Virtio 1.2 section 4.1) for any vhost-user device.
//!
//! [`VirtioPciDevice`] is all that the machine sees: a PCI function whose queues another process
//! serves. What kind of device it is comes from [`VhostUserDeviceConfig`]; nothing here parses
//! what flows through the queues.

mod config;

use std::sync::Arc;
use std::time::Duration;

use vhost_user::frontend::MemoryTable;

pub use config::{ConfigError, DeviceType, VhostUserDeviceConfig};

use crate::kvm::interrupts::InterruptFabric;
use crate::pci::Function;

/// How a device is, for [control](crate) and people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceHealth {
    /// The `tag=` of the device.
    pub tag: String,
    /// `blk`, `net`, ... or a virtio device number.
    pub device_type: String,
    /// The backend's socket.
    pub socket: String,
    /// Whether a backend is connected and was told everything.
    pub connected: bool,
    /// Connections made since the start.
    pub incarnations: u64,
    /// The last error of the connection, empty if there was none.
    pub last_error: String,
    /// The guest's driver set DRIVER_OK.
    pub driver_ok: bool,
    /// In-flight requests are kept in shared memory, so a crash of the backend loses none.
    pub inflight_tracking: bool,
}

/// A device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nothing usable answered on the socket in time.
    #[error("device {tag}: no usable vhost-user backend at {socket} within {waited_ms} ms: start its daemon, or correct socket=")]
    Backend {
        /// The device.
        tag: String,
        /// Its socket.
        socket: String,
        /// How long it was tried.
        waited_ms: u128,
    },
}

/// A virtio device on the PCI bus, served by another process.
pub struct VirtioPciDevice {}

impl VirtioPciDevice {
    /// Connects to the backend, for `patience` at most, and builds the PCI function from what it
    /// offers. Afterwards its own thread keeps the connection and reconnects without limit.
    ///
    /// # Errors
    /// No usable backend in time, or no descriptor, thread or interrupt route is left.
    pub fn connect(
        _config: VhostUserDeviceConfig,
        _memory: Arc<MemoryTable>,
        _fabric: Arc<dyn InterruptFabric>,
        _patience: Duration,
    ) -> Result<Arc<Self>, AttachError> {
        unimplemented!()
    }

    /// How the device is. Never waits for the backend.
    #[must_use]
    pub fn health(&self) -> DeviceHealth {
        unimplemented!()
    }

    /// Machine reset, vCPUs being stopped: stops the rings (for `patience` at most; a backend
    /// that does not answer is disconnected) and returns the function to its power-on state.
    /// [`crate::pci::RootBus::place_bars`] comes after it.
    pub fn reset(&self, _patience: Duration) {
        unimplemented!()
    }

    /// Stops the rings and returns once they stand still (for `patience` at most; a backend that
    /// does not answer is disconnected, an absent one is no obstacle). Idempotent.
    pub fn pause(&self, _patience: Duration) {
        unimplemented!()
    }

    /// Lets the rings go on. Idempotent.
    pub fn resume(&self) {
        unimplemented!()
    }
}

impl Function for VirtioPciDevice {
    fn read_config(&self, _offset: u16, _data: &mut [u8]) {
        unimplemented!()
    }
    fn write_config(&self, _offset: u16, _data: &[u8]) {
        unimplemented!()
    }
    fn bar_len(&self) -> u64 {
        unimplemented!()
    }
    fn place_bar(&self, _gpa: u64) {
        unimplemented!()
    }
    fn bar_gpa(&self) -> Option<u64> {
        unimplemented!()
    }
    fn read_bar(&self, _offset: u64, _data: &mut [u8]) {
        unimplemented!()
    }
    fn write_bar(&self, _offset: u64, _data: &[u8]) {
        unimplemented!()
    }
}
