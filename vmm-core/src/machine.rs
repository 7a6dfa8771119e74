//! Assembly of a machine, and what can be done to it as a whole.
//!
//! Construction goes through phases that each consume the one before:
//!
//! ```text
//! MachineConfig ─ open ─► Opened ─ build ─► Board ─ attach ─► Populated ─ ready ─► Machine
//!                (files,          (RAM, VM,        (buses, serial,       (vCPUs and
//!                 /dev/kvm)        irqchips)        PCI, backends)        their threads)
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use faults::{DeviceFaults, Faults};
use kvm_ioctls::Kvm;
use tracing::warn;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi;
use crate::boot::{BootError, BootSource, ElfProtocol};
use crate::bus::{Bus, BusDevice, Overlap};
use crate::config_ports::{CONFIG_ADDRESS, CONFIG_PORTS_LEN, ConfigPorts};
use crate::console::Console;
use crate::error::chain;
use crate::kvm::irqchip::IrqchipState;
use crate::kvm::routes::KvmInterrupts;
use crate::kvm::{self, KvmError, Vm};
use crate::layout::{
    ACPI_PORT, ACPI_START, COM1_GSI, COM1_PORT, ECAM_LEN, ECAM_START, GED_GSI, PCI_MMIO32_END,
    PCI_MMIO32_START, PCI_MMIO64_LEN, RESET_VECTOR,
};
use crate::memory::{GuestRam, MemoryError};
use crate::pci::{BusFull, Layout, MmioWindow, RootBus};
use crate::power::{
    ACPI_PORTS_LEN, AcpiRegisters, KEYBOARD_COMMAND_PORT, KeyboardReset, PowerLatch, RESET_STUB,
    ResetControl,
};
use crate::seccomp::ThreadKind;
use crate::serial::SerialPort;
use crate::vcpu::cpuid::CpuidTemplate;
use crate::vcpu::gate::GateError;
use crate::vcpu::state::msr_indices;
use crate::vcpu::{Report, Surroundings, Vcpu, VcpuThreads};
use crate::virtio_pci::{AttachError, DeviceHealth, VhostUserDeviceConfig, VirtioPciDevice};

/// How long a backend's socket may take to appear and answer.
const ATTACH_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether the machine is still wanted while a backend is awaited.
const CANCEL_POLL: Duration = Duration::from_millis(20);
/// How long backends may take to stop their rings.
const RING_STOP_PATIENCE: Duration = Duration::from_secs(5);
const COM1_PORTS_LEN: u64 = 8;

/// Called on each thread of the kind it names before that touches anything of the guest's: drops
/// privileges.
pub type Confine = Arc<dyn Fn(ThreadKind) -> Result<(), String> + Send + Sync>;

/// What machine to make.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The KVM device.
    pub kvm_path: PathBuf,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initramfs file.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// How an ELF kernel is entered.
    pub elf_protocol: ElfProtocol,
    /// Devices served by other processes.
    pub devices: Vec<VhostUserDeviceConfig>,
}

