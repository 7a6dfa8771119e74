//! The `SecurityGroups` service.

use api::controller::security_groups_server::SecurityGroups;
use api::controller::*;
use api::names::{Name, Parent};
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, command_status, store_status};
use crate::commands;
use crate::model::{SecurityGroupRecord, prefix};
use crate::reconciler::decode;

#[tonic::async_trait]
impl SecurityGroups for Api {
    async fn get_security_group(
        &self,
        request: Request<GetSecurityGroupRequest>,
    ) -> Result<Response<SecurityGroup>, Status> {
        let name = validate::security_group_request(&request.into_inner().name)?;
        let stored = commands::get_security_group(&self.store, &name)
            .await
            .map_err(command_status)?;
        self.visible(stored.record).await.map(Response::new)
    }

    async fn list_security_groups(
        &self,
        request: Request<ListSecurityGroupsRequest>,
    ) -> Result<Response<ListSecurityGroupsResponse>, Status> {
        let request = request.into_inner();
        let prefix = match validate::list_parent(&request.parent)? {
            Parent::All => prefix::SECURITY_GROUPS.to_owned(),
            Parent::Project(project) => format!("{}{project}/", prefix::SECURITY_GROUPS),
        };
        let vms = prefix.replacen(prefix::SECURITY_GROUPS, prefix::VMS, 1);
        let members = commands::members_of_groups(&self.store, &vms)
            .await
            .map_err(command_status)?;
        let page = self
            .list("SecurityGroup", (&prefix, false), &request, |item| {
                let record: SecurityGroupRecord =
                    decode(&item.key, &item.value).map_err(store_status)?;
                Ok(Some(commands::security_group_with(record, &members)))
            })
            .await?;
        Ok(Response::new(ListSecurityGroupsResponse {
            security_groups: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn create_security_group(
        &self,
        request: Request<CreateSecurityGroupRequest>,
    ) -> Result<Response<SecurityGroup>, Status> {
        let request = request.into_inner();
        validate::create_security_group_request(&request)?;
        let parent = validate::list_parent(&request.parent)?.project();
        let project = parent.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let name = Name::security_group(&project, &request.security_group_id);
        let group = request.security_group.unwrap_or_default();
        let made = commands::create_security_group(&self.store, &name, &group).await;
        made.map(Response::new).map_err(command_status)
    }

    async fn update_security_group(
        &self,
        request: Request<UpdateSecurityGroupRequest>,
    ) -> Result<Response<SecurityGroup>, Status> {
        let request = request.into_inner();
        let name = validate::update_security_group_request(&request)?;
        let group = request.security_group.unwrap_or_default();
        let changed = commands::update_security_group(&self.store, &name, &group).await;
        changed.map(Response::new).map_err(command_status)
    }

    async fn delete_security_group(
        &self,
        request: Request<DeleteSecurityGroupRequest>,
    ) -> Result<Response<DeleteSecurityGroupResponse>, Status> {
        let request = request.into_inner();
        let name = validate::security_group_request(&request.name)?;
        commands::delete_security_group(&self.store, &name, &request.etag)
            .await
            .map_err(command_status)?;
        Ok(Response::new(DeleteSecurityGroupResponse {}))
    }
}

impl Api {
    async fn visible(&self, record: SecurityGroupRecord) -> Result<SecurityGroup, Status> {
        commands::visible_security_group(&self.store, record)
            .await
            .map_err(command_status)
    }
}
