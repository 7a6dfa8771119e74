//! From a device request to a device: connects, and builds the function from what the backend
//! offers.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use faults::{DeviceFaults, Wake};
use vhost_user::frontend::{
    Connected, Endpoint, Link, LinkError, MemoryTable, Offer, QueueEvents, Timeouts, Wiring,
};
use vhost_user::log_limit::LogLimit;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::common_cfg::{CommonCfg, F_VERSION_1};
use super::config::{MAX_QUEUES, TYPE_FEATURES};
use super::doorbells::Doorbells;
use super::layout::VirtioSpace;
use super::{DeviceType, Registers, State, VhostUserDeviceConfig, VirtioPciDevice};
use crate::kvm::interrupts::InterruptFabric;
use crate::pci::Msix;

/// Features that the transport lets through if the backend offers them: those of the device type
/// (bits 0 to 23 and 50 to 63), INDIRECT_DESC, EVENT_IDX and VERSION_1.
///
/// Held back because nothing here does what they ask: in-order use (a crash of the backend breaks
/// the order), platform DMA, SR-IOV, notification data, ring reset, admin queues.
const GUEST_FEATURES: u64 = TYPE_FEATURES | F_RING_INDIRECT_DESC | F_RING_EVENT_IDX | F_VERSION_1;
/// Packed rings, for backends with an in-flight region: nothing else tells after a crash where
/// such a ring stands.
const RESUMABLE_FEATURES: u64 = GUEST_FEATURES | 1 << 34;
const F_RING_INDIRECT_DESC: u64 = 1 << 28;
const F_RING_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_NET_F_CTRL_VQ: one queue more than the pairs.
const NET_F_CTRL_VQ: u64 = 1 << 17;

/// A device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nothing usable answered on the socket in time.
    #[error(
        "device {tag}: no usable vhost-user backend at {socket} within {waited_ms} ms: \
         start its daemon, or correct socket= (or config-size= if it is the configuration that failed)"
    )]
    Backend {
        /// The device.
        tag: String,
        /// Its socket.
        socket: String,
        /// How long it was tried.
        waited_ms: u128,
        /// What went wrong last.
        #[source]
        source: LinkError,
    },
    /// The backend speaks only the legacy interface.
    #[error(
        "device {tag}: the backend at {socket} does not offer VIRTIO_F_VERSION_1: use a daemon that speaks virtio 1.0"
    )]
    Legacy {
        /// The device.
        tag: String,
        /// Its socket.
        socket: String,
    },
    /// The backend offers no queue.
    #[error(
        "device {tag}: the backend at {socket} offers no queues: give queues=N or correct the daemon"
    )]
    NoQueues {
        /// The device.
        tag: String,
        /// Its socket.
        socket: String,
    },
    /// This process ran out of something.
    #[error(
        "device {tag}: cannot get descriptors, interrupt routes and a thread: raise the limit on open files (ulimit -n)"
    )]
    Resources {
        /// The device.
        tag: String,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
}

impl VirtioPciDevice {
    /// Connects to the backend, for `patience` at most, and builds the PCI function from what it
    /// offers. Afterwards its own thread keeps the connection and reconnects without limit. What goes
    /// wrong with it on purpose is decided by `faults`.
    ///
    /// # Errors
    /// No usable backend in time, or no descriptor, thread or interrupt route is left.
    pub fn connect(
        config: VhostUserDeviceConfig,
        memory: Arc<MemoryTable>,
        fabric: Arc<dyn InterruptFabric>,
        patience: Duration,
        faults: Arc<DeviceFaults>,
    ) -> Result<Arc<Self>, AttachError> {
        let timeouts = Timeouts::default();
        Self::connect_with(config, memory, fabric, patience, timeouts, faults)
    }

