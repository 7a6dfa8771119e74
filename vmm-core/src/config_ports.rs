//! Ports 0xcf8 to 0xcff: PCI configuration mechanism #1 (PCI 3.0 section 3.2.2.3.2), and among
//! them the reset control register 0xcf9.
//!
//! Everything is reachable through ECAM, which Linux uses in the end; but it looks for a host
//! bridge here first, before it has read the ACPI tables.

use std::sync::{Arc, Mutex};

use crate::bus::BusDevice;
use crate::power::ResetControl;

/// The first port.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// All ports.
pub const CONFIG_PORTS_LEN: u64 = 8;

const RESET_CONTROL: u64 = 1;
const CONFIG_DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;

/// The address and data registers.
pub struct ConfigPorts {
    address: Mutex<u32>,
    ecam: Arc<dyn BusDevice>,
    reset_control: ResetControl,
}

impl ConfigPorts {
    /// Ports through which the guest reaches `ecam`.
    pub fn new(ecam: Arc<dyn BusDevice>, reset_control: ResetControl) -> Self {
        Self {
            address: Mutex::default(),
            ecam,
            reset_control,
        }
    }

    /// As at power-on.
    pub fn reset(&self) {
        self.set_address(0);
    }

    /// Where in ECAM the byte at port `offset` of the data register is.
    fn ecam_offset(&self, offset: u64) -> Option<u64> {
        let address = self.address();
        let function = u64::from(address >> 8 & 0xffff);
        let register = u64::from(address & 0xfc);
        (address & ENABLE != 0).then_some(function << 12 | register | (offset - CONFIG_DATA))
    }

    fn address(&self) -> u32 {
        *self.address.lock().expect("no panic while locked")
    }

    fn set_address(&self, address: u32) {
        *self.address.lock().expect("no panic while locked") = address;
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address().to_le_bytes()),
            (RESET_CONTROL, 1) => self.reset_control.read(0, data),
            (CONFIG_DATA.., _) => {
                if let Some(offset) = self.ecam_offset(offset) {
                    self.ecam.read(offset, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.set_address(u32::from_le_bytes([a, b, c, d])),
            (RESET_CONTROL, [_]) => self.reset_control.write(0, data),
            (CONFIG_DATA.., _) => {
                if let Some(offset) = self.ecam_offset(offset) {
                    self.ecam.write(offset, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::{PowerLatch, PowerRequest};

    /// Answers each byte with the low byte of its offset; remembers writes.
    #[derive(Default)]
    struct Ecam(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Ecam {
        fn read(&self, offset: u64, data: &mut [u8]) {
            (offset..).zip(data).for_each(|(at, byte)| *byte = at as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn ports() -> (ConfigPorts, Arc<Ecam>, Arc<PowerLatch>) {
        let (ecam, latch) = (Arc::new(Ecam::default()), Arc::new(PowerLatch::default()));
        let ports = ConfigPorts::new(ecam.clone(), ResetControl(latch.clone()));
        (ports, ecam, latch)
    }

    fn read<const N: usize>(ports: &ConfigPorts, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        ports.read(offset, &mut data);
        data
    }

    #[test]
    fn data_register_reaches_the_addressed_function() {
        let (ports, ecam, _) = ports();
        // Bus 0, device 3, function 0, register 0x10.
        ports.write(0, &0x8000_1810u32.to_le_bytes());
        assert_eq!(read(&ports, 0), 0x8000_1810u32.to_le_bytes());
        assert_eq!(read(&ports, 4), [0x10, 0x11, 0x12, 0x13]);
        assert_eq!(read(&ports, 6), [0x12, 0x13]);
        ports.write(5, &[7]);
        assert_eq!(*ecam.0.lock().unwrap(), [(0x1_8011, vec![7])]);
    }

    #[test]
    fn without_enable_bit_nothing_is_reached() {
        let (ports, ecam, _) = ports();
        ports.write(0, &0x1810u32.to_le_bytes());
        assert_eq!(read(&ports, 4), [0xff; 4]);
        ports.write(4, &[1, 2, 3, 4]);
        assert!(ecam.0.lock().unwrap().is_empty());
        // Linux writes a byte here when it looks for mechanism #1.
        ports.write(3, &[1]);
        assert_eq!(read(&ports, 0), 0x1810u32.to_le_bytes());
    }

    #[test]
    fn byte_between_is_the_reset_control_register() {
        let (ports, _, latch) = ports();
        ports.write(0, &0x8000_0606u32.to_le_bytes());
        assert_eq!(latch.take(), None);
        ports.write(1, &[6]);
        assert_eq!(latch.take(), Some(PowerRequest::Reset));
    }
}
