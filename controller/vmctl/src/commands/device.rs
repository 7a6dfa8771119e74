//! `vmctl device`

mod health;
mod upgrade;

use std::process::ExitCode;

use crate::cli::Global;
use crate::cli::device::DeviceCommand;

/// Runs one command.
pub(crate) async fn run(global: &Global, command: DeviceCommand) -> anyhow::Result<ExitCode> {
    match command {
        DeviceCommand::List { vm } => health::list(global, &vm).await?,
        DeviceCommand::Show { vm, device } => health::show(global, &vm, &device).await?,
        DeviceCommand::SetPolicy(args) => health::set_policy(global, args).await?,
        DeviceCommand::Upgrade(args) => upgrade::run(global, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}
