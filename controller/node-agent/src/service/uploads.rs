//! Taking files: chunks are written in order by one task for each stream, which answers how much
//! has arrived. A sender that is faster than the disk is held up by HTTP/2's flow control.

use api::{
    errors::invalid_field,
    node::{self, UploadChunk, UploadProgress},
    validate,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::blocking;
use crate::import::{Imports, Upload, UploadFile};

/// Answers under way to one sender.
const ANSWER_QUEUE: usize = 16;

pub(super) fn files(files: Vec<node::UploadFile>) -> Vec<UploadFile> {
    files
        .into_iter()
        .map(|file| UploadFile {
            name: file.name,
            size_bytes: file.size_bytes,
            received_bytes: 0,
        })
        .collect()
}

pub(super) fn answer(upload: Upload) -> node::Upload {
    node::Upload {
        id: upload.id,
        files: upload
            .files
            .into_iter()
            .map(|file| node::UploadFile {
                name: file.name,
                size_bytes: file.size_bytes,
                received_bytes: file.received_bytes,
            })
            .collect(),
    }
}

pub(super) async fn receive(
    imports: Imports,
    mut chunks: Streaming<UploadChunk>,
) -> Result<ReceiverStream<Result<UploadProgress, Status>>, Status> {
    let first = chunks
        .message()
        .await?
        .ok_or_else(|| invalid_field("id", "the first message must name the upload"))?;
    validate::node_id(&first.id)?;
    let id = first.id.clone();
    let known = imports.clone();
    let upload = blocking(move || known.get(&id)).await?;
    let (sender, receiver) = mpsc::channel(ANSWER_QUEUE);
    tokio::spawn(async move {
        let mut next = Some(first);
        while let Some(chunk) = next {
            let answer = write(&imports, &upload, chunk).await;
            let failed = answer.is_err();
            if sender.send(answer).await.is_err() || failed {
                return;
            }
            next = match chunks.message().await {
                Ok(chunk) => chunk,
                Err(status) => {
                    let _ = sender.send(Err(status)).await;
                    return;
                }
            };
        }
    });
    Ok(ReceiverStream::new(receiver))
}

async fn write(
    imports: &Imports,
    upload: &Upload,
    chunk: UploadChunk,
) -> Result<UploadProgress, Status> {
    if chunk.data.len() > validate::MAX_CHUNK_BYTES {
        return Err(invalid_field(
            "data",
            format!("has more than {} bytes", validate::MAX_CHUNK_BYTES),
        ));
    }
    let (imports, upload, file) = (imports.clone(), upload.clone(), chunk.file);
    let received_bytes =
        blocking(move || imports.write(&upload, file, chunk.offset, &chunk.data)).await?;
    Ok(UploadProgress {
        file,
        received_bytes,
    })
}
