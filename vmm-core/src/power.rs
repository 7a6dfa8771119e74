//! How the guest resets itself or switches itself off: ACPI sleep and reset registers, the
//! PC's reset control register and the keyboard controller's reset line.
//!
//! Sources: ACPI 6.5 sections 4.8.3.7 (sleep control, sleep status) and 4.8.3.6 (reset); Intel
//! ICH manuals for port 0xcf9; IBM PC/AT for port 0x64.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;
use crate::layout::ACPI_PORT;

/// Offsets from [`crate::layout::ACPI_PORT`].
pub const SLEEP_CONTROL: u64 = 0;
/// Always 0: no wake.
pub const SLEEP_STATUS: u64 = 1;
/// Takes [`RESET_VALUE`].
pub const RESET: u64 = 2;
/// All three registers.
pub const ACPI_PORTS_LEN: u64 = 3;
/// What resets the machine when written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of `_S5`.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The keyboard controller's command and status register.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;

const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0x7;
const SLEEP_ENABLE: u8 = 1 << 5;
const RESET_CPU: u8 = 1 << 2;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// What firmware has at the reset vector, in real mode: a write to the reset register. Linux jumps
/// there when it finds hardware-reduced ACPI, expects EFI to reset the machine, and finds none.
pub const RESET_STUB: [u8; 10] = {
    let [low, high] = (ACPI_PORT + RESET as u16).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; again: cli; hlt; jmp again
    [
        0xba,
        low,
        high,
        0xb0,
        RESET_VALUE,
        0xee,
        0xfa,
        0xf4,
        0xeb,
        0xfc,
    ]
};

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Hard reset.
    Reset,
    /// Off.
    Shutdown,
}

/// Holds the last request until the vCPU thread that dispatched the write takes it.
#[derive(Default)]
pub struct PowerLatch(AtomicU8);

impl PowerLatch {
    /// The request, once.
    pub fn take(&self) -> Option<PowerRequest> {
        // Almost every port write finds nothing here: a plain load is cheaper than an exchange.
        if self.0.load(Ordering::Relaxed) == 0 {
            return None;
        }
        match self.0.swap(0, Ordering::SeqCst) {
            1 => Some(PowerRequest::Reset),
            2 => Some(PowerRequest::Shutdown),
            _ => None,
        }
    }

    fn set(&self, request: PowerRequest) {
        let code = match request {
            PowerRequest::Reset => 1,
            PowerRequest::Shutdown => 2,
        };
        self.0.store(code, Ordering::SeqCst);
    }
}

/// The registers of hardware-reduced ACPI.
pub struct AcpiRegisters(pub Arc<PowerLatch>);

impl BusDevice for AcpiRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE => {
                self.0.set(PowerRequest::Shutdown)
            }
            RESET if value == RESET_VALUE => self.0.set(PowerRequest::Reset),
            _ => {}
        }
    }
}

/// Port 0xcf9, which lies among those of [`crate::config_ports`].
pub struct ResetControl(pub Arc<PowerLatch>);

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if matches!(data, [value] if value & RESET_CPU != 0) {
            self.0.set(PowerRequest::Reset);
        }
    }
}

/// Port 0x64: nothing of a keyboard controller but its reset line.
pub struct KeyboardReset(pub Arc<PowerLatch>);

impl BusDevice for KeyboardReset {
    /// Status: input and output buffers are empty, so that the guest does not wait.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [KEYBOARD_PULSE_RESET] {
            self.0.set(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s5_needs_both_sleep_type_and_enable() {
        let latch = Arc::new(PowerLatch::default());
        let registers = AcpiRegisters(latch.clone());
        for (offset, value) in [
            (SLEEP_CONTROL, 5 << 2),
            (SLEEP_CONTROL, 1 << 5),
            (SLEEP_STATUS, 5 << 2 | 1 << 5),
        ] {
            registers.write(offset, &[value]);
            assert_eq!(latch.take(), None, "{value:#x} at {offset}");
        }
        registers.write(SLEEP_CONTROL, &[5 << 2 | 1 << 5]);
        assert_eq!(latch.take(), Some(PowerRequest::Shutdown));
        assert_eq!(latch.take(), None);
    }

    #[test]
    fn three_registers_reset() {
        let latch = Arc::new(PowerLatch::default());
        AcpiRegisters(latch.clone()).write(RESET, &[RESET_VALUE]);
        assert_eq!(latch.take(), Some(PowerRequest::Reset));
        ResetControl(latch.clone()).write(0, &[2]);
        assert_eq!(latch.take(), None);
        ResetControl(latch.clone()).write(0, &[6]);
        assert_eq!(latch.take(), Some(PowerRequest::Reset));
        KeyboardReset(latch.clone()).write(0, &[0xd1]);
        assert_eq!(latch.take(), None);
        KeyboardReset(latch.clone()).write(0, &[0xfe]);
        assert_eq!(latch.take(), Some(PowerRequest::Reset));
    }
}
