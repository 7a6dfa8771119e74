//! When faults begin and end: decided before a run, by its seed alone, so that the same seed does the
//! same again.

use api::controller::{FaultExperimentSpec, FaultSchedule};

/// Beginnings of one experiment: a fault every 20 ms for ten minutes.
const MAX_BEGINNINGS: usize = 30_000;

/// One time that a fault is begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Beginning {
    /// After the start.
    pub(crate) at_ms: u32,
    /// When it is over; at most the duration.
    pub(crate) until_ms: u32,
    /// Of the experiment's faults.
    pub(crate) fault: usize,
    /// From 1, of this fault.
    pub(crate) number: u32,
    /// For what is left to chance in it.
    pub(crate) seed: u64,
}

/// All beginnings of an experiment, in the order of their times.
pub(crate) fn beginnings(spec: &FaultExperimentSpec) -> Vec<Beginning> {
    let mut all = Vec::new();
    for (fault, injection) in spec.faults.iter().enumerate() {
        // Of its own, so that a fault begins as before when another one is added to the file.
        let mut chance = Chance::new(spec.seed ^ fnv1a(&injection.id));
        let schedule = injection.schedule.unwrap_or_default();
        let mut number = 0;
        while all.len() < MAX_BEGINNINGS {
            let jitter_ms = chance.up_to(schedule.jitter_ms);
            let seed = chance.next();
            let Some((at_ms, until_ms)) = span(&schedule, number, jitter_ms, spec.duration_ms)
            else {
                break;
            };
            number += 1;
            all.push(Beginning {
                at_ms,
                until_ms,
                fault,
                number,
                seed,
            });
        }
    }
    all.sort_by_key(|beginning| (beginning.at_ms, beginning.fault));
    all
}

/// From when to when the beginning with this number (from 0) lasts, if there is one.
fn span(
    schedule: &FaultSchedule,
    number: u32,
    jitter_ms: u32,
    duration_ms: u32,
) -> Option<(u32, u32)> {
    let limit = match (schedule.every_ms, schedule.times) {
        (0, _) => 1,
        (_, 0) => u32::MAX,
        (_, times) => times,
    };
    let at_ms = number
        .checked_mul(schedule.every_ms)?
        .checked_add(schedule.after_ms)?
        .checked_add(jitter_ms)?;
    if number >= limit || at_ms >= duration_ms {
        return None;
    }
    let lasts_ms = match (schedule.for_ms, schedule.every_ms) {
        (0, 0) => u32::MAX,
        (0, every_ms) => every_ms,
        (for_ms, _) => for_ms,
    };
    Some((at_ms, at_ms.saturating_add(lasts_ms).min(duration_ms)))
}

/// SplitMix64: small, and the same in every version of everything.
struct Chance(u64);

impl Chance {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn up_to(&mut self, most: u32) -> u32 {
        (self.next() % (u64::from(most) + 1)) as u32
    }
}

fn fnv1a(text: &str) -> u64 {
    crate::model::fnv1a(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::controller::FaultInjection;

    fn spec(seed: u64, schedules: &[FaultSchedule]) -> FaultExperimentSpec {
        let faults = schedules.iter().enumerate();
        FaultExperimentSpec {
            seed,
            duration_ms: 10_000,
            faults: faults
                .map(|(index, schedule)| FaultInjection {
                    id: format!("f{index}"),
                    schedule: Some(*schedule),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }

    fn storm() -> FaultSchedule {
        FaultSchedule {
            after_ms: 1000,
            every_ms: 500,
            jitter_ms: 400,
            ..Default::default()
        }
    }

    #[test]
    fn one_beginning_lasts_to_the_end_unless_told_otherwise() {
        let once = beginnings(&spec(1, &[FaultSchedule::default()]));
        assert_eq!(once.len(), 1);
        assert_eq!((once[0].at_ms, once[0].until_ms), (0, 10_000));
        let short = FaultSchedule {
            after_ms: 9_500,
            for_ms: 2_000,
            ..Default::default()
        };
        let short = beginnings(&spec(1, &[short]));
        assert_eq!((short[0].at_ms, short[0].until_ms), (9_500, 10_000));
    }

    #[test]
    fn repeated_faults_end_with_their_times_or_the_duration() {
        let all = beginnings(&spec(1, &[storm()]));
        assert!((17..=18).contains(&all.len()), "{}", all.len());
        assert!(all.iter().all(|b| b.at_ms >= 1000 && b.until_ms <= 10_000));
        assert!(all.is_sorted_by_key(|b| b.at_ms));
        let thrice = FaultSchedule {
            times: 3,
            ..storm()
        };
        assert_eq!(beginnings(&spec(1, &[thrice])).len(), 3);
    }

    #[test]
    fn the_same_seed_does_the_same_and_another_does_not() {
        let times = |seed| beginnings(&spec(seed, &[storm()]));
        assert_eq!(times(7), times(7));
        assert_ne!(times(7), times(8));
    }

    #[test]
    fn a_fault_begins_as_before_when_another_is_added() {
        let alone = beginnings(&spec(7, &[storm()]));
        let both = beginnings(&spec(7, &[storm(), storm()]));
        let first: Vec<_> = both.into_iter().filter(|b| b.fault == 0).collect();
        assert_eq!(alone, first);
    }

    #[test]
    fn numbers_that_cannot_be_kept_are_no_beginnings() {
        let endless = FaultSchedule {
            every_ms: u32::MAX,
            after_ms: 1,
            ..Default::default()
        };
        assert_eq!(beginnings(&spec(1, &[endless])).len(), 1);
    }
}
