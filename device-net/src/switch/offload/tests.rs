use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6};

use super::*;

fn header(needs_csum: bool, gso_type: u32, gso_size: u16, start: u16, offset: u16) -> Header {
    let mut bytes = [0; MAX_HEADER_LEN_BYTES];
    bytes[0] = u8::from(needs_csum);
    bytes[1] = gso_type as u8;
    bytes[2..4].copy_from_slice(&(start + 20).to_le_bytes());
    bytes[4..6].copy_from_slice(&gso_size.to_le_bytes());
    bytes[6..8].copy_from_slice(&start.to_le_bytes());
    bytes[8..10].copy_from_slice(&offset.to_le_bytes());
    Header::checked(&bytes, 4000, Offloads::all()).unwrap()
}

/// Ethernet, optionally a tag, IPv4 or IPv6, TCP or UDP with a payload of its own pattern.
fn packet(is_ipv6: bool, is_udp: bool, tagged: bool, payload_len: usize) -> (Vec<u8>, usize) {
    let mut frame = vec![0x52; 12];
    if tagged {
        frame.extend([0x81, 0, 0, 5]);
    }
    let l4_len = if is_udp { 8 } else { 20 };
    let protocol = if is_udp { 17 } else { 6 };
    let rest = (l4_len + payload_len) as u16;
    if is_ipv6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(rest.to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend((0..32).map(|byte| byte * 3));
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + rest).to_be_bytes());
        frame.extend([0xff, 0xff, 0, 0, 64, protocol, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let l4_at = frame.len();
    frame.extend([0x30, 0x39, 0, 80]);
    if is_udp {
        frame.extend(rest.to_be_bytes());
        frame.extend([0, 0]);
    } else {
        frame.extend([0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9]);
        // FIN, PSH, ACK and CWR.
        frame.extend([0x50, 0x99, 1, 0, 0, 0, 0, 0]);
    }
    frame.extend((0..payload_len).map(|at| (at * 7) as u8));
    (frame, l4_at)
}

/// Whether the checksums of an untagged or tagged packet are right.
fn assert_sums(frame: &[u8], l4_at: usize, is_ipv6: bool) {
    let ip_at = l4_at - if is_ipv6 { 40 } else { 20 };
    let (addresses, protocol) = if is_ipv6 {
        (&frame[ip_at + 8..ip_at + 40], frame[ip_at + 6])
    } else {
        assert_eq!(
            fold(add(0, &frame[ip_at..l4_at])),
            0xffff,
            "of the IPv4 header"
        );
        (&frame[ip_at + 12..ip_at + 20], frame[ip_at + 9])
    };
    let pseudo = add(
        (frame.len() - l4_at) as u32 + u32::from(protocol),
        addresses,
    );
    assert_eq!(fold(add(pseudo, &frame[l4_at..])), 0xffff, "of the segment");
}

fn run(header: &Header, frame: &mut [u8]) -> Result<Vec<Vec<u8>>, DropReason> {
    let mut out = Vec::new();
    finish(header, frame, &mut Vec::new(), |frame| {
        out.push(frame.to_vec());
        Ok(())
    })?;
    Ok(out)
}

#[test]
fn checksum_that_was_left_is_filled_in() {
    let (mut frame, l4_at) = packet(false, true, false, 101);
    // As a driver leaves it: the pseudo header's sum.
    let pseudo = fold(add(17 + 109, &frame[26..34]));
    frame[l4_at + 6..l4_at + 8].copy_from_slice(&pseudo.to_be_bytes());
    // The IPv4 header's own is never left.
    let ip = !fold(add(0, &frame[14..34]));
    frame[24..26].copy_from_slice(&ip.to_be_bytes());
    let out = run(&header(true, 0, 0, l4_at as u16, 6), &mut frame).unwrap();
    assert_eq!(out.len(), 1);
    assert_sums(&out[0], l4_at, false);
}

#[test]
fn tcp_is_cut_into_sound_segments() {
    for (is_ipv6, tagged) in [(false, false), (true, false), (false, true), (true, true)] {
        let (frame, l4_at) = packet(is_ipv6, false, tagged, 3000);
        let kind = if is_ipv6 {
            VIRTIO_NET_HDR_GSO_TCPV6
        } else {
            VIRTIO_NET_HDR_GSO_TCPV4
        };
        let gso = header(true, kind, 1400, l4_at as u16, 16);
        let out = run(&gso, &mut frame.clone()).unwrap();
        assert_eq!(out.len(), 3);
        let mut payload = Vec::new();
        for (number, segment) in out.iter().enumerate() {
            assert_sums(segment, l4_at, is_ipv6);
            let sequence = u32::from_be_bytes(segment[l4_at + 4..l4_at + 8].try_into().unwrap());
            assert_eq!(sequence, 0xffff_fff0_u32.wrapping_add(1400 * number as u32));
            let flags = segment[l4_at + 13];
            assert_eq!(
                flags & 0x09 != 0,
                number == 2,
                "FIN and PSH end the last one"
            );
            assert_eq!(flags & 0x80 != 0, number == 0, "CWR is told once");
            payload.extend_from_slice(&segment[l4_at + 20..]);
        }
        assert_eq!(payload, frame[l4_at + 20..]);
        if !is_ipv6 {
            let id =
                |segment: &[u8]| u16::from_be_bytes([segment[l4_at - 16], segment[l4_at - 15]]);
            assert_eq!(
                out.iter().map(|s| id(s)).collect::<Vec<_>>(),
                [0xffff, 0, 1]
            );
        }
    }
}

#[test]
fn udp_is_cut_into_datagrams() {
    for is_ipv6 in [false, true] {
        let (frame, l4_at) = packet(is_ipv6, true, false, 2500);
        let gso = header(true, VIRTIO_NET_HDR_GSO_UDP_L4, 1000, l4_at as u16, 6);
        let out = run(&gso, &mut frame.clone()).unwrap();
        let lengths: Vec<_> = out
            .iter()
            .map(|segment| segment.len() - l4_at - 8)
            .collect();
        assert_eq!(lengths, [1000, 1000, 500]);
        for segment in &out {
            assert_sums(segment, l4_at, is_ipv6);
            let len = u16::from_be_bytes([segment[l4_at + 4], segment[l4_at + 5]]);
            assert_eq!(usize::from(len), segment.len() - l4_at);
        }
    }
}

#[test]
fn frames_that_are_not_what_the_header_says_are_dropped() {
    let (frame, l4_at) = packet(false, false, false, 3000);
    let gso = |start: u16| header(true, VIRTIO_NET_HDR_GSO_TCPV4, 1400, start, 16);
    for start in [0, 14, 33, 3000, 3900] {
        assert_eq!(
            run(&gso(start), &mut frame.clone()),
            Err(DropReason::Malformed),
            "{start}"
        );
    }
    let start = l4_at as u16;
    for (at, byte) in [(12, 0x11), (14, 0x42), (23, 17), (l4_at + 12, 0x40)] {
        let mut broken = frame.clone();
        broken[at] = byte;
        assert_eq!(
            run(&gso(start), &mut broken),
            Err(DropReason::Malformed),
            "{at}"
        );
    }
    // One byte each would be more segments than anybody sends.
    let tiny = header(true, VIRTIO_NET_HDR_GSO_TCPV4, 1, start, 16);
    assert_eq!(run(&tiny, &mut frame.clone()), Err(DropReason::Malformed));
    // Any bytes at all.
    let mut seed = 1_u32;
    for _ in 0..20_000 {
        let mut noise = frame[..200].to_vec();
        for _ in 0..4 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            noise[(seed >> 8) as usize % 64] = (seed >> 24) as u8;
        }
        let len = (seed >> 4) as usize % 200;
        let _ = run(&gso((seed >> 16) as u16 % 80), &mut noise[..len]);
    }
}

#[test]
fn tag_moves_what_the_header_says() {
    let plain = header(true, VIRTIO_NET_HDR_GSO_TCPV4, 1400, 34, 16);
    let tagged = shifted(&plain, 4, 4004).unwrap();
    assert_eq!(tagged.as_bytes()[6..10], [38, 0, 16, 0]);
    assert_eq!(tagged.as_bytes()[2..4], [58, 0]);
    assert_eq!(shifted(&tagged, -4, 4000), Some(plain));
    let early = header(true, 0, 0, 2, 0);
    assert_eq!(shifted(&early, -4, 4000), None);
}
