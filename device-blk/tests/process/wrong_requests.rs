//! Whatever a driver sends, it gets a status, and the daemon goes on.

use crate::daemon::{Daemon, Place, numbered_sector};
use crate::driver::{NO_STATUS, Piece, RawClient};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const HEADER: Piece = Piece::Header(0, 16);

struct Served {
    client: RawClient,
    daemon: Daemon,
    _place: Place,
}

fn serve(disk_options: &str) -> Served {
    let place = Place::new();
    place.image("a.img", 64);
    let daemon = Daemon::start(&place, &[&format!("{}{disk_options}", place.disk("a"))]);
    let client = RawClient::connect(&place.socket("a"));
    Served {
        client,
        daemon,
        _place: place,
    }
}

impl Served {
    fn status(&mut self, kind: u32, sector: u64, payload: &[u8], pieces: &[Piece]) -> u8 {
        let status = self.client.request(kind, sector, payload, pieces).status;
        self.daemon.assert_alive();
        status
    }

    /// The check after every provocation.
    fn assert_still_serves(&mut self) {
        let done = self.client.request(
            READ,
            3,
            &[],
            &[HEADER, Piece::Answer(0, 512), Piece::Status],
        );
        assert_eq!(done.status, OK);
        assert_eq!(done.answer[..512], numbered_sector(3));
    }
}

fn range(sector: u64, num_sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &num_sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn id_is_the_serial_or_the_disks_id() {
    for (options, expected) in [("", "a"), (",serial=SN-0123456789", "SN-0123456789")] {
        let mut served = serve(options);
        let done = served.client.request(
            GET_ID,
            0,
            &[],
            &[HEADER, Piece::Answer(0, 20), Piece::Status],
        );
        assert_eq!(done.status, OK);
        let mut id = expected.as_bytes().to_vec();
        id.resize(20, 0);
        assert_eq!(done.answer[..20], id);
        assert_eq!(done.answer[20], 0xee, "only 20 bytes are written");
    }
}

#[test]
fn framing_is_free() {
    let mut served = serve("");
    let pieces = [
        Piece::Header(0, 1),
        Piece::Header(1, 7),
        Piece::Header(8, 8),
        Piece::Payload(0, 500),
        Piece::Payload(500, 12),
        Piece::Status,
    ];
    assert_eq!(served.status(WRITE, 9, &[0x77; 512], &pieces), OK);
    let pieces = [
        HEADER,
        Piece::Answer(0, 1),
        Piece::Answer(1, 510),
        Piece::Answer(511, 1),
        Piece::Status,
    ];
    let done = served.client.request(READ, 9, &[], &pieces);
    assert_eq!((done.status, &done.answer[..512]), (OK, &[0x77; 512][..]));
    // The status byte at the end of the data's own buffer.
    let done = served
        .client
        .request(READ, 9, &[], &[HEADER, Piece::Answer(0, 513)]);
    assert_eq!(
        (&done.answer[..512], done.answer[512]),
        (&[0x77; 512][..], OK)
    );
    assert_eq!(done.status, NO_STATUS);
    // The header and the data in one buffer: bytes 16 to 528 of the chain are the data.
    let mut payload = vec![0; 16 + 512];
    payload[..4].copy_from_slice(&WRITE.to_le_bytes());
    payload[8..16].copy_from_slice(&5_u64.to_le_bytes());
    payload[16..].fill(0x55);
    assert_eq!(
        served.status(0, 0, &payload, &[Piece::Payload(0, 528), Piece::Status]),
        OK
    );
    let done = served.client.request(
        READ,
        5,
        &[],
        &[HEADER, Piece::Answer(0, 512), Piece::Status],
    );
    assert_eq!(done.answer[..512], [0x55; 512]);
}

#[test]
fn past_end_misaligned_and_empty_report_ioerr() {
    let mut served = serve("");
    for (sector, len) in [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 1),
        (0, 513),
    ] {
        let read = served.status(
            READ,
            sector,
            &[],
            &[HEADER, Piece::Answer(0, len), Piece::Status],
        );
        assert_eq!(read, IOERR, "read of {len} at {sector}");
        let write = served.status(
            WRITE,
            sector,
            &[],
            &[HEADER, Piece::Payload(0, len), Piece::Status],
        );
        assert_eq!(write, IOERR, "write of {len} at {sector}");
        served.assert_still_serves();
    }
    for kind in [READ, WRITE, DISCARD, WRITE_ZEROES, GET_ID] {
        assert_eq!(
            served.status(kind, 0, &[], &[HEADER, Piece::Status]),
            IOERR,
            "type {kind} without data"
        );
    }
    served.assert_still_serves();
}

#[test]
fn unknown_types_report_unsupp() {
    let mut served = serve("");
    for kind in [2, 3, 5, 6, 7, 9, 14, 15, 99, u32::MAX] {
        let pieces = [
            HEADER,
            Piece::Payload(0, 512),
            Piece::Answer(0, 512),
            Piece::Status,
        ];
        assert_eq!(served.status(kind, 0, &[], &pieces), UNSUPP, "type {kind}");
    }
    served.assert_still_serves();
}

