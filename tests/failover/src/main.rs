//! The program: see the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use failover::{Loss, Settings};

/// Kills or cuts off one of two hosts, and shows that its VM runs again on the other one, once, with its
/// disk intact. Needs root and /dev/kvm.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
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

fn main() -> ExitCode {
    match measure(&Args::parse()) {
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
    let text = serde_json::to_string_pretty(&report)? + "\n";
    print!("{text}");
    if let Some(file) = &args.json {
        std::fs::write(file, text)?;
    }
    Ok(report.is_good())
}
