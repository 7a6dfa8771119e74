//! The packets of a load: over IPv4, to a station that nobody is. UDP of any length, and a TCP segment that is
//! yet to be cut.

/// Ethernet, IPv4 and UDP.
pub const HEADERS_BYTES: usize = 14 + 20 + 8;
/// What virtio-net puts before a packet.
pub const VNET_HEADER_BYTES: usize = 12;

/// The payload of a packet that [`segment`] is cut into: what an Ethernet frame holds.
pub const SEGMENT_SIZE: usize = 1460;
/// Ethernet, IPv4 and TCP.
pub const TCP_HEADERS_BYTES: usize = 14 + 20 + 20;
/// A [`segment`]: as many whole packets as IPv4's length allows.
pub const SEGMENT_BYTES: usize = TCP_HEADERS_BYTES + 44 * SEGMENT_SIZE;

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
    packet.extend(ipv4_header(17, len - 14));
    // Ports of the discard protocol; the checksum may be left out.
    packet.extend([0, 9, 0, 9]);
    packet.extend(length(len - 34));
    packet.extend([0, 0]);
    packet.resize(len, 0);
    packet
}

/// A TCP segment of [`SEGMENT_BYTES`], as a driver hands it over that leaves cutting it and its checksum to
/// the other end: see [`segment_header`].
pub fn segment(stations: Stations) -> Vec<u8> {
    let mut packet = Vec::with_capacity(SEGMENT_BYTES);
    packet.extend(stations.destination);
    packet.extend(stations.source);
    packet.extend(0x0800_u16.to_be_bytes());
    packet.extend(ipv4_header(6, SEGMENT_BYTES - 14));
    let mut tcp = [0; 20];
    tcp[..4].copy_from_slice(&[0, 9, 0, 9]);
    // Five words of header; ACK.
    tcp[12..14].copy_from_slice(&[0x50, 0x10]);
    tcp[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
    // As whoever finishes the checksum expects it: the sum over the addresses, the protocol and the length.
    let mut pseudo = [0; 12];
    pseudo[..8].copy_from_slice(&packet[26..34]);
    pseudo[9] = 6;
    pseudo[10..].copy_from_slice(&length(SEGMENT_BYTES - 34));
    let sum = !internet_checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    packet.extend(tcp);
    packet.resize(SEGMENT_BYTES, 0);
    packet
}

/// What virtio-net says of a [`segment`] (Virtio 1.2 section 5.1.6).
pub fn segment_header() -> [u8; VNET_HEADER_BYTES] {
    const NEEDS_CSUM: u8 = 1;
    const GSO_TCPV4: u8 = 1;
    const TCP_AT: u16 = 34;
    const CHECKSUM_IN_TCP: u16 = 16;
    let mut header = [0; VNET_HEADER_BYTES];
    header[0] = NEEDS_CSUM;
    header[1] = GSO_TCPV4;
    let words = [
        TCP_HEADERS_BYTES as u16,
        SEGMENT_SIZE as u16,
        TCP_AT,
        CHECKSUM_IN_TCP,
    ];
    for (at, word) in header[2..].chunks_exact_mut(2).zip(words) {
        at.copy_from_slice(&word.to_le_bytes());
    }
    header
}

fn ipv4_header(protocol: u8, total_len: usize) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&length(total_len));
    header[8] = 64;
    header[9] = protocol;
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
    #[test]
    fn segment_is_what_its_header_says() {
        let packet = segment(Stations::default());
        assert_eq!(packet.len(), SEGMENT_BYTES);
        assert_eq!(internet_checksum(&packet[14..34]), 0);
        assert!(u16::try_from(packet.len() - 14).is_ok());
        let header = segment_header();
        assert_eq!(header[..2], [1, 1]);
        assert_eq!(header[2..4], 54_u16.to_le_bytes());
        assert_eq!(header[4..6], 1460_u16.to_le_bytes());
        // 198.18.0.1 + 198.18.0.2 + TCP + length, folded.
        let sum = u16::from_be_bytes([packet[50], packet[51]]);
        let expected = 2 * 0xc612_u32 + 3 + 6 + (SEGMENT_BYTES as u32 - 34);
        assert_eq!(u32::from(sum), (expected & 0xffff) + (expected >> 16));
    }
}
