//! `vmctl device list`, `show` and `set-policy`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use api::controller as pb;
use api::controller::devices_client::DevicesClient;
use prost_types::FieldMask;

use crate::cli::device::SetPolicyArgs;
use crate::cli::{Format, Global};
use crate::commands::conclude;
use crate::{client, json, output, spec};

/// Outages that `show` prints.
const SHOWN_OUTAGES: usize = 10;

pub(super) async fn list(global: &Global, vm: &str) -> anyhow::Result<()> {
    let request = pb::ListDevicesRequest {
        parent: spec::vm_name(vm, &global.project)?.to_string(),
        max_outages: 0,
    };
    let mut client = DevicesClient::new(client::connect(global).await?);
    let answer = client.list_devices(request).await.map_err(client::failed)?;
    let devices = answer.into_inner().devices;
    if global.output == Format::Json {
        let devices: anyhow::Result<Vec<_>> = devices
            .iter()
            .map(|device| json::value("Device", device))
            .collect();
        json::print(&devices?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = devices.iter().map(row).collect();
    output::table(
        &[
            "NAME",
            "TYPE",
            "STATE",
            "FOR",
            "IN FLIGHT",
            "OUTAGES",
            "LAST RECOVERY",
            "RESTARTS",
            "HANGS",
            "DAEMON",
            "VERSION",
            "POLICY",
        ],
        &rows,
    );
    Ok(())
}

fn row(device: &pb::Device) -> Vec<String> {
    let stalled = match device.stalled_since {
        None => "-".to_owned(),
        since => output::age(since),
    };
    vec![
        output::id(&device.name),
        device.r#type.clone(),
        state(device),
        stalled,
        device.in_flight.to_string(),
        device.outages_total.to_string(),
        output::or_dash(&recovery(device.last_recovery_us)),
        device.restarts.to_string(),
        device.hangs.to_string(),
        output::or_dash(&device.daemon),
        output::or_dash(&device.version),
        policy(device),
    ]
}

pub(super) async fn show(global: &Global, vm: &str, device: &str) -> anyhow::Result<()> {
    let request = pb::GetDeviceRequest {
        name: device_name(global, vm, device)?,
    };
    let mut client = DevicesClient::new(client::connect(global).await?);
    let found = client.get_device(request).await.map_err(client::failed)?;
    let found = found.into_inner();
    if global.output == Format::Json {
        json::print(&json::value("Device", &found)?);
        return Ok(());
    }
    let positive = |number: u64| match number {
        0 => String::new(),
        number => number.to_string(),
    };
    let waits = match found.storage_wait_ms {
        0 => String::new(),
        ms => format!("{} s", ms / 1000),
    };
    let is_active = found.state() != pb::DeviceState::Inactive;
    let guaranteed = match (is_active, found.not_guaranteed.is_empty()) {
        (true, true) => "nothing is lost when its daemon is killed".to_owned(),
        _ => String::new(),
    };
    output::fields(&[
        ("Name", found.name.clone()),
        ("Type", found.r#type.clone()),
        ("State", state(&found)),
        (
            "Stalled for",
            match found.stalled_since {
                None => String::new(),
                since => output::age(since),
            },
        ),
        ("Waits for storage for", waits),
        ("In flight", found.in_flight.to_string()),
        ("Outage policy", policy(&found)),
        ("Daemon", found.daemon.clone()),
        ("Version", found.version.clone()),
        ("Process", positive(found.pid.into())),
        ("Restarts", positive(found.restarts)),
        ("Of them hung", positive(found.hangs)),
        ("Connections", positive(found.incarnations)),
        ("Outages", positive(found.outages_total)),
        ("Last recovery", recovery(found.last_recovery_us)),
        ("Last error", found.last_error.clone()),
        ("Guaranteed", guaranteed),
    ]);
    for lost in &found.not_guaranteed {
        println!("Not guaranteed: {lost}");
    }
    print_outages(&found.outages);
    Ok(())
}

fn print_outages(outages: &[pb::DeviceOutage]) {
    if outages.is_empty() {
        return;
    }
    let rows: Vec<Vec<String>> = outages
        .iter()
        .rev()
        .take(SHOWN_OUTAGES)
        .map(|outage| {
            let part = |us: Option<u64>| output::or_dash(&us.map(recovery).unwrap_or_default());
            vec![
                outage.number.to_string(),
                output::age(outage.start_time),
                outage.in_flight.to_string(),
                part(outage.connected_us),
                part(outage.replayed_us),
                part(outage.first_completion_us),
                outage.cause.clone(),
            ]
        })
        .collect();
    println!();
    output::table(
        &[
            "OUTAGE",
            "AGO",
            "IN FLIGHT",
            "CONNECTED",
            "REPLAYED",
            "COMPLETED",
            "CAUSE",
        ],
        &rows,
    );
}

pub(super) async fn set_policy(global: &Global, args: SetPolicyArgs) -> anyhow::Result<()> {
    let policy = parse_policy(&args.policy)?;
    let name = device_name(global, &args.vm, &args.device)?;
    let request = pb::UpdateDeviceRequest {
        device: Some(pb::Device {
            name,
            outage_policy: Some(policy),
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["outage_policy".to_owned()],
        }),
        ..Default::default()
    };
    let channel = client::connect(global).await?;
    let mut client = DevicesClient::new(channel.clone());
    let operation = client
        .update_device(request)
        .await
        .map_err(client::failed)?;
    let doing = format!("Changing {} of vm {}", args.device, args.vm);
    let done = format!("device {} of vm {}: {}", args.device, args.vm, args.policy);
    conclude(
        global,
        &channel,
        operation.into_inner(),
        args.wait,
        &doing,
        &done,
    )
    .await
}

/// `stall`, `pause-vm` or `error-after=30s`
fn parse_policy(text: &str) -> anyhow::Result<pb::OutagePolicy> {
    let policy = |action: pb::OutageAction, error_after_ms| pb::OutagePolicy {
        device: String::new(),
        action: action as i32,
        error_after_ms,
    };
    match (text, text.split_once('=')) {
        ("stall", _) => Ok(policy(pb::OutageAction::Stall, 0)),
        ("pause-vm", _) => Ok(policy(pb::OutageAction::PauseVm, 0)),
        (_, Some(("error-after", time))) => {
            let after = parse_time(time)?;
            let ms = u32::try_from(after.as_millis()).context("at most a day is possible")?;
            Ok(policy(pb::OutageAction::ErrorAfter, ms))
        }
        _ => bail!(
            "{text:?} is none of stall, pause-vm and error-after=TIME such as error-after=30s"
        ),
    }
}

fn parse_time(text: &str) -> anyhow::Result<Duration> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .with_context(|| format!("{text:?} is no time such as 500ms, 30s or 5m"))?;
    let ms = match &text[digits.len()..] {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => bail!("{text:?} is no time such as 30s or 5m"),
    };
    ms.map(Duration::from_millis)
        .with_context(|| format!("{text} is too long"))
}

fn device_name(global: &Global, vm: &str, device: &str) -> anyhow::Result<String> {
    let vm = spec::vm_name(vm, &global.project)?;
    let name = format!("{vm}/devices/{device}");
    api::names::Name::parse_device(&name)?;
    Ok(name)
}

fn state(device: &pb::Device) -> String {
    output::word(device.state().as_str_name(), "DEVICE_STATE_")
}

fn policy(device: &pb::Device) -> String {
    let policy = device.outage_policy.clone().unwrap_or_default();
    match policy.action() {
        pb::OutageAction::Unspecified | pb::OutageAction::Stall => "stall".to_owned(),
        pb::OutageAction::PauseVm => "pause-vm".to_owned(),
        pb::OutageAction::ErrorAfter => {
            let after = Duration::from_millis(policy.error_after_ms.into());
            format!("error-after={after:?}")
        }
    }
}

/// `43.1 ms`
fn recovery(us: u64) -> String {
    match us {
        0 => String::new(),
        1..1_000_000 => format!("{:.1} ms", us as f64 / 1000.0),
        us => format!("{:.1} s", us as f64 / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_words_with_times() {
        let parsed = parse_policy("error-after=30s").unwrap();
        assert_eq!(parsed.action(), pb::OutageAction::ErrorAfter);
        assert_eq!(parsed.error_after_ms, 30_000);
        assert_eq!(
            parse_policy("error-after=5m").unwrap().error_after_ms,
            300_000
        );
        let shown = pb::Device {
            outage_policy: Some(parsed),
            ..Default::default()
        };
        assert_eq!(policy(&shown), "error-after=30s");
        for wrong in [
            "",
            "error",
            "error-after",
            "error-after=",
            "error-after=5",
            "pause",
        ] {
            assert!(parse_policy(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn recoveries_have_their_unit() {
        assert_eq!(recovery(0), "");
        assert_eq!(recovery(43_120), "43.1 ms");
        assert_eq!(recovery(75_400_000), "75.4 s");
    }
}
