//! Every way in which a request can be wrong, and its answer.

use super::*;

const LIMITS: Limits = Limits {
    capacity_sectors: 100,
    block_sectors: 1,
    read_only: false,
    discard: true,
};
const READ_ONLY: Limits = Limits {
    read_only: true,
    ..LIMITS
};

fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, num_sectors: u32, flags: u32) -> [u8; RANGE_BYTES] {
    let mut range = [0; RANGE_BYTES];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&num_sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

fn read(sector: u64, len_bytes: u32) -> Result<Request, Status> {
    parse(&header(VIRTIO_BLK_T_IN, sector), 0, len_bytes, &LIMITS)
}

#[test]
fn read_of_the_last_sector_is_accepted() {
    assert_eq!(
        read(99, 512),
        Ok(Request::Read {
            offset_bytes: 99 * 512,
            len_bytes: 512
        })
    );
    assert_eq!(
        read(0, 51_200),
        Ok(Request::Read {
            offset_bytes: 0,
            len_bytes: 51_200
        })
    );
}

#[test]
fn read_past_end_reports_ioerr() {
    assert_eq!(read(99, 1024), Err(Status::IoErr));
    assert_eq!(read(100, 512), Err(Status::IoErr));
    assert_eq!(read(0, u32::MAX - 511), Err(Status::IoErr));
}

#[test]
fn sector_that_overflows_reports_ioerr() {
    assert_eq!(read(u64::MAX, 512), Err(Status::IoErr));
    assert_eq!(read(u64::MAX / 512 + 1, 512), Err(Status::IoErr));
}

#[test]
fn data_that_is_no_whole_sectors_reports_ioerr() {
    for len_bytes in [0, 1, 511, 513, 1000] {
        assert_eq!(read(0, len_bytes), Err(Status::IoErr), "{len_bytes}");
        let write = parse(&header(VIRTIO_BLK_T_OUT, 0), len_bytes, 0, &LIMITS);
        assert_eq!(write, Err(Status::IoErr), "{len_bytes}");
    }
}

#[test]
fn writes_use_the_readable_data_and_reads_the_writable() {
    assert_eq!(
        parse(&header(VIRTIO_BLK_T_IN, 0), 512, 0, &LIMITS),
        Err(Status::IoErr)
    );
    assert_eq!(
        parse(&header(VIRTIO_BLK_T_OUT, 0), 0, 512, &LIMITS),
        Err(Status::IoErr)
    );
}

#[test]
fn everything_that_changes_a_read_only_disk_reports_ioerr() {
    for kind in [
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ] {
        assert_eq!(
            parse(&header(kind, 0), 512, 0, &READ_ONLY),
            Err(Status::IoErr),
            "{kind}"
        );
    }
    assert_eq!(
        parse(&header(VIRTIO_BLK_T_FLUSH, 0), 0, 0, &READ_ONLY),
        Ok(Request::Flush)
    );
    assert!(parse(&header(VIRTIO_BLK_T_IN, 0), 0, 512, &READ_ONLY).is_ok());
}

#[test]
fn lifetime_needs_room() {
    let lifetime = header(VIRTIO_BLK_T_GET_LIFETIME, 0);
    assert_eq!(parse(&lifetime, 0, 6, &LIMITS), Ok(Request::GetLifetime));
    assert_eq!(parse(&lifetime, 0, 5, &LIMITS), Err(Status::IoErr));
}

#[test]
fn parts_of_large_blocks_report_ioerr() {
    let limits = Limits {
        block_sectors: 8,
        ..LIMITS
    };
    let read = |sector, len_bytes| parse(&header(VIRTIO_BLK_T_IN, sector), 0, len_bytes, &limits);
    assert!(read(8, 4096).is_ok());
    assert_eq!(read(1, 4096), Err(Status::IoErr));
    assert_eq!(read(8, 512), Err(Status::IoErr));
}

#[test]
fn unknown_types_report_unsupp() {
    for kind in [2, 3, 5, 6, 7, 9, 12, 14, 15, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(
            parse(&header(kind, 0), 512, 512, &LIMITS),
            Err(Status::Unsupp),
            "{kind}"
        );
    }
}

#[test]
fn id_needs_room() {
    assert_eq!(
        parse(&header(VIRTIO_BLK_T_GET_ID, 0), 0, 0, &LIMITS),
        Err(Status::IoErr)
    );
    assert_eq!(
        parse(&header(VIRTIO_BLK_T_GET_ID, 0), 0, 20, &LIMITS),
        Ok(Request::GetId)
    );
}

#[test]
fn payload_of_no_or_too_many_or_torn_ranges_reports_ioerr() {
    let most = (MAX_RANGES * RANGE_BYTES) as u32;
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for bytes in [0, 1, 15, 17, most + 16, u32::MAX] {
            let parsed = parse(&header(kind, 0), bytes, 0, &LIMITS);
            assert_eq!(parsed, Err(Status::IoErr), "type {kind}, {bytes} bytes");
        }
        assert!(parse(&header(kind, 0), most, 0, &LIMITS).is_ok());
    }
}

