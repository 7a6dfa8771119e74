//! The region's layout, its checks, and recovery from every state a crash can leave.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::*;
use crate::inflight::{InflightError, InflightRegion, QueueInflight};
use crate::ring::RingFormat;

const SIZE: u16 = 4;

fn queue_of(region: &InflightRegion) -> SplitInflight {
    split_of(region, 0)
}

fn split_of(region: &InflightRegion, index: u16) -> SplitInflight {
    match region.queue(index, SIZE).unwrap() {
        QueueInflight::Split(queue) => queue,
        QueueInflight::Packed(_) => panic!("a split ring's region"),
    }
}

#[test]
fn region_is_laid_out_as_specified() {
    assert_eq!(InflightRegion::needed_bytes(RingFormat::Split, 1, 1), 64);
    assert_eq!(InflightRegion::needed_bytes(RingFormat::Split, 1, 3), 64);
    assert_eq!(InflightRegion::needed_bytes(RingFormat::Split, 1, 4), 128);
    assert_eq!(
        InflightRegion::needed_bytes(RingFormat::Split, 2, 128),
        2 * (16 + 128 * 16 + 48)
    );

    let (region, file) = InflightRegion::create(RingFormat::Split, 2, SIZE).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 256);
    let mut queue = split_of(&region, 1);
    queue.recover(7, 7);
    queue.begin(0);
    queue.begin(3);
    queue.add_to_batch(3);
    let mut bytes = [0u8; 80];
    file.read_exact_at(&mut bytes, 128).unwrap();
    let mut expected = [0u8; 80];
    expected[8] = 1; // version
    expected[10] = 4; // desc_num
    expected[12] = 3; // last_batch_head
    expected[14] = 7; // used_idx
    expected[16] = 1; // entry 0: in flight, counter 0
    expected[64] = 1; // entry 3: in flight
    expected[72] = 1; // entry 3: counter
    assert_eq!(bytes, expected);
}

#[test]
fn region_file_cannot_be_resized() {
    let (_region, file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    assert!(file.set_len(0).is_err());
    assert!(file.set_len(1 << 20).is_err());
    assert!(crate::memory::is_sealed_against_shrinking(file.as_fd()));
}

#[test]
fn impossible_regions_are_refused() {
    for (num_queues, queue_size) in [(0, 1), (1, 0), (1, 32769)] {
        let result = InflightRegion::create(RingFormat::Split, num_queues, queue_size);
        assert!(
            matches!(result, Err(InflightError::BadShape { .. })),
            "{num_queues} {queue_size}"
        );
    }
    let (_region, file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    for (offset, len, num_queues, queue_size) in [
        (0, 127, 1, SIZE),
        (0, 1 << 20, 2, SIZE),
        (64, 128, 1, SIZE),
        (u64::MAX - 63, 128, 1, SIZE),
        (0, u64::MAX, u16::MAX, 32768),
    ] {
        let result = InflightRegion::map(
            &file,
            offset,
            len,
            RingFormat::Split,
            num_queues,
            queue_size,
        );
        assert!(
            matches!(result, Err(InflightError::TooShort { .. })),
            "{offset} {len}"
        );
    }
    assert!(matches!(
        InflightRegion::map(&file, 8, 64, RingFormat::Split, 1, 1),
        Err(InflightError::Map(_))
    ));
}

#[test]
fn queue_beyond_the_region_is_not_there() {
    let (region, _file) = InflightRegion::create(RingFormat::Split, 2, SIZE).unwrap();
    assert!(region.queue(1, SIZE).is_some());
    assert!(region.queue(2, SIZE).is_none());
    assert!(region.queue(0, SIZE * 2).is_none());
}

#[test]
fn fresh_region_does_not_clear_entry_zero() {
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    // The ring is in mid-life: a backend without a region served it before.
    let mut queue = queue_of(&region);
    assert_eq!(
        queue.recover(1, 1),
        Recovered {
            heads: vec![],
            was_stale: false
        }
    );
    queue.begin(0);
    assert_eq!(queue_of(&region).recover(1, 2).heads, [0]);
}

#[test]
fn batch_ends_in_every_order_of_completion() {
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut queue = queue_of(&region);
    queue.recover(0, 0);
    (0..4).for_each(|head| queue.begin(head));
    queue.add_to_batch(2);
    queue.add_to_batch(0);
    queue.batch_published(2);
    queue.add_to_batch(3);
    assert_eq!(
        queue_of(&region).recover(2, 4).heads,
        [1, 3],
        "3 was not published"
    );
    assert_eq!(
        queue_of(&region).recover(3, 4).heads,
        [1],
        "3 was published"
    );
    assert_eq!(
        queue_of(&region).recover(3, 4).heads,
        [1],
        "recovery is repeatable"
    );
}

#[test]
fn counters_go_on_after_recovery() {
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut queue = queue_of(&region);
    queue.recover(0, 0);
    queue.begin(3);
    let mut queue = queue_of(&region);
    assert_eq!(queue.recover(0, 1).heads, [3]);
    queue.begin(1);
    let mut queue = queue_of(&region);
    assert_eq!(queue.recover(0, 2).heads, [3, 1]);
    queue.begin(0);
    assert_eq!(queue_of(&region).recover(0, 3).heads, [3, 1, 0]);
}

#[test]
fn used_index_wraps_within_a_batch() {
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut queue = queue_of(&region);
    queue.recover(u16::MAX, u16::MAX);
    queue.begin(0);
    queue.begin(1);
    queue.add_to_batch(1);
    queue.add_to_batch(0);
    assert_eq!(queue_of(&region).recover(1, 1).heads, [] as [u16; 0]);
}

#[test]
fn region_of_an_earlier_ring_is_stale() {
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut queue = queue_of(&region);
    queue.recover(100, 100);
    queue.begin(2);
    assert_eq!(
        queue_of(&region).recover(0, 1),
        Recovered {
            heads: vec![],
            was_stale: true
        }
    );
    // The same, when indices happen to be close: more in flight than was made available.
    let mut queue = queue_of(&region);
    queue.recover(0, 4);
    (0..3).for_each(|head| queue.begin(head));
    assert_eq!(
        queue_of(&region).recover(1, 1),
        Recovered {
            heads: vec![],
            was_stale: true
        }
    );
}

#[test]
fn rubbish_in_the_region_cannot_lead_outside() {
    let (region, file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    for seed in 0..2000u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = [0u8; 80];
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = (state >> 32) as u8 & if seed % 2 == 0 { 0x03 } else { 0xff };
        }
        file.write_all_at(&bytes, 0).unwrap();
        let used_idx = state as u16 & 7;
        let recovered = queue_of(&region).recover(used_idx, used_idx.wrapping_add(SIZE));
        assert!(recovered.heads.len() <= usize::from(SIZE), "seed {seed}");
        assert!(
            recovered.heads.iter().all(|head| *head < SIZE),
            "seed {seed}"
        );
    }
}
