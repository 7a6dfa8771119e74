//! Runs one virtual machine: see `vmm-core --help`.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use vmm_core::app;
use vmm_core::cli::Cli;

fn main() -> ExitCode {
    let started = Instant::now();
    app::run(Cli::parse(), started)
}
