//! `vmctl device upgrade`

use anyhow::bail;
use api::controller as pb;
use api::controller::device_upgrades_client::DeviceUpgradesClient;

use crate::cli::device::UpgradeArgs;
use crate::cli::{Format, Global};
use crate::{client, json, spec};

pub(super) async fn run(global: &Global, args: UpgradeArgs) -> anyhow::Result<()> {
    let request = pb::UpgradeDevicesRequest {
        target: target(global, &args)?,
        binary: args.binary.unwrap_or_default(),
        program: args.program.unwrap_or_default(),
        max_unavailable: args.max_unavailable,
        gate_ms: milliseconds("--gate", args.gate)?,
        watch_ms: milliseconds("--watch", args.watch)?,
        drain_ms: milliseconds("--drain", args.drain)?,
        version: args.expect_version.unwrap_or_default(),
        request_id: client::request_id(None),
        validate_only: false,
    };
    let channel = client::connect(global).await?;
    let answer = DeviceUpgradesClient::new(channel.clone())
        .upgrade_devices(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    if args.wait.no_wait {
        match global.output {
            Format::Json => json::print(&json::value("Operation", &operation)?),
            Format::Table => println!("{}", operation.name),
        }
        return Ok(());
    }
    let operation = client::wait(global, &channel, operation, "upgrade", None).await?;
    match global.output {
        Format::Json => json::print(&json::value("Operation", &operation)?),
        Format::Table => {
            let findings = operation.metadata.unwrap_or_default().findings;
            for finding in findings.iter().filter(|_| !global.quiet) {
                println!("{finding}");
            }
        }
    }
    Ok(())
}

fn target(global: &Global, args: &UpgradeArgs) -> anyhow::Result<String> {
    if let Some(host) = &args.host {
        return Ok(format!("hosts/{}", host.trim_start_matches("hosts/")));
    }
    let target = args.target.as_deref().unwrap_or_default();
    // Names of VMs may have their project in front: PROJECT/VM is not a device.
    match target.rsplit_once('/') {
        Some((vm, device)) if !target.starts_with("projects/") => {
            let vm = spec::vm_name(vm, &global.project)?;
            Ok(format!("{vm}/devices/{device}"))
        }
        Some(_) if target.contains("/devices/") => Ok(target.to_owned()),
        _ => Ok(spec::vm_name(target, &global.project)?.to_string()),
    }
}

fn milliseconds(option: &str, seconds: Option<f64>) -> anyhow::Result<u32> {
    let Some(seconds) = seconds else {
        return Ok(0);
    };
    let milliseconds = (seconds * 1e3).round();
    if !(1.0..=f64::from(u32::MAX)).contains(&milliseconds) {
        bail!("{option} {seconds}: give a number of seconds of at least 0.001");
    }
    Ok(milliseconds as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_become_milliseconds_and_nothing_is_the_default() {
        assert_eq!(milliseconds("--gate", Some(0.25)).unwrap(), 250);
        assert_eq!(milliseconds("--gate", None).unwrap(), 0);
        for wrong in [0.0, -1.0, f64::NAN, 1e12] {
            assert!(milliseconds("--gate", Some(wrong)).is_err(), "{wrong}");
        }
    }
}
