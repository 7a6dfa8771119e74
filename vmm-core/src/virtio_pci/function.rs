//! The device as a PCI function: what reads and writes of configuration space and BAR do.

use super::common_cfg::{Effect, Vectors};
use super::layout::{
    BAR_LEN, COMMON_CFG, DEVICE_CFG, ISR_CFG, MSIX_PBA, MSIX_TABLE, NOTIFY_CFG, PAGE_LEN,
};
use super::{CONFIG_SOURCE, State, VirtioPciDevice};
use crate::pci::Function;

impl Function for VirtioPciDevice {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let access = self.registers.lock().pci.pci_cfg_access(offset);
        if let Some((bar_offset, len)) = access {
            let mut bytes = [0; 4];
            self.read_bar(bar_offset, &mut bytes[..len]);
            let mut state = self.registers.lock();
            let register = state.pci.pci_cfg + 16;
            state.pci.space.write(register, &bytes);
        }
        self.registers.lock().pci.space.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let access = {
            let mut state = self.registers.lock();
            state.pci.space.write(offset, data);
            state.follow_config_space();
            state.pci.pci_cfg_access(offset)
        };
        if let Some((bar_offset, len)) = access {
            let mut bytes = [0; 4];
            {
                let state = self.registers.lock();
                state.pci.space.read(state.pci.pci_cfg + 16, &mut bytes);
            }
            self.write_bar(bar_offset, &bytes[..len]);
        }
    }

    fn bar_len(&self) -> u64 {
        BAR_LEN
    }

    fn place_bar(&self, gpa: u64) {
        let mut state = self.registers.lock();
        state.pci.space.place_bar(gpa);
        state.follow_config_space();
    }

    fn bar_gpa(&self) -> Option<u64> {
        self.registers.lock().pci.space.bar_gpa()
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.registers.lock();
        let within = offset % PAGE_LEN;
        match offset - within {
            COMMON_CFG => {
                let vectors = state.vectors();
                state.common.read(within, data, vectors);
            }
            ISR_CFG => {
                data.fill(0);
                if within == 0 {
                    data[0] = std::mem::take(&mut state.isr);
                }
            }
            DEVICE_CFG => state.read_device_cfg(within, data),
            MSIX_TABLE => state.msix.read_table(within, data),
            MSIX_PBA => state.msix.read_pba(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let mut state = self.registers.lock();
        let within = offset % PAGE_LEN;
        match offset - within {
            COMMON_CFG => {
                let effect = state.common.write(within, data);
                self.apply(effect, &mut state);
            }
            DEVICE_CFG => self.write_device_cfg(&mut state, within, data),
            NOTIFY_CFG => state.doorbells.ring(within),
            MSIX_TABLE => state.msix.write_table(within, data),
            _ => {}
        }
    }
}

impl VirtioPciDevice {
    fn apply(&self, effect: Effect, state: &mut State) {
        match effect {
            Effect::None => {}
            Effect::ConfigVector(vector) => state.msix.set_vector(CONFIG_SOURCE, vector),
            Effect::QueueVector { queue, vector } => state.msix.set_vector(queue + 1, vector),
            Effect::QueueEnabled => state.follow_config_space(),
            Effect::Activate => match state.common.activation(self.backend_queues, &self.memory) {
                Some(activation) => self.link.activate(activation),
                None => {
                    if let Some(withheld) = state.complaints.admit() {
                        tracing::warn!(
                            tag = self.tag,
                            withheld,
                            "the driver put a ring outside memory: the device needs a reset"
                        );
                    }
                    state.common.set_needs_reset();
                    state.signal_config_change();
                }
            },
            Effect::Reset => {
                if self.link.deactivate() {
                    state.reset_driver_state();
                } else {
                    state.common.begin_reset();
                }
            }
        }
    }

    /// The driver sees its write at once; the backend gets it when it can, and what it makes of
    /// it is read back.
    fn write_device_cfg(&self, state: &mut State, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else {
            return;
        };
        let start = offset as usize;
        let Some(bytes) = state.device_cfg.get_mut(start..start + data.len()) else {
            return;
        };
        if self.link.write_config(offset, data) {
            bytes.copy_from_slice(data);
        }
    }
}

impl State {
    /// MSI-X and doorbells follow what the guest wrote to configuration space.
    fn follow_config_space(&mut self) {
        let (enabled, masked) = self.pci.msix_bits();
        self.msix.set_control(enabled, masked);
        let Self {
            doorbells,
            common,
            pci,
            ..
        } = self;
        doorbells.update(pci.space.bar_gpa(), |queue| common.is_enabled(queue));
    }

    fn vectors(&self) -> Vectors {
        let queue = self.common.queue_select();
        Vectors {
            config: self.msix.vector(CONFIG_SOURCE),
            selected_queue: self.msix.vector(queue.saturating_add(1)),
        }
    }

    fn read_device_cfg(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.device_cfg.get(at).copied().unwrap_or(0);
        }
    }
}
