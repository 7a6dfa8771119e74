//! `vmctl device`

mod upgrade;

use std::process::ExitCode;

use crate::cli::Global;
use crate::cli::device::DeviceCommand;

/// Runs one command.
pub(crate) async fn run(global: &Global, command: DeviceCommand) -> anyhow::Result<ExitCode> {
    match command {
        DeviceCommand::Upgrade(args) => upgrade::run(global, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}
