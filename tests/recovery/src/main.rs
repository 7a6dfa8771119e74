//! `recovery`: one storm of kills, and its outcome as JSON. `cargo lab bench recovery` makes rows
//! of many.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use guest::oracle::BLOCK_LEN;
use recovery::guest::Habits;
use recovery::host::{Fencing, Readiness};
use recovery::storm::{self, Plan};
use recovery::transport::Flaw;
use recovery::{bystander, nic, upgrade};
use serde::Serialize;
use tempfile::NamedTempFile;

const EXAMPLES: &str = "\
Examples:
  A hundred kills, with a warm spare and 256 MiB of guest memory touched before each:
    recovery blk-storm --daemon target/release/device-blk --dir /var/tmp --kills 100 \\
        --spare --touch-mib 256

  What the oracle finds when the frontend does not replay:
    recovery blk-storm --daemon target/release/device-blk --dir /var/tmp --flaw no-replay";

/// Kills device daemons under verified load
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// SIGKILLs of a device-blk at random instants
    BlkStorm(BlkStorm),
    /// A disk handed over from process to process and back
    BlkUpgrade(BlkUpgrade),
    /// What a storm does to a disk of another process
    BlkBystander(BlkBystander),
    /// SIGKILLs of a device-net under a busy TCP connection; needs root
    NetStorm(NetStorm),
}

