//! `cargo lab bench`: puts load on our daemons and on others' in turn, and compares.
//!
//! What every bench needs is here: how contenders run in interleaved rounds ([`rounds`]), what a
//! row of results is ([`report`]), which processes serve and load ([`process`]), and where it all
//! happens ([`ground`]). [`blk`] is about disks, [`net`] about NICs, [`recovery`] about daemons that
//! are killed and exchanged.

mod blk;
mod control;
mod ground;
mod interrupt;
mod net;
mod process;
mod recovery;
mod report;
mod rounds;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use crate::artifacts::Artifacts;
use crate::progress::step;
use crate::workspace;
use ground::Ground;
use report::{Report, Row};
use rounds::{RowSpec, Samples};

const BLK_EXAMPLES: &str = "\
Examples:
  All of it, with the figures in a file:
    cargo lab bench blk --json blk.json

  A look at one column in a few seconds:
    cargo lab bench blk --quick --case '*/randread-4k/qd1'

  Images on another file system than that of target/lab:
    cargo lab bench blk --dir /mnt/nvme

What the columns mean is in docs/performance.md. The machine should have nothing else to do.";

const NET_EXAMPLES: &str = "\
Examples:
  All of it, with the figures in a file:
    cargo lab bench net --json net.json

  One column in a few seconds, to see what a change does:
    cargo lab bench net --quick --case 'tap/tx-64*'

What the columns mean is in docs/performance.md. It takes two CPUs that have nothing else to do.";

const RECOVERY_EXAMPLES: &str = "\
Examples:
  All of it, with each kill and the figures in a file:
    cargo lab bench recovery --json recovery.json

  A hundred kills with a warm spare:
    cargo lab bench recovery --rounds 1 --case 'kill/spare/256-mib/*'

What the rows mean is in docs/performance.md. The machine should have nothing else to do.";

const EXAMPLES: &str = "\
Examples:
  cargo lab bench blk --quick
  cargo lab bench recovery --quick
  cargo lab bench net --quick --json net.json";

