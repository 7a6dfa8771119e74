//! A client of the API, as a control plane would write it: makes a project with a quota, watches what
//! becomes of a volume in it, is refused what is too much, lists by a filter, and clears up.
//!
//! ```text
//! controller --standalone &
//! cargo run -p api --example client -- 127.0.0.1:7070
//! ```

use std::error::Error;
use std::time::Duration;

use api::controller::operations_client::OperationsClient;
use api::controller::projects_client::ProjectsClient;
use api::controller::volumes_client::VolumesClient;
use api::controller::watch_resources_response::Change;
use api::controller::watched_resource::Resource;
use api::controller::watches_client::WatchesClient;
use api::controller::*;
use api::listen::Address;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address: Address = std::env::args().nth(1).ok_or("give HOST:PORT")?.parse()?;
    let channel = api::connect::address(&address, PATIENCE).await?;
    let mut projects = ProjectsClient::new(channel.clone());
    let mut volumes = VolumesClient::new(channel.clone());

    // A request with a request_id may be sent again: it is done once.
    let request = CreateProjectRequest {
        project_id: "rust-example".into(),
        project: Some(Project {
            display_name: "Example".into(),
            quota: Some(Quota {
                volumes: 1,
                ..Default::default()
            }),
            ..Default::default()
        }),
        request_id: "rust-example-1".into(),
        validate_only: false,
    };
    let project = projects.create_project(request.clone()).await?.into_inner();
    let again = projects.create_project(request).await?.into_inner();
    assert_eq!(project.uid, again.uid, "the same project");

    // List, then watch from where the list ends: nothing is missed in between.
    let list = ListVolumesRequest {
        parent: project.name.clone(),
        filter: "status.phase = ready".into(),
        ..Default::default()
    };
    let listed = volumes.list_volumes(list.clone()).await?.into_inner();
    assert!(listed.volumes.is_empty());
    let watch = WatchResourcesRequest {
        parent: project.name.clone(),
        kind: ResourceKind::Volume as i32,
        resume_token: listed.resume_token,
        ..Default::default()
    };
    let mut changes = WatchesClient::new(channel.clone())
        .watch_resources(watch)
        .await?
        .into_inner();

    let create = CreateVolumeRequest {
        parent: project.name.clone(),
        volume_id: "data".into(),
        volume: Some(Volume {
            spec: Some(VolumeSpec {
                size_bytes: 1 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }),
        request_id: "rust-example-2".into(),
        ..Default::default()
    };
    let operation = volumes.create_volume(create.clone()).await?.into_inner();
    finished(&channel, operation).await?;
    let ready = async {
        while let Some(message) = changes.message().await? {
            if let Some(Change::Put(put)) = message.change
                && let Some(Resource::Volume(volume)) = put.resource
            {
                println!(
                    "{} is {:?}",
                    volume.name,
                    volume.status.unwrap_or_default().phase()
                );
                return Ok(volume.etag);
            }
        }
        Err("the watch ended".into())
    };
    let etag: Result<String, Box<dyn Error>> = tokio::time::timeout(PATIENCE, ready).await?;
    println!("the watch told of etag {}", etag?);
    let listed = volumes.list_volumes(list).await?.into_inner();
    assert_eq!(
        listed.volumes.len(),
        1,
        "the filter lets it through once it is ready"
    );

    // Errors carry a stable reason and what the message names.
    let second = CreateVolumeRequest {
        volume_id: "more".into(),
        request_id: String::new(),
        ..create
    };
    let refused = volumes
        .create_volume(second)
        .await
        .expect_err("the quota is one volume");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let info = refused.get_details_error_info().ok_or("no ErrorInfo")?;
    println!("refused: {} {}", info.reason, refused.message());
    assert_eq!(info.reason, "QUOTA_EXCEEDED");

    let delete = DeleteVolumeRequest {
        name: format!("{}/volumes/data", project.name),
        ..Default::default()
    };
    let operation = volumes.delete_volume(delete).await?.into_inner();
    finished(&channel, operation).await?;
    let delete = DeleteProjectRequest {
        name: project.name,
        ..Default::default()
    };
    projects.delete_project(delete).await?;
    println!("done");
    Ok(())
}

/// Waits for a long-running operation.
async fn finished(channel: &Channel, operation: Operation) -> Result<(), Box<dyn Error>> {
    let request = WaitOperationRequest {
        name: operation.name,
        timeout_ms: PATIENCE.as_millis() as u32,
    };
    let operation = OperationsClient::new(channel.clone())
        .wait_operation(request)
        .await?
        .into_inner();
    match (operation.done, operation.error) {
        (true, None) => Ok(()),
        (true, Some(error)) => Err(error.message.into()),
        (false, _) => Err(format!("{} is not done in time", operation.name).into()),
    }
}
