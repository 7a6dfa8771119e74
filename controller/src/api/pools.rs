//! The `Pools` service.

use api::controller::pools_server::Pools;
use api::controller::*;
use api::validate::{self, LOCAL_POOL};
use tonic::{Request, Response, Status};

use super::{Api, command_status, store_status};
use crate::commands;
use crate::model::{PoolRecord, prefix};
use crate::reconciler::decode;

#[tonic::async_trait]
impl Pools for Api {
    async fn get_pool(&self, request: Request<GetPoolRequest>) -> Result<Response<Pool>, Status> {
        let id = validate::pool_name(&request.into_inner().name)?;
        if id == LOCAL_POOL {
            return Ok(Response::new(commands::local_pool()));
        }
        let stored = commands::get_pool(&self.store, &id).await;
        let stored = stored.map_err(command_status)?;
        Ok(Response::new(commands::visible_pool(&stored.record)))
    }

    async fn list_pools(
        &self,
        request: Request<ListPoolsRequest>,
    ) -> Result<Response<ListPoolsResponse>, Status> {
        let request = request.into_inner();
        let page = self
            .list("Pool", (prefix::POOLS, false), &request, |item| {
                let record: PoolRecord = decode(&item.key, &item.value).map_err(store_status)?;
                Ok(Some(commands::visible_pool(&record)))
            })
            .await?;
        Ok(Response::new(ListPoolsResponse {
            pools: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn create_pool(
        &self,
        request: Request<CreatePoolRequest>,
    ) -> Result<Response<Pool>, Status> {
        let request = request.into_inner();
        validate::create_pool_request(&request)?;
        let made = commands::create_pool(&self.store, &request).await;
        made.map(Response::new).map_err(command_status)
    }

    async fn delete_pool(
        &self,
        request: Request<DeletePoolRequest>,
    ) -> Result<Response<DeletePoolResponse>, Status> {
        let request = request.into_inner();
        let id = validate::pool_name(&request.name)?;
        commands::delete_pool(&self.store, &id, &request.etag)
            .await
            .map_err(command_status)?;
        Ok(Response::new(DeletePoolResponse {}))
    }
}
