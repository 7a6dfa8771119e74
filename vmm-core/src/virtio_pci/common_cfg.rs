//! The common configuration structure (Virtio 1.2 section 4.1.4.3) and the device status state
//! machine behind it (section 2.1).
//!
//! ```text
//!   0 ─ACKNOWLEDGE─DRIVER─▶ features ─FEATURES_OK─▶ queues ─DRIVER_OK─▶ live
//!   ▲                                                                   │ driver writes 0
//!   └────────────── rings stand still ◀────── resetting ◀───────────────┘
//! ```
//!
//! While `resetting`, the status still reads as before: a driver waits for 0, and so knows that
//! nobody touches its rings any more, yet no vCPU is ever held up.

use serde::{Deserialize, Serialize};
use vhost_user::frontend::{Activation, MemoryTable, QueueState, first_base};
use vhost_user::ring::RingFormat;

/// Bytes of the structure; `queue_notify_data` and `queue_reset` belong to features that are
/// not offered.
pub(super) const LEN: u32 = 0x38;

/// VIRTIO_F_VERSION_1.
pub(super) const F_VERSION_1: u64 = 1 << 32;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// What the driver set up, as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CommonCfg {
    offered_features: u64,
    /// Those of the offered ones that the backend knows nothing of.
    config_features: u64,
    max_queue_size: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    resetting: bool,
    config_generation: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Queue {
    size: u16,
    enabled: bool,
    desc_gpa: u64,
    driver_gpa: u64,
    device_gpa: u64,
}

/// What a write asks of the device behind the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Bind configuration changes to a vector.
    ConfigVector(u16),
    /// Bind a queue to a vector.
    QueueVector {
        queue: u16,
        vector: u16,
    },
    /// A queue was enabled: it needs its doorbell.
    QueueEnabled,
    /// DRIVER_OK: serve the rings.
    Activate,
    /// The driver wrote 0: stop the rings, then call [`CommonCfg::reset`].
    Reset,
}

/// Vectors live with MSI-X; the registers that show them are filled in from there.
#[derive(Clone, Copy)]
pub(super) struct Vectors {
    pub(super) config: u16,
    pub(super) selected_queue: u16,
}

impl CommonCfg {
    /// The driver finds the backend's features and those of a configuration space that is not the
    /// backend's.
    pub(super) fn new(
        backend_features: u64,
        config_features: u64,
        queues: u16,
        max_queue_size: u16,
    ) -> Self {
        let mut common = Self {
            offered_features: backend_features | config_features,
            config_features,
            max_queue_size,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            resetting: false,
            config_generation: 0,
            queue_select: 0,
            queues: vec![Queue::default(); usize::from(queues)],
        };
        common.reset();
        common
    }

    /// Fills `data` from `offset` on.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], vectors: Vectors) {
        let registers = self.registers(vectors);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start
            .checked_add(data.len())
            .and_then(|end| registers.get(start..end))
        {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }

