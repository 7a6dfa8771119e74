//! A vCPU's whole state as KVM knows it: captured at power-on, put back at reset.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::kvm::{KvmError, failed_to};

/// The time stamp counter runs on through a reset, the same on all vCPUs: writing it would part them.
const MSR_IA32_TSC: u32 = 0x10;

/// Registers, interrupt controller and model-specific registers of one vCPU.
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl VcpuState {
    /// Reads the state of `vcpu`, which must not be running; `msr_indices` from [`msr_indices`].
    ///
    /// # Errors
    /// An ioctl's error.
    pub fn capture(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<Self, KvmError> {
        Ok(Self {
            regs: vcpu
                .get_regs()
                .map_err(failed_to("read a vCPU's registers"))?,
            sregs: vcpu
                .get_sregs()
                .map_err(failed_to("read a vCPU's special registers"))?,
            xsave: Box::new(
                vcpu.get_xsave()
                    .map_err(failed_to("read a vCPU's extended state"))?,
            ),
            xcrs: vcpu
                .get_xcrs()
                .map_err(failed_to("read a vCPU's extended control registers"))?,
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(failed_to("read a vCPU's debug registers"))?,
            lapic: vcpu
                .get_lapic()
                .map_err(failed_to("read a vCPU's local APIC"))?,
            msrs: read_msrs(vcpu, msr_indices),
            events: vcpu
                .get_vcpu_events()
                .map_err(failed_to("read a vCPU's pending events"))?,
            mp_state: vcpu
                .get_mp_state()
                .map_err(failed_to("read a vCPU's run state"))?,
        })
    }

    /// Writes the state to `vcpu`, which must not be running and have no I/O pending.
    ///
    /// # Errors
    /// An ioctl's error.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed_to("write a vCPU's run state"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(failed_to("write a vCPU's special registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(failed_to("write a vCPU's registers"))?;
        // SAFETY: no extended features with state beyond 4 KiB are enabled for the guest, so that KVM reads no more
        // than the structure holds.
        unsafe { vcpu.set_xsave(&self.xsave) }
            .map_err(failed_to("write a vCPU's extended state"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(failed_to("write a vCPU's extended control registers"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(failed_to("write a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(failed_to("write a vCPU's local APIC"))?;
        // After the local APIC, whose timer mode decides what the deadline register means.
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed_to("write a vCPU's pending events"))
    }
}

/// The model-specific registers that make up a vCPU's state.
///
/// # Errors
/// The ioctl's error.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(failed_to("list the model-specific registers"))?;
    Ok(list
        .as_slice()
        .iter()
        .copied()
        .filter(|index| *index != MSR_IA32_TSC)
        .collect())
}

/// KVM lists registers that this processor may lack, and stops at the first it cannot read.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let mut read = Vec::with_capacity(indices.len());
    for &index in indices {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
        if matches!(vcpu.get_msrs(&mut msrs), Ok(1)) {
            read.extend_from_slice(msrs.as_slice());
        }
    }
    read
}

/// Writes `entries` in order; a register that KVM reads but refuses to write is skipped.
pub(super) fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).expect("KVM listed fewer than its own limit");
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(failed_to("write a vCPU's model-specific registers"))?;
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}
