//! Where the structures lie in the BAR, and the capabilities that say so (Virtio 1.2 section
//! 4.1.4).

use crate::pci::{ConfigSpace, Identity};

use super::common_cfg;
use super::config::{DeviceType, MAX_CONFIG_LEN};

/// Length of BAR0.
pub(super) const BAR_LEN: u64 = 0x8000;
/// Each structure has a page, so that its offset within it is `offset % PAGE_LEN`.
pub(super) const PAGE_LEN: u64 = 0x1000;
pub(super) const COMMON_CFG: u64 = 0x0000;
pub(super) const ISR_CFG: u64 = 0x1000;
pub(super) const DEVICE_CFG: u64 = 0x2000;
pub(super) const NOTIFY_CFG: u64 = 0x3000;
pub(super) const MSIX_TABLE: u64 = 0x4000;
pub(super) const MSIX_PBA: u64 = 0x5000;
/// Bytes between the doorbells of two queues.
pub(super) const NOTIFY_OFF_MULTIPLIER: u64 = 4;

const VENDOR_RED_HAT: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const CAP_ID_VENDOR: u8 = 0x09;
const CAP_ID_MSIX: u8 = 0x11;
const CFG_TYPE_COMMON: u8 = 1;
const CFG_TYPE_NOTIFY: u8 = 2;
const CFG_TYPE_ISR: u8 = 3;
const CFG_TYPE_DEVICE: u8 = 4;
const CFG_TYPE_PCI: u8 = 5;

/// Configuration space of a virtio function, and where its active registers are.
pub(super) struct VirtioSpace {
    pub(super) space: ConfigSpace,
    /// Offset of the MSI-X message control register.
    pub(super) msix_control: u16,
    /// Offset of the PCI configuration access capability.
    pub(super) pci_cfg: u16,
}

impl VirtioSpace {
    pub(super) fn new(device_type: DeviceType, queues: u16, vectors: u16) -> Self {
        let identity = Identity {
            vendor: VENDOR_RED_HAT,
            device: DEVICE_BASE + device_type.number(),
            // Non-transitional (Virtio 1.2 section 4.1.2.1).
            revision: 1,
            class: device_type.pci_class(),
            subsystem_vendor: VENDOR_RED_HAT,
            subsystem: DEVICE_BASE + device_type.number(),
        };
        let mut space = ConfigSpace::new(&identity).with_bar(BAR_LEN);
        let msix = msix_capability(vectors);
        let msix_control =
            space.add_capability(CAP_ID_MSIX, &msix, &[0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]) + 2;
        let doorbells = u64::from(queues) * NOTIFY_OFF_MULTIPLIER;
        let structures = [
            (CFG_TYPE_COMMON, COMMON_CFG, common_cfg::LEN, &[][..]),
            (CFG_TYPE_ISR, ISR_CFG, 1, &[]),
            (CFG_TYPE_DEVICE, DEVICE_CFG, u32::from(MAX_CONFIG_LEN), &[]),
            (
                CFG_TYPE_NOTIFY,
                NOTIFY_CFG,
                doorbells as u32,
                &(NOTIFY_OFF_MULTIPLIER as u32).to_le_bytes(),
            ),
        ];
        for (cfg_type, offset, len, extra) in structures {
            let body = virtio_capability(cfg_type, offset, len, extra);
            space.add_capability(CAP_ID_VENDOR, &body, &vec![0; body.len()]);
        }
        let pci_cfg_body = virtio_capability(CFG_TYPE_PCI, 0, 0, &[0; 4]);
        // The driver sets BAR, offset, length and data.
        let writable = [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 12]].concat();
        let pci_cfg = space.add_capability(CAP_ID_VENDOR, &pci_cfg_body, &writable);
        Self {
            space,
            msix_control,
            pci_cfg,
        }
    }

    /// MSI-X Enable and Function Mask.
    pub(super) fn msix_bits(&self) -> (bool, bool) {
        let control = self.space.read_u16(self.msix_control);
        (control & 1 << 15 != 0, control & 1 << 14 != 0)
    }

    /// Where and how long an access through the PCI configuration access capability is, if
    /// `register` is its data register and the access is possible.
    pub(super) fn pci_cfg_access(&self, register: u16) -> Option<(u64, usize)> {
        let data = self.pci_cfg + 16;
        if !(data..data + 4).contains(&register) {
            return None;
        }
        let bar = self.space.read_u32(self.pci_cfg + 4) as u8;
        let offset = u64::from(self.space.read_u32(self.pci_cfg + 8));
        let len = self.space.read_u32(self.pci_cfg + 12) as usize;
        let possible = bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len as u64)
            && offset < BAR_LEN;
        possible.then_some((offset, len))
    }
}

fn msix_capability(vectors: u16) -> [u8; 10] {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    // The low bits name BAR 0.
    body[2..6].copy_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
    body[6..].copy_from_slice(&(MSIX_PBA as u32).to_le_bytes());
    body
}

/// `struct virtio_pci_cap` after its ID and next pointer, in BAR 0.
fn virtio_capability(cfg_type: u8, offset: u64, len: u32, extra: &[u8]) -> Vec<u8> {
    let cap_len = 16 + extra.len() as u8;
    let mut body = vec![cap_len, cfg_type, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra);
    body
}
