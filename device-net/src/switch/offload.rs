//! What a sender left to be finished and a receiver cannot finish: checksums and segmentation in
//! software.
//!
//! The sender's header was checked against its frame's length; everything else that is read here is
//! checked here, in a copy.

use crate::nic::header::{Header, MAX_HEADER_LEN_BYTES, Offloads};
use crate::nic::stats::DropReason;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

const TPID: u16 = 0x8100;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

const TCP_FLAGS_OFFSET: usize = 13;
const TCP_FIN_PSH: u8 = 0x01 | 0x08;
const TCP_CWR: u8 = 0x80;

/// Segments of one frame at most: 64 KiB in the smallest pieces that anybody sends.
const MAX_SEGMENTS: usize = 512;

/// `header`, for a frame whose beginning became `shift` bytes longer; None for a header that does not
/// fit the frame then.
pub(super) fn shifted(header: &Header, shift: isize, frame_len_bytes: usize) -> Option<Header> {
    let mut bytes = *header.as_bytes();
    if shift == 0 {
        return Some(*header);
    }
    // hdr_len and csum_start.
    for at in [2, 6] {
        let value = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if value != 0 {
            let value = isize::from(value.cast_signed()).checked_add(shift)?;
            let value = u16::try_from(value).ok()?;
            bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    Header::checked(&bytes, frame_len_bytes, Offloads::all()).ok()
}

/// Finishes `frame`, which is changed, and passes on what becomes of it.
///
/// # Errors
/// The frame does not fit what its header says, or `put` refused part of it.
pub(crate) fn finish(
    header: &Header,
    frame: &mut [u8],
    segment: &mut Vec<u8>,
    mut put: impl FnMut(&[u8]) -> Result<(), DropReason>,
) -> Result<(), DropReason> {
    let fields = Fields::of(header.as_bytes());
    if fields.gso_type != VIRTIO_NET_HDR_GSO_NONE as u8 {
        return Segmentation::of(&fields, frame)
            .ok_or(DropReason::Malformed)?
            .run(frame, segment, put);
    }
    if fields.needs_csum {
        let (start, field) = (fields.csum_start, fields.csum_start + fields.csum_offset);
        if field + 2 > frame.len() {
            return Err(DropReason::Malformed);
        }
        // The field holds the pseudo header's sum.
        let sum = !fold(add(0, &frame[start..]));
        let sum = if sum == 0 { 0xffff } else { sum };
        frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
    put(frame)
}

/// What the virtio-net header says.
struct Fields {
    needs_csum: bool,
    gso_type: u8,
    gso_size: usize,
    csum_start: usize,
    csum_offset: usize,
}

impl Fields {
    fn of(bytes: &[u8; MAX_HEADER_LEN_BYTES]) -> Self {
        let field = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        Self {
            needs_csum: bytes[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 != 0,
            gso_type: bytes[1] & !(VIRTIO_NET_HDR_GSO_ECN as u8),
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        }
    }
}

/// A frame to be cut: where its headers are.
struct Segmentation {
    is_ipv6: bool,
    is_udp: bool,
    ip_at: usize,
    l4_at: usize,
    payload_at: usize,
    payload_end: usize,
    gso_size: usize,
}

impl Segmentation {
    fn of(fields: &Fields, frame: &[u8]) -> Option<Self> {
        let is_udp = fields.gso_type == VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
        let (mut ethertype, mut ip_at) = (u16_at(frame, 12)?, 14);
        if ethertype == TPID {
            (ethertype, ip_at) = (u16_at(frame, 16)?, 18);
        }
        let (is_ipv6, protocol, ip_end) = match ethertype {
            ETHERTYPE_IPV4 => {
                let header_len = usize::from(*frame.get(ip_at)? & 0xf) * 4;
                let end = ip_at + usize::from(u16_at(frame, ip_at + 2)?);
                if header_len < 20 || fields.csum_start < ip_at + header_len {
                    return None;
                }
                (false, *frame.get(ip_at + 9)?, end)
            }
            ETHERTYPE_IPV6 => {
                let end = ip_at + 40 + usize::from(u16_at(frame, ip_at + 4)?);
                if fields.csum_start < ip_at + 40 {
                    return None;
                }
                // Extension headers lie between; the sender says where they end.
                (true, if is_udp { PROTOCOL_UDP } else { PROTOCOL_TCP }, end)
            }
            _ => return None,
        };
        let l4_at = fields.csum_start;
        let (wanted, l4_len) = if is_udp {
            (PROTOCOL_UDP, 8)
        } else {
            let header_len = usize::from(*frame.get(l4_at + 12)? >> 4) * 4;
            (PROTOCOL_TCP, header_len)
        };
        let min_len = if is_udp { 8 } else { 20 };
        let payload_at = l4_at + l4_len;
        let payload_end = ip_end.min(frame.len());
        let segments = payload_end
            .checked_sub(payload_at)?
            .div_ceil(fields.gso_size.max(1));
        let is_sound = protocol == wanted
            && l4_len >= min_len
            && fields.gso_size > 0
            && (1..=MAX_SEGMENTS).contains(&segments);
        is_sound.then_some(Self {
            is_ipv6,
            is_udp,
            ip_at,
            l4_at,
            payload_at,
            payload_end,
            gso_size: fields.gso_size,
        })
    }

    fn run(
        &self,
        frame: &[u8],
        segment: &mut Vec<u8>,
        mut put: impl FnMut(&[u8]) -> Result<(), DropReason>,
    ) -> Result<(), DropReason> {
        let payload = &frame[self.payload_at..self.payload_end];
        let last = payload.len().div_ceil(self.gso_size) - 1;
        for (number, part) in payload.chunks(self.gso_size).enumerate() {
            segment.clear();
            segment.extend_from_slice(&frame[..self.payload_at]);
            segment.extend_from_slice(part);
            self.set_ip_length(segment, number);
            if self.is_udp {
                let len = (segment.len() - self.l4_at) as u16;
                segment[self.l4_at + 4..self.l4_at + 6].copy_from_slice(&len.to_be_bytes());
            } else {
                self.set_sequence(segment, number, number == last);
            }
            self.set_checksum(segment);
            put(segment)?;
        }
        Ok(())
    }

    fn set_ip_length(&self, segment: &mut [u8], number: usize) {
        let ip_at = self.ip_at;
        let len_bytes = segment.len() - ip_at;
        if self.is_ipv6 {
            let len = (len_bytes - 40) as u16;
            segment[ip_at + 4..ip_at + 6].copy_from_slice(&len.to_be_bytes());
            return;
        }
        segment[ip_at + 2..ip_at + 4].copy_from_slice(&(len_bytes as u16).to_be_bytes());
        let id = u16::from_be_bytes([segment[ip_at + 4], segment[ip_at + 5]]);
        let id = id.wrapping_add(number as u16);
        segment[ip_at + 4..ip_at + 6].copy_from_slice(&id.to_be_bytes());
        segment[ip_at + 10..ip_at + 12].fill(0);
        let header_len = usize::from(segment[ip_at] & 0xf) * 4;
        let sum = !fold(add(0, &segment[ip_at..ip_at + header_len]));
        segment[ip_at + 10..ip_at + 12].copy_from_slice(&sum.to_be_bytes());
    }

    fn set_sequence(&self, segment: &mut [u8], number: usize, is_last: bool) {
        let at = self.l4_at + 4;
        let sequence = segment[at..at + 4]
            .iter()
            .fold(0, |value: u32, &byte| value << 8 | u32::from(byte));
        let sequence = sequence.wrapping_add((number * self.gso_size) as u32);
        segment[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
        let flags = &mut segment[self.l4_at + TCP_FLAGS_OFFSET];
        if !is_last {
            *flags &= !TCP_FIN_PSH;
        }
        if number > 0 {
            *flags &= !TCP_CWR;
        }
    }

    fn set_checksum(&self, segment: &mut [u8]) {
        let (field, protocol) = if self.is_udp {
            (self.l4_at + 6, PROTOCOL_UDP)
        } else {
            (self.l4_at + 16, PROTOCOL_TCP)
        };
        segment[field..field + 2].fill(0);
        let addresses = if self.is_ipv6 {
            self.ip_at + 8..self.ip_at + 40
        } else {
            self.ip_at + 12..self.ip_at + 20
        };
        let l4_len = (segment.len() - self.l4_at) as u32;
        let pseudo = add(l4_len + u32::from(protocol), &segment[addresses]);
        let sum = !fold(add(pseudo, &segment[self.l4_at..]));
        let sum = if sum == 0 && self.is_udp { 0xffff } else { sum };
        segment[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([field[0], field[1]]))
}

/// Adds big-endian words to an Internet checksum (RFC 1071). 64 KiB of them do not overflow.
fn add(sum: u32, bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(2);
    let total = words.by_ref().fold(u64::from(sum), |sum, word| {
        sum + u64::from(u16::from_be_bytes([word[0], word[1]]))
    });
    let odd = words
        .remainder()
        .first()
        .map_or(0, |&byte| u64::from(byte) << 8);
    let total = total + odd;
    (total & 0xffff_ffff) as u32 + (total >> 32) as u32
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests;