/// The command line of all benches.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Bench {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, Subcommand)]
enum Subject {
    /// Disks of device-blk against raw io_uring and qemu-storage-daemon.
    #[command(after_help = BLK_EXAMPLES)]
    Blk {
        #[command(flatten)]
        options: Options,
        /// Where images on disk go.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// NICs of device-net against DPDK, Open vSwitch and plain writes to a tap.
    #[command(after_help = NET_EXAMPLES)]
    Net {
        #[command(flatten)]
        options: Options,
    },
    /// How long guests wait when a daemon is killed or exchanged, and whether anything is lost.
    #[command(after_help = RECOVERY_EXAMPLES)]
    Recovery {
        #[command(flatten)]
        options: Options,
        /// Where images on disk go.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// The controller with a thousand simulated hosts and fifty thousand VMs.
    Control(control::Control),
}

/// What one bench is.
struct Plan {
    name: &'static str,
    /// Whose programs it measures and uses.
    packages: &'static [&'static str],
    body: fn(&mut Session) -> Result<()>,
}

const BLK: Plan = Plan {
    name: "blk",
    packages: &["device-blk", "bench"],
    body: blk::run,
};

const NET: Plan = Plan {
    name: "net",
    packages: &["device-net", "bench"],
    body: net::run,
};

const RECOVERY: Plan = Plan {
    name: "recovery",
    packages: &["device-blk", "device-net", "recovery", "bench"],
    body: recovery::run,
};

/// What all benches take.
#[derive(Debug, Args)]
struct Options {
    /// Write the figures to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer and shorter rounds on smaller images: within a minute, and less exact.
    #[arg(long)]
    quick: bool,
    /// Only cases whose names match; `*` stands for anything. May be repeated.
    #[arg(long = "case", value_name = "PATTERN")]
    cases: Vec<String>,
    /// Rounds of each case.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// What one contender gets in a round.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// Take the daemon and bench from DIR instead of building them.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Print the names of the cases and do nothing.
    #[arg(long)]
    list: bool,
}

impl Bench {
    /// Exit code 0 when the bench ran, whatever it found.
    pub(crate) fn run(self) -> Result<i32> {
        match self.subject {
            Subject::Blk { options, dir } => run(&options, dir.as_deref(), &BLK),
            Subject::Net { options } => run(&options, None, &NET),
            Subject::Control(control) => control.run(),
            Subject::Recovery { options, dir } => run(&options, dir.as_deref(), &RECOVERY),
        }
    }
}

fn run(options: &Options, dir: Option<&Path>, plan: &Plan) -> Result<i32> {
    if let (Some(file), false) = (&options.json, options.list) {
        // A FILE that cannot be written is better known now than in twenty minutes.
        fs::write(file, "").with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut session = Session::begin(options, dir, plan)?;
    (plan.body)(&mut session)?;
    if session.list_only {
        return Ok(0);
    }
    let report = session.end()?;
    print!("{report}");
    if let Some(file) = &options.json {
        fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(0)
}

/// How much time is spent.
#[derive(Clone, Copy, Debug)]
struct Effort {
    rounds: u32,
    /// Of one contender in one round: what counts, and what goes before.
    seconds: f64,
    warm_up_seconds: f64,
    /// Of the images that get most of the load.
    image_bytes: u64,
    /// What idle daemons are watched for.
    idle: Duration,
}

impl Effort {
    fn new(options: &Options) -> Self {
        let mut effort = if options.quick {
            Self {
                rounds: 3,
                seconds: 0.12,
                warm_up_seconds: 0.03,
                image_bytes: 256 << 20,
                idle: Duration::from_secs(2),
            }
        } else {
            Self {
                rounds: 11,
                seconds: 1.0,
                warm_up_seconds: 0.1,
                image_bytes: 1 << 30,
                idle: Duration::from_secs(10),
            }
        };
        effort.rounds = options.rounds.unwrap_or(effort.rounds);
        effort.seconds = options
            .seconds
            .map_or(effort.seconds, |duration| duration.as_secs_f64());
        effort
    }
}

/// One bench under way.
struct Session {
    effort: Effort,
    is_quick: bool,
    /// As the command line says.
    rounds_wanted: Option<u32>,
    cases: Vec<String>,
    /// Names are printed instead of measured.
    list_only: bool,
    ground: Option<Ground>,
    report: Report,
}

impl Session {
    fn begin(options: &Options, dir: Option<&Path>, plan: &Plan) -> Result<Self> {
        let ground = if options.list {
            None
        } else {
            let artifacts = Artifacts::obtain()?;
            let bin_dir = match &options.bin_dir {
                Some(dir) => dir.clone(),
                None => build(plan.packages)?,
            };
            interrupt::catch()?;
            Some(Ground::prepare(artifacts, &bin_dir, dir)?)
        };
        let mut report = Report::new(plan.name, ground.as_ref().map(Ground::machine));
        if !options.list {
            report.foreign_before = ground::foreign_cpu()?;
            let share = report.foreign_before * 100.0;
            step(format_args!("others take {share:.0} % of the CPUs"));
        }
        Ok(Self {
            effort: Effort::new(options),
            is_quick: options.quick,
            rounds_wanted: options.rounds,
            cases: options.cases.clone(),
            list_only: options.list,
            report,
            ground,
        })
    }

    /// Whether any of these rows is wanted.
    fn wants(&mut self, specs: &[RowSpec]) -> bool {
        let wanted: Vec<&RowSpec> = specs
            .iter()
            .filter(|spec| self.is_wanted(&spec.case))
            .collect();
        if self.list_only {
            for spec in wanted {
                println!("{}", spec.case);
            }
            return false;
        }
        !wanted.is_empty()
    }

    fn is_wanted(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|pattern| matches(pattern, case))
    }

    fn ground(&self) -> Result<&Ground> {
        self.ground.as_ref().context("nothing is prepared")
    }

    /// Rounds for rows without targets.
    fn few_rounds(&self) -> u32 {
        self.effort.rounds.div_ceil(3)
    }

    /// Adds the rows that come of `samples`. A failure becomes part of the results, so that one
    /// case does not take the others along.
    fn add(&mut self, specs: &[RowSpec], samples: Result<Samples>) -> Result<()> {
        interrupt::check()?;
        for spec in specs {
            if !self.is_wanted(&spec.case) {
                continue;
            }
            let row = match &samples {
                Ok(samples) => samples.row(spec),
                Err(error) => Row::failed(spec, &format!("{error:#}")),
            };
            self.add_row(row);
        }
        Ok(())
    }

    /// Adds a row that was not made of rounds.
    fn add_row(&mut self, row: Row) {
        if self.is_wanted(&row.case) {
            step(row.summary());
            self.report.rows.push(row);
        }
    }

    fn end(self) -> Result<Report> {
        ensure!(
            !self.report.rows.is_empty(),
            "no case matches; --list prints them all"
        );
        Ok(self.report)
    }
}

/// Optimised, as users have them.
fn build(packages: &[&str]) -> Result<PathBuf> {
    step(format_args!(
        "building {}, optimised",
        packages.join(" and ")
    ));
    let mut args = vec!["build", "--release"];
    for package in packages {
        args.extend(["--package", package]);
    }
    let binaries = workspace::build_always(&args)?;
    let dir = binaries.first().and_then(|binary| binary.file.parent());
    Ok(dir.unwrap_or(Path::new(".")).to_owned())
}

/// Whether `*` can be replaced so that `pattern` is `name`.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(name) = name.strip_prefix(start) else {
        return false;
    };
    (0..=name.len())
        .filter(|&at| name.is_char_boundary(at))
        .any(|at| matches(rest, &name[at..]))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=60.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("{text:?} is no number of seconds from 0.01 to 60")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("tmpfs/*", "tmpfs/randread-4k/qd1", true),
            ("*/qd1", "tmpfs/randread-4k/qd1", true),
            ("*/qd1", "tmpfs/randread-4k/qd128", false),
            ("*qd1*", "tmpfs/randread-4k/qd128", true),
            ("tmpfs", "tmpfs/randread-4k/qd1", false),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn lengths_of_rounds_are_bounded() {
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "nan", "61", "x"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }
}
