//! State of the in-kernel PIC and IOAPIC, captured at power-on and put back at reset.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::{KvmError, failed_to};

/// Registers of both PICs and of the IOAPIC.
pub struct IrqchipState([kvm_irqchip; 3]);

impl IrqchipState {
    /// Reads the registers from `vm`.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn capture(vm: &VmFd) -> Result<Self, KvmError> {
        let mut chips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]
        .map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut chips {
            vm.get_irqchip(chip)
                .map_err(failed_to("read an interrupt controller"))?;
        }
        Ok(Self(chips))
    }

    /// Writes the registers back to `vm`.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in &self.0 {
            vm.set_irqchip(chip)
                .map_err(failed_to("write an interrupt controller"))?;
        }
        Ok(())
    }
}
