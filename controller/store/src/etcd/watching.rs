//! Watches that outlive connections and members: each goes on elsewhere after the last revision it
//! delivered whole.

use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{EventType, GetOptions, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::mpsc;

use super::Inner;
use super::members::{Failure, classify, roomy};
use crate::{Change, StoreError, Watch};

/// Changes that wait for a watcher: a busy controller makes some thousand a second.
const QUEUE: usize = 4096;
/// Before a broken watch is begun anew.
const PAUSE: Duration = Duration::from_millis(200);
/// For the member to say that it watches.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Changes to keys below `prefix`, which is a whole one, after revision `after`.
pub(super) async fn watch(
    inner: &Arc<Inner>,
    prefix: String,
    after: u64,
) -> Result<Watch, StoreError> {
    // A watch tells of forgotten history late and by itself; a look at that time tells at once.
    let looked = inner.members.read(|client| {
        let options = GetOptions::new().with_count_only().with_prefix();
        let options = options.with_revision(after.max(1) as i64);
        let prefix = prefix.clone();
        async move { roomy(&client).0.get(prefix, Some(options)).await }
    });
    match looked.await {
        Ok(_) => {}
        Err(Failure::Compacted) => {
            let oldest = oldest(inner, &prefix, after).await?;
            return Err(StoreError::Compacted { after, oldest });
        }
        // The state was restored: that revision was another store's.
        Err(Failure::Future) => {
            let oldest = *inner.revision.borrow();
            return Err(StoreError::Compacted { after, oldest });
        }
        Err(failure) => return Err(failure.into_error()),
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let stream = begin(inner, &prefix, after).await.ok();
    tokio::spawn(pump(inner.clone(), prefix, after, stream, sender));
    Ok(receiver)
}

/// Keeps the newest revision up to date until the store is dropped.
pub(super) async fn follow_revision(inner: Weak<Inner>, from: u64) {
    let mut after = from;
    loop {
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let prefix = strong.prefix.clone();
        let begun = begin(&strong, &prefix, after).await;
        drop(strong);
        let Ok((index, mut stream)) = begun else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        loop {
            let message = tokio::time::timeout(BEGIN_TIMEOUT, stream.message()).await;
            let Some(strong) = inner.upgrade() else {
                return;
            };
            match message {
                Ok(Ok(Some(message))) if message.canceled() => {
                    // What was missed does not matter here.
                    after = after.max(message.compact_revision().unsigned_abs());
                    break;
                }
                Ok(Ok(Some(message))) => {
                    after = after.max(last_revision(&message));
                    strong.saw(after);
                }
                Ok(Ok(None) | Err(_)) => {
                    strong.members.leave(index).await;
                    break;
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Feeds one watcher until it hangs up or what it needs is forgotten.
async fn pump(
    inner: Arc<Inner>,
    prefix: String,
    mut after: u64,
    mut begun: Option<(usize, WatchStream)>,
    sender: mpsc::Sender<Result<Change, StoreError>>,
) {
    loop {
        let stream = match begun.take() {
            Some(stream) => Ok(stream),
            None => begin(&inner, &prefix, after).await,
        };
        if let Ok((index, stream)) = stream {
            match deliver(&inner, stream, &mut after, &sender).await {
                End::HungUp => return,
                End::Forgotten(oldest) => {
                    let error = StoreError::Compacted { after, oldest };
                    let _ = sender.send(Err(error)).await;
                    return;
                }
                End::Broken => inner.members.leave(index).await,
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = sender.closed() => return,
        }
    }
}

enum End {
    HungUp,
    Forgotten(u64),
    Broken,
}

async fn deliver(
    inner: &Inner,
    mut stream: WatchStream,
    after: &mut u64,
    sender: &mpsc::Sender<Result<Change, StoreError>>,
) -> End {
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            () = sender.closed() => return End::HungUp,
        };
        let Ok(Some(message)) = message else {
            return End::Broken;
        };
        if message.compact_revision() > 0 {
            return End::Forgotten(message.compact_revision().unsigned_abs());
        }
        if message.canceled() {
            return End::Broken;
        }
        let Ok(changes) = changes(inner, &message) else {
            return End::Broken;
        };
        for change in changes {
            // What came again because a connection broke half-way was delivered before.
            if change.revision > *after && sender.send(Ok(change)).await.is_err() {
                return End::HungUp;
            }
        }
        // A message has whole revisions.
        *after = (*after).max(last_revision(&message));
    }
}

fn changes(inner: &Inner, message: &WatchResponse) -> Result<Vec<Change>, Failure> {
    let mut changes = Vec::with_capacity(message.events().len());
    for event in message.events() {
        let Some(found) = event.kv() else { continue };
        let put = event.event_type() == EventType::Put;
        changes.push(Change {
            key: inner.own_key(found.key())?,
            value: put.then(|| found.value().to_vec()),
            revision: found.mod_revision().unsigned_abs(),
        });
    }
    Ok(changes)
}

/// Up to which revision everything has been told.
fn last_revision(message: &WatchResponse) -> u64 {
    if message.created() {
        return 0;
    }
    let revision = match message.events().last().and_then(|event| event.kv()) {
        Some(last) => last.mod_revision(),
        // Nothing happened until then.
        None => message.header().map_or(0, |header| header.revision()),
    };
    revision.unsigned_abs()
}

async fn begin(inner: &Inner, prefix: &str, after: u64) -> Result<(usize, WatchStream), Failure> {
    let (index, client) = match inner.members.any().await {
        Ok(found) => found,
        Err(failure) => {
            inner.members.leave_current().await;
            return Err(failure);
        }
    };
    let options = WatchOptions::new()
        .with_prefix()
        .with_start_revision(after.saturating_add(1) as i64)
        .with_progress_notify();
    let (_, mut watcher) = roomy(&client);
    let begun = watcher.watch(prefix, Some(options));
    match tokio::time::timeout(BEGIN_TIMEOUT, begun).await {
        Ok(Ok(stream)) => Ok((index, stream)),
        Ok(Err(error)) => {
            inner.members.leave(index).await;
            Err(classify(error))
        }
        Err(_) => {
            inner.members.leave(index).await;
            Err(Failure::NotDone("it did not begin to watch in time".into()))
        }
    }
}

/// The oldest revision that can be watched after.
async fn oldest(inner: &Inner, prefix: &str, after: u64) -> Result<u64, StoreError> {
    let asked = async {
        let (_, mut stream) = begin(inner, prefix, after).await?;
        loop {
            match stream.message().await.map_err(classify)? {
                Some(message) if message.compact_revision() > 0 => {
                    return Ok(message.compact_revision().unsigned_abs());
                }
                Some(_) => {}
                None => return Err(Failure::NotDone("it ended the watch".into())),
            }
        }
    };
    match tokio::time::timeout(BEGIN_TIMEOUT, asked).await {
        Ok(found) => found.map_err(Failure::into_error),
        // It says so when it looks for forgotten watches; where it does not, the newest is safe.
        Err(_) => Ok(*inner.revision.borrow()),
    }
}
