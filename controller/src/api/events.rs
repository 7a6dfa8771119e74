//! The `Events` service.

use std::pin::Pin;

use api::controller::events_server::Events;
use api::controller::*;
use gate::auth::Principal;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Api, caller, store_status};
use crate::model::prefix;
use crate::reconciler::decode;
use crate::store::{Item, Range, Watch};

/// Events waiting for a client; a slow one holds up only its own stream.
const QUEUE: usize = 64;

#[tonic::async_trait]
impl Events for Api {
    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let page = self
            .list("Event", (prefix::EVENTS, false), &request, |item| {
                let event = event(item)?;
                let wanted = concerns(&event, &request.target) && caller.may_see(&event.target);
                Ok(wanted.then_some(event))
            })
            .await?;
        Ok(Response::new(ListEventsResponse {
            events: page.items,
            next_page_token: page.next_page_token,
            revision: page.revision,
        }))
    }

    type WatchEventsStream =
        Pin<Box<dyn Stream<Item = Result<WatchEventsResponse, Status>> + Send>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let newest = *self.store.revision().borrow();
        let (kept, after) = match request.after_revision {
            // Older events are in the store even when the log of changes has dropped them.
            0 => {
                let listing = self.store.list(Range::all(prefix::EVENTS)).await;
                let listing = listing.map_err(store_status)?;
                (listing.items, listing.revision)
            }
            after => (vec![], after.min(newest)),
        };
        let watch = self
            .store
            .watch(prefix::EVENTS, after)
            .await
            .map_err(store_status)?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let wanted = Wanted {
            target: request.target,
            caller,
        };
        tokio::spawn(send_events(kept, after, watch, wanted, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// First what is kept, then a bookmark, then what comes, until the client hangs up.
async fn send_events(
    kept: Vec<Item>,
    revision: u64,
    mut watch: Watch,
    wanted: Wanted,
    client: mpsc::Sender<Result<WatchEventsResponse, Status>>,
) {
    for item in &kept {
        let event = event(item);
        // A bookmark among them would say that what is kept has been sent.
        if event.as_ref().is_ok_and(|event| !wanted.has(event)) {
            continue;
        }
        if !send(event, &wanted, &client).await {
            return;
        }
    }
    if client.send(Ok(bookmark(revision))).await.is_err() {
        return;
    }
    loop {
        let change = tokio::select! {
            change = watch.recv() => change,
            () = client.closed() => return,
        };
        let change = match change {
            Some(Ok(change)) => change,
            Some(Err(error)) => {
                let _ = client.send(Err(store_status(error))).await;
                return;
            }
            None => return,
        };
        // Old events that are dropped are no news.
        let Some(value) = change.value else { continue };
        let item = Item {
            key: change.key,
            value,
            revision: change.revision,
        };
        if !send(event(&item), &wanted, &client).await {
            return;
        }
    }
}

/// Whether the client is still there.
async fn send(
    event: Result<Event, Status>,
    wanted: &Wanted,
    client: &mpsc::Sender<Result<WatchEventsResponse, Status>>,
) -> bool {
    let message = match event {
        Ok(event) if wanted.has(&event) => {
            let message = Some(watch_events_response::Message::Event(event));
            Ok(WatchEventsResponse { message })
        }
        Ok(event) => Ok(bookmark(event.revision)),
        Err(status) => Err(status),
    };
    client.send(message).await.is_ok()
}

fn bookmark(revision: u64) -> WatchEventsResponse {
    WatchEventsResponse {
        message: Some(watch_events_response::Message::Bookmark(revision)),
    }
}

fn event(item: &Item) -> Result<Event, Status> {
    let event: Event = decode(&item.key, &item.value).map_err(store_status)?;
    Ok(Event {
        revision: item.revision,
        ..event
    })
}

/// What one client watches.
struct Wanted {
    target: String,
    caller: Principal,
}

impl Wanted {
    fn has(&self, event: &Event) -> bool {
        concerns(event, &self.target) && self.caller.may_see(&event.target)
    }
}

fn concerns(event: &Event, target: &str) -> bool {
    target.is_empty() || event.target == target
}
