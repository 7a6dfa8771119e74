//! `cargo lab bench recovery`: how long guests wait when a daemon is killed or exchanged, and whether
//! anything is lost. The program `recovery` does it, with a third party's driver and an oracle that
//! verifies every block; here its outcomes become rows.

use std::path::Path;
use std::process::Command;

use ::bench::meter::Snapshot;
use anyhow::{Context, Result, bail};
use guest::oracle::Summary;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ground::Medium;
use super::report::{Better, Row};
use super::rounds::{RowSpec, Verdict};
use super::{Session, interrupt};
use crate::progress::step;

/// Kills of one run of the program, each of which begins with a new image and another seed.
const KILLS_PER_RUN: u32 = 100;
const QUICK_KILLS: u32 = 20;
/// Hand-overs of one run: each round is two upgrades and a roll-back.
const UPGRADE_ROUNDS: u32 = 100;
const QUICK_UPGRADE_ROUNDS: u32 = 5;

/// One way to be killed.
struct Storm {
    name: &'static str,
    args: &'static [&'static str],
    /// Runs of a full bench.
    runs: u32,
    targets: Targets,
}

/// In milliseconds, at most.
struct Targets {
    after_fence_p50: Option<f64>,
    after_fence_p99: Option<f64>,
    first_io_p50: Option<f64>,
    first_io_p99: Option<f64>,
}

const STORMS: [Storm; 3] = [
    Storm {
        name: "kill/spare/256-mib",
        args: &["--spare", "--touch-mib", "256"],
        runs: 10,
        targets: Targets {
            after_fence_p50: Some(5.0),
            after_fence_p99: Some(20.0),
            first_io_p50: Some(40.0),
            first_io_p99: Some(100.0),
        },
    },
    Storm {
        name: "kill/cold/256-mib",
        args: &["--touch-mib", "256"],
        runs: 3,
        targets: Targets {
            after_fence_p50: None,
            after_fence_p99: Some(100.0),
            first_io_p50: None,
            first_io_p99: None,
        },
    },
    Storm {
        name: "kill/spare/256-mib/packed",
        args: &["--spare", "--touch-mib", "256", "--packed"],
        runs: 3,
        targets: Targets {
            after_fence_p50: Some(5.0),
            after_fence_p99: Some(20.0),
            first_io_p50: Some(40.0),
            first_io_p99: Some(100.0),
        },
    },
];

/// What `recovery blk-storm` prints.
#[derive(Debug, Deserialize)]
struct StormOutcome {
    kills: Vec<Value>,
    oracle: Summary,
    failure: Option<String>,
}

#[derive(Debug, Deserialize)]
struct UpgradeOutcome {
    upgrades: Vec<Value>,
    roll_backs: Vec<Value>,
    oracle: Summary,
    failure: Option<String>,
}

#[derive(Debug, Deserialize)]
struct NetOutcome {
    kills: Vec<Value>,
    wrong: u64,
    failure: Option<String>,
}

#[derive(Debug, Deserialize)]
struct BystanderOutcome {
    quiet_p99_ms: Vec<f64>,
    storm_p99_ms: Vec<f64>,
    oracle: Summary,
    neighbour: Summary,
}

pub(super) fn run(session: &mut Session) -> Result<()> {
    for storm in &STORMS {
        kill(session, storm)?;
    }
    upgrade(session)?;
    bystander(session)?;
    nic(session, "net/kill/spare", &["--spare"])?;
    nic(session, "net/kill/cold", &[])
}

fn kill(session: &mut Session, storm: &Storm) -> Result<()> {
    let rows = storm_rows(storm);
    if !session.wants(&rows.each_ref().map(|(spec, _)| spec.clone())) {
        return Ok(());
    }
    let (runs, kills) = match session.is_quick {
        true => (1, QUICK_KILLS),
        false => (session.rounds_wanted.unwrap_or(storm.runs), KILLS_PER_RUN),
    };
    let mut tally = Tally::default();
    for run in 1..=runs {
        step(format_args!("{}: run {run} of {runs}", storm.name));
        let kills = kills.to_string();
        let seed = run.to_string();
        let args = [storm.args, &["--kills", &kills, "--seed", &seed]].concat();
        match measure::<StormOutcome>(session, "blk-storm", &args) {
            Ok((outcome, foreign)) => tally.add(outcome, foreign),
            Err(error) => tally.failures.push(format!("{error:#}")),
        }
        interrupt::check()?;
    }
    for (spec, figure) in rows {
        let row = match (tally.kills.is_empty(), figure) {
            (true, _) => Row::failed(&spec, &tally.complaint()),
            (_, figure) => Row::new(&spec, &[figure(&tally)], &[], &tally.foreign),
        };
        session.add_row(row);
    }
    if let Some(failure) = tally.failures.first() {
        step(format_args!("{}: {failure}", storm.name));
    }
    session.report.add_events(storm.name, tally.kills);
    Ok(())
}

