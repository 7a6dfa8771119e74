//! Which system calls each kind of thread may make; every other one kills the process.
//!
//! | threads | beyond memory, locks, clocks and open descriptors |
//! |---|---|
//! | vCPU | the vCPU's KVM calls, interrupt routes and doorbells, hanging up on backends |
//! | devices | Unix sockets to backends, shared memory, interrupt routes and doorbells |
//! | control | Unix sockets, reading guest memory's file, removing the control socket's file, doorbells (for faults that are armed) |
//! | stdio | nothing |
//! | main | interrupt controllers and routes, guest memory, hanging up on backends, the exit file |

use sandbox::Achieved;
use sandbox::seccomp::{Profile, SeccompError, Syscalls, sets};

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Keeps the connections to backends.
    Devices,
    /// Serves the control socket.
    Control,
    /// Copies the console to or from standard streams.
    Stdio,
    /// Drives the machine.
    Main,
}

impl ThreadKind {
    /// Filters the calling thread, and those that it starts, for good.
    ///
    /// # Errors
    /// The kernel refused the filter.
    pub fn confine(self) -> Result<Achieved, SeccompError> {
        let (name, syscalls) = match self {
            Self::Vcpu => (
                "vmm-core-vcpu",
                sets::base()
                    .with(vcpu())
                    .with(interrupts())
                    .with(hanging_up()),
            ),
            Self::Devices => {
                let sockets = sets::unix_sockets()
                    .with(sets::shared_memory())
                    .with(sets::file_io());
                (
                    "vmm-core-devices",
                    sets::base().with(sockets).with(interrupts()),
                )
            }
            Self::Control => {
                let socket_file =
                    Syscalls::new().allow(&[libc::SYS_unlink, libc::SYS_lstat, libc::SYS_statx]);
                // How far rings are is read from guest memory's file.
                let memory = Syscalls::new().allow(&[libc::SYS_pread64]);
                (
                    "vmm-core-control",
                    sets::base()
                        .with(sets::tokio())
                        .with(socket_file)
                        .with(memory)
                        // Whoever arms faults of kicks takes doorbells from KVM.
                        .with(interrupts()),
                )
            }
            Self::Stdio => ("vmm-core-stdio", sets::base()),
            Self::Main => {
                let machine = interrupts()
                    .with(irqchip())
                    .with(hanging_up())
                    .with(sets::file_io())
                    .with(sets::files());
                ("vmm-core-main", sets::base().with(machine).with(terminal()))
            }
        };
        Profile::new(name, syscalls).apply_to_this_thread()
    }
}

/// `_IO(KVMIO, nr)` and its kin (Linux `include/uapi/linux/kvm.h`).
const fn kvm_io(direction: u64, nr: u64, size_bytes: u64) -> u64 {
    const KVMIO: u64 = 0xae;
    direction << 30 | size_bytes << 16 | KVMIO << 8 | nr
}

const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// Running a vCPU and putting it into its power-on state.
fn vcpu() -> Syscalls {
    Syscalls::new().allow_ioctls(&[
        kvm_io(NONE, 0x80, 0),     // KVM_RUN
        kvm_io(NONE, 0xad, 0),     // KVM_KVMCLOCK_CTRL
        kvm_io(WRITE, 0x82, 144),  // KVM_SET_REGS
        kvm_io(READ, 0x83, 312),   // KVM_GET_SREGS
        kvm_io(WRITE, 0x84, 312),  // KVM_SET_SREGS
        kvm_io(WRITE, 0x89, 8),    // KVM_SET_MSRS
        kvm_io(WRITE, 0x8f, 1024), // KVM_SET_LAPIC
        kvm_io(WRITE, 0x99, 4),    // KVM_SET_MP_STATE
        kvm_io(WRITE, 0xa0, 64),   // KVM_SET_VCPU_EVENTS
        kvm_io(WRITE, 0xa2, 128),  // KVM_SET_DEBUGREGS
        kvm_io(WRITE, 0xa5, 4096), // KVM_SET_XSAVE
        kvm_io(WRITE, 0xa7, 392),  // KVM_SET_XCRS
    ])
}

