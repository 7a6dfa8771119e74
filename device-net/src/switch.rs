//! A switch inside the process: NICs of many VMs, from one guest's memory to another's.
//!
//! - [`port`]: a NIC's end; [`forward`]: from its transmit rings; [`deliver`]: into receive rings;
//!   [`uplink`]: a tap or another interface of the host as a port
//! - [`frame`]: what is known of a frame; [`mac_table`]: where addresses are; [`vlan`], [`storm`]:
//!   who may send what to whom; [`flow`]: which ring of several
//! - [`detour`]: what is late, spoiled or doubled on purpose
//! - [`offload`]: what a receiver's driver cannot finish; [`shown`]: what guards are shown
//!
//! All rings are served by a bounded set of threads ([`WorkerGroup`]). The thread that serves a
//! port's transmit ring puts frames right into other ports' receive rings, which it locks once for a
//! batch. What ports there are is a [`View`] that is replaced as a whole; threads look whether theirs
//! is the current one.

mod deliver;
mod detour;
mod flow;
mod forward;
mod frame;
mod mac_table;
pub(crate) mod offload;
mod port;
mod shown;
mod storm;
mod uplink;
mod vlan;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Instant;

use api::device;
use tonic::Status;
use vhost_user::backend::{Polling, WorkerGroup};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

use crate::kernel::Interface;
use crate::nic::MacAddress;
use crate::nic::backend::Backend;
use detour::Detour;
use mac_table::{Key, MacTable, PinError, PortNumber};
use port::{Port, RingReceiver};
use uplink::Uplink;
pub(crate) use vlan::VlanError;
use vlan::{NO_VLAN, Vlans};

/// All there are: what a receiver cannot do is done here.
const OFFLOADS: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_USO,
];

/// Ports of one switch: far more than a host has VMs.
const MAX_PORTS: usize = 1024;

/// Threads that serve all switches of the process at most; more than that many CPUs copying find
/// the memory busy.
const MAX_THREADS: usize = 8;

/// A NIC that cannot be connected to a switch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Vlan(#[from] VlanError),
    #[error("{mac} is the address of another port of switch {switch:?}; choose another one")]
    DuplicateMac { mac: MacAddress, switch: String },
    #[error("switch {0:?} has {MAX_PORTS} ports, and no more are possible; use another one")]
    Full(String),
    #[error("no thread or descriptor to be had for switches")]
    Threads(#[source] io::Error),
}

/// An uplink that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UplinkError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the kernel refuses to set up the uplink")]
    Io(#[source] io::Error),
}

impl From<ConnectError> for Status {
    fn from(error: ConnectError) -> Self {
        let text = format!("net.switch_port: {error}");
        match error {
            ConnectError::Vlan(_) => Self::invalid_argument(text),
            ConnectError::DuplicateMac { .. } => Self::already_exists(text),
            ConnectError::Full(_) | ConnectError::Threads(_) => Self::resource_exhausted(text),
        }
    }
}

/// Makes a port of the switch that `config` names, which comes into being with its first port, for a
/// NIC with the address `mac`.
///
/// # Errors
/// [`ConnectError`].
pub(crate) fn connect(
    config: &device::SwitchPort,
    num_pairs: u16,
    mac: MacAddress,
    polling: Polling,
) -> Result<Arc<dyn Backend>, ConnectError> {
    let vlans = Vlans::of(config)?;
    let seat = group()?.seat();
    let switch = Switch::named(&config.switch);
    let vlans = Arc::new(vlans);
    let number = switch.add(Arc::clone(&vlans), num_pairs, Some(mac))?;
    Ok(Arc::new(Port {
        switch,
        number,
        vlans,
        num_pairs,
        seat,
        polling,
    }))
}

/// Makes an interface a port of the switch that `config` names, for good.
///
/// # Errors
/// [`UplinkError`].
pub(crate) fn connect_uplink(
    config: &device::SwitchPort,
    interface: Interface,
) -> Result<(), UplinkError> {
    let vlans = Vlans::of(config).map_err(ConnectError::Vlan)?;
    let vlans = Arc::new(vlans);
    let switch = Switch::named(&config.switch);
    let number = switch.add(Arc::clone(&vlans), 0, None)?;
    let uplink =
        Uplink::start(&switch, number, &vlans, interface).inspect_err(|_| switch.remove(number))?;
    switch.change(number, |port| port.uplink = Some(uplink));
    Ok(())
}

/// The threads of all switches of the process.
fn group() -> Result<&'static WorkerGroup, ConnectError> {
    static GROUP: OnceLock<WorkerGroup> = OnceLock::new();
    if let Some(group) = GROUP.get() {
        return Ok(group);
    }
    // Half of the CPUs are the guests'.
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let threads = (cpus / 2).clamp(1, MAX_THREADS);
    let group = WorkerGroup::spawn("switch", threads).map_err(ConnectError::Threads)?;
    Ok(GROUP.get_or_init(|| group))
}

