mod readers;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::DropReason;
use crate::frames::*;

/// Offers a frame that arrives at this time.
fn offer_at(capture: &Capture, bytes: &[u8], verdict: Verdict, time_ns: u64) {
    let head = &bytes[..bytes.len().min(crate::packet::HEAD_LEN_BYTES)];
    capture.offer(&Frame {
        packet: &parsed(bytes),
        head,
        bytes: &bytes,
        len_bytes: bytes.len(),
        direction: Direction::Egress,
        verdict,
        time_ns,
    });
}

fn offer(capture: &Capture, bytes: &[u8]) {
    offer_at(capture, bytes, Verdict::Pass, 1_700_000_000_123_456_789);
}

/// All that was captured so far.
fn drain(capture: &Capture) -> (Vec<u8>, Piece) {
    let mut file = Vec::new();
    loop {
        let mut piece = capture.take();
        if piece.data.is_empty() {
            return (file, piece);
        }
        file.append(&mut piece.data);
    }
}

/// Time, length of the frame, and its bytes that were kept.
type Record = (u64, usize, Vec<u8>);

fn records(file: &[u8]) -> Vec<Record> {
    let (header, mut rest) = file.split_at(24);
    let is_nanoseconds = header[..4] == MAGIC.to_le_bytes();
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut records = Vec::new();
    while !rest.is_empty() {
        let kept_bytes = word(rest, 8) as usize;
        let fraction = u64::from(word(rest, 4)) * if is_nanoseconds { 1 } else { 1000 };
        let time_ns = u64::from(word(rest, 0)) * 1_000_000_000 + fraction;
        let (record, behind) = rest.split_at(16 + kept_bytes);
        records.push((time_ns, word(rest, 12) as usize, record[16..].to_vec()));
        rest = behind;
    }
    records
}

#[test]
fn file_has_what_matched_with_its_time() {
    let request = Request {
        filter: "udp".parse().unwrap(),
        ..Request::default()
    };
    let capture = Capture::new(request, || {});
    let frame = udp(GUEST, 1, PEER, 2);
    offer(&capture, &frame);
    offer(&capture, &tcp(GUEST, 1, PEER, 2, SYN));
    let (file, piece) = drain(&capture);
    assert_eq!(
        records(&file),
        [(1_700_000_000_123_456_789, frame.len(), frame)]
    );
    assert_eq!((piece.packets, piece.missed, piece.is_last), (1, 0, false));
    capture.end();
    assert!(drain(&capture).1.is_last);
    offer(&capture, &udp(GUEST, 1, PEER, 2));
    assert_eq!(drain(&capture).1.packets, 1);
}

#[test]
fn frames_are_whole_beyond_the_head_and_cut_to_the_snaplen() {
    let large = udp(GUEST, 1, PEER, 2)
        .into_iter()
        .chain((0..3000_u32).map(|i| i as u8))
        .collect::<Vec<_>>();
    for (snaplen_bytes, kept_bytes) in [(0, large.len()), (100, 100), (1000, 1000)] {
        let request = Request {
            snaplen_bytes,
            ..Request::default()
        };
        let capture = Capture::new(request, || {});
        offer(&capture, &large);
        let records = records(&drain(&capture).0);
        assert_eq!(records[0].1, large.len());
        assert_eq!(records[0].2, large[..kept_bytes]);
    }
}

#[test]
fn capture_ends_with_its_limits() {
    let frame = udp(GUEST, 1, PEER, 2);
    let capture = Capture::new(
        Request {
            max_packets: 3,
            ..Request::default()
        },
        || {},
    );
    for _ in 0..5 {
        offer(&capture, &frame);
    }
    let (file, piece) = drain(&capture);
    assert_eq!(
        (records(&file).len(), piece.is_last, piece.missed),
        (3, true, 0)
    );

    let max_bytes = 24 + 2 * (16 + frame.len() as u64);
    let capture = Capture::new(
        Request {
            max_bytes,
            ..Request::default()
        },
        || {},
    );
    for _ in 0..5 {
        offer(&capture, &frame);
    }
    let (file, piece) = drain(&capture);
    assert_eq!((file.len() as u64, piece.is_last), (max_bytes, true));
}

#[test]
fn one_direction_or_one_verdict_can_be_asked_for() {
    let frame = udp(GUEST, 1, PEER, 2);
    let count = |request: Request| {
        let capture = Capture::new(request, || {});
        offer(&capture, &frame);
        offer_at(&capture, &frame, Verdict::Drop(DropReason::NotPermitted), 1);
        drain(&capture).1.packets
    };
    let all = Request::default();
    for (direction, expected) in [(Direction::Egress, 2), (Direction::Ingress, 0)] {
        let direction = Some(direction);
        assert_eq!(
            count(Request {
                direction,
                ..all.clone()
            }),
            expected
        );
    }
    for is_dropped in [true, false] {
        let is_dropped = Some(is_dropped);
        assert_eq!(
            count(Request {
                is_dropped,
                ..all.clone()
            }),
            1
        );
    }
    assert_eq!(count(all), 2);
}

#[test]
fn frames_that_find_no_room_are_counted_and_those_after_them_kept() {
    let wakes = Arc::new(AtomicUsize::new(0));
    let capture = {
        let wakes = wakes.clone();
        Capture::new(Request::default(), move || {
            wakes.fetch_add(1, Ordering::Relaxed);
        })
    };
    let large = vec![0; 60_000];
    for _ in 0..100 {
        offer(&capture, &large);
    }
    let (file, piece) = drain(&capture);
    let kept = records(&file).len();
    assert!((60..=80).contains(&kept), "{kept}");
    assert_eq!(
        (piece.packets, piece.missed),
        (kept as u64, 100 - kept as u64)
    );
    assert!(wakes.load(Ordering::Relaxed) <= MAX_PIECES);
    offer(&capture, &large);
    assert_eq!(drain(&capture).1.packets, kept as u64 + 1);
}
