//! Bus 0: which function answers which configuration and memory address.

use std::sync::{Arc, RwLock};

use super::Function;
use super::config_space::{ConfigSpace, Identity};
use crate::bus::BusDevice;

/// Device numbers of one bus (PCI 3.0 section 3.2.2.3).
const SLOTS: usize = 32;
/// Bytes of configuration space of one function (PCI Express 5.0 section 7.2.2).
const ECAM_FUNCTION_LEN: u64 = 4096;

/// A range of guest physical addresses from which BARs are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioWindow {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Where the bus lies in the guest's address space.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The ECAM region, one MiB for bus 0.
    pub ecam: MmioWindow,
    /// Windows for BARs, the preferred one first.
    pub windows: Vec<MmioWindow>,
}

/// Device number of a function on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(pub u8);

/// A range of addresses that the bus answers.
pub struct BusRange {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// What answers there.
    pub device: Arc<dyn BusDevice>,
}

/// No slot or no address space is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusFull {
    /// All device numbers are taken.
    #[error("all 31 PCI slots are taken: attach fewer devices")]
    Slots,
    /// No window has room for the BAR.
    #[error("no PCI window has room for a BAR of {0:#x} bytes: attach fewer devices")]
    Windows(u64),
}

/// Bus 0 and everything on it.
pub struct RootBus {
    layout: Layout,
    inner: RwLock<Slots>,
    host_bridge: ConfigSpace,
}

#[derive(Default)]
struct Slots {
    functions: Vec<Occupied>,
}

struct Occupied {
    function: Arc<dyn Function>,
    firmware_bar_gpa: u64,
}

impl RootBus {
    /// A bus with nothing but the host bridge.
    #[must_use]
    pub fn new(layout: Layout) -> Arc<Self> {
        Arc::new(Self {
            layout,
            inner: RwLock::default(),
            host_bridge: ConfigSpace::new(&Identity::HOST_BRIDGE),
        })
    }

    /// Puts `function` into the next free slot and its BAR into a window.
    ///
    /// # Errors
    /// No slot or no address space is left.
    ///
    /// # Panics
    /// If another thread panicked while it changed the bus.
    pub fn add(&self, function: Arc<dyn Function>) -> Result<Slot, BusFull> {
        let mut slots = self
            .inner
            .write()
            .expect("no thread panics while it changes the bus");
        if slots.functions.len() + 1 >= SLOTS {
            return Err(BusFull::Slots);
        }
        let gpa = self
            .free_gpa(&slots, function.bar_len())
            .ok_or(BusFull::Windows(function.bar_len()))?;
        function.place_bar(gpa);
        slots.functions.push(Occupied {
            function,
            firmware_bar_gpa: gpa,
        });
        Ok(Slot(
            u8::try_from(slots.functions.len()).expect("there are 32 slots"),
        ))
    }

    /// The ranges to put on the MMIO bus: ECAM and each window.
    #[must_use]
    pub fn ranges(self: &Arc<Self>) -> Vec<BusRange> {
        let ecam = BusRange {
            base: self.layout.ecam.base,
            len: self.layout.ecam.len,
            device: Arc::new(Ecam {
                bus: Arc::clone(self),
            }),
        };
        let windows = self.layout.windows.iter().map(|window| BusRange {
            base: window.base,
            len: window.len,
            device: Arc::new(Window {
                bus: Arc::clone(self),
                base: window.base,
            }),
        });
        std::iter::once(ecam).chain(windows).collect()
    }

    /// Puts every BAR back where the firmware (that is us) had put it, as at power-on. The
    /// functions' own state is reset by their own `reset`, before this.
    ///
    /// # Panics
    /// If another thread panicked while it changed the bus.
    pub fn place_bars(&self) {
        let slots = self
            .inner
            .read()
            .expect("no thread panics while it changes the bus");
        for occupied in &slots.functions {
            occupied.function.place_bar(occupied.firmware_bar_gpa);
        }
    }

    /// First address in a window that is aligned to `len` and taken by no firmware-placed BAR.
    fn free_gpa(&self, slots: &Slots, len: u64) -> Option<u64> {
        self.layout.windows.iter().find_map(|window| {
            let window_end = window.base + window.len;
            let past_taken = slots
                .functions
                .iter()
                .filter(|occupied| (window.base..window_end).contains(&occupied.firmware_bar_gpa))
                .map(|occupied| occupied.firmware_bar_gpa + occupied.function.bar_len())
                .max()
                .unwrap_or(window.base);
            let gpa = past_taken.checked_next_multiple_of(len)?;
            (gpa.checked_add(len)? <= window_end).then_some(gpa)
        })
    }

    fn function_in(&self, slot: usize) -> Option<Arc<dyn Function>> {
        let slots = self
            .inner
            .read()
            .expect("no thread panics while it changes the bus");
        slots
            .functions
            .get(slot.checked_sub(1)?)
            .map(|occupied| Arc::clone(&occupied.function))
    }

    /// The function whose BAR holds all of `[gpa, gpa + len)`, and the offset in the BAR.
    fn function_at(&self, gpa: u64, len: usize) -> Option<(Arc<dyn Function>, u64)> {
        let slots = self
            .inner
            .read()
            .expect("no thread panics while it changes the bus");
        slots
            .functions
            .iter()
            .find_map(|Occupied { function, .. }| {
                let offset = gpa.checked_sub(function.bar_gpa()?)?;
                (offset.checked_add(len as u64)? <= function.bar_len())
                    .then(|| (Arc::clone(function), offset))
            })
    }
}

/// PCI Express enhanced configuration access mechanism: 4 KiB for each function.
struct Ecam {
    bus: Arc<RootBus>,
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some((slot, mut register)) = decode_ecam(offset, data.len()) else {
            return;
        };
        for dword in data.chunks_mut(4) {
            match self.bus.function_in(slot) {
                Some(function) => function.read_config(register, dword),
                None if slot == 0 => self.bus.host_bridge.read(register, dword),
                None => {}
            }
            register += u16::try_from(dword.len()).expect("an access has at most 8 bytes");
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((slot, mut register)) = decode_ecam(offset, data.len()) else {
            return;
        };
        let Some(function) = self.bus.function_in(slot) else {
            return;
        };
        for dword in data.chunks(4) {
            function.write_config(register, dword);
            register += u16::try_from(dword.len()).expect("an access has at most 8 bytes");
        }
    }
}

/// Slot and register of an ECAM access; `None` for other buses, functions above 0, and accesses
/// that are not aligned to their length.
fn decode_ecam(offset: u64, len: usize) -> Option<(usize, u16)> {
    let function = offset / ECAM_FUNCTION_LEN;
    let register = offset % ECAM_FUNCTION_LEN;
    let in_bus_0 = function < (SLOTS * 8) as u64 && function.is_multiple_of(8);
    let aligned = len.is_power_of_two() && len <= 8 && register.is_multiple_of(len as u64);
    (in_bus_0 && aligned).then_some(((function / 8) as usize, register as u16))
}

/// A window of BARs.
struct Window {
    bus: Arc<RootBus>,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.bus.function_at(self.base + offset, data.len()) {
            Some((function, offset)) => function.read_bar(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.bus.function_at(self.base + offset, data.len()) {
            function.write_bar(offset, data);
        }
    }
}
