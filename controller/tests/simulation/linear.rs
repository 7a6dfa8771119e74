//! Whether a history of one VM's generation could have happened one operation after the other (Wing and
//! Gong's search, with the states seen remembered).

use std::collections::HashSet;

use tokio::time::Instant;

/// What a user did, and when.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) begun: Instant,
    /// `None`: nobody knows whether it happened.
    pub(crate) ended: Option<Instant>,
    pub(crate) did: Did,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Did {
    /// Read this generation.
    Read(u64),
    /// Wanted something, which is since this generation.
    Changed(u64),
    /// The same, without an answer.
    MayHaveChanged,
}

/// More than the search has bits for do not happen in one schedule.
const MAX_EVENTS: usize = 128;

/// Whether there is an order; a VM begins with generation 1.
pub(crate) fn is_linearizable(events: &[Event]) -> bool {
    assert!(events.len() <= MAX_EVENTS, "{} events", events.len());
    search(events, 0, 1, &mut HashSet::new())
}

fn search(events: &[Event], done: u128, generation: u64, seen: &mut HashSet<(u128, u64)>) -> bool {
    let open = |index: usize| done & 1 << index == 0;
    let is_over = (0..events.len()).all(|index| !open(index) || events[index].ended.is_none());
    if is_over {
        return true;
    }
    if !seen.insert((done, generation)) {
        return false;
    }
    // Whatever comes next began before anything else that is left ended.
    let ends = (0..events.len()).filter(|index| open(*index));
    let first_end = ends.filter_map(|index| events[index].ended).min();
    (0..events.len())
        .filter(|index| open(*index))
        .filter(|index| first_end.is_none_or(|end| events[*index].begun <= end))
        .any(|index| {
            let done = done | 1 << index;
            match events[index].did {
                Did::Read(read) => read == generation && search(events, done, generation, seen),
                // What was wanted already changes nothing.
                Did::Changed(to) => {
                    (to == generation || to == generation + 1) && search(events, done, to, seen)
                }
                Did::MayHaveChanged => {
                    search(events, done, generation + 1, seen)
                        || search(events, done, generation, seen)
                }
            }
        })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn history(events: &[(u64, Option<u64>, Did)]) -> Vec<Event> {
        let zero = Instant::now();
        let at = |second: u64| zero + Duration::from_secs(second);
        let event = |&(begun, ended, did): &(u64, Option<u64>, Did)| Event {
            begun: at(begun),
            ended: ended.map(at),
            did,
        };
        events.iter().map(event).collect()
    }

    #[test]
    fn overlapping_operations_may_be_in_any_order() {
        let events = [
            (0, Some(10), Did::Changed(3)),
            (1, Some(2), Did::Changed(2)),
            (3, Some(4), Did::Read(2)),
            (11, Some(12), Did::Read(3)),
        ];
        assert!(is_linearizable(&history(&events)));
    }

    #[test]
    fn a_lost_change_is_found() {
        let events = [
            (0, Some(1), Did::Changed(2)),
            (2, Some(3), Did::Changed(3)),
            (4, Some(5), Did::Read(2)),
        ];
        assert!(!is_linearizable(&history(&events)));
    }

    #[test]
    fn a_change_without_an_answer_may_show_at_any_time_later() {
        let unknown = (0, None, Did::MayHaveChanged);
        let late = [
            unknown,
            (1, Some(2), Did::Read(1)),
            (3, Some(4), Did::Read(2)),
        ];
        assert!(is_linearizable(&history(&late)));
        let back = [
            unknown,
            (1, Some(2), Did::Read(2)),
            (3, Some(4), Did::Read(1)),
        ];
        assert!(!is_linearizable(&history(&back)));
    }
}
