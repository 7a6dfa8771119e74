//! What a disk must hold: blocks that describe themselves, and a ledger of what was promised.
//!
//! ```text
//!   begin_write ─▶ in flight ─▶ end_write: acknowledged ─▶ end_flush: flushed
//!   begin_read  ─▶ in flight ─▶ end_read:  at least what was acknowledged when the read began,
//!                                          at most what was begun when it ended
//! ```
//!
//! Each sector of a block names the block, the write that made it and itself, and has a checksum:
//! a late write of a dead process shows as an old sequence number, a block at the wrong place by
//! its number, a torn one by sectors of two writes, a read into memory that belongs to another
//! request by anything. The ledger knows no disk: a guest drives it with `O_DIRECT` files, tests
//! and benches of daemons with rings.

use std::fmt;

use serde::{Deserialize, Serialize};

mod block;
mod latencies;

pub use block::{BLOCK_LEN, Content, digest, examine, stamp};
pub use latencies::{Latencies, Spread};

/// Violations that are told in full; the rest is counted.
const TOLD_LIMIT: usize = 16;

/// What was promised about each block of a disk.
#[derive(Clone, Debug)]
pub struct Ledger {
    seed: u64,
    blocks: Vec<Promise>,
    /// Of the latest write that began; they count over all blocks.
    sequence: u64,
    /// Writes that were acknowledged so far.
    acknowledgements: u64,
    summary: Summary,
}

/// Sequence numbers of one block; 0 stands for a block that was never written.
#[derive(Clone, Copy, Debug, Default)]
struct Promise {
    begun: u64,
    acknowledged: u64,
    /// How many writes had been acknowledged then, this one included.
    acknowledged_at: u64,
    flushed: u64,
    is_busy: bool,
}

/// A write under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a write is acknowledged or failed in the end"]
pub struct Write {
    /// Where to, in blocks.
    pub block: u64,
    sequence: u64,
}

/// A read under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "what was read is compared"]
pub struct Read {
    /// Where from, in blocks.
    pub block: u64,
    at_least: u64,
}

/// A flush under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a flush is acknowledged or failed in the end"]
pub struct Flush {
    acknowledgements: u64,
}

/// What a disk did that it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Violation {
    /// An older write than the one that was promised.
    Lost {
        /// Where.
        block: u64,
        /// What was found.
        found: u64,
        /// What was promised.
        promised: u64,
    },
    /// A write that nobody made.
    Unknown {
        /// Where.
        block: u64,
        /// What was found.
        found: u64,
        /// The last one that was begun.
        begun: u64,
    },
    /// Another block's content.
    Misplaced {
        /// Where.
        block: u64,
        /// Whose.
        found: u64,
    },
    /// Sectors of two writes.
    Torn {
        /// Where.
        block: u64,
    },
    /// No block of this test's.
    Foreign {
        /// Where.
        block: u64,
    },
    /// A request failed.
    Failed {
        /// Where; the disk's number of blocks for a flush.
        block: u64,
    },
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Blocks that were read and compared.
    pub reads: u64,
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
    /// Blocks older than promised, or of writes that nobody made.
    pub lost: u64,
    /// Blocks at wrong places.
    pub misplaced: u64,
    /// Blocks of two writes.
    pub torn: u64,
    /// Blocks of which nothing is known.
    pub foreign: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Requests that were never answered.
    pub unanswered: u64,
    /// Answers to what was not asked: a request was completed twice.
    pub unasked: u64,
    /// The first violations.
    pub violations: Vec<Violation>,
}

impl Summary {
    /// Nothing was lost, wrong, failed or left unanswered.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.lost
            + self.misplaced
            + self.torn
            + self.foreign
            + self.errors
            + self.unanswered
            + self.unasked
            == 0
    }

    fn note(&mut self, violation: Violation) {
        *match violation {
            Violation::Lost { .. } | Violation::Unknown { .. } => &mut self.lost,
            Violation::Misplaced { .. } => &mut self.misplaced,
            Violation::Torn { .. } => &mut self.torn,
            Violation::Foreign { .. } => &mut self.foreign,
            Violation::Failed { .. } => &mut self.errors,
        } += 1;
        if self.violations.len() < TOLD_LIMIT {
            self.violations.push(violation);
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            reads,
            writes,
            flushes,
            lost,
            misplaced,
            torn,
            foreign,
            errors,
            unanswered,
            unasked,
            violations,
        } = self;
        write!(
            f,
            "{reads} reads compared, {writes} writes and {flushes} flushes acknowledged: {lost} \
             lost, {misplaced} misplaced, {torn} torn, {foreign} foreign, {errors} failed, \
             {unanswered} unanswered, {unasked} unasked"
        )?;
        match violations.first() {
            Some(first) => write!(f, "; first {first:?}"),
            None => Ok(()),
        }
    }
}

