//! `bench`: one measurement, and its outcome as JSON. `cargo lab bench` runs many and compares.

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::load::{Load, Outcome, Pattern};
use bench::tap::{self, Course, Tap};
use bench::vhost_user::{self, Wait};
use bench::{meter, packet, uring};
use clap::{Args, Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  A disk that a daemon serves, with the daemon's CPU time:
    bench blk-load --socket /run/root.vu --depth 32 --pid $(pidof device-blk)

  The same load on the image itself, past the page cache:
    bench io-uring --file root.img --direct --depth 32

  64 disks at once, one request in flight on each, by a driver that takes no interrupts:
    bench blk-load $(printf -- '--socket /run/disk%s.vu ' $(seq 64)) --depth 1 --wait busy

Writing patterns destroy what is on the disk.";

/// Puts load on a disk for a while and says how it did
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Load on vhost-user-blk disks, through the driver of the crate virtio-driver
    BlkLoad(BlkLoad),
    /// Load on a file by io_uring
    IoUring(IoUring),
    /// Connect to disks, send each a few requests, say "ready", and stay until standard input ends
    BlkHold(BlkHold),
    /// Write packets to a tap of its own until it is stopped
    TapWrite(TapWrite),
    /// Read packets from a tap of its own until it is stopped
    TapRead {
        /// The tap's name
        #[arg(long)]
        tap: String,
        /// Take segments of 64 KiB whole
        #[arg(long)]
        segments: bool,
    },
    /// Send packets out through an interface until it is stopped, or has sent enough
    Flood(Flood),
}

#[derive(Debug, Args)]
struct BlkLoad {
    /// Where a daemon listens; may be repeated, and each gets the whole depth
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,
    /// What to do while waiting for completions
    #[arg(long, value_enum, default_value = "sleep")]
    wait: Wait,
    /// Daemon whose CPU time to report; may be repeated
    #[arg(long = "pid", value_name = "PID")]
    pids: Vec<meter::Pid>,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Debug, Args)]
struct IoUring {
    /// The file
    #[arg(long)]
    file: PathBuf,
    /// Open it with O_DIRECT
    #[arg(long)]
    direct: bool,
    /// Process completions only when they are waited for (IORING_SETUP_DEFER_TASKRUN)
    #[arg(long)]
    deferred: bool,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Debug, Args)]
struct BlkHold {
    /// Where a daemon listens; may be repeated
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Debug, Args)]
struct TapWrite {
    /// The tap's name
    #[arg(long)]
    tap: String,
    /// Many with each call, by io_uring
    #[arg(long)]
    batches: bool,
    #[command(flatten)]
    packets: Packets,
}

#[derive(Debug, Args)]
struct Flood {
    /// The interface's name
    #[arg(long)]
    interface: String,
    /// End after so many
    #[arg(long)]
    count: Option<u64>,
    /// Sleep between two calls
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = parse_seconds)]
    pause: Duration,
    #[command(flatten)]
    packets: Packets,
}

#[derive(Debug, Args)]
struct Packets {
    /// Length of each packet, Ethernet header included
    #[arg(long, default_value = "64", value_parser = parse_packet_len)]
    bytes: usize,
    /// Instead, TCP segments of 64 KiB that are yet to be cut
    #[arg(long, conflicts_with = "bytes")]
    segments: bool,
}

impl Packets {
    fn load(&self) -> tap::Load {
        match self.segments {
            true => tap::Load::Segment,
            false => tap::Load::Packet(self.bytes),
        }
    }
}

