//! A disk that one guest after the other writes, and how much of it is as it must be.
//!
//! Writes are numbered from 1 through all lives of the guest; number n goes to block n modulo the disk's
//! blocks, and the next one begins when it is acknowledged. A block tells its number and in which life
//! it was written. So whoever reads the disk knows what each block must hold: nothing that was
//! acknowledged is missing, and nothing of an earlier life comes after the next one began.

use crate::oracle::{BLOCK_LEN, Content, examine, stamp};

/// Numbers are below the lives in a block's sequence.
const NUMBER_BITS: u32 = 40;

/// What a disk has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journal {
    /// Lives of the guest that wrote to it.
    pub lives: u64,
    /// The number of the last write; 0 for none.
    pub last: u64,
    /// Blocks that hold what they must.
    pub verified: u64,
    /// Blocks that do not, at most 16 of them, in words.
    pub wrong: Vec<String>,
}

impl Journal {
    /// Judges a disk by its blocks, in order.
    #[must_use]
    pub fn of(contents: &[Content]) -> Self {
        let entries: Vec<Option<(u64, u64)>> = contents
            .iter()
            .map(|content| match content {
                Content::Whole { sequence, .. } => {
                    Some((sequence & ((1 << NUMBER_BITS) - 1), sequence >> NUMBER_BITS))
                }
                _ => None,
            })
            .collect();
        let written = || entries.iter().flatten();
        let last = written().map(|(number, _)| *number).max().unwrap_or(0);
        let mut journal = Self {
            lives: written().map(|(_, life)| *life).max().unwrap_or(0),
            last,
            ..Self::default()
        };
        let mut in_order: Vec<(u64, u64)> = written().copied().collect();
        in_order.sort_unstable();
        let blocks = contents.len() as u64;
        for (block, content) in (0..).zip(contents) {
            let expected = latest(block, blocks, last);
            let is_right = match content {
                Content::Blank => expected.is_none(),
                Content::Whole {
                    block: place,
                    sequence,
                } => {
                    let (number, life) =
                        (sequence & ((1 << NUMBER_BITS) - 1), sequence >> NUMBER_BITS);
                    *place == block
                        && Some(number) == expected
                        && !is_after_a_later_life(&in_order, number, life)
                }
                Content::Torn | Content::Foreign => false,
            };
            if is_right {
                journal.verified += 1;
            } else if journal.wrong.len() < 16 {
                journal.wrong.push(format!(
                    "block {block} has {content:?}, not write {expected:?}"
                ));
            }
        }
        journal
    }

    /// The same for the bytes of a disk's image.
    #[must_use]
    pub fn of_bytes(seed: u64, bytes: &[u8]) -> Self {
        let contents: Vec<Content> = bytes
            .chunks_exact(BLOCK_LEN)
            .map(|block| examine(seed, block))
            .collect();
        Self::of(&contents)
    }
}

/// Fills a block for write `number` in a life; returns the block's place.
pub fn entry(seed: u64, blocks: u64, life: u64, number: u64, buffer: &mut [u8]) -> u64 {
    let block = number % blocks;
    stamp(seed, block, life << NUMBER_BITS | number, buffer);
    block
}

/// The last write up to `last` that went to a block.
fn latest(block: u64, blocks: u64, last: u64) -> Option<u64> {
    let number = last.checked_sub((last + blocks - block) % blocks)?;
    (number > 0).then_some(number)
}

/// A smaller number was written in a later life.
fn is_after_a_later_life(in_order: &[(u64, u64)], number: u64, life: u64) -> bool {
    in_order
        .iter()
        .take_while(|(other, _)| *other < number)
        .any(|(_, other_life)| *other_life > life)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 16;

    fn write(disk: &mut [u8], life: u64, numbers: std::ops::RangeInclusive<u64>) {
        let mut buffer = [0; BLOCK_LEN];
        for number in numbers {
            let block = entry(7, BLOCKS, life, number, &mut buffer) as usize;
            disk[block * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(&buffer);
        }
    }

    fn judged(disk: &[u8]) -> (u64, u64, u64) {
        let journal = Journal::of_bytes(7, disk);
        (journal.lives, journal.last, journal.verified)
    }

    #[test]
    fn a_disk_of_two_lives_is_as_it_must_be() {
        let mut disk = vec![0; BLOCKS as usize * BLOCK_LEN];
        assert_eq!(judged(&disk), (0, 0, BLOCKS));
        write(&mut disk, 1, 1..=5);
        assert_eq!(judged(&disk), (1, 5, BLOCKS));
        write(&mut disk, 1, 6..=100);
        write(&mut disk, 2, 101..=107);
        assert_eq!(judged(&disk), (2, 107, BLOCKS));
    }

    #[test]
    fn what_was_lost_and_what_came_late_is_found() {
        let mut disk = vec![0; BLOCKS as usize * BLOCK_LEN];
        write(&mut disk, 1, 1..=50);
        // 45 was acknowledged and is lost.
        let mut lost = disk.clone();
        write(&mut lost, 1, 29..=29);
        assert_eq!(judged(&lost), (1, 50, BLOCKS - 1));
        // The first life writes on although the second one has begun.
        write(&mut disk, 2, 51..=53);
        let mut late = disk.clone();
        write(&mut late, 1, 51..=51);
        assert_eq!(judged(&late), (2, 53, BLOCKS));
        write(&mut late, 1, 54..=54);
        assert_eq!(judged(&late), (2, 54, BLOCKS - 1));
        // Half of a write.
        disk[..512].fill(0);
        assert_eq!(judged(&disk), (2, 53, BLOCKS - 1));
    }
}
