//! The `Watches` service: changes of records, as users see resources.

use std::pin::Pin;
use std::time::Duration;

use api::controller::watch_resources_response::Change;
use api::controller::watched_resource::Resource;
use api::controller::watches_server::Watches;
use api::controller::*;
use api::errors::invalid_field;
use api::names::Parent;
use api::validate;
use gate::auth::Principal;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Api, caller, listing, store_status};
use crate::commands;
use crate::model::{
    NetworkRecord, ProjectRecord, SecurityGroupRecord, VmRecord, VolumeRecord, prefix,
};
use crate::query::{Filter, Mask, descriptor, dynamic};
use crate::reconciler::decode;
use crate::store::{self, SharedStore, Watch};

/// Messages waiting for a client; a slow one holds up only its own stream.
pub(super) const QUEUE: usize = 64;
/// How often a client without news is told that there is none, and from where it may go on.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(30);

#[tonic::async_trait]
impl Watches for Api {
    type WatchResourcesStream =
        Pin<Box<dyn Stream<Item = Result<WatchResourcesResponse, Status>> + Send>>;

    async fn watch_resources(
        &self,
        request: Request<WatchResourcesRequest>,
    ) -> Result<Response<Self::WatchResourcesStream>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let parent = validate::list_parent(&request.parent)?;
        let (message, collection) = kind_of(request.kind())
            .ok_or_else(|| invalid_field("kind", "say what to watch, such as VM"))?;
        let message = descriptor(message);
        let prefix = match (&parent, request.kind()) {
            (_, ResourceKind::Project | ResourceKind::Operation) | (Parent::All, _) => {
                collection.to_owned()
            }
            (Parent::Project(project), _) => format!("{collection}{project}/"),
        };
        let wanted = Wanted {
            api: self.clone(),
            kind: request.kind(),
            project: parent.project().ok(),
            caller,
            filter: listing::filter(&message, &request.filter)?,
            mask: listing::read_mask(&message, request.read_mask.as_ref())?,
            message,
        };
        let after = resume(&self.store, &request.resume_token)?;
        let watch = self
            .store
            .watch(&prefix, after)
            .await
            .map_err(store_status)?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(wanted.send(watch, after, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// The revision that a token stands for; the newest for none.
pub(super) fn resume(store: &SharedStore, token: &str) -> Result<u64, Status> {
    let newest = *store.revision().borrow();
    if token.is_empty() {
        return Ok(newest);
    }
    let revision: u64 = token
        .parse()
        .map_err(|_| invalid_field("resume_token", "is not from a list or a watch"))?;
    Ok(revision)
}

/// Message and prefix of keys.
fn kind_of(kind: ResourceKind) -> Option<(&'static str, &'static str)> {
    Some(match kind {
        ResourceKind::Unspecified => return None,
        ResourceKind::Vm => ("Vm", prefix::VMS),
        ResourceKind::Volume => ("Volume", prefix::VOLUMES),
        ResourceKind::Network => ("Network", prefix::NETWORKS),
        ResourceKind::SecurityGroup => ("SecurityGroup", prefix::SECURITY_GROUPS),
        ResourceKind::Project => ("Project", prefix::PROJECTS),
        ResourceKind::Operation => ("Operation", prefix::OPERATIONS),
        ResourceKind::FaultExperiment => ("FaultExperiment", prefix::FAULT_EXPERIMENTS),
    })
}

/// What one client watches.
struct Wanted {
    api: Api,
    kind: ResourceKind,
    project: Option<String>,
    caller: Principal,
    message: prost_reflect::MessageDescriptor,
    filter: Option<Filter>,
    mask: Option<Mask>,
}

impl Wanted {
    async fn send(
        self,
        mut watch: Watch,
        mut revision: u64,
        client: mpsc::Sender<Result<WatchResourcesResponse, Status>>,
    ) {
        let mut newest = self.api.store.revision();
        loop {
            // Read before waiting: what is newer than it may still be on its way here.
            let seen = *newest.borrow_and_update();
            let change = tokio::select! {
                change = watch.recv() => change.map(|change| change.map_err(store_status)),
                () = client.closed() => return,
                () = tokio::time::sleep(BOOKMARK_INTERVAL) => {
                    revision = revision.max(seen);
                    Some(Ok(store::Change { key: String::new(), value: None, revision }))
                }
            };
            let message = match change {
                None => return,
                Some(Ok(change)) => {
                    revision = change.revision;
                    match self.told(&change).await {
                        Ok(Some(told)) => Ok(told),
                        Ok(None) => continue,
                        Err(status) => Err(status),
                    }
                }
                Some(Err(status)) => Err(status),
            };
            let over = message.is_err();
            if client.send(message).await.is_err() || over {
                return;
            }
        }
    }

    /// What the client is told of a change; nothing if it is none of its business.
    async fn told(&self, change: &store::Change) -> Result<Option<WatchResourcesResponse>, Status> {
        let told = |what| {
            Ok(Some(WatchResourcesResponse {
                change: Some(what),
                resume_token: change.revision.to_string(),
            }))
        };
        if change.key.is_empty() {
            return told(Change::Bookmark(WatchBookmark {}));
        }
        let Some(value) = &change.value else {
            let name = self.name(&change.key);
            return match self.may_see(&name) {
                true => told(Change::Removed(name)),
                false => Ok(None),
            };
        };
        let fleet = self.api.fleet();
        let (name, resource) = match self.kind {
            ResourceKind::Vm => {
                let vm = commands::visible_vm(&read::<VmRecord>(change, value)?, &fleet);
                (vm.name.clone(), self.passed(vm).map(Resource::Vm))
            }
            ResourceKind::Volume => {
                let record: VolumeRecord = read(change, value)?;
                let volume = commands::visible_volume(&record, &fleet);
                (
                    volume.name.clone(),
                    self.passed(volume).map(Resource::Volume),
                )
            }
            ResourceKind::Network => {
                let network = self
                    .api
                    .network_now(read::<NetworkRecord>(change, value)?)
                    .await?;
                (
                    network.name.clone(),
                    self.passed(network).map(Resource::Network),
                )
            }
            ResourceKind::SecurityGroup => {
                let record: SecurityGroupRecord = read(change, value)?;
                let group = commands::visible_security_group(&self.api.store, record)
                    .await
                    .map_err(super::command_status)?;
                (
                    group.name.clone(),
                    self.passed(group).map(Resource::SecurityGroup),
                )
            }
            ResourceKind::Project => {
                let project = commands::visible_project(&read::<ProjectRecord>(change, value)?);
                (
                    project.name.clone(),
                    self.passed(project).map(Resource::Project),
                )
            }
            ResourceKind::Operation => {
                let operation: Operation = read(change, value)?;
                let metadata = operation.metadata.as_ref();
                let target = metadata.map(|metadata| metadata.target.as_str());
                if !self.may_see(target.unwrap_or_default()) {
                    return Ok(None);
                }
                (
                    operation.name.clone(),
                    self.passed(operation).map(Resource::Operation),
                )
            }
            ResourceKind::FaultExperiment => {
                let stored: FaultExperiment = read(change, value)?;
                let live = self.api.experiments.with_live(stored);
                (
                    live.name.clone(),
                    self.passed(live).map(Resource::FaultExperiment),
                )
            }
            ResourceKind::Unspecified => return Ok(None),
        };
        match resource {
            Some(resource) => told(Change::Put(WatchedResource {
                resource: Some(resource),
            })),
            None if self.may_see(&name) => told(Change::Removed(name)),
            None => Ok(None),
        }
    }

    /// Masked, if the filter lets it through and the caller may see it.
    fn passed<T: Message + Default>(&self, message: T) -> Option<T> {
        let dynamic = || dynamic(&self.message, &message);
        if !self
            .filter
            .as_ref()
            .is_none_or(|filter| filter.matches(&dynamic()))
        {
            return None;
        }
        Some(match &self.mask {
            Some(mask) => mask.apply(&message),
            None => message,
        })
    }

    fn may_see(&self, resource: &str) -> bool {
        let inside = match &self.project {
            Some(project) => {
                let rest = resource.strip_prefix("projects/");
                rest.is_some_and(|rest| rest.split('/').next() == Some(project))
            }
            None => true,
        };
        // Names of operations say nothing of whose they are; their targets were looked at.
        (inside || resource.starts_with(prefix::OPERATIONS)) && self.caller.may_see(resource)
    }

    /// `vms/p/v` is `projects/p/vms/v`.
    fn name(&self, key: &str) -> String {
        let mut parts = key.splitn(3, '/');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(collection), Some(project), Some(id)) => {
                format!("projects/{project}/{collection}/{id}")
            }
            _ => key.to_owned(),
        }
    }
}

fn read<T: Message + Default>(change: &store::Change, value: &[u8]) -> Result<T, Status> {
    decode(&change.key, value).map_err(store_status)
}