#[derive(Debug, Args)]
struct LoadArgs {
    /// Order and direction of requests
    #[arg(long, value_enum, default_value = "randread")]
    pattern: Pattern,
    /// Size of each request: bytes, or with a suffix k or m
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_size)]
    block: usize,
    /// Requests in flight
    #[arg(long, value_name = "COUNT", default_value = "32", value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
    /// Time that counts
    #[arg(long, default_value = "1", value_parser = parse_seconds)]
    seconds: Duration,
    /// Time before that
    #[arg(long, value_name = "SECONDS", default_value = "0.05", value_parser = parse_seconds)]
    warm_up: Duration,
    /// Write the outcome to FILE as JSON, - for standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl LoadArgs {
    fn load(&self) -> Load {
        Load {
            pattern: self.pattern,
            block_bytes: self.block,
            depth: usize::from(self.depth),
            warm_up: self.warm_up,
            duration: self.seconds,
        }
    }

    fn report(&self, outcome: &Outcome) -> Result<()> {
        let json = serde_json::to_string(outcome)? + "\n";
        match &self.json {
            None => print(outcome),
            Some(file) if file.as_os_str() == "-" => print!("{json}"),
            Some(file) => {
                fs::write(file, json)
                    .with_context(|| format!("cannot write {}", file.display()))?;
            }
        }
        Ok(())
    }
}

fn print(outcome: &Outcome) {
    println!("{:.0} requests/s", outcome.iops);
    let per_million = |seconds: f64| seconds * 1e6 / outcome.ios.max(1) as f64;
    let driver = per_million(outcome.driver_cpu_seconds);
    println!("{driver:.2} CPU s per million requests in this program");
    if let Some(seconds) = outcome.daemon_cpu_seconds {
        let daemon = per_million(seconds);
        println!("{daemon:.2} CPU s per million requests in the daemon");
    }
    let foreign = outcome.foreign_cpu * 100.0;
    println!("{foreign:.1} % of all CPUs' time went elsewhere");
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: &Verb) -> Result<()> {
    match verb {
        Verb::BlkLoad(args) => {
            let load = args.load.load();
            let outcome = vhost_user::run(&args.sockets, args.wait, &args.pids, &load)?;
            args.load.report(&outcome)
        }
        Verb::IoUring(args) => {
            let access = uring::Access {
                direct: args.direct,
                deferred: args.deferred,
            };
            let outcome = uring::run(&args.file, access, &args.load.load())?;
            args.load.report(&outcome)
        }
        Verb::BlkHold(args) => {
            vhost_user::hold(&args.sockets, &args.load.load(), wait_for_end)?;
            Ok(())
        }
        Verb::TapWrite(args) => {
            let (tap, load) = (open_tap(&args.tap)?, args.packets.load());
            match args.batches {
                true => Ok(tap.write_batches_forever(load)?),
                false => Ok(tap.write_forever(load)?),
            }
        }
        Verb::TapRead { tap, segments } => {
            let tap = open_tap(tap)?;
            if *segments {
                tap.take_segments()?;
            }
            Ok(tap.read_forever()?)
        }
        Verb::Flood(args) => {
            let course = Course {
                count: args.count,
                pause: args.pause,
            };
            tap::flood(&args.interface, args.packets.load(), course)
                .with_context(|| format!("cannot send through {}", args.interface))
        }
    }
}

fn open_tap(name: &str) -> Result<Tap> {
    Tap::open(name).with_context(|| format!("cannot use the tap {name}"))
}

/// Says "ready", and returns when standard input ends.
fn wait_for_end() {
    println!("ready");
    // Whoever closed the pipes wants the end as well.
    let _ = io::stdout().flush();
    let _ = io::stdin().read_to_end(&mut Vec::new());
}

fn parse_size(text: &str) -> Result<usize, String> {
    let (digits, factor) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1 << 10),
        None => match text.strip_suffix(['m', 'M']) {
            Some(digits) => (digits, 1 << 20),
            None => (text, 1),
        },
    };
    let size = digits.parse::<usize>().ok();
    match size.and_then(|size| size.checked_mul(factor)) {
        Some(size) if size > 0 && size % 512 == 0 && size <= 16 << 20 => Ok(size),
        _ => Err(format!(
            "{text:?} is no multiple of 512 bytes up to 16m, such as 4k"
        )),
    }
}

fn parse_packet_len(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(len) if (packet::HEADERS_BYTES..=65_000).contains(&len) => Ok(len),
        _ => Err(format!(
            "{text:?} is no length from {} to 65000",
            packet::HEADERS_BYTES
        )),
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text:?} is no number of seconds"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("1m"), Ok(1 << 20));
        assert_eq!(parse_size("512"), Ok(512));
        for wrong in ["", "k", "0", "100", "32m", "-4k", "99999999999999999999k"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