#[test]
fn discard_that_is_not_offered_reports_unsupp() {
    let limits = Limits {
        discard: false,
        ..LIMITS
    };
    let parsed = parse(&header(VIRTIO_BLK_T_DISCARD, 0), 16, 0, &limits);
    assert_eq!(parsed, Err(Status::Unsupp));
}

#[test]
fn ranges_inside_the_disk_are_accepted() {
    let payload = [range(0, 100, 0), range(99, 1, 0), range(100, 0, 0)].concat();
    let ranges = parse_ranges(RangeOp::Discard, &payload, &LIMITS).unwrap();
    assert_eq!(ranges.len(), 3);
    assert_eq!(
        ranges[0],
        ByteRange {
            offset_bytes: 0,
            len_bytes: 51_200,
            unmap: true
        }
    );
}

#[test]
fn one_range_past_end_refuses_all() {
    let payload = [range(0, 1, 0), range(99, 2, 0)].concat();
    assert_eq!(
        parse_ranges(RangeOp::Discard, &payload, &LIMITS),
        Err(Status::IoErr)
    );
    let overflow = range(u64::MAX, 1, 0);
    assert_eq!(
        parse_ranges(RangeOp::WriteZeroes, &overflow, &LIMITS),
        Err(Status::IoErr)
    );
}

#[test]
fn giant_range_reports_ioerr() {
    let limits = Limits {
        capacity_sectors: u64::MAX / 512,
        block_sectors: 1,
        ..LIMITS
    };
    let most = range(0, MAX_RANGE_SECTORS, 0);
    assert!(parse_ranges(RangeOp::Discard, &most, &limits).is_ok());
    let giant = range(0, MAX_RANGE_SECTORS + 1, 0);
    assert_eq!(
        parse_ranges(RangeOp::Discard, &giant, &limits),
        Err(Status::IoErr)
    );
}

#[test]
fn unmap_is_a_flag_of_write_zeroes_alone() {
    let unmap = range(0, 1, FLAG_UNMAP);
    assert_eq!(
        parse_ranges(RangeOp::Discard, &unmap, &LIMITS),
        Err(Status::Unsupp)
    );
    let ranges = parse_ranges(RangeOp::WriteZeroes, &unmap, &LIMITS).unwrap();
    assert!(ranges[0].unmap);
    let keep = parse_ranges(RangeOp::WriteZeroes, &range(0, 1, 0), &LIMITS).unwrap();
    assert!(!keep[0].unmap);
    let unknown = range(0, 1, 2);
    assert_eq!(
        parse_ranges(RangeOp::WriteZeroes, &unknown, &LIMITS),
        Err(Status::Unsupp)
    );
}
