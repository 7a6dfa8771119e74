//! Modern virtio-pci (Virtio 1.2 section 4.1) for any vhost-user device.
//!
//! [`VirtioPciDevice`] is all that the machine sees: a PCI function whose queues another process
//! serves. What kind of device it is comes from [`VhostUserDeviceConfig`]; nothing here parses
//! what flows through the queues.
//!
//! vCPU threads only read and write plain state under a short lock; whatever needs the backend
//! is left to the device's [`Link`].

mod attach;
mod common_cfg;
mod config;
mod doorbells;
mod function;
mod layout;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use faults::Wake;
use vhost_user::frontend::{Events, Link, LinkHealth, MemoryTable, Outage, QueueProgress};
use vhost_user::log_limit::LogLimit;

pub use attach::AttachError;
pub use config::{ConfigError, DeviceType, VhostUserDeviceConfig};

use self::common_cfg::CommonCfg;
use self::doorbells::Doorbells;
use self::layout::VirtioSpace;
use crate::pci::{ConfigSpace, Msix};

/// The MSI-X source of configuration changes; queue `i` is source `i + 1`.
const CONFIG_SOURCE: u16 = 0;

/// A virtio device on the PCI bus, served by another process.
pub struct VirtioPciDevice {
    tag: String,
    device_type: DeviceType,
    socket: PathBuf,
    registers: Arc<Registers>,
    memory: Arc<MemoryTable>,
    /// Queues that the backend serves; the guest may see more.
    backend_queues: u16,
    link: Link,
}

/// How a device is, for [`crate::virtio_pci`]'s callers and people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceHealth {
    /// The `tag=` of the device.
    pub tag: String,
    /// `blk`, `net`, ... or a virtio device number.
    pub device_type: String,
    /// The backend's socket.
    pub socket: String,
    /// How the connection to it is.
    pub link: LinkHealth,
    /// The guest's driver set DRIVER_OK.
    pub driver_ok: bool,
    /// How far its rings are.
    pub queues: Vec<QueueProgress>,
    /// Its last outages, oldest first.
    pub outages: Vec<Outage>,
}

impl DeviceHealth {
    /// Of a device whose backend was not reached yet.
    #[must_use]
    pub fn awaited(config: &VhostUserDeviceConfig) -> Self {
        Self {
            tag: config.tag.clone(),
            device_type: config.device_type.to_string(),
            socket: config.socket.display().to_string(),
            link: LinkHealth::default(),
            driver_ok: false,
            queues: Vec::new(),
            outages: Vec::new(),
        }
    }

    /// Requests that the backend has, or with no in-flight region those that wait for one.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let queues = self.queues.iter();
        queues
            .map(|queue| u64::from(queue.in_flight.unwrap_or(queue.due)))
            .sum()
    }
}

/// What vCPUs read and write. The link's thread updates it too.
struct Registers {
    state: Mutex<State>,
}

struct State {
    pci: VirtioSpace,
    /// Configuration space as at power-on.
    pristine: ConfigSpace,
    common: CommonCfg,
    msix: Msix,
    doorbells: Doorbells,
    /// Device configuration space, as last read from the backend or written by the driver.
    device_cfg: Vec<u8>,
    isr: u8,
    /// About what a driver can make happen at will.
    complaints: LogLimit,
}

impl VirtioPciDevice {
    /// How the device is, with its last `max_outages` outages. Never waits for the backend.
    #[must_use]
    pub fn health(&self, max_outages: usize) -> DeviceHealth {
        DeviceHealth {
            tag: self.tag.clone(),
            device_type: self.device_type.to_string(),
            socket: self.socket.display().to_string(),
            link: self.link.health(),
            driver_ok: self.registers.lock().common.driver_ok(),
            queues: self.link.progress(),
            outages: self.link.outages(max_outages),
        }
    }

    /// Machine reset, vCPUs being stopped: stops the rings (for `patience` at most; a backend
    /// that does not answer is disconnected) and returns the function to its power-on state.
    /// [`crate::pci::RootBus::place_bars`] comes after it.
    pub fn reset(&self, patience: Duration) {
        if !self.link.deactivate() {
            self.link.wait_stopped(patience);
        }
        let mut state = self.registers.lock();
        state.reset_driver_state();
        state.msix.reset();
        state.doorbells.reset();
        state.pci.space = state.pristine.clone();
    }

    /// Stops the rings and returns once they stand still (for `patience` at most; a backend that
    /// does not answer is disconnected, an absent one is no obstacle). Idempotent.
    pub fn pause(&self, patience: Duration) {
        self.link.pause(patience);
    }

    /// Lets the rings go on. Idempotent.
    pub fn resume(&self) {
        self.link.resume();
    }

    /// Reads the device configuration space again, because somebody changed what it describes;
    /// the driver gets a configuration change interrupt if it differs.
    pub fn refresh_config(&self) {
        self.link.refresh_config();
    }
}

impl Registers {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no code that holds this lock can panic")
    }
}

impl Events for Registers {
    fn stopped(&self) {
        let mut state = self.lock();
        if state.common.is_resetting() {
            state.reset_driver_state();
        }
    }

    fn config_read(&self, config: &[u8], is_current: &dyn Fn() -> bool) {
        let mut state = self.lock();
        if state.device_cfg != config && is_current() {
            config.clone_into(&mut state.device_cfg);
            state.common.bump_generation();
            state.signal_config_change();
        }
    }

    fn ring_broken(&self) {
        let mut state = self.lock();
        // It may be about rings that the driver has reset by now: then a driver waits for the status
        // to be 0. And a backend may say it all the time.
        if !state.common.is_live() {
            return;
        }
        if let Some(withheld) = state.complaints.admit() {
            tracing::warn!(
                withheld,
                "the backend reports a broken ring: the device needs a reset by its driver"
            );
        }
        state.common.set_needs_reset();
        state.signal_config_change();
    }
}

/// Faults came or went.
impl Wake for Registers {
    fn wake(&self) {
        self.lock().doorbells.look_at_faults();
    }
}

impl State {
    /// What a driver's reset clears: everything but PCI's own registers.
    fn reset_driver_state(&mut self) {
        self.common.reset();
        self.msix.unbind();
        self.isr = 0;
    }

    /// Only a driver that is live expects the interrupt (Virtio 1.2 section 2.1.2).
    fn signal_config_change(&mut self) {
        const ISR_CONFIG: u8 = 1 << 1;
        if self.common.driver_ok() {
            self.isr |= ISR_CONFIG;
            // Only a counter that is full fails, and then the interrupt is pending anyway.
            let _ = self.msix.irqfd(CONFIG_SOURCE).write(1);
        }
    }
}
