//! Which flow a frame belongs to, so that all of its frames take the same receive ring.

/// Bytes of a frame that tell its flow: headers of IPv6 behind a tag, and ports.
pub(super) const LOOKED_AT_BYTES: usize = 64;

const TPID: [u8; 2] = [0x81, 0x00];
const PROTOCOLS_WITH_PORTS: [u8; 2] = [6, 17];

/// A number that is the same for all frames of a flow. `frame` is its beginning.
pub(super) fn flow_hash(frame: &[u8]) -> u32 {
    let at = |offset: usize, len: usize| frame.get(offset..offset + len).unwrap_or(&[]);
    let ip_at = if at(12, 2) == TPID { 18 } else { 14 };
    let (addresses, protocol, ports_at) = match at(ip_at - 2, 2) {
        [0x08, 0x00] => {
            let header_len = frame
                .get(ip_at)
                .map_or(0, |byte| usize::from(byte & 0xf) * 4);
            // Of a fragment only the first has ports.
            let is_fragment = at(ip_at + 6, 2)
                .iter()
                .zip([0x3f, 0xff])
                .any(|(b, m)| b & m != 0);
            let ports_at = if is_fragment {
                frame.len()
            } else {
                ip_at + header_len
            };
            (at(ip_at + 12, 8), at(ip_at + 9, 1), ports_at)
        }
        [0x86, 0xdd] => (at(ip_at + 8, 32), at(ip_at + 6, 1), ip_at + 40),
        _ => (at(0, 12), &[][..], frame.len()),
    };
    let has_ports = protocol.iter().any(|p| PROTOCOLS_WITH_PORTS.contains(p));
    let ports = if has_ports { at(ports_at, 4) } else { &[] };
    // FNV-1a.
    let hash = [addresses, ports]
        .into_iter()
        .flatten()
        .fold(0x811c_9dc5_u32, |hash, &byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp4(source_port: u8) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[23] = 17;
        frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        frame[35] = source_port;
        frame
    }

    #[test]
    fn flows_spread_and_frames_of_one_stay_together() {
        let mut rings = [0; 4];
        for port in 0..=255 {
            let mut frame = udp4(port);
            let hash = flow_hash(&frame);
            rings[hash as usize % 4] += 1;
            frame[50] = 77;
            assert_eq!(flow_hash(&frame), hash, "the payload does not count");
        }
        assert!(rings.iter().all(|&count| count > 30), "{rings:?}");
    }

    #[test]
    fn fragments_and_short_frames_have_a_flow_as_well() {
        let mut fragment = udp4(1);
        fragment[21] = 8;
        let mut other = udp4(2);
        other[21] = 8;
        assert_eq!(flow_hash(&fragment), flow_hash(&other));
        for len in 0..60 {
            flow_hash(&udp4(1)[..len]);
        }
    }
}