/// What PCI functions do when the guest programs MSI-X or moves a BAR.
fn interrupts() -> Syscalls {
    Syscalls::new().allow_ioctls(&[
        kvm_io(WRITE, 0x6a, 8),  // KVM_SET_GSI_ROUTING
        kvm_io(WRITE, 0x76, 32), // KVM_IRQFD
        kvm_io(WRITE, 0x79, 64), // KVM_IOEVENTFD
    ])
}

/// Resetting the interrupt controllers.
fn irqchip() -> Syscalls {
    Syscalls::new().allow_ioctls(&[kvm_io(READ, 0x63, 520)]) // KVM_SET_IRQCHIP
}

/// Ending a backend's session, which whoever gives up the device does.
fn hanging_up() -> Syscalls {
    Syscalls::new().allow(&[libc::SYS_shutdown])
}

/// Restoring the terminal.
fn terminal() -> Syscalls {
    Syscalls::new().allow_ioctls(&[libc::TCSETS, libc::TCSETSW, libc::TCSETSF])
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const IN_CHILD: &str = "VMM_CORE_TEST_CONFINE";

    /// A filter cannot be taken off again: a child process, this program once more, puts it on
    /// and makes a system call that is forbidden to it.
    #[test]
    fn forbidden_system_call_kills_the_process_on_every_kind_of_thread() {
        use ThreadKind::{Control, Devices, Main, Stdio, Vcpu};
        let kinds = [Vcpu, Devices, Control, Stdio, Main];
        if let Ok(index) = std::env::var(IN_CHILD) {
            let kind = kinds[index.parse::<usize>().unwrap()];
            sandbox::no_new_privs().unwrap();
            std::thread::spawn(move || {
                kind.confine().unwrap();
                println!("confined");
                // SAFETY: creates a socket or kills the process.
                unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
            })
            .join()
            .unwrap();
            println!("survived");
            return;
        }
        for (index, kind) in kinds.iter().enumerate() {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["forbidden_system_call", "--nocapture", "--test-threads=1"])
                .env(IN_CHILD, index.to_string())
                .env_remove("MORTISE_SECCOMP")
                .output()
                .unwrap();
            let stdout = String::from_utf8_lossy(&output.stdout);
            assert_eq!(
                output.status.signal(),
                Some(libc::SIGSYS),
                "{kind:?}: {stdout}"
            );
            assert!(
                stdout.contains("confined") && !stdout.contains("survived"),
                "{kind:?}: {stdout}"
            );
        }
    }

    /// As above. Whoever gives up a device hangs up: the main thread at the machine's end.
    #[test]
    fn hanging_up_on_a_backend_survives_where_devices_are_given_up() {
        use ThreadKind::{Devices, Main, Vcpu};
        const IN_CHILD: &str = "VMM_CORE_TEST_HANG_UP";
        let kinds = [Vcpu, Devices, Main];
        if let Ok(index) = std::env::var(IN_CHILD) {
            let kind = kinds[index.parse::<usize>().unwrap()];
            sandbox::no_new_privs().unwrap();
            let (here, _there) = std::os::unix::net::UnixStream::pair().unwrap();
            std::thread::spawn(move || {
                kind.confine().unwrap();
                here.shutdown(std::net::Shutdown::Both).unwrap();
            })
            .join()
            .unwrap();
            return;
        }
        for (index, kind) in kinds.iter().enumerate() {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["hanging_up_on", "--nocapture", "--test-threads=1"])
                .env(IN_CHILD, index.to_string())
                .env_remove("MORTISE_SECCOMP")
                .output()
                .unwrap();
            assert!(output.status.success(), "{kind:?}: {output:?}");
        }
    }

    #[test]
    fn request_numbers_are_the_kernel_s() {
        assert_eq!(kvm_io(NONE, 0x80, 0), 0xae80);
        assert_eq!(kvm_io(WRITE, 0x76, 32), 0x4020_ae76);
        assert_eq!(kvm_io(READ, 0x63, 520), 0x8208_ae63);
    }
}
