//! Configuration space of one function: type 0 header, one 64-bit memory BAR, capabilities
//! (PCI 3.0 chapter 6).
//!
//! Every byte has a mask of the bits that the guest may write; BAR sizing follows from the BAR's
//! mask by itself. What a register *does* is up to the function that owns the space.

const LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Memory, 64 bits wide, not prefetchable.
const BAR_MEMORY_64: u8 = 0b100;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and programming interface, from high to low byte.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

impl Identity {
    /// A host bridge of no particular make: Linux binds no driver and applies no quirk to it.
    pub const HOST_BRIDGE: Self = Self {
        vendor: 0x1b36,
        device: 0x0008,
        revision: 0,
        class: 0x06_00_00,
        subsystem_vendor: 0,
        subsystem: 0,
    };
}

/// The first 256 bytes of configuration space; the extended rest reads as zeros.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    has_bar: bool,
    /// Where the next capability goes, and the pointer that must then lead to it.
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A space with a header and nothing else.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            has_bar: false,
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES_POINTER,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        space
    }

    /// Adds a 64-bit memory BAR of `len` bytes as BAR0 and BAR1.
    ///
    /// # Panics
    /// If `len` is no power of two of at least a page.
    #[must_use]
    pub fn with_bar(mut self, len: u64) -> Self {
        assert!(
            len.is_power_of_two() && len >= 4096,
            "a BAR of {len:#x} bytes"
        );
        self.has_bar = true;
        self.bytes[BAR0] = BAR_MEMORY_64;
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(len - 1)).to_le_bytes());
        self
    }

    /// Appends a capability to the list: `body` follows its ID and next pointer, `writable` has
    /// the guest's bits of `body`. Returns the capability's offset.
    ///
    /// # Panics
    /// If the space is full or the lengths differ.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        assert_eq!(
            body.len(),
            writable.len(),
            "each byte of a capability has a mask"
        );
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= LEN, "capabilities of {end:#x} bytes");
        self.bytes[self.last_pointer] = at as u8;
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.writable[at + 2..end].copy_from_slice(writable);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at as u16
    }

    /// Fills `data` from `offset` on.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        match self.bytes.get(offset..offset + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }

    /// Takes the writable bits of `data`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            let Some(mask) = self.writable.get(at) else {
                return;
            };
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// A little-endian 16-bit register.
    #[must_use]
    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A little-endian 32-bit register.
    #[must_use]
    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Puts the BAR at `gpa` and switches memory decoding on, as firmware does.
    pub fn place_bar(&mut self, gpa: u64) {
        self.write(BAR0 as u16, &gpa.to_le_bytes());
        self.write(COMMAND as u16, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Where the BAR is; `None` without one or while memory decoding is off.
    #[must_use]
    pub fn bar_gpa(&self) -> Option<u64> {
        let decodes = self.read_u16(COMMAND as u16) & COMMAND_MEMORY != 0;
        let low = u64::from(self.read_u32(BAR0 as u16) & !0xf);
        let high = u64::from(self.read_u32(BAR0 as u16 + 4)) << 32;
        (self.has_bar && decodes).then_some(high | low)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
