//! The `Operations` service.

use std::time::Duration;

use api::controller::operations_server::Operations;
use api::controller::*;
use api::names::Name;
use api::node::JobState;
use api::validate;
use gate::auth::Principal;
use tonic::{Request, Response, Status};

use super::{Api, caller, command_status, store_status};
use crate::commands::{self, CommandError};
use crate::host_upgrades;
use crate::model::{self, prefix};
use crate::reconciler::decode;

const DEFAULT_WAIT_MS: u32 = 30_000;

#[tonic::async_trait]
impl Operations for Api {
    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Ok(Response::new(
            self.operation(&caller(&request), &request.into_inner().name)
                .await?,
        ))
    }

    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let page = self
            .list("Operation", (prefix::OPERATIONS, true), &request, |item| {
                let operation: Operation = decode(&item.key, &item.value).map_err(store_status)?;
                let target = operation
                    .metadata
                    .as_ref()
                    .map(|metadata| metadata.target.as_str());
                let wanted = target.is_some_and(|target| {
                    let rest = target.strip_prefix(&request.target);
                    // A VM's disks are the VM's.
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("/disks/"))
                });
                let wanted = request.target.is_empty() || wanted;
                let wanted = wanted && caller.may_see(target.unwrap_or_default());
                Ok(wanted.then(|| self.with_progress(operation)))
            })
            .await?;
        Ok(Response::new(ListOperationsResponse {
            operations: page.items,
            next_page_token: page.next_page_token,
            resume_token: page.resume_token,
        }))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let timeout_ms = match request.timeout_ms {
            0 => DEFAULT_WAIT_MS,
            asked => asked.min(validate::MAX_WAIT_MS),
        };
        let deadline = tokio::time::sleep(Duration::from_millis(timeout_ms.into()));
        tokio::pin!(deadline);
        let mut revision = self.store.revision();
        loop {
            revision.mark_unchanged();
            let operation = self.operation(&caller, &request.name).await?;
            if operation.done {
                return Ok(Response::new(operation));
            }
            tokio::select! {
                changed = revision.changed() => {
                    changed.map_err(|_| Status::unavailable("the controller is stopping"))?;
                }
                () = &mut deadline => return Ok(Response::new(operation)),
            }
        }
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let name = request.into_inner().name;
        // Somebody else's is not there.
        self.operation(&caller, &name).await?;
        let operation = commands::cancel_operation(&self.store, &name).await;
        operation.map(Response::new).map_err(command_status)
    }
}

impl Api {
    async fn operation(&self, caller: &Principal, name: &str) -> Result<Operation, Status> {
        validate::flat_name(name, "operations")?;
        let stored = commands::get_operation(&self.store, name)
            .await
            .map_err(command_status)?;
        let metadata = stored.record.metadata.as_ref();
        let target = metadata.map(|metadata| metadata.target.as_str());
        if !caller.may_see(target.unwrap_or_default()) {
            return Err(command_status(CommandError::NotFound {
                what: name.to_owned(),
            }));
        }
        let operation = self.with_progress(stored.record);
        let operation = self.with_placement(operation).await;
        let operation = self.with_hosts_progress(operation).await;
        Ok(self.with_volume_progress(operation).await)
    }

    /// Adds what it waits for.
    fn with_progress(&self, mut operation: Operation) -> Operation {
        let fleet = self.fleet();
        let answers = !fleet.hosts.is_empty() && fleet.hosts.values().all(|seen| seen.connected);
        if let Some(metadata) = operation.metadata.as_mut().filter(|_| !operation.done) {
            metadata.progress = if answers {
                "waiting for the host".to_owned()
            } else {
                "waiting for a node agent, which does not answer".to_owned()
            };
            if let Some(job) = fleet.job(model::job_id(&operation.name)) {
                (metadata.done_bytes, metadata.total_bytes) = (job.done_bytes, job.total_bytes);
                metadata.ready = job.state() == JobState::Ready;
                metadata.progress = if metadata.ready {
                    "keeps up; vmctl disk mirror complete switches over".to_owned()
                } else {
                    match job.stage.as_str() {
                        "" => format!("{} under way", job.kind),
                        stage => format!("{} under way, {stage}", job.kind),
                    }
                };
            }
        }
        operation
    }

    /// As [`Self::with_progress`], for a VM that no host can have yet.
    async fn with_placement(&self, mut operation: Operation) -> Operation {
        let metadata = operation.metadata.get_or_insert_default();
        if !operation.done
            && let Ok(name) = Name::parse_vm(&metadata.target)
            && let Ok(stored) = commands::get_vm(&self.store, &name).await
            && !stored.record.unplaced.is_empty()
        {
            metadata.progress = format!("no host can have it: {}", stored.record.unplaced);
        }
        operation
    }

    /// As [`Self::with_progress`], for an upgrade of hosts, whose record says how far each is.
    async fn with_hosts_progress(&self, mut operation: Operation) -> Operation {
        let metadata = operation.metadata.get_or_insert_default();
        if operation.done || metadata.kind() != OperationKind::UpgradeHosts {
            return operation;
        }
        if let Ok(Some(item)) = self.store.get(model::HOST_UPGRADE).await
            && let Ok(record) = decode::<model::HostUpgradeRecord>(&item.key, &item.value)
            && record.operation == operation.name
        {
            metadata.progress = host_upgrades::progress(&record);
            metadata.findings = host_upgrades::findings(&record);
        }
        operation
    }

    /// As [`Self::with_progress`], for a volume that is made, whose record has its id on the host.
    async fn with_volume_progress(&self, mut operation: Operation) -> Operation {
        let metadata = operation.metadata.get_or_insert_default();
        if operation.done || metadata.kind() != OperationKind::CreateVolume {
            return operation;
        }
        let Ok(name) = Name::parse_volume(&metadata.target) else {
            return operation;
        };
        if let Ok(stored) = commands::get_volume(&self.store, &name).await
            && let Some(seen) = self
                .hosts
                .observed(&stored.record.host)
                .volumes
                .get(&stored.record.node_id)
            && seen.creating
        {
            (metadata.done_bytes, metadata.total_bytes) = (seen.copied_bytes, seen.total_bytes);
            metadata.progress = seen.stage.clone();
        }
        operation
    }
}
