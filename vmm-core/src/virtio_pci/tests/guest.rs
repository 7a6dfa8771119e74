//! A guest without a vCPU: finds the device through ECAM, drives it through its BAR.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use faults::DeviceFaults;
use vhost_user::driver::{DriverRing, GuestMemory};
use vhost_user::frontend::{MemoryRegion, MemoryTable, Timeouts};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::kvm::interrupts::{InterruptFabric, MsiMessage, MsiRoute};
use crate::pci::{Layout, MmioWindow, RootBus};
use crate::virtio_pci::{AttachError, VhostUserDeviceConfig, VirtioPciDevice};

const ECAM: u64 = 0xe000_0000;
const WINDOW: u64 = 0xc000_0000;
const MEMORY_LEN: u64 = 1 << 20;
pub(super) const RINGS_GPA: u64 = 0x1_0000;
pub(super) const BUFFERS_GPA: u64 = 0x8_0000;
const QUEUE_SIZE: u16 = 8;
/// VIRTIO_F_RING_PACKED.
pub(super) const F_RING_PACKED: u64 = 1 << 34;
/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) const TIMEOUTS: Timeouts = Timeouts {
    first_reply: Duration::from_secs(5),
    request: Duration::from_secs(5),
    stop: Duration::from_secs(5),
};

/// Remembers routes and doorbells, and acts as KVM's irqfd when asked what was delivered.
#[derive(Default)]
pub(super) struct Recorder {
    routes: Mutex<Vec<(EventFd, Option<MsiMessage>)>>,
    doorbells: Mutex<HashMap<u64, EventFd>>,
}

impl InterruptFabric for Recorder {
    fn add_msi_route(&self, irqfd: &EventFd) -> io::Result<MsiRoute> {
        let mut routes = self.routes.lock().unwrap();
        routes.push((irqfd.try_clone()?, None));
        Ok(MsiRoute(routes.len() as u32 - 1))
    }

    fn set_msi_route(
        &self,
        route: MsiRoute,
        _irqfd: &EventFd,
        message: Option<MsiMessage>,
    ) -> io::Result<()> {
        self.routes.lock().unwrap()[route.0 as usize].1 = message;
        Ok(())
    }

    fn add_doorbell(&self, gpa: u64, doorbell: &EventFd) -> io::Result<()> {
        let previous = self
            .doorbells
            .lock()
            .unwrap()
            .insert(gpa, doorbell.try_clone()?);
        assert!(previous.is_none(), "doorbell {gpa:#x} was registered twice");
        Ok(())
    }

    fn remove_doorbell(&self, gpa: u64, _doorbell: &EventFd) -> io::Result<()> {
        self.doorbells
            .lock()
            .unwrap()
            .remove(&gpa)
            .expect("only what was registered is removed");
        Ok(())
    }
}

impl Recorder {
    /// Messages of the interrupts that were raised since the last call and are not masked.
    pub(super) fn delivered(&self) -> Vec<MsiMessage> {
        let routes = self.routes.lock().unwrap();
        routes
            .iter()
            .filter_map(|(irqfd, message)| message.filter(|_| irqfd.read().is_ok()))
            .collect()
    }

    /// What a backend can do to all descriptors that it was given. [`Recorder::delivered`] is not
    /// to be called any more.
    pub(super) fn make_blocking(&self) {
        let routes = self.routes.lock().unwrap();
        let doorbells = self.doorbells.lock().unwrap();
        let calls = routes.iter().map(|(irqfd, _)| irqfd);
        for event in calls.chain(doorbells.values()) {
            // SAFETY: F_SETFL takes an integer.
            let set = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
            assert_eq!(set, 0);
        }
    }

    pub(super) fn doorbell_gpas(&self) -> Vec<u64> {
        let mut gpas: Vec<u64> = self.doorbells.lock().unwrap().keys().copied().collect();
        gpas.sort_unstable();
        gpas
    }
}

pub(super) struct Guest {
    pub(super) fabric: Arc<Recorder>,
    pub(super) device: Arc<VirtioPciDevice>,
    pub(super) root_bus: Arc<RootBus>,
    pub(super) memory: Arc<GuestMemory>,
    bus: Bus,
}

impl Guest {
    /// Attaches the device that `socket`'s backend serves as `parameters` say.
    pub(super) fn attach(
        parameters: &str,
        socket: &Path,
        timeouts: Timeouts,
    ) -> Result<Self, AttachError> {
        Self::attach_faulty(parameters, socket, timeouts, DeviceFaults::none())
    }