    /// Takes a write of one register, or of half of a 64-bit one.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (value16, value32) = (value as u16, value as u32);
        if self.resetting {
            return Effect::None;
        }
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value32,
            (0x08, 4) => self.driver_feature_select = value32,
            (0x0c, 4) => self.write_driver_feature(value32),
            (0x10, 2) => return Effect::ConfigVector(value16),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value16,
            (0x1a, 2) if self.selected_queue().is_some() => {
                return Effect::QueueVector {
                    queue: self.queue_select,
                    vector: value16,
                };
            }
            (0x18..=0x37, _) => return self.write_queue(offset, value, data.len()),
            _ => {}
        }
        Effect::None
    }

    pub(super) fn queue_select(&self) -> u16 {
        self.queue_select
    }

    /// Queues that the driver enabled since the last reset.
    pub(super) fn is_enabled(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(|queue| queue.enabled)
    }

    pub(super) fn driver_ok(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    /// The driver relies on the device, and neither of them has given up the other.
    pub(super) fn is_live(&self) -> bool {
        self.driver_ok() && !self.resetting && self.status & STATUS_NEEDS_RESET == 0
    }

    /// The rings are being stopped; the status reads as before until [`CommonCfg::reset`].
    pub(super) fn begin_reset(&mut self) {
        self.resetting = true;
    }

    pub(super) fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// The state after power-on. The configuration generation goes on counting.
    pub(super) fn reset(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.resetting = false;
        self.queue_select = 0;
        self.queues.fill(Queue {
            size: self.max_queue_size,
            ..Queue::default()
        });
    }

    /// The device cannot go on before the driver resets it.
    pub(super) fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    pub(super) fn bump_generation(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    /// What to serve: the enabled ones of the first `backend_queues` queues. `None` if the driver
    /// put a ring outside memory.
    pub(super) fn activation(
        &self,
        backend_queues: u16,
        memory: &MemoryTable,
    ) -> Option<Activation> {
        let queues = (0..backend_queues)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.enabled);
        let format = self.ring_format();
        let queues = queues.map(|(index, queue)| {
            let is_in = queue.is_in(memory, format);
            is_in.then(|| queue.state(index, format))
        });
        Some(Activation {
            features: self.driver_features & !self.config_features,
            queues: queues.collect::<Option<_>>()?,
        })
    }

    fn ring_format(&self) -> RingFormat {
        RingFormat::of(self.driver_features)
    }

    fn registers(&self, vectors: Vectors) -> [u8; LEN as usize] {
        let mut registers = [0; LEN as usize];
        let mut put = |offset: usize, bytes: &[u8]| {
            registers[offset..offset + bytes.len()].copy_from_slice(bytes)
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.offered_features, self.device_feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &vectors.config.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, self.config_generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected_queue() {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &vectors.selected_queue.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.desc_gpa.to_le_bytes());
            put(0x28, &queue.driver_gpa.to_le_bytes());
            put(0x30, &queue.device_gpa.to_le_bytes());
        }
        registers
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn write_driver_feature(&mut self, value: u32) {
        let shift = match self.driver_feature_select {
            select @ 0..=1 => select * 32,
            _ => return,
        };
        if self.status & STATUS_FEATURES_OK == 0 {
            self.driver_features =
                self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    fn write_status(&mut self, mut value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let acceptable = self.driver_features & !self.offered_features == 0
            && self.driver_features & F_VERSION_1 != 0;
        if self.status & STATUS_FEATURES_OK == 0 && !acceptable {
            value &= !STATUS_FEATURES_OK;
        }
        if value & STATUS_FEATURES_OK == 0 {
            value &= !STATUS_DRIVER_OK;
        }
        let goes_live = !self.driver_ok() && value & STATUS_DRIVER_OK != 0;
        self.status = value | self.status & STATUS_NEEDS_RESET;
        if goes_live {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    fn write_queue(&mut self, offset: u64, value: u64, len: usize) -> Effect {
        let max_size = self.max_queue_size;
        let format = self.ring_format();
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Effect::None;
        };
        if queue.enabled {
            return Effect::None;
        }
        match (offset, len) {
            (0x18, 2) => {
                let size = value as u16;
                let is_possible = match format {
                    RingFormat::Split => size.is_power_of_two(),
                    RingFormat::Packed => size > 0,
                };
                if is_possible && size <= max_size {
                    queue.size = size;
                }
            }
            (0x1c, 2) if value == 1 => {
                queue.enabled = true;
                return Effect::QueueEnabled;
            }
            (0x20 | 0x24, 4) | (0x20, 8) => set_part(&mut queue.desc_gpa, offset, value, len),
            (0x28 | 0x2c, 4) | (0x28, 8) => set_part(&mut queue.driver_gpa, offset, value, len),
            (0x30 | 0x34, 4) | (0x30, 8) => set_part(&mut queue.device_gpa, offset, value, len),
            _ => {}
        }
        Effect::None
    }
}

impl Queue {
    /// Alignment and lengths of Virtio 1.2 section 2.7, with room for the event indexes, and 2.8.
    fn is_in(&self, memory: &MemoryTable, format: RingFormat) -> bool {
        let size = u64::from(self.size);
        let (driver_area, device_area) = match format {
            RingFormat::Split => ((6 + 2 * size, 2), (6 + 8 * size, 4)),
            RingFormat::Packed => ((4, 4), (4, 4)),
        };
        let areas = [
            (self.desc_gpa, (16 * size, 16)),
            (self.driver_gpa, driver_area),
            (self.device_gpa, device_area),
        ];
        areas
            .iter()
            .all(|(gpa, (len, align))| gpa.is_multiple_of(*align) && memory.contains(*gpa, *len))
    }

    fn state(&self, index: u16, format: RingFormat) -> QueueState {
        QueueState {
            index,
            size: self.size,
            desc_gpa: self.desc_gpa,
            driver_gpa: self.driver_gpa,
            device_gpa: self.device_gpa,
            base: Some(first_base(format)),
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Writes all of a 64-bit register, or the half that `offset` names.
fn set_part(register: &mut u64, offset: u64, value: u64, len: usize) {
    *register = match (len, offset & 4) {
        (8, _) => value,
        (_, 0) => *register & !0xffff_ffff | value,
        _ => *register & 0xffff_ffff | value << 32,
    };
}
