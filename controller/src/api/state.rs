//! The `States` service: who leads, and the state as one file.

use std::pin::Pin;

use ::api::controller::states_server::States;
use ::api::controller::*;
use ::api::errors::status;
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::store_status;
use crate::leader::Leader;
use crate::store::SharedStore;
use crate::store::backup::{self, BackupError, Reader};

/// See the module.
pub struct StateService {
    store: SharedStore,
    /// The name of its kind.
    kind: &'static str,
    leader: watch::Receiver<Option<Leader>>,
}

impl StateService {
    /// Of a controller that keeps its state in `store`.
    pub fn new(
        store: SharedStore,
        kind: &'static str,
        leader: watch::Receiver<Option<Leader>>,
    ) -> Self {
        Self {
            store,
            kind,
            leader,
        }
    }
}

#[tonic::async_trait]
impl States for StateService {
    async fn get_controller_status(
        &self,
        _request: Request<GetControllerStatusRequest>,
    ) -> Result<Response<ControllerStatus>, Status> {
        let leader = self.leader.borrow().clone();
        let record = leader.as_ref().map(|leader| leader.record.clone());
        let record = record.unwrap_or_default();
        Ok(Response::new(ControllerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            leads: leader.as_ref().is_some_and(|leader| leader.here),
            leader_address: record.address,
            leader_version: record.version,
            leader_since: record.since,
            epoch: leader.map_or(0, |leader| leader.epoch),
            store: self.kind.to_owned(),
            revision: *self.store.revision().borrow(),
        }))
    }

    type BackupStateStream =
        Pin<Box<dyn Stream<Item = Result<BackupStateResponse, Status>> + Send>>;

    async fn backup_state(
        &self,
        _request: Request<BackupStateRequest>,
    ) -> Result<Response<Self::BackupStateStream>, Status> {
        let pieces = backup::take(&self.store).await.map_err(store_status)?;
        let answers = pieces.map(|content| Ok(BackupStateResponse { content }));
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn restore_state(
        &self,
        request: Request<Streaming<RestoreStateRequest>>,
    ) -> Result<Response<RestoreStateResponse>, Status> {
        let mut pieces = request.into_inner();
        let mut reader = Reader::default();
        let mut replace = None;
        while let Some(piece) = pieces.message().await? {
            replace.get_or_insert(piece.replace);
            reader.feed(&piece.content).map_err(refusal)?;
        }
        let backup = reader.finish().map_err(refusal)?;
        tracing::warn!(records = backup.len(), "the state is replaced by a backup");
        backup::restore(&self.store, &backup, replace.unwrap_or(false))
            .await
            .map_err(refusal)?;
        Ok(Response::new(RestoreStateResponse {
            records: backup.len() as u64,
            backup_time: backup.header.time,
            backup_version: backup.header.version,
        }))
    }
}

fn refusal(error: BackupError) -> Status {
    let message = error.to_string();
    let (code, reason) = match error {
        BackupError::Store(error) => return store_status(error),
        BackupError::NotEmpty { .. } => (Code::FailedPrecondition, "STORE_NOT_EMPTY"),
        BackupError::Newer { .. } | BackupError::NewerSchema { .. } => {
            (Code::FailedPrecondition, "BACKUP_TOO_NEW")
        }
        BackupError::Schema(_) => (Code::FailedPrecondition, "STORE_UNUSABLE"),
        BackupError::NotABackup | BackupError::Damaged | BackupError::CutOff => {
            (Code::InvalidArgument, "BAD_BACKUP")
        }
    };
    status(code, reason, message, &[])
}