#[test]
fn torn_headers_report_ioerr() {
    let mut served = serve("");
    for len in [1, 8, 15] {
        let status = served.status(READ, 0, &[], &[Piece::Header(0, len), Piece::Status]);
        assert_eq!(status, IOERR, "header of {len} bytes");
    }
    assert_eq!(
        served.status(READ, 0, &[], &[Piece::Status]),
        IOERR,
        "no header at all"
    );
    served.assert_still_serves();
}

#[test]
fn chain_without_room_for_a_status_comes_back() {
    let mut served = serve("");
    assert_eq!(served.status(READ, 0, &[], &[HEADER]), NO_STATUS);
    assert_eq!(
        served.status(WRITE, 0, &[1; 512], &[HEADER, Piece::Payload(0, 512)]),
        NO_STATUS
    );
    let done = served.client.request(
        READ,
        0,
        &[],
        &[HEADER, Piece::Answer(0, 512), Piece::Status],
    );
    assert_eq!(
        done.answer[..512],
        numbered_sector(0),
        "a write that cannot be answered is not done"
    );
    served.assert_still_serves();
}

#[test]
fn bad_ranges_change_nothing() {
    let mut served = serve("");
    let two = |a: Vec<u8>, b: Vec<u8>| [a, b].concat();
    for (payload, expected) in [
        (range(0, 1, 2), UNSUPP),
        (range(64, 1, 0), IOERR),
        (range(63, 2, 0), IOERR),
        (range(u64::MAX, 1, 0), IOERR),
        (range(0, u32::MAX, 0), IOERR),
        (range(0, 1, 0)[..15].to_vec(), IOERR),
        ([range(0, 1, 0), vec![0]].concat(), IOERR),
        (two(range(0, 1, 0), range(64, 1, 0)), IOERR),
        (range(0, 1, 0).repeat(33), IOERR),
    ] {
        for kind in [DISCARD, WRITE_ZEROES] {
            let pieces = [HEADER, Piece::Payload(0, payload.len()), Piece::Status];
            let status = served.status(kind, 0, &payload, &pieces);
            assert_eq!(status, expected, "type {kind}, {payload:?}");
        }
    }
    let unmap = range(0, 1, 1);
    let pieces = [HEADER, Piece::Payload(0, 16), Piece::Status];
    assert_eq!(
        served.status(DISCARD, 0, &unmap, &pieces),
        UNSUPP,
        "unmap is no flag of discard"
    );
    let done = served.client.request(
        READ,
        0,
        &[],
        &[HEADER, Piece::Answer(0, 512), Piece::Status],
    );
    assert_eq!(done.answer[..512], numbered_sector(0));
}

#[test]
fn several_ranges_are_all_zeroed() {
    let mut served = serve("");
    let payload = [range(1, 1, 0), range(5, 2, 1), range(9, 0, 0)].concat();
    let pieces = [
        HEADER,
        Piece::Payload(0, 20),
        Piece::Payload(20, 28),
        Piece::Status,
    ];
    assert_eq!(served.status(WRITE_ZEROES, 0, &payload, &pieces), OK);
    for (sector, zeroed) in [
        (0, false),
        (1, true),
        (2, false),
        (5, true),
        (6, true),
        (7, false),
    ] {
        let done = served.client.request(
            READ,
            sector,
            &[],
            &[HEADER, Piece::Answer(0, 512), Piece::Status],
        );
        let expected = if zeroed {
            [0; 512]
        } else {
            numbered_sector(sector)
        };
        assert_eq!(done.answer[..512], expected, "sector {sector}");
    }
}

#[test]
fn flush_ignores_its_sector() {
    let mut served = serve("");
    assert_eq!(
        served.status(FLUSH, u64::MAX, &[], &[HEADER, Piece::Status]),
        OK
    );
}

#[test]
fn truncated_image_reports_ioerr_and_recovers() {
    let place = Place::new();
    let image = place.image("a.img", 64);
    let daemon = Daemon::start(&place, &[&place.disk("a")]);
    let client = RawClient::connect(&place.socket("a"));
    let mut served = Served {
        client,
        daemon,
        _place: place,
    };
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(16 << 10).unwrap();
    let read = [HEADER, Piece::Answer(0, 512), Piece::Status];
    assert_eq!(
        served.status(READ, 40, &[], &read),
        IOERR,
        "there is nothing to read"
    );
    let across = [HEADER, Piece::Answer(0, 1024), Piece::Status];
    assert_eq!(
        served.status(READ, 31, &[], &across),
        IOERR,
        "half of it is gone"
    );
    served.assert_still_serves();
    assert!(
        served.daemon.log().contains("request failed"),
        "{}",
        served.daemon.log()
    );
    file.set_len(32 << 10).unwrap();
    let done = served.client.request(READ, 40, &[], &read);
    assert_eq!((done.status, &done.answer[..512]), (OK, &[0; 512][..]));
}
