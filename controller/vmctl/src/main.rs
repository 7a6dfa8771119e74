//! `vmctl`: people's and scripts' way to the controller.
//!
//! ```text
//! cli        what can be typed; spec: the words for disks, NICs and sizes; seed: files for cloud-init
//! client     the connection, operations to wait for, errors in words
//! commands   one module for each noun, and run
//! campaign   files of what to break; fault_report: what came of it, as text, XML and a page
//! console    a terminal on a VM's serial port
//! output     tables and colours; json: any message as JSON
//! ```
//!
//! Exit status: 0 done, 1 failed, 2 not understood.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

mod campaign;
mod cli;
mod client;
mod commands;
mod console;
mod fault_report;
mod json;
mod output;
mod placement;
mod port_forward;
mod security_rule;
mod seed;
mod spec;
mod standalone;

use cli::{Cli, Command};

fn main() -> ExitCode {
    reset_sigpipe();
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("vmctl: error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(dispatch(cli));
    // A thread may still be reading the terminal; nobody waits for it.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => {
            let text = format!("{error:#}");
            eprintln!("vmctl: error: {}", text.replace('\n', "\n  "));
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let global = cli.global;
    match cli.command {
        Command::Vm { command } => commands::vm::run(&global, command).await,
        Command::Volume { command } => commands::volume::run(&global, command).await,
        Command::Device { command } => commands::device::run(&global, command).await,
        Command::Disk { command } => commands::disk::run(&global, command).await,
        Command::Nic { command } => commands::nic::run(&global, command).await,
        Command::Network { command } => commands::network::run(&global, command).await,
        Command::PortForward { command } => commands::port_forward::run(&global, command).await,
        Command::SecurityGroup { command } => commands::security_group::run(&global, command).await,
        Command::Fault { command } => commands::fault::run(&global, command).await,
        Command::Host { command } => commands::host::run(&global, command).await,
        Command::Ca { command } => commands::ca::run(&global, command).await,
        Command::Pool { command } => commands::pool::run(&global, command).await,
        Command::Project { command } => commands::project::run(&global, command).await,
        Command::Quota { command } => commands::project::quota(&global, command).await,
        Command::Audit { command } => commands::audit::run(&global, command).await,
        Command::Backup { file } => commands::state::backup(&global, &file).await,
        Command::Restore { file, force } => commands::state::restore(&global, &file, force).await,
        Command::Controller => commands::state::status(&global).await,
        Command::Op { command } => commands::op::run(&global, command).await,
        Command::Events(args) => commands::events::run(&global, args).await,
        Command::Run(args) => commands::run::run(&global, *args).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "vmctl", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// `vmctl vm list | head -1` ends quietly instead of with a panic.
fn reset_sigpipe() {
    // SAFETY: SIG_DFL is no handler, so no code runs in signal context.
    let _ = unsafe {
        nix::sys::signal::signal(
            nix::sys::signal::Signal::SIGPIPE,
            nix::sys::signal::SigHandler::SigDfl,
        )
    };
}
