//! `vmctl run`: from a kernel on the command line to a console in one step.

use std::process::ExitCode;

use crate::client::Channel;
use anyhow::{anyhow, bail};
use api::controller as pb;
use api::controller::vms_client::VmsClient;
use api::names::Name;
use tokio::signal::unix::{SignalKind, signal};

use super::vm;
use crate::cli::{Format, Global, RunArgs};
use crate::console::{self, End};
use crate::{client, json, spec, standalone};

/// Creates, starts, attaches; and deletes what it created if starting fails or `--rm` says so.
pub(crate) async fn run(global: &Global, args: RunArgs) -> anyhow::Result<ExitCode> {
    if args.machine.kernel.is_none() {
        bail!("name a kernel: vmctl run --kernel FILE ...");
    }
    let id = args.name.clone().unwrap_or_else(random_name);
    let name = spec::vm_name(&id, &global.project)?;
    let spec = spec::vm_spec(args.machine.clone(), pb::VmSpec::default(), &name.project)?;
    let channel = standalone::connect_or_start(global, &args).await?;
    create(global, &channel, &name, spec).await?;

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let work = start_and_attach(global, &channel, &name, &args);
    let result = tokio::select! {
        result = work => result,
        _ = terminate.recv() => Err(anyhow!("interrupted")),
        _ = interrupt.recv() => Err(anyhow!("interrupted")),
    };
    match result {
        // A VM that never ran is in the way of the next attempt.
        Err(error) if args.rm || error.is::<NotStarted>() => {
            delete(global, &channel, &name, true).await?;
            Err(error)
        }
        Err(error) => Err(error.context(format!("vm {} is still there", name.id))),
        Ok(Outcome::RunsOn) => Ok(ExitCode::SUCCESS),
        Ok(Outcome::Stopped(status)) => {
            if args.rm {
                // It was seen stopped; its record may still want it to run for a moment.
                delete(global, &channel, &name, true).await?;
            }
            conclude(&name, &status)
        }
    }
}

enum Outcome {
    RunsOn,
    Stopped(Box<pb::VmStatus>),
}

/// The VM's own start failed.
#[derive(Debug)]
struct NotStarted(String);

impl std::fmt::Display for NotStarted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotStarted {}

async fn create(
    global: &Global,
    channel: &Channel,
    name: &Name,
    spec: pb::VmSpec,
) -> anyhow::Result<()> {
    let request = pb::CreateVmRequest {
        parent: format!("projects/{}", name.project),
        vm_id: name.id.clone(),
        vm: Some(pb::Vm {
            spec: Some(spec),
            ..Default::default()
        }),
        request_id: client::request_id(None),
        validate_only: false,
    };
    let answer = VmsClient::new(channel.clone()).create_vm(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("creating vm {}", name.id);
    if let Err(error) = client::wait(global, channel, operation, &doing, None).await {
        delete(global, channel, name, true).await?;
        return Err(error);
    }
    Ok(())
}

async fn start_and_attach(
    global: &Global,
    channel: &Channel,
    name: &Name,
    args: &RunArgs,
) -> anyhow::Result<Outcome> {
    let request = pb::StartVmRequest {
        name: name.to_string(),
        request_id: client::request_id(None),
        ..Default::default()
    };
    let answer = VmsClient::new(channel.clone()).start_vm(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("starting vm {}", name.id);
    client::wait(global, channel, operation, &doing, None)
        .await
        .map_err(|error| NotStarted(error.to_string()))?;
    if args.detach {
        let vm = client::get_vm(channel, &name.to_string())
            .await
            .map_err(client::failed)?;
        match global.output {
            Format::Json => json::print(&json::value("Vm", &vm)?),
            Format::Table => println!("vm {0} is running; vmctl vm console {0}", name.id),
        }
        return Ok(Outcome::RunsOn);
    }
    if !global.quiet {
        eprintln!("vm {} is running", name.id);
    }
    match console::attach(global, channel, name, 0).await {
        Ok(End::Left) => Ok(Outcome::RunsOn),
        Ok(End::Stopped(status)) => Ok(Outcome::Stopped(status)),
        // So short-lived that there was no console to attach to.
        Err(error) => match over(channel, name).await {
            Some(status) => Ok(Outcome::Stopped(Box::new(status))),
            None => Err(error),
        },
    }
}

async fn over(channel: &Channel, name: &Name) -> Option<pb::VmStatus> {
    let status = client::get_vm(channel, &name.to_string())
        .await
        .ok()?
        .status?;
    matches!(status.phase(), pb::VmPhase::Stopped | pb::VmPhase::Failed).then_some(status)
}

async fn delete(
    global: &Global,
    channel: &Channel,
    name: &Name,
    force: bool,
) -> anyhow::Result<()> {
    let operation = vm::delete(channel, &name.to_string(), force).await?;
    let doing = format!("deleting vm {}", name.id);
    client::wait(global, channel, operation, &doing, None)
        .await
        .map(drop)
}

/// A guest that shut itself down, or was asked to, did well.
fn conclude(name: &Name, status: &pb::VmStatus) -> anyhow::Result<ExitCode> {
    let reason = status.stop_reason.as_str();
    if matches!(reason, "guest-shutdown" | "stop-request") {
        return Ok(ExitCode::SUCCESS);
    }
    match &status.error {
        Some(error) => bail!("vm {} failed: {}", name.id, error.message),
        None => bail!("vm {} stopped: {reason}", name.id),
    }
}

fn random_name() -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("vm-{}", &random[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_names_are_valid() {
        assert!(api::names::is_id(&random_name()));
    }

    #[test]
    fn only_a_clean_shutdown_is_success() {
        let name = Name::vm("default", "web");
        let status = |reason: &str| pb::VmStatus {
            stop_reason: reason.into(),
            ..Default::default()
        };
        assert!(conclude(&name, &status("guest-shutdown")).is_ok());
        assert!(conclude(&name, &status("stop-request")).is_ok());
        let error = conclude(&name, &status("killed")).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
    }
}
