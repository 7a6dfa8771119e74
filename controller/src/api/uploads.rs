//! The `Uploads` service: everything is passed on to the host, which holds the files. What is under
//! way between the two ends is bounded by HTTP/2's flow control on both sides.

use std::pin::Pin;

use api::controller::uploads_server::Uploads;
use api::controller::*;
use api::errors::invalid_field;
use api::names::Name;
use api::{node, validate};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::{Api, command_status, store_status};
use crate::commands::{self, CommandError};
use crate::model;
use crate::node::Node;
use crate::store::Transaction;

#[tonic::async_trait]
impl Uploads for Api {
    async fn create_upload(
        &self,
        request: Request<CreateUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        let request = request.into_inner();
        let name = validate::create_upload_request(&request)?;
        let wanted_host = request.host;
        let files = request.files.into_iter().map(|file| node::UploadFile {
            name: file.name,
            size_bytes: file.size_bytes,
            received_bytes: 0,
        });
        let request = node::CreateUploadRequest {
            id: model::upload_node_id(&name),
            files: files.collect(),
        };
        let chosen = commands::place_upload(&self.store, &self.hosts, &name, &wanted_host).await;
        let chosen = chosen.map_err(command_status)?;
        let host = self.hosts.reach(&chosen)?;
        let upload = host.create_upload(request).await?;
        Ok(Response::new(visible(&name, upload)))
    }

    async fn get_upload(
        &self,
        request: Request<GetUploadRequest>,
    ) -> Result<Response<Upload>, Status> {
        let name = validate::upload_request(&request.into_inner().name)?;
        let host = self.upload_host(&name).await?;
        let upload = host.get_upload(model::upload_node_id(&name)).await?;
        Ok(Response::new(visible(&name, upload)))
    }

    async fn delete_upload(
        &self,
        request: Request<DeleteUploadRequest>,
    ) -> Result<Response<DeleteUploadResponse>, Status> {
        let name = validate::upload_request(&request.into_inner().name)?;
        let id = model::upload_node_id(&name);
        self.upload_host(&name).await?.delete_upload(id).await?;
        let forgotten = Transaction::new().delete(model::upload_host_key(&name));
        self.store.commit(forgotten).await.map_err(store_status)?;
        Ok(Response::new(DeleteUploadResponse {}))
    }

    type WriteUploadStream =
        Pin<Box<dyn Stream<Item = Result<WriteUploadResponse, Status>> + Send>>;

    async fn write_upload(
        &self,
        request: Request<Streaming<WriteUploadRequest>>,
    ) -> Result<Response<Self::WriteUploadStream>, Status> {
        let mut chunks = request.into_inner();
        let first = chunks
            .message()
            .await?
            .ok_or_else(|| invalid_field("name", "the first message must name the upload"))?;
        let name = validate::upload_request(&first.name)?;
        let id = model::upload_node_id(&name);
        let host = self.upload_host(&name).await?;
        // A sender that breaks off ends the stream; the host keeps what has arrived.
        let rest = chunks.map_while(Result::ok);
        let chunks = tokio_stream::once(first)
            .chain(rest)
            .map(move |chunk| node::UploadChunk {
                id: id.clone(),
                file: chunk.file,
                offset: chunk.offset,
                data: chunk.data,
            });
        let answers = host.write_upload(chunks).await?;
        let answers = answers.map(|answer| {
            answer.map(|progress| WriteUploadResponse {
                file: progress.file,
                received_bytes: progress.received_bytes,
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

impl Api {
    /// The host that has the files: the only one, if an older controller did not note it.
    async fn upload_host(&self, name: &Name) -> Result<Node, Status> {
        let noted = commands::upload_host(&self.store, name).await;
        let noted = noted.map_err(store_status)?;
        let host = noted.or_else(|| self.hosts.only());
        self.hosts.reach(&host.ok_or_else(|| not_found(name))?)
    }
}

fn not_found(name: &Name) -> Status {
    command_status(CommandError::NotFound {
        what: format!("upload {}", name.id),
    })
}

fn visible(name: &Name, upload: node::Upload) -> Upload {
    Upload {
        name: name.to_string(),
        files: upload
            .files
            .into_iter()
            .map(|file| UploadFile {
                name: file.name,
                size_bytes: file.size_bytes,
                received_bytes: file.received_bytes,
            })
            .collect(),
    }
}
