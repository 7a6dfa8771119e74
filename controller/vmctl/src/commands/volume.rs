//! `vmctl volume`

use std::io::Read as _;
use std::path::Path;
use std::process::ExitCode;

use crate::client::Channel;
use anyhow::Context as _;
use api::controller as pb;
use api::controller::volumes_client::VolumesClient;
use api::validate::MAX_KEY_BYTES;
use prost_types::FieldMask;

use super::{PAGE_SIZE, conclude, import, parent};
use crate::cli::volume::{KeyCommand, Preallocation, VolumeCommand};
use crate::cli::{Format, Global, WaitArgs};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: VolumeCommand) -> anyhow::Result<ExitCode> {
    match command {
        VolumeCommand::Create {
            name,
            size,
            from,
            format,
            preallocation,
            preallocate,
            cluster_size,
            encrypted,
            key_file,
            pool,
            export,
            request_id,
            wait,
        } => {
            let source_path = match &from {
                Some(path) => spec::absolute(path)?,
                None => String::new(),
            };
            let cluster_bytes = u32::try_from(cluster_size.unwrap_or(0))
                .context("--cluster-size is too large; 2M is the most")?;
            let spec = pb::VolumeSpec {
                size_bytes: size.unwrap_or(0),
                source_path,
                preallocate,
                format: format.name().to_owned(),
                preallocation: api_preallocation(preallocation) as i32,
                cluster_bytes,
                encrypted,
                pool: pool.as_deref().map(super::pool::full).unwrap_or_default(),
                export: export.unwrap_or_default(),
                ..Default::default()
            };
            let key = key_file.as_deref().map(read_key).transpose()?;
            let channel = client::connect(global).await?;
            let request = pb::CreateVolumeRequest {
                parent: parent(global, false),
                volume_id: name.clone(),
                volume: Some(pb::Volume {
                    spec: Some(spec),
                    ..Default::default()
                }),
                request_id: client::request_id(request_id),
                key: key.unwrap_or_default(),
                ..Default::default()
            };
            let doing = format!("creating volume {name}");
            create(global, &channel, request, wait, &doing).await?;
        }
        VolumeCommand::Clone {
            base,
            name,
            snapshot,
            size,
            wait,
        } => {
            let spec = pb::VolumeSpec {
                size_bytes: size.unwrap_or(0),
                format: "qcow2".to_owned(),
                base: spec::volume_name(&base, &global.project)?.to_string(),
                base_snapshot: snapshot.unwrap_or_default(),
                ..Default::default()
            };
            let channel = client::connect(global).await?;
            let request = pb::CreateVolumeRequest {
                parent: parent(global, false),
                volume_id: name.clone(),
                volume: Some(pb::Volume {
                    spec: Some(spec),
                    ..Default::default()
                }),
                request_id: client::request_id(None),
                ..Default::default()
            };
            let doing = format!("cloning volume {base}");
            create(global, &channel, request, wait, &doing).await?;
        }
        VolumeCommand::Import {
            file,
            name,
            format,
            to,
            size,
            wait,
        } => {
            let import = import::Import {
                file,
                name,
                format,
                to,
                size,
                wait,
            };
            import::run(global, import).await?;
        }
        VolumeCommand::Resize { name, size, wait } => {
            let channel = client::connect(global).await?;
            resize(global, &channel, &name, &size, wait).await?;
        }
        VolumeCommand::Check {
            name,
            repair_leaks,
            wait,
        } => {
            let name = spec::volume_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let request = pb::CheckVolumeRequest {
                name: name.to_string(),
                repair_leaks,
                request_id: client::request_id(None),
            };
            let answer = VolumesClient::new(channel.clone())
                .check_volume(request)
                .await;
            let mut operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("checking volume {}", name.id);
            if !wait.no_wait {
                operation = client::wait(global, &channel, operation, &doing, None).await?;
            }
            let findings = operation.metadata.clone().unwrap_or_default().findings;
            let done = format!("volume {} is sound: {}", name.id, findings.join("; "));
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
        VolumeCommand::Key { command } => set_key(global, command).await?,
        VolumeCommand::List { all_projects } => list(global, all_projects).await?,
        VolumeCommand::Show { name } => show(global, &name).await?,
        VolumeCommand::Delete { name, wait } => {
            let name = spec::volume_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let request = pb::DeleteVolumeRequest {
                name: name.to_string(),
                request_id: client::request_id(None),
                ..Default::default()
            };
            let answer = VolumesClient::new(channel.clone())
                .delete_volume(request)
                .await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("deleting volume {}", name.id);
            let done = format!("volume {} is deleted", name.id);
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(
    global: &Global,
    channel: &Channel,
    request: pb::CreateVolumeRequest,
    wait: WaitArgs,
    doing: &str,
) -> anyhow::Result<()> {
    let done = format!("volume {} is ready", request.volume_id);
    let answer = VolumesClient::new(channel.clone())
        .create_volume(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    conclude(global, channel, operation, wait, doing, &done).await
}

/// Makes a volume larger: to `size`, or by it if it begins with a plus.
pub(super) async fn resize(
    global: &Global,
    channel: &Channel,
    name: &str,
    size: &str,
    wait: WaitArgs,
) -> anyhow::Result<()> {
    let name = spec::volume_name(name, &global.project)?;
    let mut client = VolumesClient::new(channel.clone());
    let size_bytes = match size.strip_prefix('+') {
        None => spec::parse_size(size).map_err(anyhow::Error::msg)?,
        Some(more) => {
            let more = spec::parse_size(more).map_err(anyhow::Error::msg)?;
            let request = pb::GetVolumeRequest {
                name: name.to_string(),
            };
            let volume = client.get_volume(request).await.map_err(client::failed)?;
            let now = volume.into_inner().status.unwrap_or_default().size_bytes;
            now.checked_add(more).context("that is too large")?
        }
    };
    let request = pb::UpdateVolumeRequest {
        volume: Some(pb::Volume {
            name: name.to_string(),
            spec: Some(pb::VolumeSpec {
                size_bytes,
                ..Default::default()
            }),
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["spec.size_bytes".to_owned()],
        }),
        request_id: client::request_id(None),
        validate_only: false,
    };
    let answer = client.update_volume(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("growing volume {}", name.id);
    let done = format!("volume {} has {}", name.id, output::size(size_bytes));
    conclude(global, channel, operation, wait, &doing, &done).await
}

async fn set_key(global: &Global, command: KeyCommand) -> anyhow::Result<()> {
    let (name, key, done) = match command {
        KeyCommand::Set { name, key_file } => (name, read_key(&key_file)?, "is on its host"),
        KeyCommand::Forget { name } => (name, Vec::new(), "is forgotten"),
    };
    let name = spec::volume_name(&name, &global.project)?;
    let mut client = VolumesClient::new(client::connect(global).await?);
    let request = pb::SetVolumeKeyRequest {
        name: name.to_string(),
        key,
    };
    let answer = client
        .set_volume_key(request)
        .await
        .map_err(client::failed)?;
    match global.output {
        Format::Json => json::print(&json::value("Volume", &answer.into_inner())?),
        Format::Table => println!("the key of volume {} {done}", name.id),
    }
    Ok(())
}

/// The passphrase in a file, or on stdin for `-`. Never an argument: those are seen by everybody.
fn read_key(path: &Path) -> anyhow::Result<Vec<u8>> {
    let key = if path == Path::new("-") {
        let mut key = Vec::new();
        std::io::stdin()
            .take(MAX_KEY_BYTES as u64 + 1)
            .read_to_end(&mut key)
            .map(|_| key)
    } else {
        std::fs::read(path)
    };
    let key = key.with_context(|| format!("cannot read the key {}", path.display()))?;
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        anyhow::bail!(
            "the key {} has {} bytes; 1 to {MAX_KEY_BYTES} can be",
            path.display(),
            key.len()
        );
    }
    Ok(key)
}

fn api_preallocation(given: Preallocation) -> pb::Preallocation {
    match given {
        // What the API takes for unset, so that --preallocate can stand beside it.
        Preallocation::Off => pb::Preallocation::Unspecified,
        Preallocation::Metadata => pb::Preallocation::Metadata,
        Preallocation::Falloc => pb::Preallocation::Falloc,
        Preallocation::Full => pb::Preallocation::Full,
    }
}

/// What a disk consists of, one line each.
pub(super) fn print_layers(layers: &[pb::Layer]) {
    if layers.is_empty() {
        return;
    }
    let rows: Vec<Vec<String>> = layers
        .iter()
        .map(|layer| {
            vec![
                output::or_dash(&layer.snapshot),
                layer.format.clone(),
                output::size(layer.allocated_bytes),
                output::age(layer.create_time),
                layer.path.clone(),
            ]
        })
        .collect();
    println!();
    output::table(&["SNAPSHOT", "FORMAT", "ALLOCATED", "AGE", "LAYER"], &rows);
}

async fn list(global: &Global, all_projects: bool) -> anyhow::Result<()> {
    let mut client = VolumesClient::new(client::connect(global).await?);
    let mut volumes = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVolumesRequest {
            parent: parent(global, all_projects),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let page = client
            .list_volumes(request)
            .await
            .map_err(client::failed)?
            .into_inner();
        volumes.extend(page.volumes);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Format::Json {
        let volumes: anyhow::Result<Vec<_>> = volumes
            .iter()
            .map(|volume| json::value("Volume", volume))
            .collect();
        json::print(&volumes?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|volume| {
            let status = volume.status.clone().unwrap_or_default();
            let name = if all_projects {
                volume.name.clone()
            } else {
                output::id(&volume.name)
            };
            vec![
                name,
                phase(volume),
                output::or_dash(&status.format),
                output::size(size(volume)),
                output::size(status.allocated_bytes),
                output::or_dash(&status.attached_to),
                output::or_dash(&output::id(&status.host)),
                output::age(volume.create_time),
                note(volume),
            ]
        })
        .collect();
    output::table(
        &[
            "NAME",
            "PHASE",
            "FORMAT",
            "SIZE",
            "ALLOCATED",
            "OPENED BY",
            "HOST",
            "AGE",
            "NOTE",
        ],
        &rows,
    );
    Ok(())
}

async fn show(global: &Global, name: &str) -> anyhow::Result<()> {
    let name = spec::volume_name(name, &global.project)?;
    let mut client = VolumesClient::new(client::connect(global).await?);
    let request = pb::GetVolumeRequest {
        name: name.to_string(),
    };
    let volume = client
        .get_volume(request)
        .await
        .map_err(client::failed)?
        .into_inner();
    if global.output == Format::Json {
        json::print(&json::value("Volume", &volume)?);
        return Ok(());
    }
    let spec = volume.spec.clone().unwrap_or_default();
    let status = volume.status.clone().unwrap_or_default();
    let clusters = match status.cluster_bytes {
        0 => String::new(),
        bytes => output::size(bytes.into()),
    };
    let encrypted = match (status.encrypted, status.key_present) {
        (false, _) => "",
        (true, true) => "yes, its host has the key",
        (true, false) => "yes, its host does not have the key",
    };
    let base = match (output::id(&spec.base), spec.base_snapshot) {
        (base, snapshot) if snapshot.is_empty() => base,
        (base, snapshot) => format!("{base} as of {snapshot}"),
    };
    let pool = match spec.pool.as_str() {
        "" => "pools/local",
        pool => pool,
    };
    let layers = status.layers.clone();
    output::fields(&[
        ("Name", volume.name.clone()),
        ("Phase", phase(&volume)),
        (
            "Error",
            status.error.map(|error| error.message).unwrap_or_default(),
        ),
        ("Size", output::size(size(&volume))),
        ("Allocated", output::size(status.allocated_bytes)),
        ("Format", status.format),
        ("Clusters", clusters),
        ("Encrypted", encrypted.to_owned()),
        ("Copied from", spec.source_path),
        ("Clone of", base),
        ("Clones", status.clones.join(", ")),
        ("Pool", pool.to_owned()),
        (
            "Fenced",
            if status.fenced { "yes" } else { "NO" }.to_owned(),
        ),
        ("Host", status.host),
        ("Image", status.path),
        ("Opened by", status.attached_to),
        ("Created", output::time(volume.create_time)),
        ("Etag", volume.etag.clone()),
    ]);
    print_layers(&layers);
    Ok(())
}

/// What went wrong, or how far it is.
fn note(volume: &pb::Volume) -> String {
    let status = volume.status.clone().unwrap_or_default();
    match status.error {
        Some(error) => error.message,
        None if status.phase() == pb::VolumePhase::Creating && status.total_bytes > 0 => {
            let share = output::share(status.copied_bytes, status.total_bytes);
            format!("{} {share}", status.stage)
        }
        None if status.encrypted && !status.key_present => "its key is missing".to_owned(),
        None => "-".to_owned(),
    }
}

fn phase(volume: &pb::Volume) -> String {
    if volume.deleting {
        return "deleting".to_owned();
    }
    let phase = volume
        .status
        .as_ref()
        .map_or(pb::VolumePhase::Pending, pb::VolumeStatus::phase);
    output::word(phase.as_str_name(), "VOLUME_PHASE_")
}

/// As it is, or as it will be.
fn size(volume: &pb::Volume) -> u64 {
    let is = volume.status.as_ref().map_or(0, |status| status.size_bytes);
    if is > 0 {
        is
    } else {
        volume.spec.as_ref().map_or(0, |spec| spec.size_bytes)
    }
}
