//! [`InterruptFabric`] on KVM: irqfds with MSI routes, doorbells on ioeventfds.
//!
//! A masked route has its irqfd detached but keeps its entry in the routing table. Raising it
//! then only counts in the eventfd, which is the pending bit; attaching it again makes KVM
//! deliver what is pending. Masking and unmasking thereby cost no change of the table, which
//! would wait for all vCPUs.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::interrupts::{InterruptFabric, MsiMessage, MsiRoute};
use crate::layout::FIRST_MSI_GSI;

/// Routes for 31 functions with 64 queues each, and far below KVM's limit of 4096 GSIs.
const MAX_MSI_ROUTES: usize = 2048;

/// All interrupt routes of one VM.
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Vec<Slot>>,
}

/// One MSI route; its index plus [`FIRST_MSI_GSI`] is its GSI.
#[derive(Clone, Copy, Default)]
struct Slot {
    message: Option<MsiMessage>,
    attached: bool,
}

impl KvmInterrupts {
    /// For `vm`, whose interrupt controllers exist.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            routes: Mutex::default(),
        }
    }

    /// Ties `irqfd` to a pin of the IOAPIC: signalling it is an edge.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn add_pin(&self, irqfd: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.vm.register_irqfd(irqfd, gsi)?)
    }

    fn write_table(&self, slots: &[Slot]) -> io::Result<()> {
        let entries = table(slots);
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::StorageFull)?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }
}

impl InterruptFabric for KvmInterrupts {
    fn add_msi_route(&self, _irqfd: &EventFd) -> io::Result<MsiRoute> {
        let mut slots = self.routes.lock().expect("no panic while locked");
        if slots.len() == MAX_MSI_ROUTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        slots.push(Slot::default());
        Ok(MsiRoute(FIRST_MSI_GSI + slots.len() as u32 - 1))
    }

    fn set_msi_route(
        &self,
        route: MsiRoute,
        irqfd: &EventFd,
        message: Option<MsiMessage>,
    ) -> io::Result<()> {
        let mut slots = self.routes.lock().expect("no panic while locked");
        let index = route
            .0
            .checked_sub(FIRST_MSI_GSI)
            .map_or(usize::MAX, |index| index as usize);
        let old = *slots.get(index).ok_or(io::ErrorKind::NotFound)?;
        let Some(message) = message else {
            if old.attached {
                self.vm.unregister_irqfd(irqfd, route.0)?;
                slots[index].attached = false;
            }
            return Ok(());
        };
        if old.message != Some(message) {
            slots[index].message = Some(message);
            if let Err(err) = self.write_table(&slots) {
                slots[index].message = old.message;
                return Err(err);
            }
        }
        if !old.attached {
            self.vm.register_irqfd(irqfd, route.0)?;
            slots[index].attached = true;
        }
        Ok(())
    }

    fn add_doorbell(&self, gpa: u64, doorbell: &EventFd) -> io::Result<()> {
        Ok(self
            .vm
            .register_ioevent(doorbell, &IoEventAddress::Mmio(gpa), NoDatamatch)?)
    }

    fn remove_doorbell(&self, gpa: u64, doorbell: &EventFd) -> io::Result<()> {
        Ok(self
            .vm
            .unregister_ioevent(doorbell, &IoEventAddress::Mmio(gpa), NoDatamatch)?)
    }
}

/// The whole routing table: the pins KVM routes by default, and every route that has a message.
fn table(slots: &[Slot]) -> Vec<kvm_irq_routing_entry> {
    let pics = (0..16).map(|gsi| match gsi {
        0..8 => pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    let ioapic = (0..FIRST_MSI_GSI).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    let msis = slots
        .iter()
        .zip(FIRST_MSI_GSI..)
        .filter_map(|(slot, gsi)| Some(msi(gsi, slot.message?)));
    pics.chain(ioapic).chain(msis).collect()
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_holds_the_default_pins_and_only_programmed_routes() {
        let message = MsiMessage {
            address: 0x1_fee0_0000,
            data: 0x4021,
        };
        let slots = [
            Slot::default(),
            Slot {
                message: Some(message),
                attached: false,
            },
        ];
        let entries = table(&slots);
        assert_eq!(entries.len(), 16 + 24 + 1);
        assert_eq!(entries.iter().filter(|entry| entry.gsi == 4).count(), 2);
        let last = entries.last().unwrap();
        assert_eq!(
            (last.gsi, last.type_),
            (FIRST_MSI_GSI + 1, KVM_IRQ_ROUTING_MSI)
        );
        // SAFETY: `msi` is the member that the entry's type selects.
        let msi = unsafe { last.u.msi };
        assert_eq!(
            (msi.address_lo, msi.address_hi, msi.data),
            (0xfee0_0000, 1, 0x4021)
        );
    }
}
