//! `recovery`: one storm of kills, and its outcome as JSON. `cargo lab bench recovery` makes rows
//! of many.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use guest::oracle::BLOCK_LEN;
use recovery::guest::Habits;
use recovery::host::{Fencing, Readiness};
use recovery::storm::{self, Outcome, Plan};
use recovery::transport::Flaw;

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
}

#[derive(Debug, Args)]
struct BlkStorm {
    /// The device-blk to kill
    #[arg(long, value_name = "FILE")]
    daemon: PathBuf,
    /// Where the image goes
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// How often
    #[arg(long, default_value = "20")]
    kills: u32,
    /// A process stands by
    #[arg(long)]
    spare: bool,
    /// Guest memory that each incarnation touches before it is killed; without it, what it uses
    #[arg(long, value_name = "MIB")]
    touch_mib: Option<u16>,
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
    /// Longest time under load before a kill
    #[arg(long, value_name = "MS", default_value = "60")]
    pause_ms: u64,
    /// What the frontend does wrong
    #[arg(long, value_enum)]
    flaw: Option<FlawArg>,
    /// The next incarnation does not wait for the requests of the last one
    #[arg(long)]
    no_fence: bool,
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
    let Verb::BlkStorm(args) = Cli::parse().command;
    match args.run() {
        Ok(outcome) if outcome.is_clean() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(2),
        Err(error) => {
            eprintln!("recovery: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl BlkStorm {
    fn run(&self) -> Result<Outcome> {
        let image = tempfile::Builder::new()
            .prefix("recovery-")
            .suffix(".img")
            .tempfile_in(&self.dir)
            .with_context(|| format!("no image in {}", self.dir.display()))?;
        fill(image.as_file(), self.blocks)?;
        let outcome = storm::run(&self.daemon, image.path(), &self.plan())?;
        match &self.json {
            None => print(&outcome),
            Some(file) => {
                let json = serde_json::to_string(&outcome)? + "\n";
                if file.as_os_str() == "-" {
                    print!("{json}");
                } else {
                    std::fs::write(file, json)
                        .with_context(|| format!("cannot write {}", file.display()))?;
                }
            }
        }
        Ok(outcome)
    }

    fn plan(&self) -> Plan {
        let pause = Duration::from_millis(self.pause_ms);
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
                queues: usize::from(self.queues),
                depth: usize::from(self.depth),
                packed: self.packed,
                memory_bytes: self
                    .touch_mib
                    .map_or(64 << 20, |mib| (usize::from(mib) << 20) + (1 << 20)),
                blocks: self.blocks,
                seed: self.seed,
                flaw: match self.flaw {
                    None => Flaw::None,
                    Some(FlawArg::NoReplay) => Flaw::NoReplay,
                    Some(FlawArg::NoInflightRegion) => Flaw::NoInflightRegion,
                },
                ..Habits::default()
            },
        }
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

fn print(outcome: &Outcome) {
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
