//! vCPUs and the threads that run them.
//!
//! A vCPU thread takes orders from the [`Gate`], runs the guest, and answers exits from the
//! buses. It owns its vCPU's descriptor alone, decides nothing about the machine (it reports) and
//! waits for nobody but the gate.

pub mod cpuid;
pub mod exit;
pub mod gate;
pub mod regs;
pub mod state;

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use self::cpuid::CpuidTemplate;
use self::exit::Exit;
use self::gate::{Gate, GateError, Numbered, Order};
use self::state::VcpuState;
use crate::boot::Entry;
use crate::bus::Bus;
use crate::error::chain;
use crate::kvm::{KvmError, Vm, failed_to};
use crate::power::{PowerLatch, PowerRequest};

/// How long all vCPUs may take to carry out an order. Leaving the guest takes microseconds, but
/// this host may be overcommitted or emulated.
const ORDER_DEADLINE: Duration = Duration::from_secs(20);
/// I/O of one instruction is completed in fewer rounds than this.
const MAX_PENDING_ROUNDS: usize = 64;

/// One vCPU that no thread runs yet.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    power_on: VcpuState,
}

impl Vcpu {
    /// Creates vCPU number `index` of `vm`.
    ///
    /// # Errors
    /// KVM refused one of the steps.
    pub fn new(
        vm: &Vm,
        index: u32,
        cpuid: &CpuidTemplate,
        msr_indices: &[u32],
    ) -> Result<Self, KvmError> {
        let fd = vm
            .fd()
            .create_vcpu(index.into())
            .map_err(failed_to("create a vCPU"))?;
        fd.set_cpuid2(&cpuid.for_vcpu(index))
            .map_err(failed_to("set a vCPU's CPUID"))?;
        regs::set_firmware_msrs(&fd)?;
        let power_on = VcpuState::capture(&fd, msr_indices)?;
        Ok(Self {
            index,
            fd,
            power_on,
        })
    }
}

/// What a vCPU thread reports; it then stays out of the guest until the next order.
#[derive(Debug)]
pub struct Report {
    /// The order under which it ran: a report from before the last order is stale.
    pub serial: u64,
    /// Index of the vCPU.
    pub vcpu: u32,
    /// What happened.
    pub what: Event,
}

/// What happened on a vCPU.
#[derive(Debug)]
pub enum Event {
    /// The guest asked for a reset.
    Reset,
    /// The guest ran into a triple fault, by which it may ask for a reset.
    TripleFault,
    /// The guest switched itself off.
    Shutdown,
    /// The vCPU cannot go on.
    Failed(String),
}

/// What vCPU threads share.
pub struct Surroundings {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Set by devices on the buses when the guest resets or switches off.
    pub power: Arc<PowerLatch>,
    /// Where reports go; must not block for long.
    pub report: Box<dyn Fn(Report) + Send + Sync>,
    /// Called first on each thread: drops privileges.
    pub confine: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
}

/// The threads of all vCPUs of a machine.
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    exits: Arc<[AtomicU64]>,
}

impl VcpuThreads {
    /// Starts one thread for each vCPU; they wait for orders.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn spawn(vcpus: Vec<Vcpu>, surroundings: Surroundings) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick)?;
        let gate = Arc::new(Gate::new(vcpus.len()));
        let exits: Arc<[AtomicU64]> = vcpus.iter().map(|_| AtomicU64::new(0)).collect();
        let surroundings = Arc::new(surroundings);
        let threads = vcpus
            .into_iter()
            .map(|vcpu| {
                let runner = Runner {
                    vcpu,
                    gate: gate.clone(),
                    exits: exits.clone(),
                    surroundings: surroundings.clone(),
                };
                thread::Builder::new()
                    .name(format!("vcpu{}", runner.vcpu.index))
                    .spawn(move || runner.follow_orders())
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            gate,
            threads,
            exits,
        })
    }

    /// Makes all vCPUs leave the guest.
    ///
    /// # Errors
    /// Not all of them did.
    pub fn park(&self) -> Result<(), GateError> {
        self.command(Order::Park)
    }

    /// Puts all (parked) vCPUs into their power-on state, the boot vCPU at `entry`.
    ///
    /// # Errors
    /// Not all of them could.
    pub fn power_on(&self, entry: Entry) -> Result<(), GateError> {
        self.command(Order::PowerOn(entry))
    }

    /// Lets all vCPUs run the guest.
    ///
    /// # Errors
    /// Not all of them do.
    pub fn run(&self) -> Result<(), GateError> {
        self.command(Order::Run)
    }

    /// Ends all threads.
    ///
    /// # Errors
    /// Not all of them ended; the others are left alone.
    pub fn exit(self) -> Result<(), GateError> {
        self.command(Order::Exit)?;
        for thread in self.threads {
            // A panic was printed when it happened, and nothing of the thread is used any more.
            let _ = thread.join();
        }
        Ok(())
    }

    /// Whether `report` was made under the order that still stands.
    pub fn is_current(&self, report: &Report) -> bool {
        report.serial == self.gate.serial()
    }

    /// Exits that were handled, for each vCPU.
    pub fn exits(&self) -> Arc<[AtomicU64]> {
        self.exits.clone()
    }

    fn command(&self, order: Order) -> Result<(), GateError> {
        self.gate.command(order, ORDER_DEADLINE, || {
            for thread in &self.threads {
                // It fails only for a thread that has ended, which the gate's deadline reports.
                let _ = thread.kill(SIGRTMIN());
            }
        })
    }
}

