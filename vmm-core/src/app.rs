//! The process around the machine: from the command line to the exit status.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use api::listen;
use faults::{Faults, Kind};
use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, ConsoleOutput};
use crate::confinement::Confinement;
use crate::console::Console;
use crate::control::{self, ControlThread, Controls};
use crate::error::chain;
use crate::lifecycle::{Inbox, Outcome, Supervisor};
use crate::machine::{Board, Confine, Devices, Machine, MachineConfig, MachineError};
use crate::seccomp::ThreadKind;
use crate::stdio::StdioConsole;

/// Runs the machine that `cli` asks for; `started` is when the process did.
pub fn run(cli: Cli, started: Instant) -> ExitCode {
    let filter = EnvFilter::try_from_env("MORTISE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(ansi)
        .init();
    // A device of 64 queues needs some hundreds.
    api::limits::raise_open_files();
    let outcome = match start(&cli, started) {
        Ok(outcome) => outcome,
        Err(why) => Outcome::VmmError(why),
    };
    if let Some(path) = &cli.exit_file
        && let Err(err) = write_exit_file(path, &outcome)
    {
        eprintln!(
            "vmm-core: error: cannot write --exit-file {}: {err}",
            path.display()
        );
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
    // The control thread takes them, from the first one on.
    control::terminating_signals()
        .thread_block()
        .map_err(|err| format!("cannot block signals: {err}"))?;
    let config = cli.machine_config()?;
    let opened = config.open().map_err(|err| chain(&err))?;
    let listener = match &cli.control_socket {
        Some(path) => Some(listen::unix(path).map_err(|err| chain(&err))?),
        None => None,
    };
    let board = opened.build(&config).map_err(|err| chain(&err))?;
    let written: Vec<_> = [&cli.control_socket, &cli.exit_file]
        .into_iter()
        .filter_map(Option::as_deref)
        .collect();
    let confinement = Confinement::of_process(&written)?;
    let confine = confinement.of_threads();

    let faults = cli
        .allow_faults
        .then(|| start_faults(&confine))
        .transpose()?;
    let console = Arc::new(Console::new(started));
    let inbox = Inbox::new(cli.run_until_boottime_ns);
    let controls = Controls {
        id: cli.id.clone(),
        vcpus: config.vcpus,
        memory_bytes: config.memory_bytes,
        handle: inbox.handle(),
        serial: board
            .serial_port(console.clone())
            .map_err(|err| chain(&err))?,
        console,
        devices: Devices::awaited(&config.devices, faults.as_deref()),
        confinement,
        faults,
    };
    let confine_control = confine.clone();
    let control = ControlThread::start(listener, controls.clone(), move || {
        confine_control(ThreadKind::Control)
    })?;
    let outcome = live(cli, &config, board, inbox, &controls, &confine);
    control.finish();
    outcome
}

/// Their thread wakes devices, and may do what those that keep the connections may.
fn start_faults(confine: &Confine) -> Result<Arc<Faults>, String> {
    let confine = confine.clone();
    let starting = thread::spawn(move || {
        confine(ThreadKind::Devices)?;
        Faults::start(Kind::Frontend).map_err(|err| format!("cannot start a thread: {err}"))
    });
    starting
        .join()
        .unwrap_or_else(|_| Err("the thread that prepares faults ended".to_owned()))
}

/// From the board to the machine's end, controlled by `controls` from the start.
fn live(
    cli: &Cli,
    config: &MachineConfig,
    board: Board,
    inbox: Inbox,
    controls: &Controls,
    confine: &Confine,
) -> Result<Outcome, String> {
    let machine = match complete(board, config, &inbox, controls, confine) {
        Ok(machine) => machine,
        Err(MachineError::Cancelled) => {
            inbox.stopped();
            return Ok(Outcome::StopRequest);
        }
        Err(err) => return Err(chain(&err)),
    };
    let stdio = match cli.console {
        ConsoleOutput::None => None,
        ConsoleOutput::Stdio => {
            let (console, serial) = (controls.console.clone(), controls.serial.clone());
            let handle = controls.handle.clone();
            let stdio = StdioConsole::start(console, serial, handle, confine.clone());
            Some(stdio.map_err(|err| format!("cannot start the console's threads: {err}"))?)
        }
    };
    confine(ThreadKind::Main)?;
    let outcome = Supervisor::new(machine, inbox).run(!cli.no_start);
    if let Some(stdio) = stdio {
        stdio.finish();
    }
    Ok(outcome)
}

fn complete(
    board: Board,
    config: &MachineConfig,
    inbox: &Inbox,
    controls: &Controls,
    confine: &Confine,
) -> Result<Machine, MachineError> {
    let com1 = (controls.serial.clone(), controls.console.clone());
    board
        .attach(controls.devices.clone(), com1, confine, &|| {
            controls.handle.stop_wanted()
        })?
        .ready(config, inbox.reporter(), confine.clone())
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
    fs::write(
        &partial,
        format!("{}\n", json!({ "reason": reason, "message": message })),
    )?;
    fs::rename(&partial, path)
}
