//! The program: see the library.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, Subcommand};
use failover::nested::{self, ground, host, story};
use failover::{Loss, Report, Settings};

/// Kills or cuts off one of two hosts, and shows that its VM runs again on the other one, once, with its
/// disk intact. Needs root and /dev/kvm.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Where controller, node-agent, vmm-core and device-blk are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Cut the host off and leave it running, instead of killing it
    #[arg(long)]
    partition: bool,
    /// Write what was measured to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// The same with emulated hosts and Linux guests, etcd and two controllers: `cargo lab demo --hosts 2`
    Nested {
        /// What it takes, as JSON
        #[arg(long, value_name = "FILE")]
        settings: PathBuf,
        /// Write what was measured to FILE
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Be such a host
    #[command(hide = true)]
    Host,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.verb {
        None => measure(&args),
        Some(Verb::Nested { settings, json }) => tell(settings, json.as_deref()),
        Some(Verb::Host) => host::run().map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("failover: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> anyhow::Result<bool> {
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None => Settings::beside_this_program()?,
    };
    let loss = match args.partition {
        true => Loss::Partition,
        false => Loss::Kill,
    };
    let report = failover::run(&Settings { bin_dir, loss }, &mut |step| println!("{step}"))?;
    publish(&report, args.json.as_deref())
}

fn tell(settings: &Path, json: Option<&Path>) -> anyhow::Result<bool> {
    let text =
        std::fs::read(settings).with_context(|| format!("cannot read {}", settings.display()))?;
    let settings: nested::Settings = serde_json::from_slice(&text)?;
    // Now, while there is one thread.
    ground::enter()?;
    let began = Instant::now();
    let report = story::run(&settings, &mut |step| {
        println!("{:>5} s  {step}", began.elapsed().as_secs());
    })
    .with_context(|| format!("see the logs in {}", settings.log_dir.display()))?;
    publish(&report, json)
}

fn publish(report: &Report, json: Option<&Path>) -> anyhow::Result<bool> {
    let text = serde_json::to_string_pretty(report)? + "\n";
    print!("{text}");
    if let Some(file) = json {
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(report.is_good())
}
