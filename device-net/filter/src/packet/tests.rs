use super::*;
use crate::frames::*;

#[track_caller]
fn is_malformed(packet: &Packet) -> bool {
    match &packet.network {
        Network::Malformed => true,
        Network::Ip(ip) => ip.transport == Transport::Malformed,
        _ => false,
    }
}

#[test]
fn checksum_belongs_where_its_protocol_has_it() {
    let v6_behind_options = {
        let header = [&[17, 0, 1, 4, 0, 0, 0, 0][..], &udp_datagram(1, 2)].concat();
        ip(GUEST_V6, PEER_V6, 60, &header)
    };
    for (frame, checksum_at) in [
        (tcp(GUEST, 1, PEER, 2, SYN), 14 + 20 + 16),
        (udp(GUEST, 1, PEER, 2), 14 + 20 + 6),
        (tagged(&udp(GUEST, 1, PEER, 2), 5), 18 + 20 + 6),
        (tcp(GUEST_V6, 1, PEER_V6, 2, SYN), 14 + 40 + 16),
        (v6_behind_options, 14 + 48 + 6),
        (echo(GUEST, PEER, false, 1), 14 + 20 + 2),
    ] {
        for offset in 0..frame.len() {
            let packet = parsed(&frame).with_checksum_at(offset);
            assert_eq!(
                is_malformed(&packet),
                offset != checksum_at,
                "{offset}: {packet:?}"
            );
        }
    }
    let later = fragment(udp(GUEST, 1, PEER, 2), 1, 8, false);
    assert!(is_malformed(&parsed(&later).with_checksum_at(40)));
    let arp = arp(GUEST_MAC, 1, GUEST_MAC, GUEST, PEER);
    assert!(is_malformed(&parsed(&arp).with_checksum_at(28)));
}

#[test]
fn lengths_that_contradict_the_frame_are_malformed() {
    let change = |mut frame: Vec<u8>, at: usize, value: u8| {
        frame[at] = value;
        frame
    };
    let (v4, v6) = (udp(GUEST, 1, PEER, 2), udp(GUEST_V6, 1, PEER_V6, 2));
    let tcp = tcp(GUEST, 1, PEER, 2, SYN);
    for frame in [
        // Version, header length, total length beyond the frame and below the header.
        change(v4.clone(), 14, 0x55),
        change(v4.clone(), 14, 0x44),
        change(v4.clone(), 14, 0x4f),
        change(v4.clone(), 16, 1),
        change(v4.clone(), 17, 19),
        change(v4.clone(), 17, 27),
        v4[..30].to_vec(),
        // TCP's header beyond the packet, and too short.
        change(tcp.clone(), 46, 0x60),
        change(tcp.clone(), 46, 0x40),
        change(v6.clone(), 14, 0x40),
        change(v6.clone(), 18, 1),
        v6[..50].to_vec(),
        // A mapped address.
        ip_from(
            GUEST_MAC,
            PEER_MAC,
            "::ffff:10.0.0.5",
            PEER_V6,
            17,
            &udp_datagram(1, 2),
        ),
        // A routing header of type 0, a fragment in a fragment, headers beyond all that is read.
        ip(GUEST_V6, PEER_V6, 43, &[17, 0, 0, 0, 0, 0, 0, 0]),
        ip(
            GUEST_V6,
            PEER_V6,
            44,
            &[44, 0, 0, 1, 0, 0, 0, 0, 17, 0, 0, 1, 0, 0, 0, 0],
        ),
        ip(GUEST_V6, PEER_V6, 60, &[60, 40].repeat(200)),
        ip(GUEST_V6, PEER_V6, 60, &[60, 0, 1, 4, 0, 0, 0, 0].repeat(20)),
    ] {
        assert!(is_malformed(&parsed(&frame)), "{frame:02x?}");
    }
    // Padding behind a short packet is none of that.
    assert!(!is_malformed(&parsed(&[v4, vec![0; 10]].concat())));
    assert_eq!(Packet::parse(&[0; 13], 13), None);
}
