//! The `Projects` service.

use api::controller::projects_server::Projects;
use api::controller::*;
use api::names::DEFAULT_PROJECT;
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, caller, command_status, store_status};
use crate::commands::{self, CommandError};
use crate::model::{ProjectRecord, prefix, project_key};
use crate::reconciler::decode;

#[tonic::async_trait]
impl Projects for Api {
    async fn get_project(
        &self,
        request: Request<GetProjectRequest>,
    ) -> Result<Response<Project>, Status> {
        let id = validate::project_name(&request.into_inner().name)?;
        let record = match commands::get_project(&self.store, &id).await {
            Ok(stored) => stored.record,
            Err(CommandError::NotFound { .. }) if id == DEFAULT_PROJECT => {
                commands::default_project()
            }
            Err(error) => return Err(command_status(error)),
        };
        let mut project = commands::visible_project(&record);
        let usage = commands::usage(&self.store, &id).await;
        project.usage = Some(usage.map_err(command_status)?);
        Ok(Response::new(project))
    }

    async fn list_projects(
        &self,
        request: Request<ListProjectsRequest>,
    ) -> Result<Response<ListProjectsResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let page = self
            .list("Project", (prefix::PROJECTS, false), &request, |item| {
                let record: ProjectRecord = decode(&item.key, &item.value).map_err(store_status)?;
                let visible = caller.may_see(&record.project.name);
                Ok(visible.then(|| commands::visible_project(&record)))
            })
            .await?;
        Ok(Response::new(ListProjectsResponse {
            projects: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn create_project(
        &self,
        request: Request<CreateProjectRequest>,
    ) -> Result<Response<Project>, Status> {
        let request = request.into_inner();
        validate::create_project_request(&request)?;
        let made = commands::create_project(&self.store, &request).await;
        made.map(Response::new).map_err(command_status)
    }

    async fn update_project(
        &self,
        request: Request<UpdateProjectRequest>,
    ) -> Result<Response<Project>, Status> {
        let request = request.into_inner();
        let id = validate::update_project_request(&request)?;
        let wanted = request.project.unwrap_or_default();
        let paths = request.update_mask.unwrap_or_default().paths;
        let etag = wanted.etag.clone();
        let changed = commands::update_project(&self.store, &id, &etag, |project| {
            for path in &paths {
                change(project, &wanted, path);
            }
        });
        changed.await.map(Response::new).map_err(command_status)
    }

    async fn delete_project(
        &self,
        request: Request<DeleteProjectRequest>,
    ) -> Result<Response<DeleteProjectResponse>, Status> {
        let request = request.into_inner();
        let id = validate::project_name(&request.name)?;
        commands::delete_project(&self.store, &id, &request.etag)
            .await
            .map_err(command_status)?;
        tracing::info!(project = %project_key(&id), "deleted");
        Ok(Response::new(DeleteProjectResponse {}))
    }
}

/// Copies what a validated path names.
fn change(project: &mut Project, wanted: &Project, path: &str) {
    let given = wanted.quota.unwrap_or_default();
    let quota = project.quota.get_or_insert_default();
    match path {
        "display_name" => project.display_name = wanted.display_name.clone(),
        "quota" => *quota = given,
        "quota.vms" => quota.vms = given.vms,
        "quota.vcpus" => quota.vcpus = given.vcpus,
        "quota.memory_bytes" => quota.memory_bytes = given.memory_bytes,
        "quota.volumes" => quota.volumes = given.volumes,
        "quota.volume_bytes" => quota.volume_bytes = given.volume_bytes,
        "quota.networks" => quota.networks = given.networks,
        _ => {}
    }
}