#[derive(Debug, Args)]
struct Common {
    /// The device-blk
    #[arg(long, value_name = "FILE")]
    daemon: PathBuf,
    /// Where images go
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Packed rings
    #[arg(long)]
    packed: bool,
    /// Rings
    #[arg(long, default_value = "4")]
    queues: u16,
    /// Requests in flight on each
    #[arg(long, default_value = "32")]
    depth: u16,
    /// Verified blocks of 4 KiB
    #[arg(long, default_value = "16384")]
    blocks: u64,
    /// Of everything random
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Write the outcome to FILE as JSON, - for standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct BlkStorm {
    #[command(flatten)]
    common: Common,
    /// How often
    #[arg(long, default_value = "20")]
    kills: u32,
    /// A process stands by
    #[arg(long)]
    spare: bool,
    /// Guest memory that each incarnation touches before it is killed; without it, what it uses
    #[arg(long, value_name = "MIB")]
    touch_mib: Option<u16>,
    /// Longest time under load before a kill
    #[arg(long, value_name = "MS", default_value = "60")]
    pause_ms: u64,
    /// What the frontend does wrong
    #[arg(long, value_enum)]
    flaw: Option<FlawArg>,
    /// The next incarnation does not wait for the requests of the last one
    #[arg(long)]
    no_fence: bool,
}

#[derive(Debug, Args)]
struct BlkUpgrade {
    #[command(flatten)]
    common: Common,
    /// Each hands over three times: to a new process, back, and again
    #[arg(long, default_value = "10")]
    rounds: u32,
}

#[derive(Debug, Args)]
struct BlkBystander {
    #[command(flatten)]
    common: Common,
    /// Each is once without kills and once with them
    #[arg(long, default_value = "3")]
    rounds: u32,
    /// Half of a round
    #[arg(long, default_value = "1")]
    seconds: f64,
}

#[derive(Debug, Args)]
struct NetStorm {
    /// The device-net to kill
    #[arg(long, value_name = "FILE")]
    daemon: PathBuf,
    /// How often
    #[arg(long, default_value = "20")]
    kills: u32,
    /// A process stands by
    #[arg(long)]
    spare: bool,
    /// Of everything random
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Write the outcome to FILE as JSON, - for standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FlawArg {
    /// It skips what was in flight
    NoReplay,
    /// It keeps no in-flight region
    NoInflightRegion,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Verb::BlkStorm(args) => args.run(),
        Verb::BlkUpgrade(args) => args.run(),
        Verb::BlkBystander(args) => args.run(),
        Verb::NetStorm(args) => args.run(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("recovery: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Common {
    fn image(&self) -> Result<NamedTempFile> {
        let image = tempfile::Builder::new()
            .prefix("recovery-")
            .suffix(".img")
            .tempfile_in(&self.dir)
            .with_context(|| format!("no image in {}", self.dir.display()))?;
        fill(image.as_file(), self.blocks)?;
        Ok(image)
    }

    fn habits(&self) -> Habits {
        Habits {
            queues: usize::from(self.queues),
            depth: usize::from(self.depth),
            packed: self.packed,
            blocks: self.blocks,
            seed: self.seed,
            ..Habits::default()
        }
    }
}

/// To where it is wanted; else `print` does it.
fn report<T: Serialize>(json: Option<&Path>, outcome: &T, print: impl FnOnce(&T)) -> Result<()> {
    let text = serde_json::to_string(outcome)? + "\n";
    match json {
        None => print(outcome),
        Some(file) if file.as_os_str() == "-" => print!("{text}"),
        Some(file) => {
            std::fs::write(file, text)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
    }
    Ok(())
}

impl BlkStorm {
    fn run(&self) -> Result<bool> {
        let image = self.common.image()?;
        let outcome = storm::run(&self.common.daemon, image.path(), &self.plan())?;
        report(self.common.json.as_deref(), &outcome, print_storm)?;
        Ok(outcome.is_clean())
    }

    fn plan(&self) -> Plan {
        let pause = Duration::from_millis(self.pause_ms);
        let memory_mib = self.touch_mib.map_or(64, |mib| usize::from(mib) + 1);
        Plan {
            kills: self.kills,
            pause: (pause.min(Duration::from_millis(5)), pause),
            touches_memory: self.touch_mib.is_some(),
            readiness: match self.spare {
                true => Readiness::Spare,
                false => Readiness::Cold,
            },
            fencing: match self.no_fence {
                true => Fencing::Off,
                false => Fencing::On,
            },
            habits: Habits {
                memory_bytes: memory_mib << 20,
                flaw: match self.flaw {
                    None => Flaw::None,
                    Some(FlawArg::NoReplay) => Flaw::NoReplay,
                    Some(FlawArg::NoInflightRegion) => Flaw::NoInflightRegion,
                },
                ..self.common.habits()
            },
        }
    }
}

impl BlkUpgrade {
    fn run(&self) -> Result<bool> {
        let image = self.common.image()?;
        let habits = self.common.habits();
        let outcome = upgrade::run(&self.common.daemon, image.path(), &habits, self.rounds)?;
        report(self.common.json.as_deref(), &outcome, print_upgrades)?;
        Ok(outcome.oracle.is_clean() && outcome.failure.is_none())
    }
}

impl BlkBystander {
    fn run(&self) -> Result<bool> {
        let (image, neighbours) = (self.common.image()?, self.common.image()?);
        let plan = Plan {
            habits: self.common.habits(),
            pause: (Duration::from_millis(50), Duration::from_millis(150)),
            ..Plan::default()
        };
        let outcome = bystander::run(
            &self.common.daemon,
            (image.path(), neighbours.path()),
            &plan,
            self.rounds,
            Duration::try_from_secs_f64(self.seconds)?,
        )?;
        report(self.common.json.as_deref(), &outcome, |outcome| {
            println!("bystander: {}", outcome.oracle);
            println!("neighbour: {}", outcome.neighbour);
            println!("{} kills; p99 in milliseconds:", outcome.kills);
            println!("  quiet  {:.2?}", outcome.quiet_p99_ms);
            println!("  storm  {:.2?}", outcome.storm_p99_ms);
        })?;
        Ok(outcome.oracle.is_clean() && outcome.neighbour.is_clean())
    }
}

impl NetStorm {
    fn run(&self) -> Result<bool> {
        let readiness = match self.spare {
            true => Readiness::Spare,
            false => Readiness::Cold,
        };
        let outcome = nic::run(&self.daemon, self.kills, readiness, self.seed)?;
        report(self.json.as_deref(), &outcome, |outcome| {
            println!("{} bytes, {} wrong", outcome.bytes, outcome.wrong);
            if let Some(failure) = &outcome.failure {
                println!("ended early: {failure}");
            }
            println!("{} kills, in milliseconds:", outcome.kills.len());
            for (name, of) in [
                (
                    "without new bytes",
                    (|kill| kill.gap_ms) as fn(&nic::Kill) -> f64,
                ),
                ("kill to new bytes", |kill| kill.first_bytes_ms),
            ] {
                let mut values: Vec<f64> = outcome.kills.iter().map(of).collect();
                let [p50, p99] = [50.0, 99.0].map(|part| storm::percentile(&mut values, part));
                println!("  {name:<28} p50 {p50:>8.2}  p99 {p99:>8.2}");
            }
        })?;
        Ok(outcome.failure.is_none() && outcome.wrong == 0)
    }
}

/// Zeroes where blocks are verified, so that first writes are like all others, and a hole behind
/// them that is read to touch memory.
fn fill(image: &File, blocks: u64) -> Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut image_writer = image;
    let len_bytes = blocks * BLOCK_LEN as u64;
    let mut left = len_bytes;
    while left > 0 {
        let part = left.min(zeroes.len() as u64) as usize;
        image_writer.write_all(&zeroes[..part])?;
        left -= part as u64;
    }
    image.set_len(len_bytes + (1 << 20))?;
    image.sync_all()?;
    Ok(())
}

fn print_storm(outcome: &storm::Outcome) {
    println!("{}", outcome.oracle);
    if let Some(failure) = &outcome.failure {
        println!("ended early: {failure}");
    }
    println!("{} kills, in milliseconds:", outcome.kills.len());
    let line = |name: &str, of: fn(&storm::Kill) -> f64| {
        let [p50, p99, max] = [50.0, 99.0, 100.0].map(|percent| outcome.percentile(percent, of));
        println!("  {name:<28} p50 {p50:>8.2}  p99 {p99:>8.2}  max {max:>8.2}");
    };
    line("requests in flight", |kill| kill.in_flight as f64);
    line("kill to fence", |kill| kill.fence_ms);
    line("kill to reaped", |kill| kill.reaped_ms);
    line("kill to attached", |kill| kill.attached_ms);
    line("kill to first completion", |kill| kill.first_io_ms);
    line("fence to first completion", |kill| kill.after_fence_ms);
    line("longest request", |kill| kill.longest_ms);
}

fn print_upgrades(outcome: &upgrade::Outcome) {
    println!("{}", outcome.oracle);
    if let Some(failure) = &outcome.failure {
        println!("ended early: {failure}");
    }
    for (name, series) in [
        ("upgrades", &outcome.upgrades),
        ("roll-backs", &outcome.roll_backs),
    ] {
        println!("{} {name}, in milliseconds:", series.len());
        let line = |what: &str, of: fn(&upgrade::HandOver) -> f64| {
            let mut values: Vec<f64> = series.iter().map(of).collect();
            let [p50, p99] = [50.0, 99.0].map(|percent| storm::percentile(&mut values, percent));
            println!("  {what:<28} p50 {p50:>8.2}  p99 {p99:>8.2}");
        };
        line("longest request", |step| step.longest_ms);
        line("without a completion", |step| step.gap_ms);
        line("until attached", |step| step.attached_ms);
    }
}
