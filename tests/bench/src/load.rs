//! What is asked of a disk, and what came of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The order and direction of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Reads at random offsets.
    Randread,
    /// Writes at random offsets.
    Randwrite,
    /// Reads one after the other, from the start again at the end.
    Read,
    /// Writes one after the other, from the start again at the end.
    Write,
}

impl Pattern {
    /// Whether requests write.
    pub fn writes(self) -> bool {
        matches!(self, Self::Randwrite | Self::Write)
    }

    fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }
}

/// One measurement's load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Order and direction.
    pub pattern: Pattern,
    /// Bytes of each request; offsets are multiples of it.
    pub block_bytes: usize,
    /// Requests in flight.
    pub depth: usize,
    /// Time before anything is counted.
    pub warm_up: Duration,
    /// Time that counts.
    pub duration: Duration,
}

/// Offsets of a load's requests, the same ones in every run.
#[derive(Clone, Debug)]
pub struct Offsets {
    blocks: u64,
    block_bytes: u64,
    is_random: bool,
    state: u64,
}

impl Offsets {
    /// Of `load` on a disk of `capacity_bytes`; `stream` tells disks of one load apart.
    ///
    /// # Panics
    /// When not one block fits.
    pub fn new(load: &Load, capacity_bytes: u64, stream: u64) -> Self {
        let block_bytes = load.block_bytes as u64;
        let blocks = capacity_bytes / block_bytes;
        assert!(blocks > 0, "the disk is smaller than a block");
        let is_random = load.pattern.is_random();
        // Sequential streams start at the disk's start, random ones anywhere.
        let state = if is_random { stream } else { 0 };
        Self {
            blocks,
            block_bytes,
            is_random,
            state,
        }
    }

    /// The next one, in bytes.
    pub fn next_offset(&mut self) -> u64 {
        let block = if self.is_random {
            // SplitMix64, scaled by multiplication since a division costs more than the rest.
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
            ((u128::from(mixed) * u128::from(self.blocks)) >> 64) as u64
        } else {
            let block = self.state;
            self.state = if block + 1 == self.blocks {
                0
            } else {
                block + 1
            };
            block
        };
        block * self.block_bytes
    }
}

/// What a run measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Requests that completed in the time that counts.
    pub ios: u64,
    /// That time.
    pub seconds: f64,
    /// `ios / seconds`
    pub iops: f64,
    /// CPU time of this program.
    pub driver_cpu_seconds: f64,
    /// CPU time of the daemon, if its pid was given.
    pub daemon_cpu_seconds: Option<f64>,
    /// Share of all CPUs' time that neither this program nor the daemon took.
    pub foreign_cpu: f64,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn load(pattern: Pattern) -> Load {
        Load {
            pattern,
            block_bytes: 4096,
            depth: 1,
            warm_up: Duration::ZERO,
            duration: Duration::from_millis(1),
        }
    }

    #[test]
    fn sequential_offsets_wrap_at_the_end() {
        let mut offsets = Offsets::new(&load(Pattern::Read), 3 * 4096 + 100, 7);
        let first: Vec<u64> = (0..5).map(|_| offsets.next_offset()).collect();
        assert_eq!(first, [0, 4096, 8192, 0, 4096]);
    }

    #[test]
    fn random_offsets_are_aligned_and_reach_every_block() {
        let mut offsets = Offsets::new(&load(Pattern::Randwrite), 64 * 4096, 1);
        let seen: BTreeSet<u64> = (0..2000).map(|_| offsets.next_offset()).collect();
        let all: BTreeSet<u64> = (0..64).map(|block| block * 4096).collect();
        assert_eq!(seen, all);
    }

    #[test]
    fn streams_differ_and_repeat() {
        let take = |stream| {
            let mut offsets = Offsets::new(&load(Pattern::Randread), 1 << 30, stream);
            (0..8).map(|_| offsets.next_offset()).collect::<Vec<_>>()
        };
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
    }
}
