//! The region's layout. What it is good for is tested with rings.

use std::os::unix::fs::FileExt;

use super::*;
use crate::inflight::{InflightRegion, QueueInflight};
use crate::ring::RingFormat::Packed;

const SIZE: u16 = 3;

fn queue_of(region: &InflightRegion, index: u16) -> PackedInflight {
    match region.queue(index, SIZE).unwrap() {
        QueueInflight::Packed(queue) => queue,
        QueueInflight::Split(_) => panic!("a packed ring's region"),
    }
}

#[test]
fn region_is_laid_out_as_specified() {
    assert_eq!(InflightRegion::needed_bytes(Packed, 1, 1), 64);
    assert_eq!(
        InflightRegion::needed_bytes(Packed, 2, 128),
        2 * (64 + 32 * 128)
    );
    let (region, file) = InflightRegion::create(Packed, 2, SIZE).unwrap();
    let mut queue = queue_of(&region, 1);
    let base = Position {
        index: 2,
        wrap: true,
    };
    let recovered = queue.recover(base, |_| false, |_| {});
    assert_eq!((recovered.used, recovered.free_head), (base, 0));
    for (index, gpa) in [(0, 0x1111), (1, 0x2222)] {
        queue.store(
            index,
            &StoredDesc {
                id: 7,
                flags: 0x81,
                len_bytes: 0x30,
                gpa,
            },
        );
    }
    queue.begin(0, 1, 2, 2);
    // A batch that is under way.
    queue.add_to_batch(0, 1);
    queue.batch_ends_at(Position {
        index: 1,
        wrap: false,
    });
    let mut bytes = [0u8; 32 + 32 * 3];
    file.read_exact_at(&mut bytes, 128).unwrap();
    let mut expected = [0u8; 32 + 32 * 3];
    expected[8] = 1; // version
    expected[10] = 3; // desc_num
    expected[12] = 0; // free_head
    expected[14] = 2; // old_free_head
    expected[16] = 1; // used_idx
    expected[18] = 2; // old_used_idx
    expected[20] = 0; // used_wrap_counter
    expected[21] = 1; // old_used_wrap_counter
    let entry = |index: usize| 32 + 32 * index;
    expected[entry(0)] = 1; // inflight
    expected[entry(0) + 2] = 1; // next
    expected[entry(0) + 4] = 1; // last
    expected[entry(0) + 6] = 2; // num
    expected[entry(1) + 2] = 2; // next: where the free ones began
    expected[entry(2) + 2] = 3; // next: none
    for (index, byte) in [(0, 0x11), (1, 0x22)] {
        expected[entry(index) + 16] = 7; // id
        expected[entry(index) + 18] = 0x81; // flags
        expected[entry(index) + 20] = 0x30; // len
        expected[entry(index) + 24] = byte; // addr
        expected[entry(index) + 25] = byte;
    }
    assert_eq!(bytes, expected);
}

#[test]
fn region_that_contradicts_itself_is_started_afresh() {
    let (region, file) = InflightRegion::create(Packed, 1, SIZE).unwrap();
    let base = Position {
        index: 0,
        wrap: true,
    };
    let entry = |index: u64| 32 + 32 * index;
    // A loop of free entries; an entry that nobody has; a chain with another end; a chain of
    // nothing; another size; a place past the ring.
    for (at, byte) in [
        (entry(2) + 2, 0),
        (entry(1) + 2, 3),
        (entry(0) + 4, 1),
        (entry(0) + 6, 0),
        (10, 4),
        (16, 3),
    ] {
        let mut queue = queue_of(&region, 0);
        queue.retire();
        assert!(!queue.recover(base, |_| false, |_| {}).was_stale);
        queue.begin(0, 0, 1, 1);
        assert_eq!(
            queue_of(&region, 0).recover(base, |_| true, |_| {}).heads,
            [0]
        );
        file.write_all_at(&[byte], at).unwrap();
        let recovered = queue_of(&region, 0).recover(base, |_| true, |_| {});
        assert!(recovered.was_stale && recovered.heads.is_empty(), "{at}");
    }
}
