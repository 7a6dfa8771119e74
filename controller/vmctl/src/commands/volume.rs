//! `vmctl volume`

use std::process::ExitCode;

use api::controller as pb;
use api::controller::volumes_client::VolumesClient;

use super::{PAGE_SIZE, conclude, parent};
use crate::cli::{Format, Global, VolumeCommand};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: VolumeCommand) -> anyhow::Result<ExitCode> {
    match command {
        VolumeCommand::Create {
            name,
            size,
            from,
            preallocate,
            request_id,
            wait,
        } => {
            let source_path = match &from {
                Some(path) => spec::absolute(path)?,
                None => String::new(),
            };
            let spec = pb::VolumeSpec {
                size_bytes: size.unwrap_or(0),
                source_path,
                preallocate,
            };
            let channel = client::connect(global).await?;
            let request = pb::CreateVolumeRequest {
                parent: parent(global, false),
                volume_id: name.clone(),
                volume: Some(pb::Volume {
                    spec: Some(spec),
                    ..Default::default()
                }),
                request_id: client::request_id(request_id),
                validate_only: false,
            };
            let answer = VolumesClient::new(channel.clone())
                .create_volume(request)
                .await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("creating volume {name}");
            let done = format!("volume {name} is ready");
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
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

async fn list(global: &Global, all_projects: bool) -> anyhow::Result<()> {
    let mut client = VolumesClient::new(client::connect(global).await?);
    let mut volumes = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVolumesRequest {
            parent: parent(global, all_projects),
            page_size: PAGE_SIZE,
            page_token,
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
                output::size(size(volume)),
                output::or_dash(&status.attached_to),
                output::or_dash(&output::id(&status.host)),
                output::age(volume.create_time),
                status
                    .error
                    .map_or_else(|| "-".to_owned(), |error| error.message),
            ]
        })
        .collect();
    output::table(
        &["NAME", "PHASE", "SIZE", "OPENED BY", "HOST", "AGE", "NOTE"],
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
    output::fields(&[
        ("Name", volume.name.clone()),
        ("Phase", phase(&volume)),
        (
            "Error",
            status.error.map(|error| error.message).unwrap_or_default(),
        ),
        ("Size", output::size(size(&volume))),
        ("Copied from", spec.source_path),
        ("Host", status.host),
        ("Image", status.path),
        ("Opened by", status.attached_to),
        ("Created", output::time(volume.create_time)),
        ("Etag", volume.etag.clone()),
    ]);
    Ok(())
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