/// A machine could not be made, or could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// PCI bus.
    #[error(transparent)]
    Pci(#[from] BusFull),
    /// Guest addresses do not fit the processor.
    #[error(
        "guest memory and PCI windows end at {end:#x}, beyond this processor's {bits} address bits: give a smaller --memory"
    )]
    AddressBits {
        /// One past the last guest address.
        end: u64,
        /// What the processor can address.
        bits: u32,
    },
    /// Two devices at one address.
    #[error("the machine's address map is inconsistent")]
    AddressMap(#[from] Overlap),
    /// vCPUs did not follow an order.
    #[error("vCPUs did not follow an order")]
    Vcpus(#[from] GateError),
    /// Boot structures.
    #[error("cannot write the firmware's tables to guest memory")]
    FirmwareTables(#[from] GuestMemoryError),
    /// The machine is not wanted any more.
    #[error("the machine was stopped before it was complete")]
    Cancelled,
    /// A thread could not be confined.
    #[error("cannot confine a thread: {0}")]
    Confine(String),
    /// Descriptors or threads.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
}

/// Kernel files and KVM are there.
pub struct Opened {
    kvm: Kvm,
    boot: BootSource,
}

/// RAM, VM and interrupt controllers.
pub struct Board {
    // The VM's memory slots point into `ram`, so it is dropped first.
    vm: Vm,
    ram: GuestRam,
    boot: BootSource,
    interrupts: Arc<KvmInterrupts>,
    cpuid: CpuidTemplate,
}

/// A board with everything on its buses.
pub struct Populated {
    board: Board,
    ports: Bus,
    mmio: Bus,
    power: Arc<PowerLatch>,
    peripherals: Peripherals,
}

struct Peripherals {
    console: Arc<Console>,
    serial: Arc<SerialPort>,
    power_button: EventFd,
    config_ports: Arc<ConfigPorts>,
    root_bus: Arc<RootBus>,
    devices: Devices,
}

/// The devices that other processes serve, connected or still awaited.
#[derive(Clone, Default)]
pub struct Devices(Arc<[DeviceSlot]>);

struct DeviceSlot {
    config: VhostUserDeviceConfig,
    /// What goes wrong with it on purpose.
    faults: Arc<DeviceFaults>,
    device: OnceLock<Arc<VirtioPciDevice>>,
}

impl Devices {
    /// None of them connected yet; `faults` are those of the process, if it may do any.
    pub fn awaited(configs: &[VhostUserDeviceConfig], faults: Option<&Faults>) -> Self {
        let slot = |config: &VhostUserDeviceConfig| DeviceSlot {
            config: config.clone(),
            faults: faults.map_or_else(DeviceFaults::none, |faults| faults.device(&config.tag)),
            device: OnceLock::new(),
        };
        Self(configs.iter().map(slot).collect())
    }

    /// How they are, with the last `max_outages` outages of each.
    pub fn health(&self, max_outages: usize) -> Vec<DeviceHealth> {
        self.0
            .iter()
            .map(|slot| match slot.device.get() {
                Some(device) => device.health(max_outages),
                None => DeviceHealth::awaited(&slot.config),
            })
            .collect()
    }

    /// Has the configuration space of the device `tag` read again; whether there is one. One that
    /// is not connected yet will be read anyway.
    pub fn refresh_config(&self, tag: &str) -> bool {
        let slot = self.0.iter().find(|slot| slot.config.tag == tag);
        if let Some(device) = slot.and_then(|slot| slot.device.get()) {
            device.refresh_config();
        }
        slot.is_some()
    }

    /// Those that are connected; all of them once the machine is complete.
    fn connected(&self) -> impl Iterator<Item = &Arc<VirtioPciDevice>> {
        self.0.iter().filter_map(|slot| slot.device.get())
    }
}

/// A complete machine. Its vCPUs are parked.
pub struct Machine {
    threads: Option<VcpuThreads>,
    exits: Arc<[AtomicU64]>,
    power_on_irqchip: IrqchipState,
    acpi_tables: Vec<u8>,
    board: Board,
    peripherals: Peripherals,
}

impl MachineConfig {
    /// Opens what the configuration names and checks what can be checked by looking.
    ///
    /// # Errors
    /// A file is missing or unfit, KVM is not usable, or allows fewer vCPUs.
    pub fn open(&self) -> Result<Opened, MachineError> {
        let boot = BootSource::open(
            &self.kernel,
            self.initramfs.as_deref(),
            &self.cmdline,
            self.elf_protocol,
        )?;
        let kvm = kvm::open(&self.kvm_path)?;
        let allowed = kvm::max_vcpus(&kvm);
        if self.vcpus > allowed {
            return Err(KvmError::TooManyVcpus {
                wanted: self.vcpus,
                allowed,
            }
            .into());
        }
        Ok(Opened { kvm, boot })
    }
}

impl Opened {
    /// Makes RAM, VM and interrupt controllers.
    ///
    /// # Errors
    /// The host cannot give the memory, or KVM refused.
    pub fn build(self, config: &MachineConfig) -> Result<Board, MachineError> {
        let cpuid = CpuidTemplate::new(&self.kvm, config.vcpus)?;
        let ram = GuestRam::new(config.memory_bytes)?;
        let (end, bits) = (
            ram.mmio64_start() + PCI_MMIO64_LEN,
            cpuid.physical_address_bits(),
        );
        if bits < 64 && end > 1 << bits {
            return Err(MachineError::AddressBits { end, bits });
        }
        let vm = Vm::new(self.kvm, &ram)?;
        let interrupts = Arc::new(KvmInterrupts::new(vm.fd().clone()));
        Ok(Board {
            vm,
            ram,
            boot: self.boot,
            interrupts,
            cpuid,
        })
    }
}

impl Board {
    /// Puts everything on the buses and connects to the backends of `devices`, as long as the
    /// machine is not `cancelled`.
    ///
    /// # Errors
    /// A backend does not answer, or descriptors or addresses ran out.
    pub fn attach(
        self,
        devices: Devices,
        (serial, console): (Arc<SerialPort>, Arc<Console>),
        confine: &Confine,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Populated, MachineError> {
        let power = Arc::new(PowerLatch::default());
        let power_button = self.pin(GED_GSI)?;
        let root_bus = self.pci();
        self.connect(&devices, confine, cancelled)?;
        for device in devices.connected() {
            root_bus.add(device.clone())?;
        }
        let mut mmio = Bus::default();
        let mut config_ports = None;
        for range in root_bus.ranges() {
            if range.base == ECAM_START {
                let reset_control = ResetControl(power.clone());
                config_ports = Some(ConfigPorts::new(range.device.clone(), reset_control));
            }
            mmio.insert(range.base, range.len, range.device)?;
        }
        let config_ports = Arc::new(config_ports.expect("the bus answers at ECAM"));
        let ports = port_bus(&serial, &config_ports, &power)?;
        let peripherals = Peripherals {
            console,
            serial,
            power_button,
            config_ports,
            root_bus,
            devices,
        };
        Ok(Populated {
            board: self,
            ports,
            mmio,
            power,
            peripherals,
        })
    }

    /// Makes COM1, which writes to `console`.
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn serial_port(&self, console: Arc<Console>) -> Result<Arc<SerialPort>, MachineError> {
        let interrupt = self.pin(COM1_GSI)?;
        let serial = SerialPort::new(interrupt, console);
        Ok(Arc::new(serial.map_err(system("duplicate an eventfd"))?))
    }

    /// An eventfd that raises `gsi`.
    fn pin(&self, gsi: u32) -> Result<EventFd, MachineError> {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(system("create an eventfd"))?;
        self.interrupts
            .add_pin(&eventfd, gsi)
            .map_err(system("tie an eventfd to an interrupt"))?;
        Ok(eventfd)
    }

    fn pci(&self) -> Arc<RootBus> {
        RootBus::new(Layout {
            ecam: MmioWindow {
                base: ECAM_START,
                len: ECAM_LEN,
            },
            windows: vec![
                MmioWindow {
                    base: self.ram.mmio64_start(),
                    len: PCI_MMIO64_LEN,
                },
                MmioWindow {
                    base: PCI_MMIO32_START,
                    len: PCI_MMIO32_END - PCI_MMIO32_START,
                },
            ],
        })
    }

    /// Connects on a confined thread: the threads that keep the connections are started by it, and
    /// inherit its confinement.
    fn connect(
        &self,
        devices: &Devices,
        confine: &Confine,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), MachineError> {
        if devices.0.is_empty() {
            return Ok(());
        }
        let memory = Arc::new(self.ram.memory_table());
        let (devices, confine) = (devices.clone(), confine.clone());
        let interrupts = self.interrupts.clone();
        let connect_all = move || {
            confine(ThreadKind::Devices).map_err(MachineError::Confine)?;
            for slot in devices.0.iter() {
                let device = VirtioPciDevice::connect(
                    slot.config.clone(),
                    memory.clone(),
                    interrupts.clone(),
                    ATTACH_PATIENCE,
                    Arc::clone(&slot.faults),
                )?;
                slot.device.get_or_init(|| device);
            }
            Ok(())
        };
        let (done, connected) = sync_channel(1);
        let connecting = thread::Builder::new()
            .name("devices".into())
            // Nobody waits any more if the machine was cancelled; the process ends then.
            .spawn(move || drop(done.send(connect_all())))
            .map_err(system("start a thread"))?;
        loop {
            match connected.recv_timeout(CANCEL_POLL) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if cancelled() => {
                    return Err(MachineError::Cancelled);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let panic = connecting.join().expect_err("it answers unless it panics");
                    std::panic::resume_unwind(panic)
                }
            }
        }
    }
}

fn port_bus(
    serial: &Arc<SerialPort>,
    config_ports: &Arc<ConfigPorts>,
    power: &Arc<PowerLatch>,
) -> Result<Bus, Overlap> {
    let acpi = Arc::new(AcpiRegisters(power.clone()));
    let keyboard = Arc::new(KeyboardReset(power.clone()));
    let ranges: [(u16, u64, Arc<dyn BusDevice>); 4] = [
        (COM1_PORT, COM1_PORTS_LEN, serial.clone()),
        (ACPI_PORT, ACPI_PORTS_LEN, acpi),
        (CONFIG_ADDRESS, CONFIG_PORTS_LEN, config_ports.clone()),
        (KEYBOARD_COMMAND_PORT, 1, keyboard),
    ];
    let mut ports = Bus::default();
    for (base, len, device) in ranges {
        ports.insert(base.into(), len, device)?;
    }
    Ok(ports)
}

impl Populated {
    /// Makes the vCPUs and their threads, which call `report`.
    ///
    /// # Errors
    /// KVM refused a vCPU, or a thread could not be started.
    pub fn ready(
        self,
        config: &MachineConfig,
        report: Box<dyn Fn(Report) + Send + Sync>,
        confine: Confine,
    ) -> Result<Machine, MachineError> {
        let Self {
            board,
            ports,
            mmio,
            power,
            peripherals,
        } = self;
        let msr_indices = msr_indices(board.vm.kvm())?;
        let vcpus = (0..config.vcpus)
            .map(|index| Vcpu::new(&board.vm, index, &board.cpuid, &msr_indices))
            .collect::<Result<Vec<_>, _>>()?;
        let power_on_irqchip = IrqchipState::capture(board.vm.fd())?;
        let mmio64_start = board.ram.mmio64_start();
        let acpi_tables = acpi::tables(&acpi::Description {
            vcpus: config.vcpus,
            pci_mmio32: (PCI_MMIO32_START as u32, (PCI_MMIO32_END - 1) as u32),
            pci_mmio64: (mmio64_start, mmio64_start + PCI_MMIO64_LEN - 1),
        });
        let confine = Box::new(move || confine(ThreadKind::Vcpu));
        let threads = VcpuThreads::spawn(
            vcpus,
            Surroundings {
                ports,
                mmio,
                power,
                report,
                confine,
            },
        )
        .map_err(system("start the vCPU threads"))?;
        let exits = threads.exits();
        Ok(Machine {
            threads: Some(threads),
            exits,
            power_on_irqchip,
            acpi_tables,
            board,
            peripherals,
        })
    }
}

impl Machine {
    /// Loads the kernel and puts the vCPUs at its entry. They stay parked.
    ///
    /// # Errors
    /// Kernel or initramfs do not fit, or a vCPU refused.
    pub fn boot(&mut self) -> Result<(), MachineError> {
        let memory = self.board.ram.memory();
        memory.write_slice(&self.acpi_tables, GuestAddress(ACPI_START))?;
        memory.write_slice(&RESET_STUB, GuestAddress(RESET_VECTOR))?;
        let entry = self.board.boot.load(&self.board.ram, ACPI_START)?;
        Ok(self.threads().power_on(entry)?)
    }

    /// Lets vCPUs and rings run.
    ///
    /// # Errors
    /// A vCPU refused.
    pub fn run(&mut self) -> Result<(), MachineError> {
        for device in self.peripherals.devices.connected() {
            device.resume();
        }
        Ok(self.threads().run()?)
    }

    /// Makes vCPUs and rings stand still.
    ///
    /// # Errors
    /// A vCPU did not leave the guest.
    pub fn park(&mut self) -> Result<(), MachineError> {
        self.threads().park()?;
        for device in self.peripherals.devices.connected() {
            device.pause(RING_STOP_PATIENCE);
        }
        Ok(())
    }

    /// Parks the vCPUs and puts everything but them into the power-on state; [`Self::boot`]
    /// comes next.
    ///
    /// # Errors
    /// A vCPU did not leave the guest, or a part refused.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        self.threads().park()?;
        for device in self.peripherals.devices.connected() {
            device.reset(RING_STOP_PATIENCE);
        }
        self.peripherals.config_ports.reset();
        self.peripherals.root_bus.place_bars();
        self.peripherals
            .serial
            .reset()
            .map_err(system("reset the serial port"))?;
        self.power_on_irqchip.restore(self.board.vm.fd())?;
        self.board.ram.clear().map_err(system("clear guest memory"))
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        self.peripherals
            .power_button
            .write(1)
            .map_err(system("raise the power button's interrupt"))
    }

    /// Ends the vCPU threads and the console. The process exits next.
    pub fn power_off(&mut self) {
        if let Some(Err(err)) = self.threads.take().map(VcpuThreads::exit) {
            warn!("{}", chain(&err));
        }
        self.peripherals.console.close();
    }

    /// Whether nothing was ordered since `report` was made.
    pub fn is_current(&self, report: &Report) -> bool {
        self.threads
            .as_ref()
            .is_some_and(|threads| threads.is_current(report))
    }

    /// Exits handled in user space, for each vCPU.
    pub fn exits(&self) -> Arc<[AtomicU64]> {
        self.exits.clone()
    }

    /// What the guest wrote.
    pub fn console(&self) -> &Arc<Console> {
        &self.peripherals.console
    }

    fn threads(&self) -> &VcpuThreads {
        self.threads
            .as_ref()
            .expect("a machine that is off is not used")
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::System { what, source }
}

/// Where KVM usually is.
pub fn default_kvm_path() -> &'static Path {
    Path::new("/dev/kvm")
}
