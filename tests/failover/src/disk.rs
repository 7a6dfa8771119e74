//! What must be on a disk that one guest wrote after the other.

use std::io;
use std::path::Path;

use crate::guest::{BLOCK_BYTES, BLOCKS};

/// What was found on a disk.
#[derive(Debug, Clone)]
pub struct Found(Vec<u32>);

/// What is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Which block.
    pub block: u32,
    /// The write that must have been the last.
    pub expected: u32,
    /// The one that was.
    pub found: u32,
}

impl Found {
    /// What an image has.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(image: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(image)?;
        let blocks = bytes.chunks_exact(BLOCK_BYTES).take(BLOCKS as usize);
        let number = |block: &[u8]| u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        Ok(Self(blocks.map(number).collect()))
    }

    /// The number of the last write.
    pub fn last(&self) -> u32 {
        self.0.iter().copied().max().unwrap_or_default()
    }

    /// Whether somebody began anew since: write 1 goes to block 1.
    pub fn has_begun_anew(&self, before: &Self) -> bool {
        self.0.get(1) != before.0.get(1)
    }

    /// The last write below a number.
    fn last_below(&self, bound: u32) -> u32 {
        let below = self.0.iter().copied().filter(|number| *number < bound);
        below.max().unwrap_or_default()
    }

    /// All of one guest's writes are there, in order.
    pub fn of_one_guest(&self) -> Vec<Wrong> {
        let last = self.last();
        self.compare(|block| latest(block, last))
    }

    /// All of one guest's writes are there, and on top of them those of the next, which began at 1 again;
    /// `first` is what the first one left, and more than two rounds. Also how many the next one made.
    pub fn of_two_guests(&self, first: &Self) -> (Vec<Wrong>, u32) {
        let left = first.last();
        // Writes that lie within one round are one guest's: the next one's have replaced all others.
        let oldest = self.0.iter().copied().min().unwrap_or_default();
        let second = match self.last() > left || self.last() - oldest < BLOCKS {
            true => self.last(),
            false => self.last_below(left.saturating_sub(BLOCKS)),
        };
        let wrong = self.compare(|block| match latest(block, second) {
            0 => latest(block, left),
            own => own,
        });
        (wrong, second)
    }

    fn compare(&self, expected: impl Fn(u32) -> u32) -> Vec<Wrong> {
        let blocks = (0..BLOCKS).zip(&self.0);
        blocks
            .filter_map(|(block, &found)| {
                let expected = expected(block);
                (found != expected).then_some(Wrong {
                    block,
                    expected,
                    found,
                })
            })
            .collect()
    }
}

/// The last of `last` writes that went to a block; 0 for none.
fn latest(block: u32, last: u32) -> u32 {
    let into_round = last % BLOCKS;
    let round = last - into_round;
    if block <= into_round {
        round + block
    } else {
        (round + block).saturating_sub(BLOCKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(disk: &mut Found, writes: std::ops::RangeInclusive<u32>) {
        for number in writes {
            disk.0[(number % BLOCKS) as usize] = number;
        }
    }

    #[test]
    fn what_two_guests_wrote_is_told_from_what_was_lost() {
        let mut disk = Found(vec![0; BLOCKS as usize]);
        written(&mut disk, 1..=1_000);
        assert_eq!(disk.last(), 1_000);
        assert_eq!(disk.of_one_guest(), []);
        let first = disk.clone();
        written(&mut disk, 1..=40);
        assert_eq!(disk.of_two_guests(&first), (vec![], 40));
        // A write of the first guest that came late.
        let mut stale = disk.clone();
        stale.0[7] = first.0[7];
        let wrong = Wrong {
            block: 7,
            expected: 7,
            found: 775,
        };
        assert_eq!(stale.of_two_guests(&first), (vec![wrong], 40));
        // One that was acknowledged and lost.
        let mut lost = first.clone();
        lost.0[200] -= BLOCKS;
        assert_eq!(lost.of_one_guest().len(), 1);
        written(&mut disk, 41..=800);
        assert_eq!(disk.of_two_guests(&first), (vec![], 800));
        written(&mut disk, 801..=5_000);
        assert_eq!(disk.of_two_guests(&first), (vec![], 5_000));
    }
}