type Figure = Box<dyn Fn(&Tally) -> f64>;

fn storm_rows(storm: &Storm) -> [(RowSpec, Figure); 12] {
    let row = |what: &str, unit, better, target: Option<f64>, figure: Figure| {
        let spec = RowSpec {
            case: format!("{}/{what}", storm.name),
            unit,
            better,
            verdict: target.map_or(Verdict::Info, |value| Verdict::Target { value, peer: None }),
            ..RowSpec::default()
        };
        (spec, figure)
    };
    let lower = Better::Lower;
    let of = |field: &'static str, percent: f64| -> Figure {
        Box::new(move |tally: &Tally| percentile(&tally.kills, field, percent))
    };
    let Targets {
        after_fence_p50,
        after_fence_p99,
        first_io_p50,
        first_io_p99,
    } = storm.targets;
    [
        row(
            "errors",
            "requests",
            lower,
            Some(0.0),
            Box::new(|tally| tally.errors as f64),
        ),
        row(
            "lost-or-wrong",
            "blocks",
            lower,
            Some(0.0),
            Box::new(|tally| tally.wrong as f64),
        ),
        row(
            "kills",
            "kills",
            Better::Higher,
            None,
            Box::new(|tally| tally.kills.len() as f64),
        ),
        row(
            "kills-with-requests-in-flight",
            "%",
            Better::Higher,
            Some(90.0),
            Box::new(|tally| {
                let values = field(&tally.kills, "in_flight");
                let hit = values.iter().filter(|&&count| count > 0.0).count();
                100.0 * hit as f64 / values.len().max(1) as f64
            }),
        ),
        row(
            "in-flight/p50",
            "requests",
            Better::Higher,
            None,
            of("in_flight", 50.0),
        ),
        row("fence-wait/p50", "ms", lower, None, of("fence_ms", 50.0)),
        row("fence-wait/p99", "ms", lower, None, of("fence_ms", 99.0)),
        row(
            "fence-to-first-io/p50",
            "ms",
            lower,
            after_fence_p50,
            of("after_fence_ms", 50.0),
        ),
        row(
            "fence-to-first-io/p99",
            "ms",
            lower,
            after_fence_p99,
            of("after_fence_ms", 99.0),
        ),
        row(
            "kill-to-first-io/p50",
            "ms",
            lower,
            first_io_p50,
            of("first_io_ms", 50.0),
        ),
        row(
            "kill-to-first-io/p99",
            "ms",
            lower,
            first_io_p99,
            of("first_io_ms", 99.0),
        ),
        row(
            "longest-request/p99",
            "ms",
            lower,
            None,
            of("longest_ms", 99.0),
        ),
    ]
}

/// Over all runs of a storm.
#[derive(Default)]
struct Tally {
    kills: Vec<Value>,
    errors: u64,
    wrong: u64,
    foreign: Vec<f64>,
    failures: Vec<String>,
}

impl Tally {
    fn add(&mut self, outcome: StormOutcome, foreign: f64) {
        self.kills.extend(outcome.kills);
        self.errors += errors(&outcome.oracle) + u64::from(outcome.failure.is_some());
        self.wrong += wrong(&outcome.oracle);
        self.foreign.push(foreign);
        self.failures.extend(outcome.failure);
    }

    fn complaint(&self) -> String {
        let first = self.failures.first();
        first.map_or("nothing was killed".to_owned(), String::clone)
    }
}

fn errors(oracle: &Summary) -> u64 {
    oracle.errors + oracle.unanswered + oracle.unasked
}

fn wrong(oracle: &Summary) -> u64 {
    oracle.lost + oracle.misplaced + oracle.torn + oracle.foreign
}

