//! The `AuditLog` service.

use std::pin::Pin;

use api::controller::audit_log_server::AuditLog;
use api::controller::*;
use gate::audit::PREFIX;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Api, listing, store_status, watches};
use crate::query::{Filter, descriptor, dynamic};
use crate::reconciler::decode;
use crate::store::{Item, Watch};

#[tonic::async_trait]
impl AuditLog for Api {
    async fn list_audit_entries(
        &self,
        request: Request<ListAuditEntriesRequest>,
    ) -> Result<Response<ListAuditEntriesResponse>, Status> {
        let request = request.into_inner();
        let page = self
            .list("AuditEntry", (PREFIX, false), &request, |item| {
                entry(item).map(Some)
            })
            .await?;
        Ok(Response::new(ListAuditEntriesResponse {
            entries: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    type WatchAuditEntriesStream =
        Pin<Box<dyn Stream<Item = Result<WatchAuditEntriesResponse, Status>> + Send>>;

    async fn watch_audit_entries(
        &self,
        request: Request<WatchAuditEntriesRequest>,
    ) -> Result<Response<Self::WatchAuditEntriesStream>, Status> {
        let request = request.into_inner();
        let filter = listing::filter(&descriptor("AuditEntry"), &request.filter)?;
        let after = watches::resume(&self.store, &request.resume_token)?;
        let watch = self
            .store
            .watch(PREFIX, after)
            .await
            .map_err(store_status)?;
        let (sender, receiver) = mpsc::channel(watches::QUEUE);
        tokio::spawn(send(watch, filter, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn send(
    mut watch: Watch,
    filter: Option<Filter>,
    client: mpsc::Sender<Result<WatchAuditEntriesResponse, Status>>,
) {
    let kind = descriptor("AuditEntry");
    loop {
        let change = tokio::select! {
            change = watch.recv() => change,
            () = client.closed() => return,
        };
        let message = match change {
            None => return,
            Some(Err(error)) => Err(store_status(error)),
            Some(Ok(change)) => {
                // Old entries that are dropped are no news.
                let Some(value) = change.value else { continue };
                let item = Item {
                    key: change.key,
                    value,
                    revision: change.revision,
                };
                entry(&item).map(|entry| {
                    let passes = filter
                        .as_ref()
                        .is_none_or(|filter| filter.matches(&dynamic(&kind, &entry)));
                    WatchAuditEntriesResponse {
                        entry: passes.then_some(entry),
                        resume_token: item.revision.to_string(),
                    }
                })
            }
        };
        let over = message.is_err();
        if client.send(message).await.is_err() || over {
            return;
        }
    }
}

fn entry(item: &Item) -> Result<AuditEntry, Status> {
    decode(&item.key, &item.value).map_err(store_status)
}
