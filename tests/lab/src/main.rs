//! `cargo lab`: obtains artifacts and runs demo, tests, benches and commands on real or nested KVM.
//!
//! The same static binary is `/init` of the nested host it boots.

mod artifacts;
mod bench;
mod cli;
mod contract;
mod cpio;
mod demo;
mod fuzz;
mod initramfs;
mod inside;
mod job;
mod kvm;
mod memory;
mod nested;
mod progress;
mod runner;
mod suite;
mod tool;
mod workspace;
mod wrappers;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    if std::process::id() == 1 && std::env::args_os().len() == 1 {
        nested::init::main();
    }
    progress::start();
    match cli::Cli::parse().run() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("lab: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
