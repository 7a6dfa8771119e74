//! The command line of `cargo lab`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::artifacts::Artifacts;
use crate::bench::Bench;
use crate::contract::Contract;
use crate::demo::Demo;
use crate::fuzz::Fuzz;
use crate::initramfs::Tool;
use crate::inside::{self, Events};
use crate::job::{Event, Job};
use crate::progress::step;
use crate::runner::Kit;
use crate::suite::Suite;
use crate::{nested, workspace, wrappers};

/// Runs Mortise where it can be run: on real KVM, or in an emulated host that has one.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build, boot a real VM made of separate processes, and verify its disk and network I/O.
    Demo(Demo),
    /// Run all tests, the fast ones first.
    Test(Suite),
    /// Measure, beside the limit and other implementations.
    Bench(Bench),
    /// Look for inputs that break what takes untrusted bytes: messages, rings, images, frames.
    ///
    /// Exit status: 0 when every target kept its promises, 3 when an input broke one (it is kept, and
    /// named with what it broke), 1 when the targets could not be built or run.
    Fuzz(Fuzz),
    /// Check the API that others build on: its .proto files by buf, its examples by running them.
    Contract(Contract),
    /// Fetch the kernel, QEMU and tools, and print where they are.
    Artifacts,
    /// Print the variables that integration tests need, to run them by cargo alone.
    Env,
    /// Boot a nested host and run a command in it, with its output shown.
    ///
    /// There, /dev/kvm is real, and GUEST_KERNEL (ELF), GUEST_BZIMAGE and GUEST_INITRD name a
    /// guest to boot.
    Nested(NestedArgs),
    /// Run a job file on this machine's KVM (what nested hosts call).
    #[command(hide = true)]
    Inside {
        #[arg(long)]
        job: PathBuf,
        #[arg(long)]
        events: PathBuf,
    },
}

#[derive(Debug, Args)]
struct NestedArgs {
    /// Package of this workspace to build, or program of this machine, to have there in /usr/bin.
    #[arg(long, value_name = "BIN")]
    with: Vec<String>,
    /// File to have there, at the same base name in /root or at THERE.
    #[arg(long, value_name = "HERE[:THERE]")]
    file: Vec<String>,
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    memory: u32,
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,
    /// The command, without a shell; use `sh -c '...'` for one.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl Cli {
    /// Does what was asked; returns the exit code.
    pub(crate) fn run(self) -> Result<i32> {
        match self.command {
            Verb::Demo(demo) => demo.run(),
            Verb::Test(suite) => suite.run(),
            Verb::Bench(bench) => bench.run(),
            Verb::Fuzz(fuzz) => fuzz.run(),
            Verb::Contract(contract) => contract.run(),
            Verb::Env => {
                let kit = Kit::prepare()?;
                let variables = kit.site().variables().into_iter();
                for (name, path) in variables.chain(wrappers::variables(&kit.artifacts)?) {
                    println!("export {name}={}", path.display());
                }
                Ok(0)
            }
            Verb::Artifacts => {
                println!("{}", serde_json::to_string_pretty(&Artifacts::obtain()?)?);
                Ok(0)
            }
            Verb::Nested(args) => args.run(),
            Verb::Inside { job, events } => {
                let mut events = Events::open(&events)?;
                let job = std::fs::read(&job)
                    .with_context(|| format!("cannot read {}", job.display()))?;
                let end = match inside::run(&serde_json::from_slice(&job)?, &mut events) {
                    Ok(code) => Event::End { code, error: None },
                    Err(error) => Event::End {
                        code: 1,
                        error: Some(format!("{error:#}")),
                    },
                };
                events.send(&end);
                Ok(0)
            }
        }
    }
}

impl NestedArgs {
    fn run(self) -> Result<i32> {
        let artifacts = Artifacts::obtain()?;
        let mut tools = Vec::new();
        for name in &self.with {
            if workspace::is_package(name) {
                step(format_args!("building {name}"));
                for binary in workspace::build(&["build", "--package", name])? {
                    tools.push(Tool::of_binary(&binary)?);
                }
            } else {
                tools.push(Tool::of_system(name)?);
            }
        }
        let options = nested::Options {
            cpus: self.cpus,
            memory_mib: self.memory,
            timeout: Duration::from_secs(self.timeout),
            show_console: true,
            tools,
            files: self.file.iter().map(|file| parse_file(file)).collect(),
            log_name: format!("nested-{}", std::process::id()),
            cable: None,
        };
        step("booting the nested host");
        let job = Job::Command { argv: self.command };
        let code = nested::run(&artifacts, &options, &job, |event| {
            if let Event::Step { text } = event {
                step(text);
            }
        })?;
        step(format_args!("the command ended with status {code}"));
        Ok(code)
    }
}

fn parse_file(text: &str) -> (PathBuf, String) {
    match text.split_once(':') {
        Some((here, there)) => (here.into(), there.to_owned()),
        None => {
            let name = text.rsplit('/').next().unwrap_or(text);
            (text.into(), format!("/root/{name}"))
        }
    }
}
