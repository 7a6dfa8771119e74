//! The process around the machine: from the command line to the exit status.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, ConsoleOutput};
use crate::console::Console;
use crate::error::chain;
use crate::lifecycle::{Inbox, Outcome, Supervisor};
use crate::machine::{Machine, MachineConfig, MachineError};
use crate::stdio::StdioConsole;

/// Runs the machine that `cli` asks for; `started` is when the process did.
pub fn run(cli: Cli, started: Instant) -> ExitCode {
    let filter = EnvFilter::try_from_env("MORTISE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let outcome = match start(&cli, started) {
        Ok(outcome) => outcome,
        Err(why) => Outcome::VmmError(why),
    };
    if let Some(path) = &cli.exit_file
        && let Err(err) = write_exit_file(path, &outcome)
    {
        eprintln!("vmm-core: error: cannot write --exit-file {}: {err}", path.display());
    }
    match outcome {
        Outcome::GuestShutdown | Outcome::StopRequest => ExitCode::SUCCESS,
        Outcome::VmmError(why) => {
            eprintln!("vmm-core: error: {why}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: &Cli, started: Instant) -> Result<Outcome, String> {
    let config = cli.machine_config()?;
    let console = Arc::new(Console::new(started));
    let inbox = Inbox::new();
    let machine = assemble(&config, console.clone(), &inbox).map_err(|err| chain(&err))?;
    let serial = machine.serial().clone();
    let (supervisor, handle) = Supervisor::new(machine, inbox);
    let stdio = match cli.console {
        ConsoleOutput::None => None,
        ConsoleOutput::Stdio => {
            let stdio = StdioConsole::start(console, serial, handle.clone());
            Some(stdio.map_err(|err| format!("cannot start the console's threads: {err}"))?)
        }
    };
    let outcome = supervisor.run(!cli.no_start);
    if let Some(stdio) = stdio {
        stdio.finish();
    }
    Ok(outcome)
}

fn assemble(config: &MachineConfig, console: Arc<Console>, inbox: &Inbox) -> Result<Machine, MachineError> {
    config.open()?.build(config)?.attach(config, console)?.ready(config, inbox.reporter(), Box::new(|| Ok(())))
}

/// Replaces `path` in one step, so that a reader never sees half of it.
fn write_exit_file(path: &Path, outcome: &Outcome) -> io::Result<()> {
    let (reason, message) = match outcome {
        Outcome::GuestShutdown => ("guest-shutdown", "the guest switched itself off"),
        Outcome::StopRequest => ("stop-request", "the machine was stopped on request"),
        Outcome::VmmError(why) => ("vmm-error", why.as_str()),
    };
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    fs::write(&partial, format!("{}\n", json!({ "reason": reason, "message": message })))?;
    fs::rename(&partial, path)
}