impl Ledger {
    /// Of a disk of `blocks` blocks that read as zeroes.
    #[must_use]
    pub fn new(seed: u64, blocks: u64) -> Self {
        Self {
            seed,
            blocks: vec![Promise::default(); usize::try_from(blocks).unwrap_or(usize::MAX)],
            sequence: 0,
            acknowledgements: 0,
            summary: Summary::default(),
        }
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// What was found so far.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Fills `buffer` for a write of `block`; None while another write of it is under way, since
    /// nobody could say which of the two is to be found.
    ///
    /// # Panics
    /// There is no such block, or the buffer is none.
    pub fn begin_write(&mut self, block: u64, buffer: &mut [u8]) -> Option<Write> {
        let promise = &mut self.blocks[block as usize];
        if promise.is_busy {
            return None;
        }
        self.sequence += 1;
        promise.is_busy = true;
        promise.begun = self.sequence;
        stamp(self.seed, block, self.sequence, buffer);
        Some(Write {
            block,
            sequence: self.sequence,
        })
    }

    /// The write was acknowledged.
    pub fn end_write(&mut self, write: Write) {
        self.acknowledgements += 1;
        let promise = &mut self.blocks[write.block as usize];
        promise.is_busy = false;
        promise.acknowledged = write.sequence;
        promise.acknowledged_at = self.acknowledgements;
        self.summary.writes += 1;
    }

    /// The write failed: the block holds it or what was there before.
    pub fn fail_write(&mut self, write: Write) {
        self.blocks[write.block as usize].is_busy = false;
        self.summary.note(Violation::Failed { block: write.block });
    }

    /// A read of `block` is about to be submitted.
    pub fn begin_read(&self, block: u64) -> Read {
        Read {
            block,
            at_least: self.blocks[block as usize].acknowledged,
        }
    }

    /// The read brought `buffer`.
    pub fn end_read(&mut self, read: Read, buffer: &[u8]) {
        self.summary.reads += 1;
        let begun = self.blocks[read.block as usize].begun;
        if let Some(violation) = self.judge(read.block, read.at_least..=begun, buffer) {
            self.summary.note(violation);
        }
    }

    /// The read failed.
    pub fn fail_read(&mut self, read: Read) {
        self.summary.note(Violation::Failed { block: read.block });
    }

    /// A flush is about to be submitted.
    pub fn begin_flush(&self) -> Flush {
        Flush {
            acknowledgements: self.acknowledgements,
        }
    }

    /// The flush was acknowledged: what had been acknowledged when it began survives the loss of
    /// caches from now on.
    pub fn end_flush(&mut self, flush: Flush) {
        self.summary.flushes += 1;
        for promise in &mut self.blocks {
            if promise.acknowledged_at <= flush.acknowledgements {
                promise.flushed = promise.acknowledged;
            }
        }
    }

    /// The flush failed.
    pub fn fail_flush(&mut self, _: Flush) {
        let block = self.blocks();
        self.summary.note(Violation::Failed { block });
    }

    /// So many requests will never be answered.
    pub fn note_unanswered(&mut self, count: u64) {
        self.summary.unanswered += count;
    }

    /// Something was answered that was not asked.
    pub fn note_unasked(&mut self) {
        self.summary.unasked += 1;
    }

    /// At the end, with nothing in flight: `buffer` is what `block` holds.
    pub fn check(&mut self, block: u64, buffer: &[u8]) {
        let promise = self.blocks[block as usize];
        self.check_between(block, promise.acknowledged..=promise.begun, buffer);
    }

    /// The same after caches were lost: only what was flushed must be there.
    pub fn check_flushed(&mut self, block: u64, buffer: &[u8]) {
        let promise = self.blocks[block as usize];
        self.check_between(block, promise.flushed..=promise.begun, buffer);
    }

    /// Where nobody knows what was promised: `buffer` must be a block, and this one.
    pub fn check_anything(&mut self, block: u64, buffer: &[u8]) {
        self.check_between(block, 0..=u64::MAX, buffer);
    }

    fn check_between(&mut self, block: u64, allowed: std::ops::RangeInclusive<u64>, buffer: &[u8]) {
        self.summary.reads += 1;
        if let Some(violation) = self.judge(block, allowed, buffer) {
            self.summary.note(violation);
        }
    }

    fn judge(
        &self,
        block: u64,
        allowed: std::ops::RangeInclusive<u64>,
        buffer: &[u8],
    ) -> Option<Violation> {
        let found = match examine(self.seed, buffer) {
            Content::Blank => 0,
            Content::Whole { block: found, .. } if found != block => {
                return Some(Violation::Misplaced { block, found });
            }
            Content::Whole { sequence, .. } => sequence,
            Content::Torn => return Some(Violation::Torn { block }),
            Content::Foreign => return Some(Violation::Foreign { block }),
        };
        let (promised, begun) = allowed.into_inner();
        if found < promised {
            Some(Violation::Lost {
                block,
                found,
                promised,
            })
        } else if found > begun {
            Some(Violation::Unknown {
                block,
                found,
                begun,
            })
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests;