    pub(super) fn attach_faulty(
        parameters: &str,
        socket: &Path,
        timeouts: Timeouts,
        faults: Arc<DeviceFaults>,
    ) -> Result<Self, AttachError> {
        let config: VhostUserDeviceConfig = format!(
            "tag=test,{parameters},socket={},queue-size={QUEUE_SIZE}",
            socket.display()
        )
        .parse()
        .unwrap();
        let memory = Arc::new(GuestMemory::new(MEMORY_LEN).unwrap());
        let region = MemoryRegion {
            gpa: 0,
            size_bytes: MEMORY_LEN,
            file: Arc::new(memory.file().try_clone().unwrap()),
            file_offset: 0,
        };
        let fabric = Arc::new(Recorder::default());
        let table = Arc::new(MemoryTable::new(vec![region]));
        let device = VirtioPciDevice::connect_with(
            config,
            table,
            fabric.clone(),
            timeouts.first_reply,
            timeouts,
            faults,
        )?;
        let root_bus = RootBus::new(Layout {
            ecam: MmioWindow {
                base: ECAM,
                len: 1 << 20,
            },
            windows: vec![MmioWindow {
                base: WINDOW,
                len: 1 << 20,
            }],
        });
        root_bus.add(device.clone()).unwrap();
        let mut bus = Bus::default();
        for range in root_bus.ranges() {
            bus.insert(range.base, range.len, range.device).unwrap();
        }
        Ok(Self {
            fabric,
            device,
            root_bus,
            memory,
            bus,
        })
    }

    pub(super) fn read(&self, gpa: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.bus.read(gpa, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn write(&self, gpa: u64, len: usize, value: u64) {
        self.bus.write(gpa, &value.to_le_bytes()[..len]);
    }

    /// Configuration space of 00:01.0.
    pub(super) fn config_gpa(&self, register: u16) -> u64 {
        ECAM + (1 << 15) + u64::from(register)
    }

    /// Brings the driver up to DRIVER_OK with all queues, as Virtio 1.2 section 3.1.1 says.
    pub(super) fn drive(&self) -> Driver<'_> {
        let mut driver = Driver::find(self);
        driver.negotiate(u64::MAX);
        driver.set_up_queues();
        driver.set_status(0xf);
        driver
    }

    /// The same, with no more than `limit` queues.
    pub(super) fn drive_queues(&self, limit: u64) -> Driver<'_> {
        let mut driver = Driver::find(self);
        driver.negotiate(u64::MAX);
        driver.set_up_some_queues(limit);
        driver.set_status(0xf);
        driver
    }
}

/// The addresses of the device's structures, found by walking its capabilities.
pub(super) struct Driver<'a> {
    guest: &'a Guest,
    pub(super) common: u64,
    pub(super) device_cfg: u64,
    notify: u64,
    multiplier: u64,
    pub(super) msix_table: u64,
    pub(super) msix_control: u64,
    pub(super) features: u64,
    pub(super) rings: Vec<DriverRing>,
    /// The queue that requests go to.
    pub(super) queue: usize,
}

impl<'a> Driver<'a> {
    pub(super) fn find(guest: &'a Guest) -> Self {
        let config = |register: u64, len| guest.read(guest.config_gpa(0) + register, len);
        let bar = config(0x10, 4) & !0xf | config(0x14, 4) << 32;
        let mut driver = Self {
            guest,
            common: 0,
            device_cfg: 0,
            notify: 0,
            multiplier: 0,
            msix_table: 0,
            msix_control: 0,
            features: 0,
            rings: Vec::new(),
            queue: 0,
        };
        let mut at = config(0x34, 1);
        while at != 0 {
            match (config(at, 1), config(at + 3, 1)) {
                (0x11, _) => {
                    driver.msix_control = guest.config_gpa(0) + at + 2;
                    driver.msix_table = bar + (config(at + 4, 4) & !0b111);
                }
                (0x09, 1) => driver.common = bar + config(at + 8, 4),
                (0x09, 2) => {
                    driver.notify = bar + config(at + 8, 4);
                    driver.multiplier = config(at + 16, 4);
                }
                (0x09, 4) => driver.device_cfg = bar + config(at + 8, 4),
                _ => {}
            }
            at = config(at + 1, 1);
        }
        driver
    }

    pub(super) fn status(&self) -> u8 {
        self.guest.read(self.common + 0x14, 1) as u8
    }

    pub(super) fn set_status(&self, status: u8) {
        self.guest.write(self.common + 0x14, 1, u64::from(status));
    }

    /// Resets, and takes what is offered of `wanted`, but no packed rings.
    pub(super) fn negotiate(&mut self, wanted: u64) {
        self.negotiate_any(wanted & !F_RING_PACKED);
    }

    /// Resets, and takes what is offered of `wanted`.
    pub(super) fn negotiate_any(&mut self, wanted: u64) {
        self.set_status(0);
        wait_until("the reset is complete", || self.status() == 0);
        self.set_status(0x3);
        let half = |select| {
            self.guest.write(self.common, 4, select);
            self.guest.read(self.common + 4, 4)
        };
        self.features = (half(0) | half(1) << 32) & wanted;
        for select in 0..2 {
            self.guest.write(self.common + 8, 4, select);
            self.guest.write(
                self.common + 0xc,
                4,
                self.features >> (32 * select) & 0xffff_ffff,
            );
        }
        self.set_status(0xb);
        assert_eq!(self.status(), 0xb, "the device accepts its own features");
    }