/// One switch.
#[derive(Debug)]
pub(crate) struct Switch {
    name: String,
    macs: MacTable,
    ports: Mutex<Ports>,
    /// Of the current view.
    generation: AtomicU64,
    /// When time began for the address table.
    epoch: Instant,
    detour: Detour,
}

#[derive(Debug)]
struct Ports {
    slots: Vec<Option<PortState>>,
    view: Arc<View>,
}

/// What is known of a port.
#[derive(Debug)]
struct PortState {
    vlans: Arc<Vlans>,
    receivers: Vec<Option<Arc<RingReceiver>>>,
    active_pairs: u16,
    uplink: Option<Arc<Uplink>>,
}

/// All ports, as threads that send look at them.
#[derive(Debug)]
struct View {
    generation: u64,
    ports: Vec<Option<ViewPort>>,
}

#[derive(Debug)]
struct ViewPort {
    vlans: Arc<Vlans>,
    /// Receive rings that run.
    outlets: Vec<Outlet>,
}

/// Where frames leave a switch.
#[derive(Clone, Debug)]
enum Outlet {
    Ring(Arc<RingReceiver>),
    Uplink(Arc<Uplink>),
}

impl Switch {
    /// The switch of that name in this process.
    fn named(name: &str) -> Arc<Self> {
        static SWITCHES: Mutex<Option<HashMap<String, Weak<Switch>>>> = Mutex::new(None);
        let mut switches = SWITCHES.lock().unwrap_or_else(PoisonError::into_inner);
        let switches = switches.get_or_insert_default();
        if let Some(switch) = switches.get(name).and_then(Weak::upgrade) {
            return switch;
        }
        switches.retain(|_, switch| switch.strong_count() > 0);
        let switch = Arc::new(Self::new(name));
        switches.insert(name.to_owned(), Arc::downgrade(&switch));
        switch
    }

    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            macs: MacTable::new(),
            ports: Mutex::new(Ports {
                slots: Vec::new(),
                view: Arc::new(View {
                    generation: 0,
                    ports: Vec::new(),
                }),
            }),
            generation: AtomicU64::new(0),
            epoch: Instant::now(),
            detour: Detour::default(),
        }
    }

    fn add(
        &self,
        vlans: Arc<Vlans>,
        num_pairs: u16,
        mac: Option<MacAddress>,
    ) -> Result<PortNumber, ConnectError> {
        let mut ports = self.ports();
        let free = ports.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(ports.slots.len());
        let full = || ConnectError::Full(self.name.clone());
        if index >= MAX_PORTS {
            return Err(full());
        }
        let number = index as PortNumber;
        // Where untagged frames of that address come from; those with a tag are learnt.
        let vlan = vlans.ingress(None).unwrap_or(NO_VLAN);
        if let Some(mac) = mac {
            self.macs
                .pin(Key::new(mac.0, vlan), number)
                .map_err(|error| match error {
                    PinError::Taken => ConnectError::DuplicateMac {
                        mac,
                        switch: self.name.clone(),
                    },
                    PinError::Full => full(),
                })?;
        }
        let state = PortState {
            vlans,
            receivers: vec![None; usize::from(num_pairs)],
            active_pairs: num_pairs,
            uplink: None,
        };
        match ports.slots.get_mut(index) {
            Some(slot) => *slot = Some(state),
            None => ports.slots.push(Some(state)),
        }
        self.publish(&mut ports);
        Ok(number)
    }

    /// The port is gone, and what was known of addresses behind it.
    fn remove(&self, number: PortNumber) {
        let mut ports = self.ports();
        ports.slots[usize::from(number)] = None;
        self.macs.forget(number);
        self.publish(&mut ports);
    }

    fn set_receiver(&self, number: PortNumber, pair: u16, receiver: Option<Arc<RingReceiver>>) {
        self.change(number, |port| {
            port.receivers[usize::from(pair)] = receiver;
        });
    }

    fn set_active_pairs(&self, number: PortNumber, pairs: u16) {
        self.change(number, |port| port.active_pairs = pairs);
    }

    fn change(&self, number: PortNumber, change: impl FnOnce(&mut PortState)) {
        let mut ports = self.ports();
        if let Some(Some(port)) = ports.slots.get_mut(usize::from(number)) {
            change(port);
            self.publish(&mut ports);
        }
    }

    fn publish(&self, ports: &mut Ports) {
        let generation = ports.view.generation + 1;
        ports.view = Arc::new(View {
            generation,
            ports: ports
                .slots
                .iter()
                .map(|slot| slot.as_ref().map(PortState::view))
                .collect(),
        });
        self.generation.store(generation, Ordering::Release);
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.ports().view)
    }

    #[inline]
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Time as the address table has it.
    #[inline]
    fn seconds(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.epoch).as_secs() as u32
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortState {
    fn view(&self) -> ViewPort {
        let active = self.receivers.iter().take(usize::from(self.active_pairs));
        ViewPort {
            vlans: Arc::clone(&self.vlans),
            outlets: active
                .flatten()
                .cloned()
                .map(Outlet::Ring)
                .chain(self.uplink.clone().map(Outlet::Uplink))
                .collect(),
        }
    }
}
