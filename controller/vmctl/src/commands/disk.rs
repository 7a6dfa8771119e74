//! `vmctl disk`

use std::process::ExitCode;

use crate::client::Channel;
use api::controller as pb;
use api::controller::disks_client::DisksClient;
use api::controller::operations_client::OperationsClient;
use prost_types::FieldMask;

use super::{conclude, op, volume};
use crate::cli::disk::{BackupArgs, DiskCommand, MirrorArgs, MirrorCommand, SetLimitsArgs};
use crate::cli::{Format, Global};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: DiskCommand) -> anyhow::Result<ExitCode> {
    match command {
        DiskCommand::List { vm } => list(global, &vm).await?,
        DiskCommand::Show { vm, disk } => show(global, &vm, &disk).await?,
        DiskCommand::SetLimits(args) => set_limits(global, args).await?,
        DiskCommand::SetPolling {
            vm,
            disk,
            polling,
            wait,
        } => {
            let wanted = pb::Disk {
                polling: polling as i32,
                ..Default::default()
            };
            let mask = vec!["spec.polling".to_owned()];
            update(global, &vm, &disk, wanted, mask, wait).await?;
        }
        DiskCommand::Resize {
            vm,
            disk,
            size,
            wait,
        } => {
            let channel = client::connect(global).await?;
            let found = get(global, &channel, &vm, &disk).await?;
            let Some(pb::disk::Source::Volume(name)) = found.spec.unwrap_or_default().source else {
                anyhow::bail!(
                    "disk {disk} of vm {vm} is not on a volume, and only volumes can be grown; import its image: vmctl volume import"
                );
            };
            volume::resize(global, &channel, &name, &size, wait).await?;
        }
        DiskCommand::Snapshot {
            vm,
            disk,
            name,
            wait,
        } => {
            let channel = client::connect(global).await?;
            let request = pb::SnapshotDiskRequest {
                name: disk_name(global, &vm, &disk)?,
                snapshot_id: name.clone(),
                request_id: client::request_id(None),
            };
            let answer = DisksClient::new(channel.clone())
                .snapshot_disk(request)
                .await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("snapshot {name} of disk {disk}");
            let done = format!("disk {disk} of vm {vm} is kept as {name}");
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
        DiskCommand::Commit { vm, disk, wait } => {
            let channel = client::connect(global).await?;
            let request = pb::CommitDiskRequest {
                name: disk_name(global, &vm, &disk)?,
                request_id: client::request_id(None),
            };
            let answer = DisksClient::new(channel.clone()).commit_disk(request).await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("merging layers of disk {disk}");
            let done = format!("the newest snapshot of disk {disk} of vm {vm} is merged");
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
        DiskCommand::Mirror(args) => mirror(global, args).await?,
        DiskCommand::Backup(args) => backup(global, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(global: &Global, vm: &str) -> anyhow::Result<()> {
    let request = pb::ListDisksRequest {
        parent: spec::vm_name(vm, &global.project)?.to_string(),
    };
    let mut client = DisksClient::new(client::connect(global).await?);
    let answer = client.list_disks(request).await.map_err(client::failed)?;
    let disks = answer.into_inner().disks;
    if global.output == Format::Json {
        let disks: anyhow::Result<Vec<_>> = disks
            .iter()
            .map(|disk| json::value("VmDisk", disk))
            .collect();
        json::print(&disks?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = disks.iter().map(row).collect();
    output::table(
        &[
            "NAME",
            "STATE",
            "SIZE",
            "FORMAT",
            "LAYERS",
            "READS",
            "WRITES",
            "P50",
            "P99",
            "ERRORS",
            "THROTTLED",
            "LIMITS",
            "SOURCE",
        ],
        &rows,
    );
    Ok(())
}

fn row(disk: &pb::VmDisk) -> Vec<String> {
    let spec = disk.spec.clone().unwrap_or_default();
    let status = disk.status.clone().unwrap_or_default();
    let figure = |text: String| match status.served {
        true => text,
        false => "-".to_owned(),
    };
    vec![
        output::id(&disk.name),
        state(&status).to_owned(),
        output::size(status.size_bytes),
        output::or_dash(&status.format),
        status.layers.len().to_string(),
        figure(status.read_requests.to_string()),
        figure(status.write_requests.to_string()),
        figure(microseconds(status.latency_p50_us)),
        figure(microseconds(status.latency_p99_us)),
        figure(status.errors.to_string()),
        figure(status.throttled.to_string()),
        output::or_dash(&limits(&spec)),
        source(&spec),
    ]
}

async fn show(global: &Global, vm: &str, disk: &str) -> anyhow::Result<()> {
    let channel = client::connect(global).await?;
    let found = get(global, &channel, vm, disk).await?;
    if global.output == Format::Json {
        json::print(&json::value("VmDisk", &found)?);
        return Ok(());
    }
    let spec = found.spec.clone().unwrap_or_default();
    let status = found.status.clone().unwrap_or_default();
    let served = |text: String| if status.served { text } else { String::new() };
    let yes = |holds: bool| {
        if holds {
            "yes".to_owned()
        } else {
            String::new()
        }
    };
    output::fields(&[
        ("Name", found.name.clone()),
        ("State", state(&status).to_owned()),
        ("Source", source(&spec)),
        ("Size", output::size(status.size_bytes)),
        ("Format", status.format.clone()),
        ("Encrypted", yes(status.encrypted)),
        ("Read-only", yes(status.read_only)),
        ("Limits", limits(&spec)),
        ("Polling", polling(&spec)),
        ("Cache", served(cache(&status).to_owned())),
        (
            "Reads",
            served(traffic(status.read_requests, status.read_bytes)),
        ),
        (
            "Writes",
            served(traffic(status.write_requests, status.write_bytes)),
        ),
        ("Flushes", served(status.flush_requests.to_string())),
        ("In flight", served(status.inflight.to_string())),
        ("Latency", served(latency(&status))),
        ("Errors", served(status.errors.to_string())),
        ("Throttled", served(status.throttled.to_string())),
        ("Slow", served(status.slow_requests.to_string())),
        ("Bitmaps", bitmaps(&status)),
    ]);
    volume::print_layers(&status.layers);
    Ok(())
}

async fn set_limits(global: &Global, args: SetLimitsArgs) -> anyhow::Result<()> {
    let mut wanted = pb::RateLimits::default();
    let mut mask = Vec::new();
    {
        let (mut read, mut write) = (pb::RateLimit::default(), pb::RateLimit::default());
        let mut set = |path: &str, own: &mut u64, given: Option<u64>| {
            if let Some(number) = given {
                *own = number;
                mask.push(format!("spec.limits.{path}"));
            }
        };
        set("read.iops", &mut read.iops, args.read_iops);
        set(
            "read.bytes_per_second",
            &mut read.bytes_per_second,
            args.read_bps,
        );
        set("read.burst_ios", &mut read.burst_ios, args.read_iops_burst);
        set(
            "read.burst_bytes",
            &mut read.burst_bytes,
            args.read_bps_burst,
        );
        set("write.iops", &mut write.iops, args.write_iops);
        set(
            "write.bytes_per_second",
            &mut write.bytes_per_second,
            args.write_bps,
        );
        set(
            "write.burst_ios",
            &mut write.burst_ios,
            args.write_iops_burst,
        );
        set(
            "write.burst_bytes",
            &mut write.burst_bytes,
            args.write_bps_burst,
        );
        (wanted.read, wanted.write) = (Some(read), Some(write));
    }
    if mask.is_empty() {
        anyhow::bail!("give at least one limit, such as --read-iops 1000; --help lists them");
    }
    let disk = pb::Disk {
        limits: Some(wanted),
        ..Default::default()
    };
    update(global, &args.vm, &args.disk, disk, mask, args.wait).await
}

async fn update(
    global: &Global,
    vm: &str,
    disk: &str,
    wanted: pb::Disk,
    paths: Vec<String>,
    wait: crate::cli::WaitArgs,
) -> anyhow::Result<()> {
    let channel = client::connect(global).await?;
    let request = pb::UpdateDiskRequest {
        disk: Some(pb::VmDisk {
            name: disk_name(global, vm, disk)?,
            spec: Some(wanted),
            ..Default::default()
        }),
        update_mask: Some(FieldMask { paths }),
        request_id: client::request_id(None),
        validate_only: false,
    };
    let answer = DisksClient::new(channel.clone()).update_disk(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("changing disk {disk}");
    let done = format!("disk {disk} of vm {vm} is changed");
    conclude(global, &channel, operation, wait, &doing, &done).await
}

async fn mirror(global: &Global, args: MirrorArgs) -> anyhow::Result<()> {
    let channel = client::connect(global).await?;
    match args.command {
        Some(MirrorCommand::Complete { operation }) => {
            let name = op::full(&operation);
            let request = pb::CompleteMirrorRequest {
                operation: name.clone(),
            };
            let answer = DisksClient::new(channel.clone())
                .complete_mirror(request)
                .await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let (doing, done) = ("switching over", "the guest goes on in the copy");
            return conclude(global, &channel, operation, args.wait, doing, done).await;
        }
        Some(MirrorCommand::Cancel { operation }) => {
            let request = pb::CancelOperationRequest {
                name: op::full(&operation),
            };
            let mut client = OperationsClient::new(channel);
            let answer = client.cancel_operation(request).await;
            return op::print(global, &answer.map_err(client::failed)?.into_inner());
        }
        Some(MirrorCommand::Status { operation }) => {
            let request = pb::GetOperationRequest {
                name: op::full(&operation),
            };
            let mut client = OperationsClient::new(channel);
            let answer = client.get_operation(request).await;
            return op::print(global, &answer.map_err(client::failed)?.into_inner());
        }
        None => {}
    }
    let (vm, disk) = (args.vm.unwrap_or_default(), args.disk.unwrap_or_default());
    let path = args.to.as_deref().map(spec::absolute).transpose()?;
    let request = pb::MirrorDiskRequest {
        name: disk_name(global, &vm, &disk)?,
        format: args.to_format.map_or("", |format| format.name()).to_owned(),
        path: path.unwrap_or_default(),
        auto_complete: !args.hold,
        bytes_per_second: args.bps.unwrap_or(0),
        request_id: client::request_id(None),
    };
    let answer = DisksClient::new(channel.clone()).mirror_disk(request).await;
    let mut operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("copying disk {disk}");
    if args.hold && !args.wait.no_wait {
        operation = client::wait_until(global, &channel, operation, &doing, None, |operation| {
            operation
                .metadata
                .as_ref()
                .is_some_and(|metadata| metadata.ready)
        })
        .await?;
        if !operation.done {
            let id = output::id(&operation.name);
            return match global.output {
                Format::Json => op::print(global, &operation),
                Format::Table => {
                    println!(
                        "the copy keeps up; switch over with: vmctl disk mirror complete {id}"
                    );
                    Ok(())
                }
            };
        }
    }
    let done = format!("disk {disk} of vm {vm} goes on in the copy");
    conclude(global, &channel, operation, args.wait, &doing, &done).await
}

async fn backup(global: &Global, args: BackupArgs) -> anyhow::Result<()> {
    let channel = client::connect(global).await?;
    let path = spec::absolute(&args.file)?;
    let request = pb::BackupDiskRequest {
        name: disk_name(global, &args.vm, &args.disk)?,
        path: path.clone(),
        format: args.format.name().to_owned(),
        bitmap: args.incremental.unwrap_or_default(),
        new_bitmap: args.bitmap.unwrap_or_default(),
        bytes_per_second: args.bps.unwrap_or(0),
        request_id: client::request_id(None),
    };
    let answer = DisksClient::new(channel.clone()).backup_disk(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("backing up disk {}", args.disk);
    let done = format!("disk {} of vm {} is in {path}", args.disk, args.vm);
    conclude(global, &channel, operation, args.wait, &doing, &done).await
}

async fn get(
    global: &Global,
    channel: &Channel,
    vm: &str,
    disk: &str,
) -> anyhow::Result<pb::VmDisk> {
    let request = pb::GetDiskRequest {
        name: disk_name(global, vm, disk)?,
    };
    let answer = DisksClient::new(channel.clone()).get_disk(request).await;
    Ok(answer.map_err(client::failed)?.into_inner())
}

fn disk_name(global: &Global, vm: &str, disk: &str) -> anyhow::Result<String> {
    Ok(format!(
        "{}/disks/{disk}",
        spec::vm_name(vm, &global.project)?
    ))
}

fn state(status: &pb::DiskStatus) -> &'static str {
    if status.served { "served" } else { "off" }
}

fn source(spec: &pb::Disk) -> String {
    match (&spec.source, &spec.nbd) {
        (Some(pb::disk::Source::Path(path)), _) => path.clone(),
        (Some(pb::disk::Source::Volume(volume)), _) => format!("volume {}", output::id(volume)),
        (None, Some(nbd)) => format!("nbd {}/{}", nbd.address, nbd.export),
        (None, None) => "-".to_owned(),
    }
}

fn cache(status: &pb::DiskStatus) -> &'static str {
    if status.direct_io {
        "direct"
    } else {
        "page cache"
    }
}

fn polling(spec: &pb::Disk) -> String {
    match spec.polling() {
        pb::Polling::Unspecified => "adaptive".to_owned(),
        polling => output::word(polling.as_str_name(), "POLLING_"),
    }
}

/// `read 1000 IO/s, write 50 MiB/s (burst 1 GiB)`
fn limits(spec: &pb::Disk) -> String {
    let limits = spec.limits.unwrap_or_default();
    let mut texts = Vec::new();
    for (direction, rate) in [("read", limits.read), ("write", limits.write)] {
        let rate = rate.unwrap_or_default();
        let burst = |text: String| match text.is_empty() {
            true => String::new(),
            false => format!(" (burst {text})"),
        };
        if rate.iops > 0 {
            let at_once = match rate.burst_ios {
                0 => String::new(),
                number => number.to_string(),
            };
            texts.push(format!("{direction} {} IO/s{}", rate.iops, burst(at_once)));
        }
        if rate.bytes_per_second > 0 {
            let at_once = match rate.burst_bytes {
                0 => String::new(),
                number => output::size(number),
            };
            let speed = output::size(rate.bytes_per_second);
            texts.push(format!("{direction} {speed}/s{}", burst(at_once)));
        }
    }
    texts.join(", ")
}

fn traffic(requests: u64, bytes: u64) -> String {
    format!("{requests} ({})", output::size(bytes))
}

fn latency(status: &pb::DiskStatus) -> String {
    format!(
        "p50 {}, p99 {}, p99.9 {}, max {}",
        microseconds(status.latency_p50_us),
        microseconds(status.latency_p99_us),
        microseconds(status.latency_p999_us),
        microseconds(status.latency_max_us),
    )
}

fn microseconds(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{:.1} s", us / 1e6),
        us if us >= 1e3 => format!("{:.1} ms", us / 1e3),
        us => format!("{us:.0} us"),
    }
}

fn bitmaps(status: &pb::DiskStatus) -> String {
    let texts: Vec<String> = status
        .bitmaps
        .iter()
        .map(|bitmap| {
            format!(
                "{} ({} to copy)",
                bitmap.bitmap,
                output::size(bitmap.dirty_bytes)
            )
        })
        .collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_words() {
        let spec = pb::Disk {
            limits: Some(pb::RateLimits {
                read: Some(pb::RateLimit {
                    iops: 1000,
                    ..Default::default()
                }),
                write: Some(pb::RateLimit {
                    bytes_per_second: 50 << 20,
                    burst_bytes: 1 << 30,
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        assert_eq!(
            limits(&spec),
            "read 1000 IO/s, write 50 MiB/s (burst 1 GiB)"
        );
        assert_eq!(limits(&pb::Disk::default()), "");
    }

    #[test]
    fn times_have_their_unit() {
        assert_eq!(microseconds(12.4), "12 us");
        assert_eq!(microseconds(1250.0), "1.2 ms");
        assert_eq!(microseconds(2.5e6), "2.5 s");
    }
}
