//! Which of the events that match are hit.

/// See the fields. Decides by the number of the event alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trigger {
    /// The first that may be hit, counted from 1.
    pub nth: u64,
    /// From there on each `every`-th; at least 1.
    pub every: u64,
    /// Of those, this part.
    pub probability: f64,
    /// Then no more.
    pub max_hits: Option<u64>,
}

impl Default for Trigger {
    /// All.
    fn default() -> Self {
        Self {
            nth: 1,
            every: 1,
            probability: 1.0,
            max_hits: None,
        }
    }
}

impl Trigger {
    /// Whether event `number`, counted from 1, is hit as far as `max_hits` allows.
    pub(crate) fn is_due(&self, number: u64, seed: u64) -> bool {
        let Some(since) = number.checked_sub(self.nth) else {
            return false;
        };
        if !since.is_multiple_of(self.every) {
            return false;
        }
        // 53 bits are what a double between 0 and 1 can tell apart.
        let chance = (scramble(seed, number) >> 11) as f64 / (1_u64 << 53) as f64;
        self.probability >= 1.0 || chance < self.probability
    }
}

/// A number that looks random and follows from the two (the finalizer of SplitMix64).
pub fn scramble(seed: u64, number: u64) -> u64 {
    let mut bits = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(trigger: Trigger, seed: u64, events: u64) -> Vec<u64> {
        (1..=events)
            .filter(|&number| trigger.is_due(number, seed))
            .collect()
    }

    #[test]
    fn default_hits_all() {
        assert_eq!(hits(Trigger::default(), 0, 4), [1, 2, 3, 4]);
    }

    #[test]
    fn nth_and_every_count_from_one() {
        let trigger = Trigger {
            nth: 3,
            every: 4,
            ..Trigger::default()
        };
        assert_eq!(hits(trigger, 0, 12), [3, 7, 11]);
    }

    #[test]
    fn seed_decides_and_repeats() {
        let trigger = Trigger {
            probability: 0.25,
            ..Trigger::default()
        };
        let first = hits(trigger, 7, 10_000);
        assert_eq!(first, hits(trigger, 7, 10_000));
        assert_ne!(first, hits(trigger, 8, 10_000));
        assert!((2_200..2_800).contains(&first.len()), "{}", first.len());
    }

    #[test]
    fn probability_of_zero_hits_nothing() {
        let trigger = Trigger {
            probability: 0.0,
            ..Trigger::default()
        };
        assert!(hits(trigger, 1, 1000).is_empty());
    }
}
