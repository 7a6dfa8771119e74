//! Which hosts begin, and when an upgrade is over: a pure function of how far its hosts are and which
//! hosts answer.

use std::collections::BTreeSet;

use crate::model::{HostProgress, HostUpgradeRecord, UpgradeStage};

/// How an upgrade stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// These begin, by their places in the order; none when the present ones are to be waited for.
    Begin(Vec<usize>),
    /// Nothing is under way, and nothing can begin: these hosts of the fleet do not answer.
    Blocked(Vec<String>),
    /// Nothing is under way, and nothing will be.
    Over,
}

/// What comes next. `down` are the hosts of the whole fleet that do not answer.
///
/// A host under way counts as unavailable, whether it answers or not; so does every other one that does not.
/// Hosts that do not answer are passed over until they do.
pub(super) fn next(record: &HostUpgradeRecord, down: &BTreeSet<String>) -> Next {
    let under_way: BTreeSet<&str> = in_stages(record, is_under_way).collect();
    let mut failed = in_stages(record, |stage| stage == UpgradeStage::Failed);
    let stops = record.cancel || failed.next().is_some();
    let mut waiting = in_stages(record, |stage| stage == UpgradeStage::Waiting).peekable();
    if stops || waiting.peek().is_none() {
        return match under_way.is_empty() {
            true => Next::Over,
            false => Next::Begin(Vec::new()),
        };
    }
    let others_down = down
        .iter()
        .filter(|host| !under_way.contains(host.as_str()));
    let unavailable = under_way.len() + others_down.count();
    let room = (record.max_unavailable as usize).saturating_sub(unavailable);
    let up = |progress: &HostProgress| {
        progress.stage() == UpgradeStage::Waiting && !down.contains(&progress.host)
    };
    let places = record.hosts.iter().enumerate();
    let begin: Vec<usize> = places
        .filter(|(_, progress)| up(progress))
        .map(|(place, _)| place)
        .take(room)
        .collect();
    match begin.is_empty() && under_way.is_empty() {
        true => Next::Blocked(down.iter().cloned().collect()),
        false => Next::Begin(begin),
    }
}

/// Whether a host of that stage is being exchanged.
pub(super) fn is_under_way(stage: UpgradeStage) -> bool {
    matches!(stage, UpgradeStage::Agent | UpgradeStage::Daemons)
}

/// The ids of hosts in some stages.
pub(super) fn in_stages(
    record: &HostUpgradeRecord,
    is_meant: impl Fn(UpgradeStage) -> bool,
) -> impl Iterator<Item = &str> {
    let hosts = record.hosts.iter();
    hosts
        .filter(move |progress| is_meant(progress.stage()))
        .map(|progress| progress.host.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(max_unavailable: u32, stages: &[UpgradeStage]) -> HostUpgradeRecord {
        let hosts = stages.iter().enumerate().map(|(index, stage)| {
            let mut progress = HostProgress {
                host: format!("h{index}"),
                ..Default::default()
            };
            progress.set_stage(*stage);
            progress
        });
        HostUpgradeRecord {
            max_unavailable,
            hosts: hosts.collect(),
            ..Default::default()
        }
    }

    fn down(hosts: &[&str]) -> BTreeSet<String> {
        hosts.iter().map(|host| (*host).to_owned()).collect()
    }

    use UpgradeStage::{Agent, Daemons, Done, Failed, Waiting};

    #[test]
    fn as_many_begin_as_there_is_room_for_in_order() {
        let fresh = record(2, &[Waiting, Waiting, Waiting]);
        assert_eq!(next(&fresh, &down(&[])), Next::Begin(vec![0, 1]));
        let begun = record(2, &[Agent, Daemons, Waiting]);
        assert_eq!(next(&begun, &down(&[])), Next::Begin(vec![]));
        // One that is under way does not count twice when it does not answer.
        let one = record(2, &[Agent, Done, Waiting]);
        assert_eq!(next(&one, &down(&["h0"])), Next::Begin(vec![2]));
    }

    #[test]
    fn hosts_that_do_not_answer_take_from_the_room() {
        let fresh = record(2, &[Waiting, Waiting, Waiting]);
        assert_eq!(next(&fresh, &down(&["other"])), Next::Begin(vec![0]));
        assert_eq!(next(&fresh, &down(&["h0"])), Next::Begin(vec![1]));
        let blocked = next(&fresh, &down(&["other", "h2"]));
        assert_eq!(blocked, Next::Blocked(vec!["h2".into(), "other".into()]));
        let last = record(5, &[Done, Waiting]);
        assert_eq!(
            next(&last, &down(&["h1"])),
            Next::Blocked(vec!["h1".into()])
        );
    }

    #[test]
    fn nothing_begins_after_a_failure_or_a_cancellation() {
        let failed = record(3, &[Failed, Agent, Waiting]);
        assert_eq!(next(&failed, &down(&[])), Next::Begin(vec![]));
        let rest = record(3, &[Failed, Done, Waiting]);
        assert_eq!(next(&rest, &down(&[])), Next::Over);
        let mut cancelled = record(1, &[Done, Waiting]);
        cancelled.cancel = true;
        assert_eq!(next(&cancelled, &down(&["h1", "x"])), Next::Over);
        let done = record(1, &[Done, Done]);
        assert_eq!(next(&done, &down(&["h1"])), Next::Over);
    }

    #[test]
    fn budget_is_never_exceeded_whatever_dies() {
        // Every way in which four hosts can be waiting, under way or done, and down or not.
        let stages = [Waiting, Agent, Done];
        for case in 0..81_usize {
            let all: Vec<UpgradeStage> = (0..4)
                .map(|at| stages[case / 3_usize.pow(at) % 3])
                .collect();
            for dead in 0..16_u32 {
                let hosts: Vec<String> = (0..4).map(|at| format!("h{at}")).collect();
                let dead: BTreeSet<String> = (0..4)
                    .filter(|at| dead & (1 << at) != 0)
                    .map(|at| hosts[at].clone())
                    .collect();
                for max in 1..4 {
                    let mut record = record(max, &all);
                    let Next::Begin(begun) = next(&record, &dead) else {
                        continue;
                    };
                    let any = !begun.is_empty();
                    for place in begun {
                        assert_eq!(record.hosts[place].stage(), Waiting);
                        record.hosts[place].set_stage(Agent);
                    }
                    let mut unavailable = dead.clone();
                    unavailable.extend(in_stages(&record, is_under_way).map(str::to_owned));
                    assert!(
                        !any || unavailable.len() <= max as usize,
                        "{all:?} {dead:?} {max}"
                    );
                }
            }
        }
    }
}
