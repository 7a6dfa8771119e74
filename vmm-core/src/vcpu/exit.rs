//! One `KVM_RUN`, decoded into what this machine has to do about it.

use std::io;

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

/// Why a vCPU left the guest.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `in`: each element of `size` bytes of `data` is one access.
    PortRead {
        /// Port number.
        port: u16,
        /// Bytes of one access.
        size: usize,
        /// To fill; more than one element for string instructions.
        data: &'a mut [u8],
    },
    /// `out`.
    PortWrite {
        /// Port number.
        port: u16,
        /// Bytes of one access.
        size: usize,
        /// What the guest wrote; more than one element for string instructions.
        data: &'a [u8],
    },
    /// A load from an address without memory.
    MmioRead {
        /// Guest physical address.
        gpa: u64,
        /// To fill.
        data: &'a mut [u8],
    },
    /// A store to an address without memory.
    MmioWrite {
        /// Guest physical address.
        gpa: u64,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// A signal came, or `immediate_exit` was set; pending I/O is complete.
    Interrupted,
    /// Nothing to do but run again.
    Again,
    /// Triple fault.
    TripleFault,
    /// The guest asked for a reset by a paravirtual interface.
    Reset,
    /// The guest asked to be switched off by a paravirtual interface.
    Shutdown,
    /// The vCPU cannot go on.
    Failed(String),
}

/// Runs the guest until it needs something.
///
/// # Errors
/// `KVM_RUN`'s error.
pub fn run(vcpu: &mut VcpuFd) -> io::Result<Exit<'_>> {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(err) if err.errno() == libc::EINTR => return Ok(Exit::Interrupted),
        Err(err) if err.errno() == libc::EAGAIN => return Ok(Exit::Again),
        Err(err) => return Err(err.into()),
    };
    Ok(match exit {
        VcpuExit::IoIn(port, data) => Exit::PortRead {
            port,
            size: access_size(run, data.len()),
            data,
        },
        VcpuExit::IoOut(port, data) => Exit::PortWrite {
            port,
            size: access_size(run, data.len()),
            data,
        },
        VcpuExit::MmioRead(gpa, data) => Exit::MmioRead { gpa, data },
        VcpuExit::MmioWrite(gpa, data) => Exit::MmioWrite { gpa, data },
        VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => {
            Exit::Again
        }
        VcpuExit::Shutdown => Exit::TripleFault,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::Shutdown,
        VcpuExit::InternalError => Exit::Failed(internal_error(run)),
        VcpuExit::FailEntry(reason, cpu) => Exit::Failed(format!(
            "the processor refused to enter the guest (reason {reason:#x} on host CPU {cpu})"
        )),
        other => Exit::Failed(format!(
            "KVM left the guest for a reason that is not handled: {other:?}"
        )),
    })
}

/// Width of one access of a port I/O exit, never 0 and never more than `len`.
fn access_size(run: *const kvm_run, len: usize) -> usize {
    // SAFETY: `run` points into the vCPU's mapping, which outlives the exit, and after KVM_EXIT_IO the kernel has
    // filled `io`, apart from which plain bytes are read.
    let size = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(size).clamp(1, len.max(1))
}

fn internal_error(run: *const kvm_run) -> String {
    // SAFETY: as in `access_size`; after KVM_EXIT_INTERNAL_ERROR the kernel has filled `internal`.
    let internal = unsafe { (*run).__bindgen_anon_1.internal };
    let what = match internal.suberror {
        1 => "an instruction cannot be emulated",
        2 => "exceptions while delivering exceptions",
        3 => "an event could not be delivered",
        4 => "an unexpected exit of the processor",
        _ => "an internal error",
    };
    let data = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
    format!(
        "KVM stopped the guest: {what} (suberror {}, data {data:x?})",
        internal.suberror
    )
}
