use super::*;

const SEED: u64 = 7;

fn block_of(block: u64, sequence: u64) -> Vec<u8> {
    let mut buffer = vec![0; BLOCK_LEN];
    stamp(SEED, block, sequence, &mut buffer);
    buffer
}

fn written(ledger: &mut Ledger, block: u64) -> Vec<u8> {
    let mut buffer = vec![0; BLOCK_LEN];
    let write = ledger.begin_write(block, &mut buffer).unwrap();
    ledger.end_write(write);
    buffer
}

#[test]
fn a_block_says_what_it_is() {
    let block = block_of(9, 3);
    let whole = Content::Whole {
        block: 9,
        sequence: 3,
    };
    assert_eq!(examine(SEED, &block), whole);
    assert_eq!(examine(SEED, &[0; BLOCK_LEN]), Content::Blank);
    assert_eq!(examine(SEED + 1, &block), Content::Foreign);
    let mut changed = block.clone();
    changed[1000] ^= 1;
    assert_eq!(examine(SEED, &changed), Content::Foreign);
    let mut shifted = block.clone();
    shifted.rotate_left(512);
    assert_eq!(examine(SEED, &shifted), Content::Foreign);
}

#[test]
fn a_block_of_two_writes_is_torn() {
    let mut block = block_of(9, 3);
    block[..512].copy_from_slice(&block_of(9, 4)[..512]);
    assert_eq!(examine(SEED, &block), Content::Torn);
    let mut half_blank = block_of(9, 3);
    half_blank[2048..].fill(0);
    assert_eq!(examine(SEED, &half_blank), Content::Torn);
}

#[test]
fn an_acknowledged_write_must_be_read() {
    let mut ledger = Ledger::new(SEED, 4);
    let old = written(&mut ledger, 1);
    let new = written(&mut ledger, 1);
    let read = ledger.begin_read(1);
    ledger.end_read(read, &new);
    assert!(ledger.summary().is_clean());
    let read = ledger.begin_read(1);
    ledger.end_read(read, &old);
    assert_eq!((ledger.summary().lost, ledger.summary().reads), (1, 2));
    let lost = Violation::Lost {
        block: 1,
        found: 1,
        promised: 2,
    };
    assert_eq!(ledger.summary().violations, [lost]);
}

#[test]
fn a_write_in_flight_may_be_read_or_not() {
    let mut ledger = Ledger::new(SEED, 4);
    let old = written(&mut ledger, 1);
    let mut new = vec![0; BLOCK_LEN];
    let write = ledger.begin_write(1, &mut new).unwrap();
    assert_eq!(ledger.begin_write(1, &mut vec![0; BLOCK_LEN]), None);
    for found in [&old, &new] {
        let read = ledger.begin_read(1);
        ledger.end_read(read, found);
    }
    // A read that began before the write was acknowledged may have seen the old one.
    let read = ledger.begin_read(1);
    ledger.end_write(write);
    ledger.end_read(read, &old);
    assert!(ledger.summary().is_clean(), "{}", ledger.summary());
    ledger.check(1, &old);
    assert_eq!(ledger.summary().lost, 1);
}

#[test]
fn what_nobody_wrote_is_found() {
    let mut ledger = Ledger::new(SEED, 4);
    written(&mut ledger, 1);
    ledger.check(1, &block_of(2, 1));
    ledger.check(1, &block_of(1, 9));
    ledger.check(1, &[0xa5; BLOCK_LEN]);
    let mut torn = block_of(1, 1);
    torn[..512].fill(0);
    ledger.check(1, &torn);
    let Summary {
        lost,
        misplaced,
        torn,
        foreign,
        ..
    } = *ledger.summary();
    assert_eq!((lost, misplaced, torn, foreign), (1, 1, 1, 1));
}

#[test]
fn only_what_was_flushed_survives_a_lost_cache() {
    let mut ledger = Ledger::new(SEED, 4);
    let flushed = written(&mut ledger, 1);
    let flush = ledger.begin_flush();
    // Acknowledged while the flush was under way: not promised by it.
    written(&mut ledger, 2);
    ledger.end_flush(flush);
    ledger.check_flushed(1, &flushed);
    ledger.check_flushed(2, &[0; BLOCK_LEN]);
    assert!(ledger.summary().is_clean());
    ledger.check_flushed(1, &[0; BLOCK_LEN]);
    assert_eq!(ledger.summary().lost, 1);
}

#[test]
fn failures_and_silence_are_not_clean() {
    let mut ledger = Ledger::new(SEED, 1);
    let mut buffer = vec![0; BLOCK_LEN];
    let write = ledger.begin_write(0, &mut buffer).unwrap();
    ledger.fail_write(write);
    assert_eq!(ledger.summary().errors, 1);
    assert!(!ledger.summary().is_clean());
    let mut ledger = Ledger::new(SEED, 1);
    ledger.note_unanswered(1);
    assert!(!ledger.summary().is_clean());
}