fn upgrade(session: &mut Session) -> Result<()> {
    const TARGET_MS: f64 = 20.0;
    let row = |what: &str, target: Option<f64>| RowSpec {
        case: format!("upgrade/{what}"),
        unit: "ms",
        better: Better::Lower,
        verdict: target.map_or(Verdict::Info, |value| Verdict::Target { value, peer: None }),
        ..RowSpec::default()
    };
    let faults = RowSpec {
        unit: "requests",
        ..row("errors-lost-or-wrong", Some(0.0))
    };
    let rows = [
        row("stall/p99", Some(TARGET_MS)),
        row("roll-back/stall/p99", Some(TARGET_MS)),
        row("stall/p50", None),
        row("roll-back/stall/p50", None),
        row("gap/p99", None),
        faults,
    ];
    if !session.wants(&rows) {
        return Ok(());
    }
    step("upgrades and roll-backs");
    let rounds = match session.is_quick {
        true => QUICK_UPGRADE_ROUNDS,
        false => UPGRADE_ROUNDS,
    };
    let rounds = rounds.to_string();
    let measured = measure::<UpgradeOutcome>(session, "blk-upgrade", &["--rounds", &rounds]);
    let (outcome, foreign) = match measured {
        Ok(measured) => measured,
        Err(error) => {
            rows.iter()
                .for_each(|spec| session.add_row(Row::failed(spec, &format!("{error:#}"))));
            return Ok(());
        }
    };
    let (up, back) = (&outcome.upgrades, &outcome.roll_backs);
    let failed = u64::from(outcome.failure.is_some());
    let figures = [
        percentile(up, "longest_ms", 99.0),
        percentile(back, "longest_ms", 99.0),
        percentile(up, "longest_ms", 50.0),
        percentile(back, "longest_ms", 50.0),
        percentile(up, "gap_ms", 99.0),
        (errors(&outcome.oracle) + wrong(&outcome.oracle) + failed) as f64,
    ];
    for (spec, figure) in rows.iter().zip(figures) {
        session.add_row(Row::new(spec, &[figure], &[], &[foreign]));
    }
    session.report.add_events("upgrade", outcome.upgrades);
    session
        .report
        .add_events("upgrade/roll-back", outcome.roll_backs);
    Ok(())
}

fn bystander(session: &mut Session) -> Result<()> {
    const TARGET_RATIO: f64 = 1.2;
    let row = |what: &str, unit, target: Option<f64>| RowSpec {
        case: format!("blast-radius/other-process/{what}"),
        unit,
        better: Better::Lower,
        verdict: target.map_or(Verdict::Info, |value| Verdict::Target { value, peer: None }),
        ..RowSpec::default()
    };
    let rows = [
        row("p99-storm-to-quiet", "ratio", Some(TARGET_RATIO)),
        row("p99-quiet", "ms", None),
        row("p99-storm", "ms", None),
        row("errors-lost-or-wrong", "requests", Some(0.0)),
    ];
    if !session.wants(&rows) {
        return Ok(());
    }
    step("a bystander's latency");
    let (rounds, seconds) = match session.is_quick {
        true => ("2", "1"),
        false => ("9", "3"),
    };
    let args = ["--rounds", rounds, "--seconds", seconds];
    let (outcome, foreign) = match measure::<BystanderOutcome>(session, "blk-bystander", &args) {
        Ok(measured) => measured,
        Err(error) => {
            rows.iter()
                .for_each(|spec| session.add_row(Row::failed(spec, &format!("{error:#}"))));
            return Ok(());
        }
    };
    let (quiet, storm) = (&outcome.quiet_p99_ms, &outcome.storm_p99_ms);
    let ratios: Vec<f64> = storm.iter().zip(quiet).map(|(a, b)| a / b).collect();
    let faults = errors(&outcome.oracle)
        + wrong(&outcome.oracle)
        + errors(&outcome.neighbour)
        + wrong(&outcome.neighbour);
    let figures = [&ratios[..], quiet, storm, &[faults as f64]];
    for (spec, figures) in rows.iter().zip(figures) {
        session.add_row(Row::new(spec, figures, &[], &[foreign]));
    }
    Ok(())
}