/// What one vCPU thread owns.
struct Runner {
    vcpu: Vcpu,
    gate: Arc<Gate>,
    exits: Arc<[AtomicU64]>,
    surroundings: Arc<Surroundings>,
}

impl Runner {
    fn follow_orders(mut self) {
        RUN_PAGE.set(self.vcpu.fd.get_kvm_run());
        let confined = (self.surroundings.confine)();
        let mut last_serial = 0;
        loop {
            let Numbered { serial, order } = self.gate.wait_for_newer(last_serial);
            last_serial = serial;
            let result = confined.clone().and_then(|()| self.prepare(order));
            let refused = result.is_err();
            self.gate.acknowledge(serial, result);
            match order {
                Order::Run if !refused => self.run_guest(serial),
                Order::Exit => break,
                _ => {}
            }
        }
        RUN_PAGE.set(ptr::null_mut());
    }

    /// Does what `order` asks for before it is acknowledged.
    fn prepare(&mut self, order: Order) -> Result<(), String> {
        match order {
            Order::Park => self.complete_pending_io(),
            Order::PowerOn(entry) => self.power_on(entry).map_err(|err| chain(&err))?,
            // Tells the guest's watchdogs that it stood still. It fails for one without a KVM clock.
            Order::Run => drop(self.vcpu.fd.kvmclock_ctrl()),
            Order::Exit => {}
        }
        Ok(())
    }

    fn power_on(&mut self, entry: Entry) -> Result<(), KvmError> {
        self.complete_pending_io();
        self.vcpu.power_on.restore(&self.vcpu.fd)?;
        if self.vcpu.index == 0 {
            regs::set_entry(&self.vcpu.fd, entry)?;
        }
        Ok(())
    }

    /// Runs the guest until there is another order than `serial`, or something to report.
    fn run_guest(&mut self, serial: u64) {
        loop {
            // A kick sets `immediate_exit`. It is cleared before the order is looked at, so that a kick that
            // comes later than the look makes KVM_RUN return at once.
            self.vcpu.fd.set_kvm_immediate_exit(0);
            compiler_fence(Ordering::SeqCst);
            if self.gate.serial() != serial {
                return;
            }
            let event = match self.run_once() {
                Ok(None) => continue,
                Ok(Some(event)) => event,
                Err(err) => {
                    Event::Failed(format!("KVM_RUN failed on vCPU {}: {err}", self.vcpu.index))
                }
            };
            (self.surroundings.report)(Report {
                serial,
                vcpu: self.vcpu.index,
                what: event,
            });
            return;
        }
    }

    /// Runs the guest up to its next exit and answers that.
    fn run_once(&mut self) -> io::Result<Option<Event>> {
        let Surroundings {
            ports, mmio, power, ..
        } = &*self.surroundings;
        let event = match exit::run(&mut self.vcpu.fd)? {
            Exit::Interrupted => return Ok(None),
            Exit::PortRead { port, size, data } => {
                data.chunks_mut(size)
                    .for_each(|element| ports.read(port.into(), element));
                None
            }
            Exit::PortWrite { port, size, data } => {
                data.chunks(size)
                    .for_each(|element| ports.write(port.into(), element));
                power.take().map(|request| match request {
                    PowerRequest::Reset => Event::Reset,
                    PowerRequest::Shutdown => Event::Shutdown,
                })
            }
            Exit::MmioRead { gpa, data } => {
                mmio.read(gpa, data);
                None
            }
            Exit::MmioWrite { gpa, data } => {
                mmio.write(gpa, data);
                None
            }
            Exit::Again => None,
            Exit::TripleFault => Some(Event::TripleFault),
            Exit::Reset => Some(Event::Reset),
            Exit::Shutdown => Some(Event::Shutdown),
            Exit::Failed(why) => Some(Event::Failed(format!("vCPU {}: {why}", self.vcpu.index))),
        };
        self.exits[self.vcpu.index as usize].fetch_add(1, Ordering::Relaxed);
        Ok(event)
    }

    /// KVM finishes the instruction that caused the last exit when it is entered again. Until then registers must
    /// not be changed from outside.
    fn complete_pending_io(&mut self) {
        for _ in 0..MAX_PENDING_ROUNDS {
            self.vcpu.fd.set_kvm_immediate_exit(1);
            let Surroundings { ports, mmio, .. } = &*self.surroundings;
            match exit::run(&mut self.vcpu.fd) {
                Ok(Exit::PortRead { port, size, data }) => {
                    data.chunks_mut(size)
                        .for_each(|element| ports.read(port.into(), element));
                }
                Ok(Exit::PortWrite { port, size, data }) => {
                    data.chunks(size)
                        .for_each(|element| ports.write(port.into(), element));
                }
                Ok(Exit::MmioRead { gpa, data }) => mmio.read(gpa, data),
                Ok(Exit::MmioWrite { gpa, data }) => mmio.write(gpa, data),
                _ => return,
            }
        }
    }
}

thread_local! {
    /// The shared page of the vCPU that this thread runs, for the signal handler.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// A kick may arrive just before KVM_RUN: the flag makes that return at once.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run_page = RUN_PAGE.get();
    if !run_page.is_null() {
        // SAFETY: the page is mapped while the pointer is set, and the handler runs on the thread that owns it.
        unsafe { ptr::addr_of_mut!((*run_page).immediate_exit).write_volatile(1) };
    }
}
