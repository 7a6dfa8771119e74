//! `vmctl project` and `vmctl quota`

use std::process::ExitCode;

use api::controller as pb;
use api::controller::projects_client::ProjectsClient;

use crate::cli::project::{ProjectCommand, QuotaCommand, QuotaFigures};
use crate::cli::{Format, Global};
use crate::{client, json, output};

/// Runs one command on projects.
pub(crate) async fn run(global: &Global, command: ProjectCommand) -> anyhow::Result<ExitCode> {
    let mut client = ProjectsClient::new(client::connect(global).await?);
    match command {
        ProjectCommand::Create {
            name,
            display_name,
            quota,
            request_id,
        } => {
            let request = pb::CreateProjectRequest {
                project_id: name,
                project: Some(pb::Project {
                    display_name: display_name.unwrap_or_default(),
                    quota: Some(quota.quota()),
                    ..Default::default()
                }),
                request_id: client::request_id(request_id),
                validate_only: false,
            };
            let made = client.create_project(request).await;
            let made = made.map_err(client::failed)?.into_inner();
            said(global, &made, "created")?;
        }
        ProjectCommand::List { filter, order_by } => {
            let mut projects = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = pb::ListProjectsRequest {
                    page_size: super::PAGE_SIZE,
                    page_token,
                    filter: filter.clone().unwrap_or_default(),
                    order_by: order_by.clone().unwrap_or_default(),
                    ..Default::default()
                };
                let page = client.list_projects(request).await;
                let page = page.map_err(client::failed)?.into_inner();
                projects.extend(page.projects);
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            list(global, &projects)?;
        }
        ProjectCommand::Show { name } => show(global, &get(&mut client, &name).await?)?,
        ProjectCommand::Delete { name } => {
            let request = pb::DeleteProjectRequest {
                name: full(&name),
                ..Default::default()
            };
            client
                .delete_project(request)
                .await
                .map_err(client::failed)?;
            if !global.quiet {
                println!("project {name} deleted");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one command on quotas.
pub(crate) async fn quota(global: &Global, command: QuotaCommand) -> anyhow::Result<ExitCode> {
    let mut client = ProjectsClient::new(client::connect(global).await?);
    match command {
        QuotaCommand::Show { name } => {
            let name = name.unwrap_or_else(|| global.project.clone());
            show(global, &get(&mut client, &name).await?)?;
        }
        QuotaCommand::Set { name, quota } => {
            let request = pb::UpdateProjectRequest {
                project: Some(pb::Project {
                    name: full(&name),
                    quota: Some(quota.quota()),
                    ..Default::default()
                }),
                update_mask: Some(prost_types::FieldMask {
                    paths: quota.paths(),
                }),
            };
            let changed = client.update_project(request).await;
            let changed = changed.map_err(client::failed)?.into_inner();
            said(global, &changed, "has its quota")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn get(
    client: &mut ProjectsClient<client::Channel>,
    name: &str,
) -> anyhow::Result<pb::Project> {
    let request = pb::GetProjectRequest { name: full(name) };
    let answer = client.get_project(request).await;
    Ok(answer.map_err(client::failed)?.into_inner())
}

fn full(name: &str) -> String {
    match name.starts_with("projects/") {
        true => name.to_owned(),
        false => format!("projects/{name}"),
    }
}

fn said(global: &Global, project: &pb::Project, done: &str) -> anyhow::Result<()> {
    match global.output {
        Format::Json => json::print(&json::value("Project", project)?),
        Format::Table if global.quiet => {}
        Format::Table => println!("project {} {done}", output::id(&project.name)),
    }
    Ok(())
}

fn list(global: &Global, projects: &[pb::Project]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        let values: anyhow::Result<Vec<_>> = projects
            .iter()
            .map(|project| json::value("Project", project))
            .collect();
        json::print(&values?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = projects
        .iter()
        .map(|project| {
            let quota = project.quota.unwrap_or_default();
            vec![
                output::id(&project.name),
                limit(quota.vms),
                limit(quota.vcpus),
                bytes(quota.memory_bytes),
                limit(quota.volumes),
                bytes(quota.volume_bytes),
                limit(quota.networks),
                output::age(project.create_time),
                output::or_dash(&project.display_name),
            ]
        })
        .collect();
    let header = [
        "PROJECT", "VMS", "VCPUS", "MEMORY", "VOLUMES", "BYTES", "NETWORKS", "AGE", "NAME",
    ];
    output::table(&header, &rows);
    Ok(())
}

fn show(global: &Global, project: &pb::Project) -> anyhow::Result<()> {
    if global.output == Format::Json {
        json::print(&json::value("Project", project)?);
        return Ok(());
    }
    let quota = project.quota.unwrap_or_default();
    let usage = project.usage.unwrap_or_default();
    let of = |used: u64, most: u64| format!("{used} of {}", limit(most));
    let of_bytes = |used: u64, most: u64| format!("{} of {}", output::size(used), bytes(most));
    output::fields(&[
        ("project", output::id(&project.name)),
        ("name", project.display_name.clone()),
        ("etag", project.etag.clone()),
        ("created", output::time(project.create_time)),
        ("vms", of(usage.vms, quota.vms)),
        ("vcpus", of(usage.vcpus, quota.vcpus)),
        ("memory", of_bytes(usage.memory_bytes, quota.memory_bytes)),
        ("volumes", of(usage.volumes, quota.volumes)),
        ("bytes", of_bytes(usage.volume_bytes, quota.volume_bytes)),
        ("networks", of(usage.networks, quota.networks)),
    ]);
    Ok(())
}

fn limit(most: u64) -> String {
    match most {
        0 => "any".to_owned(),
        most => most.to_string(),
    }
}

fn bytes(most: u64) -> String {
    match most {
        0 => "any".to_owned(),
        most => output::size(most),
    }
}

impl QuotaFigures {
    fn quota(&self) -> pb::Quota {
        pb::Quota {
            vms: self.vms.unwrap_or_default(),
            vcpus: self.vcpus.unwrap_or_default(),
            memory_bytes: self.memory.unwrap_or_default(),
            volumes: self.volumes.unwrap_or_default(),
            volume_bytes: self.volume_bytes.unwrap_or_default(),
            networks: self.networks.unwrap_or_default(),
        }
    }

    /// Of what was given.
    fn paths(&self) -> Vec<String> {
        let given = [
            ("quota.vms", self.vms),
            ("quota.vcpus", self.vcpus),
            ("quota.memory_bytes", self.memory),
            ("quota.volumes", self.volumes),
            ("quota.volume_bytes", self.volume_bytes),
            ("quota.networks", self.networks),
        ];
        let named = given.iter().filter(|(_, figure)| figure.is_some());
        named.map(|(path, _)| (*path).to_owned()).collect()
    }
}