    pub(super) fn connect_with(
        config: VhostUserDeviceConfig,
        memory: Arc<MemoryTable>,
        fabric: Arc<dyn InterruptFabric>,
        patience: Duration,
        timeouts: Timeouts,
        faults: Arc<DeviceFaults>,
    ) -> Result<Arc<Self>, AttachError> {
        let (tag, socket) = (config.tag.clone(), config.socket.display().to_string());
        let config_len = config
            .config_size
            .unwrap_or(config.device_type.default_config_len());
        let endpoint = Endpoint {
            socket: config.socket.clone(),
            timeouts,
            config_len,
        };
        let started = Instant::now();
        let connected =
            endpoint
                .connect_within(patience)
                .map_err(|source| AttachError::Backend {
                    tag: tag.clone(),
                    socket: socket.clone(),
                    waited_ms: started.elapsed().as_millis(),
                    source,
                })?;
        if connected.offer.features & F_VERSION_1 == 0 {
            return Err(AttachError::Legacy { tag, socket });
        }
        let queues = QueueCounts::new(&config, &connected.offer);
        if queues.guest == 0 {
            return Err(AttachError::NoQueues { tag, socket });
        }
        Self::build(config, endpoint, connected, queues, memory, fabric, faults)
            .map_err(|source| AttachError::Resources { tag, source })
    }

    fn build(
        config: VhostUserDeviceConfig,
        endpoint: Endpoint,
        connected: Connected,
        queues: QueueCounts,
        memory: Arc<MemoryTable>,
        fabric: Arc<dyn InterruptFabric>,
        faults: Arc<DeviceFaults>,
    ) -> io::Result<Arc<Self>> {
        let msix = Msix::new(queues.guest + 1, Arc::clone(&fabric))?;
        let mut kicks = Vec::new();
        let mut events = Vec::new();
        for queue in 0..queues.guest {
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            kicks.push(kick.try_clone()?);
            events.push(QueueEvents {
                kick,
                call: msix.irqfd(queue + 1).try_clone()?,
            });
        }
        let guest_features = match connected.offer.tracks_inflight() {
            true => RESUMABLE_FEATURES,
            false => GUEST_FEATURES,
        };
        // A backend that serves the configuration space offers its features, too.
        let config_features = match connected.offer.config {
            Some(_) => 0,
            None => config.config_features & !connected.offer.features,
        };
        let pci = VirtioSpace::new(config.device_type, queues.guest, msix.table_len());
        let state = State {
            pristine: pci.space.clone(),
            pci,
            common: CommonCfg::new(
                connected.offer.features & guest_features,
                config_features,
                queues.guest,
                config.queue_size,
            ),
            msix,
            doorbells: Doorbells::new(kicks, fabric, Arc::clone(&faults)),
            device_cfg: device_cfg(&config, &connected.offer, endpoint.config_len),
            isr: 0,
            complaints: LogLimit::new(),
        };
        let registers = Arc::new(Registers {
            state: Mutex::new(state),
        });
        let waker: Arc<dyn Wake> = Arc::clone(&registers) as _;
        faults.add_waker(&waker);
        waker.wake();
        let wiring = Wiring {
            memory: Arc::clone(&memory),
            queues: events,
            events: Arc::clone(&registers) as _,
        };
        Ok(Arc::new(Self {
            link: Link::spawn_faulty(&config.tag, endpoint, connected, wiring, faults)?,
            tag: config.tag,
            device_type: config.device_type,
            socket: config.socket,
            registers,
            memory,
            backend_queues: queues.backend,
        }))
    }
}

/// How many queues the guest sees, and how many of them the backend serves. They differ for
/// instance where a driver insists on a queue that a backend never uses (vsock's events).
struct QueueCounts {
    guest: u16,
    backend: u16,
}

impl QueueCounts {
    fn new(config: &VhostUserDeviceConfig, offer: &Offer) -> Self {
        let answered = offer.queue_num.map(|number| match config.device_type {
            DeviceType::NET => {
                number.saturating_mul(2) + u64::from(offer.features & NET_F_CTRL_VQ != 0)
            }
            _ => number,
        });
        let answered =
            answered.map(|number| u16::try_from(number).unwrap_or(MAX_QUEUES).min(MAX_QUEUES));
        let usual = config.device_type.default_queues();
        let promised = answered.filter(|_| offer.config.is_some()).unwrap_or(0);
        let guest = config
            .queues
            .or(answered.map(|number| number.max(usual)))
            .unwrap_or(usual)
            .max(promised);
        Self {
            guest,
            backend: answered.unwrap_or(guest).min(guest),
        }
    }
}

/// The configuration space that the guest finds first.
fn device_cfg(config: &VhostUserDeviceConfig, offer: &Offer, len: u16) -> Vec<u8> {
    match &offer.config {
        Some(served) => served.clone(),
        None => {
            let mut bytes = config.config.clone();
            bytes.resize(bytes.len().max(usize::from(len)), 0);
            bytes
        }
    }
}
