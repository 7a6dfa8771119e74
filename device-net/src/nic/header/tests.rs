use super::*;

const ALL: Offloads = Offloads {
    csum: true,
    tso4: true,
    tso6: true,
    ecn: true,
    uso4: true,
    uso6: true,
};

fn header(flags: u8, gso_type: u8, fields: [u16; 4]) -> [u8; MAX_HEADER_LEN_BYTES] {
    let mut bytes = [0xee; MAX_HEADER_LEN_BYTES];
    bytes[0] = flags;
    bytes[1] = gso_type;
    for (field, target) in fields.iter().zip(bytes[2..10].chunks_exact_mut(2)) {
        target.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

#[test]
fn plain_frame_gets_a_zero_header() {
    let bytes = header(0, GSO_NONE, [77, 77, 77, 77]);
    let checked = Header::checked(&bytes, 60, Offloads::default()).unwrap();
    assert_eq!(checked.as_bytes(), &[0; MAX_HEADER_LEN_BYTES]);
}

#[test]
fn num_buffers_is_little_endian_at_ten() {
    let checked = Header::checked(&[0; 12], 60, ALL)
        .unwrap()
        .with_num_buffers(0x0102);
    assert_eq!(checked.as_bytes()[10..], [2, 1]);
}

#[test]
fn checksum_up_to_the_last_byte_passes_and_beyond_is_dropped() {
    let at_end = header(FLAG_NEEDS_CSUM, GSO_NONE, [0, 0, 34, 6]);
    assert!(Header::checked(&at_end, 42, ALL).is_ok());
    let error = Header::checked(&at_end, 41, ALL).unwrap_err();
    assert_eq!(error, HeaderError::ChecksumOutside);
    let wrapping = header(FLAG_NEEDS_CSUM, GSO_NONE, [0, 0, 0xffff, 0xffff]);
    let error = Header::checked(&wrapping, 60, ALL).unwrap_err();
    assert_eq!(error, HeaderError::ChecksumOutside);
}

#[test]
fn offloads_that_were_not_negotiated_are_dropped() {
    let csum = header(FLAG_NEEDS_CSUM, GSO_NONE, [0, 0, 34, 6]);
    for (bytes, offloads) in [
        (csum, Offloads { csum: false, ..ALL }),
        (tso(GSO_TCPV4), Offloads { tso4: false, ..ALL }),
        (tso(GSO_TCPV6), Offloads { tso6: false, ..ALL }),
        (tso(GSO_TCPV4 | GSO_ECN), Offloads { ecn: false, ..ALL }),
        (
            tso(GSO_UDP_L4),
            Offloads {
                uso4: false,
                uso6: false,
                ..ALL
            },
        ),
        (tso(3), ALL),
        (tso(0x7f), ALL),
    ] {
        let error = Header::checked(&bytes, 4000, offloads).unwrap_err();
        assert_eq!(error, HeaderError::NotNegotiated, "{bytes:?}");
    }
}

#[test]
fn negotiated_segmentation_passes_unchanged_but_for_a_too_long_hint() {
    let bytes = tso(GSO_TCPV4 | GSO_ECN);
    let checked = Header::checked(&bytes, 4000, ALL).unwrap();
    assert_eq!(checked.as_bytes()[..10], bytes[..10]);
    let checked = Header::checked(&bytes, 52, ALL).unwrap();
    assert_eq!(checked.as_bytes()[2..4], 52_u16.to_le_bytes());
}

#[test]
fn segmentation_without_size_or_checksum_is_dropped() {
    let no_size = header(FLAG_NEEDS_CSUM, GSO_TCPV4, [54, 0, 34, 16]);
    let no_csum = header(0, GSO_TCPV4, [54, 1448, 34, 16]);
    for bytes in [no_size, no_csum] {
        let error = Header::checked(&bytes, 4000, ALL).unwrap_err();
        assert_eq!(error, HeaderError::Incomplete);
    }
}

#[test]
fn data_valid_reaches_only_who_asked_for_checksums() {
    let bytes = header(FLAG_DATA_VALID, GSO_NONE, [0; 4]);
    let told = Header::checked(&bytes, 60, ALL).unwrap();
    assert_eq!(told.as_bytes()[0], FLAG_DATA_VALID);
    let untold = Header::checked(&bytes, 60, Offloads::default()).unwrap();
    assert_eq!(untold.as_bytes()[0], 0);
}

#[test]
fn tun_gets_no_segmentation_without_checksums() {
    assert_eq!(Offloads { csum: false, ..ALL }.tun_flags(), 0);
    let only_uso4 = Offloads { uso6: false, ..ALL };
    assert_eq!(
        only_uso4.tun_flags() & (libc::TUN_F_USO4 | libc::TUN_F_USO6),
        0
    );
    assert_eq!(ALL.tun_flags() & !0x7f, 0);
}

#[test]
fn header_is_ten_bytes_for_legacy_drivers_only() {
    assert_eq!(header_len_bytes(0), 10);
    assert_eq!(header_len_bytes(1 << VIRTIO_NET_F_MRG_RXBUF), 12);
    assert_eq!(header_len_bytes(1 << VIRTIO_F_VERSION_1), 12);
}

fn tso(gso_type: u8) -> [u8; MAX_HEADER_LEN_BYTES] {
    header(FLAG_NEEDS_CSUM, gso_type, [54, 1448, 34, 16])
}
