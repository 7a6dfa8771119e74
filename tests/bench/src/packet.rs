//! The packets of a load: UDP over IPv4, of any length, to a station that nobody is.

/// Ethernet, IPv4 and UDP.
pub const HEADERS_BYTES: usize = 14 + 20 + 8;
/// What virtio-net puts before a packet, without its offloads.
pub const VNET_HEADER_BYTES: usize = 12;

/// Ethernet addresses of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stations {
    /// Who sends.
    pub source: [u8; 6],
    /// Who is meant.
    pub destination: [u8; 6],
}

impl Default for Stations {
    /// Those that DPDK's testpmd uses unless told otherwise, or like them.
    fn default() -> Self {
        Self {
            source: [0x02, 0, 0, 0, 0, 1],
            destination: [0x02, 0, 0, 0, 0, 0],
        }
    }
}

/// A packet of `len` bytes, checksums included.
///
/// # Panics
/// When the headers do not fit.
pub fn udp(stations: Stations, len: usize) -> Vec<u8> {
    assert!(len >= HEADERS_BYTES, "{len} bytes hold no UDP packet");
    let mut packet = Vec::with_capacity(len);
    packet.extend(stations.destination);
    packet.extend(stations.source);
    packet.extend(0x0800_u16.to_be_bytes());
    packet.extend(ipv4_header(len - 14));
    // Ports of the discard protocol; the checksum may be left out.
    packet.extend([0, 9, 0, 9]);
    packet.extend(length(len - 34));
    packet.extend([0, 0]);
    packet.resize(len, 0);
    packet
}

fn ipv4_header(total_len: usize) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&length(total_len));
    header[8] = 64;
    header[9] = 17;
    // Addresses of the range for benchmarks.
    header[12..16].copy_from_slice(&[198, 18, 0, 1]);
    header[16..20].copy_from_slice(&[198, 18, 0, 2]);
    let checksum = internet_checksum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}

fn length(len: usize) -> [u8; 2] {
    u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes()
}

/// RFC 1071, over an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_checksum_are_right() {
        let packet = udp(Stations::default(), 64);
        assert_eq!(packet.len(), 64);
        assert_eq!(packet[16..18], [0, 50]);
        assert_eq!(packet[38..40], [0, 30]);
        // A correct header sums up to nothing.
        assert_eq!(internet_checksum(&packet[14..34]), 0);
    }
}