    /// Enables MSI-X, programs vector `i` with data `0x100 + i`, and enables all queues.
    pub(super) fn set_up_queues(&mut self) {
        self.set_up_some_queues(u64::MAX);
    }

    fn set_up_some_queues(&mut self, limit: u64) {
        self.guest.write(self.msix_control, 2, 0x8000);
        let queues = self.guest.read(self.common + 0x12, 2);
        for vector in 0..=queues {
            self.program_vector(vector, false);
        }
        self.guest.write(self.common + 0x10, 2, 0);
        for queue in 0..queues.min(limit) {
            let base_gpa = RINGS_GPA + queue * 0x1000;
            let ring = DriverRing::new(&self.guest.memory, base_gpa, QUEUE_SIZE, self.features);
            let addresses = ring.addresses();
            let to_gpa = |address: u64| address - addresses.desc + base_gpa;
            let areas = [
                to_gpa(addresses.desc),
                to_gpa(addresses.avail),
                to_gpa(addresses.used),
            ];
            self.enable_queue(queue, QUEUE_SIZE, areas);
            self.rings.push(ring);
        }
    }

    pub(super) fn enable_queue(&self, queue: u64, size: u16, areas: [u64; 3]) {
        self.guest.write(self.common + 0x16, 2, queue);
        self.guest.write(self.common + 0x18, 2, u64::from(size));
        assert_eq!(self.guest.read(self.common + 0x18, 2), u64::from(size));
        self.guest.write(self.common + 0x1a, 2, queue + 1);
        for (register, gpa) in [0x20, 0x28, 0x30].into_iter().zip(areas) {
            self.guest
                .write(self.common + register, 4, gpa & 0xffff_ffff);
            self.guest.write(self.common + register + 4, 4, gpa >> 32);
        }
        self.guest.write(self.common + 0x1c, 2, 1);
        assert_eq!(
            self.guest.read(self.common + 0x1c, 2),
            1,
            "queue {queue} is enabled"
        );
    }

    pub(super) fn program_vector(&self, vector: u64, masked: bool) {
        let entry = self.msix_table + vector * 16;
        self.guest.write(entry, 4, 0xfee0_0000);
        self.guest.write(entry + 4, 4, 0);
        self.guest.write(entry + 8, 4, 0x100 + vector);
        self.guest.write(entry + 12, 4, u64::from(masked));
    }

    /// Puts a request with `payload` into the queue, with as much room for the answer, and kicks if
    /// the device wants it.
    pub(super) fn submit(&mut self, payload: &[u8]) -> u16 {
        self.submit_with_room(payload, payload.len())
    }

    pub(super) fn submit_with_room(&mut self, payload: &[u8], room: usize) -> u16 {
        let (readable, writable) = (BUFFERS_GPA, BUFFERS_GPA + 0x1000);
        self.guest.memory.write(readable, payload);
        self.guest.memory.write(writable, &vec![0xee; room]);
        let head = self.rings[self.queue]
            .add(
                &[(readable, payload.len() as u32)],
                &[(writable, room as u32)],
            )
            .expect("the ring has room");
        self.rings[self.queue].ask_for_signal();
        if self.rings[self.queue].needs_kick() {
            self.kick(self.queue as u64);
        }
        head
    }

    /// The doorbell, by way of the ioeventfd if there is one, else as an exit.
    pub(super) fn kick(&self, queue: u64) {
        let gpa = self.notify + queue * self.multiplier;
        let doorbells = self.guest.fabric.doorbells.lock().unwrap();
        match doorbells.get(&gpa) {
            Some(doorbell) => doorbell.write(1).unwrap(),
            None => {
                drop(doorbells);
                self.guest.write(gpa, 2, queue);
            }
        }
    }

    /// Waits for the interrupt of the queue and for `head`; what the device wrote.
    pub(super) fn complete(&mut self, head: u16, len: usize) -> Vec<u8> {
        let expected = MsiMessage {
            address: 0xfee0_0000,
            data: 0x101 + self.queue as u32,
        };
        wait_until("the queue's interrupt arrives", || {
            self.guest.fabric.delivered().contains(&expected)
        });
        let mut used = None;
        wait_until("the request is complete", || {
            used = used.or_else(|| self.rings[self.queue].pop_used());
            used.is_some()
        });
        assert_eq!(used.map(|(head, _)| head), Some(head));
        self.guest.memory.read(BUFFERS_GPA + 0x1000, len)
    }
}

pub(super) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
