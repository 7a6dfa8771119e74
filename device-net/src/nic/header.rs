//! The header before each frame (Virtio 1.2 section 5.1.6.1) and the offloads that driver and
//! device agreed on.
//!
//! The driver's header is copied once, and the checked copy is what the kernel gets. The kernel's
//! header is checked as well: frames that were queued under another driver's offloads may come out
//! of a tap after the next driver has taken over.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// `struct virtio_net_hdr_v1`.
pub(crate) const MAX_HEADER_LEN_BYTES: usize = 12;
/// Without `num_buffers`, for drivers from before Virtio 1.0.
const LEGACY_HEADER_LEN_BYTES: usize = 10;
/// Where `num_buffers` lies.
const NUM_BUFFERS_OFFSET: usize = 10;

/// The largest frame of a segmentation offload: 64 KiB of IP packet, Ethernet header, two VLAN tags.
pub(crate) const MAX_FRAME_LEN_BYTES: usize = 65535 + 14 + 8;

const FLAG_NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const FLAG_DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// Whether the feature bit `bit` is in `features`.
pub(crate) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// These feature bits.
pub(crate) fn mask(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |mask, bit| mask | 1 << bit)
}

/// Length of the header under these features.
pub(crate) fn header_len_bytes(features: u64) -> usize {
    if has(features, VIRTIO_F_VERSION_1) || has(features, VIRTIO_NET_F_MRG_RXBUF) {
        MAX_HEADER_LEN_BYTES
    } else {
        LEGACY_HEADER_LEN_BYTES
    }
}

/// What one side leaves for the other to finish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads {
    csum: bool,
    tso4: bool,
    tso6: bool,
    ecn: bool,
    uso4: bool,
    uso6: bool,
}

impl Offloads {
    /// Everything that can be left.
    pub(crate) fn all() -> Self {
        Self {
            csum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            uso4: true,
            uso6: true,
        }
    }

    /// What the driver may leave to the device.
    pub(crate) fn to_device(features: u64) -> Self {
        Self {
            csum: has(features, VIRTIO_NET_F_CSUM),
            tso4: has(features, VIRTIO_NET_F_HOST_TSO4),
            tso6: has(features, VIRTIO_NET_F_HOST_TSO6),
            ecn: has(features, VIRTIO_NET_F_HOST_ECN),
            uso4: has(features, VIRTIO_NET_F_HOST_USO),
            uso6: has(features, VIRTIO_NET_F_HOST_USO),
        }
    }

    /// What the device may leave to the driver.
    pub(crate) fn to_driver(features: u64) -> Self {
        Self {
            csum: has(features, VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(features, VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(features, VIRTIO_NET_F_GUEST_TSO6),
            ecn: has(features, VIRTIO_NET_F_GUEST_ECN),
            uso4: has(features, VIRTIO_NET_F_GUEST_USO4),
            uso6: has(features, VIRTIO_NET_F_GUEST_USO6),
        }
    }

    /// As `TUNSETOFFLOAD` takes them. The kernel wants both kinds of USO or none, and no
    /// segmentation without checksums.
    pub(crate) fn tun_flags(self) -> u32 {
        if !self.csum {
            return 0;
        }
        let mut flags = libc::TUN_F_CSUM;
        for (wanted, flag) in [
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn && (self.tso4 || self.tso6), libc::TUN_F_TSO_ECN),
            (self.uso4 && self.uso6, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        flags
    }
}

/// A header that is consistent with its frame and with what was agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header([u8; MAX_HEADER_LEN_BYTES]);

impl Header {
    /// Of a frame that leaves nothing to be finished.
    pub(crate) fn empty() -> Self {
        Self([0; MAX_HEADER_LEN_BYTES])
    }

    /// Checks `bytes`, the header of a frame of `frame_len_bytes`; fields that mean nothing in
    /// it are cleared.
    ///
    /// # Errors
    /// The frame must be dropped.
    pub(crate) fn checked(
        bytes: &[u8; MAX_HEADER_LEN_BYTES],
        frame_len_bytes: usize,
        offloads: Offloads,
    ) -> Result<Self, HeaderError> {
        let u16_at = |offset: usize| u16::from_le_bytes([bytes[offset], bytes[offset + 1]]);
        let (flags, gso_type) = (bytes[0], bytes[1]);
        let (hdr_len, gso_size) = (u16_at(2), u16_at(4));
        let (csum_start, csum_offset) = (u16_at(6), u16_at(8));

        let mut header = [0; MAX_HEADER_LEN_BYTES];
        let needs_csum = flags & FLAG_NEEDS_CSUM != 0;
        if needs_csum {
            if !offloads.csum {
                return Err(HeaderError::NotNegotiated);
            }
            let csum_end = usize::from(csum_start) + usize::from(csum_offset) + 2;
            if csum_end > frame_len_bytes {
                return Err(HeaderError::ChecksumOutside);
            }
            header[0] = FLAG_NEEDS_CSUM;
            header[6..8].copy_from_slice(&csum_start.to_le_bytes());
            header[8..10].copy_from_slice(&csum_offset.to_le_bytes());
        } else if flags & FLAG_DATA_VALID != 0 && offloads.csum {
            header[0] = FLAG_DATA_VALID;
        }

        let is_permitted = match gso_type & !GSO_ECN {
            GSO_NONE => return Ok(Self(header)),
            GSO_TCPV4 => offloads.tso4,
            GSO_TCPV6 => offloads.tso6,
            GSO_UDP_L4 => offloads.uso4 || offloads.uso6,
            _ => false,
        };
        if !is_permitted || (gso_type & GSO_ECN != 0 && !offloads.ecn) {
            return Err(HeaderError::NotNegotiated);
        }
        if gso_size == 0 || !needs_csum {
            return Err(HeaderError::Incomplete);
        }
        // A hint; the kernel refuses one that is longer than the frame.
        let hdr_len = usize::from(hdr_len).min(frame_len_bytes) as u16;
        header[1] = gso_type;
        header[2..4].copy_from_slice(&hdr_len.to_le_bytes());
        header[4..6].copy_from_slice(&gso_size.to_le_bytes());
        Ok(Self(header))
    }

    /// The header of a frame that is spread over `num_buffers` chains.
    pub(crate) fn with_num_buffers(mut self, num_buffers: u16) -> Self {
        self.0[NUM_BUFFERS_OFFSET..].copy_from_slice(&num_buffers.to_le_bytes());
        self
    }

    /// UDP that is left to be cut.
    pub(crate) fn is_large_datagram(&self) -> bool {
        self.as_bytes()[1] & !GSO_ECN == GSO_UDP_L4
    }

    /// Where the other side is to put a checksum into the frame.
    pub(crate) fn checksum_at(&self) -> Option<usize> {
        let u16_at = |offset: usize| u16::from_le_bytes([self.0[offset], self.0[offset + 1]]);
        (self.0[0] & FLAG_NEEDS_CSUM != 0).then(|| usize::from(u16_at(6)) + usize::from(u16_at(8)))
    }

    /// All twelve bytes; legacy drivers get the first ten.
    pub(crate) fn as_bytes(&self) -> &[u8; MAX_HEADER_LEN_BYTES] {
        &self.0
    }
}

/// Why a frame is dropped because of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("asks for an offload that was not negotiated")]
    NotNegotiated,
    #[error("the checksum lies outside the frame")]
    ChecksumOutside,
    #[error("segmentation without size or checksum")]
    Incomplete,
}

#[cfg(test)]
mod tests;
