//! Requests of a block driver: what is accepted lies inside the disk and is whole blocks.

use request::{HEADER_BYTES, Limits, RangeOp, Request, SECTOR_BYTES, parse, parse_ranges};

use crate::input::Input;

/// Limits, a header, how long its data is, and a payload of ranges.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte();
    let limits = Limits {
        capacity_sectors: u64::from(input.half()) << (flags >> 4),
        block_sectors: 1 << (flags & 3),
        read_only: flags & 4 != 0,
        discard: flags & 8 != 0,
    };
    let mut header = [0; HEADER_BYTES];
    let given = input.bytes(HEADER_BYTES);
    header[..given.len()].copy_from_slice(given);
    let (data_out_bytes, data_in_bytes) = (input.word() as u32, input.word() as u32);
    let payload = input.0;
    for data_out_bytes in [data_out_bytes, payload.len() as u32] {
        let Ok(request) = parse(&header, data_out_bytes, data_in_bytes, &limits) else {
            continue;
        };
        assert!(!limits.read_only || !changes(&request), "{request:?}");
        match request {
            Request::Read {
                offset_bytes,
                len_bytes,
            }
            | Request::Write {
                offset_bytes,
                len_bytes,
            } => {
                assert_ne!(len_bytes, 0);
                assert_inside(offset_bytes, u64::from(len_bytes), &limits);
            }
            Request::Discard { payload_bytes } => {
                assert_ranges(
                    RangeOp::Discard,
                    &payload[..payload_bytes.min(payload.len())],
                    &limits,
                );
            }
            Request::WriteZeroes { payload_bytes } => {
                let payload = &payload[..payload_bytes.min(payload.len())];
                assert_ranges(RangeOp::WriteZeroes, payload, &limits);
            }
            Request::Flush | Request::GetId | Request::GetLifetime => {}
        }
    }
}

fn changes(request: &Request) -> bool {
    matches!(
        request,
        Request::Write { .. } | Request::Discard { .. } | Request::WriteZeroes { .. }
    )
}

fn assert_ranges(op: RangeOp, payload: &[u8], limits: &Limits) {
    for range in parse_ranges(op, payload, limits).into_iter().flatten() {
        assert_inside(range.offset_bytes, range.len_bytes, limits);
    }
}

fn assert_inside(offset_bytes: u64, len_bytes: u64, limits: &Limits) {
    let block_bytes = limits.block_sectors * SECTOR_BYTES;
    assert!(offset_bytes.is_multiple_of(block_bytes) && len_bytes.is_multiple_of(block_bytes));
    let end = offset_bytes.checked_add(len_bytes).expect("no overflow");
    assert!(
        end <= limits.capacity_sectors * SECTOR_BYTES,
        "beyond the end"
    );
}