/// A connection through a NIC whose daemon is killed.
fn nic(session: &mut Session, name: &'static str, args: &[&str]) -> Result<()> {
    const TARGET_MS: f64 = 200.0;
    const KILLS: u32 = 300;
    const QUICK_KILLS: u32 = 10;
    let row = |what: &str, unit, target: Option<f64>| RowSpec {
        case: format!("{name}/{what}"),
        unit,
        better: Better::Lower,
        verdict: target.map_or(Verdict::Info, |value| Verdict::Target { value, peer: None }),
        ..RowSpec::default()
    };
    let rows = [
        row("tcp-gap/p99", "ms", Some(TARGET_MS)),
        row("tcp-gap/p50", "ms", None),
        row("kill-to-new-bytes/p99", "ms", None),
        row("connections-lost-or-bytes-wrong", "count", Some(0.0)),
    ];
    if !session.wants(&rows) {
        return Ok(());
    }
    step(format_args!("{name}: a connection through a NIC"));
    let kills = if session.is_quick { QUICK_KILLS } else { KILLS }.to_string();
    let args = [args, &["--kills", &kills]].concat();
    let (outcome, foreign) =
        match measure_of::<NetOutcome>(session, "device-net", "net-storm", &args) {
            Ok(measured) => measured,
            Err(error) => {
                rows.iter()
                    .for_each(|spec| session.add_row(Row::failed(spec, &format!("{error:#}"))));
                return Ok(());
            }
        };
    let lost = outcome.wrong + u64::from(outcome.failure.is_some());
    let figures = [
        percentile(&outcome.kills, "gap_ms", 99.0),
        percentile(&outcome.kills, "gap_ms", 50.0),
        percentile(&outcome.kills, "first_bytes_ms", 99.0),
        lost as f64,
    ];
    for (spec, figure) in rows.iter().zip(figures) {
        session.add_row(Row::new(spec, &[figure], &[], &[foreign]));
    }
    if let Some(failure) = outcome.failure {
        step(format_args!("{name}: {failure}"));
    }
    session.report.add_events(name, outcome.kills);
    Ok(())
}

/// Runs the program on disks; its outcome, and the share of all CPUs' time that neither it nor its daemons
/// took. What the oracle found wrong is an outcome too.
fn measure<T: DeserializeOwned>(session: &Session, verb: &str, args: &[&str]) -> Result<(T, f64)> {
    let dir: &Path = session.ground()?.dir(Medium::FileDirect);
    let dir = dir.to_str().context("the directory's name is no UTF-8")?;
    measure_of(
        session,
        "device-blk",
        verb,
        &[&["--dir", dir], args].concat(),
    )
}

fn measure_of<T: DeserializeOwned>(
    session: &Session,
    daemon: &str,
    verb: &str,
    args: &[&str],
) -> Result<(T, f64)> {
    const FOUND_WRONG: i32 = 2;
    let ground = session.ground()?;
    let mut command = Command::new(ground.program("recovery")?);
    command
        .arg(verb)
        .arg("--daemon")
        .arg(ground.program(daemon)?)
        .args(["--json", "-"])
        .args(args);
    let children_before = children_seconds();
    let before = Snapshot::take(&[], &[])?;
    let output = command.output().context("cannot run recovery")?;
    let usage = before.usage_until(&Snapshot::take(&[], &[])?);
    match output.status.code() {
        Some(0 | FOUND_WRONG) => {}
        _ => bail!("{}", String::from_utf8_lossy(&output.stderr).trim()),
    }
    let children = children_seconds() - children_before;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let foreign = (usage.foreign_cpu - children / (usage.seconds * cpus)).max(0.0);
    Ok((serde_json::from_slice(&output.stdout)?, foreign))
}

/// CPU time of processes that were started from here and have ended, and of theirs.
fn children_seconds() -> f64 {
    let Ok(usage) = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)
    else {
        return 0.0;
    };
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

fn field(events: &[Value], name: &str) -> Vec<f64> {
    let values = events.iter().filter_map(|event| event[name].as_f64());
    values.collect()
}

/// Nearest rank.
fn percentile(events: &[Value], name: &str, percent: f64) -> f64 {
    let mut values = field(events, name);
    values.sort_unstable_by(f64::total_cmp);
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    let index = rank.clamp(1, values.len().max(1)) - 1;
    values.get(index).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let events: Vec<Value> = (1..=200).map(|ms| json!({"first_io_ms": ms})).collect();
        assert_eq!(percentile(&events, "first_io_ms", 50.0), 100.0);
        assert_eq!(percentile(&events, "first_io_ms", 99.0), 198.0);
        assert_eq!(percentile(&events[..1], "first_io_ms", 99.0), 1.0);
        assert!(percentile(&events, "else", 99.0).is_nan());
    }

    #[test]
    fn a_storm_that_ended_early_counts_as_an_error() {
        let outcome = json!({"kills": [{"in_flight": 3}], "oracle": Summary::default(),
            "failure": "kill 2: no request completes"});
        let mut tally = Tally::default();
        tally.add(serde_json::from_value(outcome).unwrap(), 0.0);
        assert_eq!((tally.errors, tally.wrong, tally.kills.len()), (1, 0, 1));
    }
}
