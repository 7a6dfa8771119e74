//! The gRPC handlers: check the request, run a command or read the store, put the answer into the
//! API's words. `tonic::Status` appears here and at the hosts' end, nowhere between.

use std::sync::Arc;

use ::api::controller::audit_log_server::AuditLogServer;
use ::api::controller::device_upgrades_server::DeviceUpgradesServer;
use ::api::controller::devices_server::DevicesServer;
use ::api::controller::disks_server::DisksServer;
use ::api::controller::events_server::EventsServer;
use ::api::controller::fault_experiments_server::FaultExperimentsServer;
use ::api::controller::host_upgrades_server::HostUpgradesServer;
use ::api::controller::hosts_server::HostsServer;
use ::api::controller::networks_server::NetworksServer;
use ::api::controller::nics_server::NicsServer;
use ::api::controller::operations_server::OperationsServer;
use ::api::controller::pools_server::PoolsServer;
use ::api::controller::projects_server::ProjectsServer;
use ::api::controller::security_groups_server::SecurityGroupsServer;
use ::api::controller::uploads_server::UploadsServer;
use ::api::controller::vms_server::VmsServer;
use ::api::controller::volumes_server::VolumesServer;
use ::api::controller::watches_server::WatchesServer;
use ::api::errors::{invalid_field, status};
use ::api::serve::Services;
use gate::Gate;
use gate::auth::Principal;
use tonic::{Code, Status};

use crate::commands::CommandError;
use crate::faults::Experiments;
use crate::hosts::Hosts;
use crate::plan::Fleet;
use crate::reconciler::with_source;
use crate::store::{SharedStore, StoreError};

mod audit;
mod certificates;
mod console;
mod devices;
mod disks;
mod events;
mod faults;
mod host_upgrades;
mod hosts;
mod listing;
mod mask;
mod networks;
mod nics;
mod operations;
mod pools;
mod projects;
mod reach;
mod security_groups;
mod state;
mod upgrades;
mod uploads;
mod vms;
mod volumes;
mod watches;

pub use certificates::CertificateService;
pub use state::StateService;

/// What all handlers work on.
#[derive(Clone)]
pub struct Api {
    store: SharedStore,
    hosts: Hosts,
    experiments: Experiments,
}

impl Api {
    /// Handlers on `store` for VMs on `hosts`.
    pub fn new(store: SharedStore, hosts: Hosts, experiments: Experiments) -> Self {
        Self {
            store,
            hosts,
            experiments,
        }
    }

    /// All services, behind the gate.
    pub fn services(self, gate: &Gate) -> Services {
        Services::new()
            .with(gate.guard(VmsServer::new(self.clone())))
            .with(gate.guard(VolumesServer::new(self.clone())))
            .with(gate.guard(UploadsServer::new(self.clone())))
            .with(gate.guard(DisksServer::new(self.clone())))
            .with(gate.guard(DevicesServer::new(self.clone())))
            .with(gate.guard(DeviceUpgradesServer::new(self.clone())))
            .with(gate.guard(NetworksServer::new(self.clone())))
            .with(gate.guard(NicsServer::new(self.clone())))
            .with(gate.guard(SecurityGroupsServer::new(self.clone())))
            .with(gate.guard(HostsServer::new(self.clone())))
            .with(gate.guard(HostUpgradesServer::new(self.clone())))
            .with(gate.guard(OperationsServer::new(self.clone())))
            .with(gate.guard(FaultExperimentsServer::new(self.clone())))
            .with(gate.guard(EventsServer::new(self.clone())))
            .with(gate.guard(ProjectsServer::new(self.clone())))
            .with(gate.guard(PoolsServer::new(self.clone())))
            .with(gate.guard(AuditLogServer::new(self.clone())))
            .with(gate.guard(WatchesServer::new(self)))
    }

    /// What was seen last, everywhere.
    fn fleet(&self) -> Arc<Fleet> {
        self.hosts.fleet()
    }
}

/// Who asks; the gate has put it there.
fn caller<T>(request: &tonic::Request<T>) -> Principal {
    let known = request.extensions().get::<Principal>();
    known.cloned().unwrap_or_else(Principal::local)
}

/// A refused command in the API's words.
fn command_status(error: CommandError) -> Status {
    let message = error.to_string();
    match &error {
        CommandError::NotFound { what } => {
            status(Code::NotFound, "NOT_FOUND", message, &[("resource", what)])
        }
        CommandError::AlreadyExists { what } => status(
            Code::AlreadyExists,
            "ALREADY_EXISTS",
            message,
            &[("resource", what)],
        ),
        CommandError::RequestIdReused { request_id } => {
            let metadata = [("request_id", request_id.as_str())];
            status(Code::AlreadyExists, "REQUEST_ID_REUSED", message, &metadata)
        }
        CommandError::EtagMismatch { what, given, etag } => {
            let metadata = [
                ("resource", what.as_str()),
                ("given", given),
                ("etag", etag),
            ];
            status(Code::Aborted, "ETAG_MISMATCH", message, &metadata)
        }
        CommandError::Running { vm, phase } => {
            let metadata = [("vm", vm.as_str()), ("phase", phase)];
            status(Code::FailedPrecondition, "VM_RUNNING", message, &metadata)
        }
        CommandError::NotRunning { vm, phase } => {
            let metadata = [("vm", vm.as_str()), ("phase", phase)];
            status(
                Code::FailedPrecondition,
                "VM_NOT_RUNNING",
                message,
                &metadata,
            )
        }
        CommandError::Deleting { what } => status(
            Code::FailedPrecondition,
            "DELETING",
            message,
            &[("resource", what)],
        ),
        CommandError::NoHost { what, verdicts, .. } => {
            // Details are sent in a header: those that were nearest are enough.
            const MAX_TOLD: usize = 16;
            let told = verdicts.iter().take(MAX_TOLD).map(|verdict| {
                let reasons = verdict.refusals.iter();
                let reasons = reasons.map(|refusal| refusal.reason.as_str());
                let reasons: Vec<&str> = reasons.collect();
                (verdict.host.as_str(), reasons.join("; "))
            });
            let told: Vec<(&str, String)> = told.collect();
            let metadata = told.iter().map(|(host, reasons)| (*host, reasons.as_str()));
            let metadata: Vec<(&str, &str)> =
                metadata.chain([("resource", what.as_str())]).collect();
            status(Code::ResourceExhausted, "NO_HOST", message, &metadata)
        }
        CommandError::HostInUse { host, .. } => {
            let metadata = [("host", host.as_str())];
            status(Code::FailedPrecondition, "HOST_IN_USE", message, &metadata)
        }
        CommandError::VolumeInUse { volume, vms } => {
            let metadata = [("volume", volume.as_str()), ("vms", vms)];
            status(
                Code::FailedPrecondition,
                "VOLUME_IN_USE",
                message,
                &metadata,
            )
        }
        CommandError::NoSuchVolume { field, volume } => {
            let metadata = [("field", field.as_str()), ("volume", volume)];
            status(
                Code::FailedPrecondition,
                "VOLUME_NOT_FOUND",
                message,
                &metadata,
            )
        }
        CommandError::ForeignVolume { field, .. } => {
            let problem = message
                .trim_start_matches(field.as_str())
                .trim_start_matches(": ");
            invalid_field(field.clone(), problem)
        }
        CommandError::NoSuchNetwork { field, network } => {
            let metadata = [("field", field.as_str()), ("network", network)];
            status(
                Code::FailedPrecondition,
                "NETWORK_NOT_FOUND",
                message,
                &metadata,
            )
        }
        CommandError::NetworkInUse { network, vms } => {
            let metadata = [("network", network.as_str()), ("vms", vms)];
            status(
                Code::FailedPrecondition,
                "NETWORK_IN_USE",
                message,
                &metadata,
            )
        }
        CommandError::Taken {
            field,
            value,
            owner,
        } => {
            let metadata = [
                ("field", field.as_str()),
                ("value", value),
                ("owner", owner),
            ];
            status(Code::AlreadyExists, "TAKEN", message, &metadata)
        }
        CommandError::PoolExhausted { field, network, .. } => {
            let metadata = [("field", field.as_str()), ("network", network)];
            status(
                Code::ResourceExhausted,
                "POOL_EXHAUSTED",
                message,
                &metadata,
            )
        }
        CommandError::NoSubnet => status(Code::ResourceExhausted, "NO_SUBNET", message, &[]),
        CommandError::NoSuchGroup { field, group } => {
            let metadata = [("field", field.as_str()), ("security_group", group)];
            status(
                Code::FailedPrecondition,
                "SECURITY_GROUP_NOT_FOUND",
                message,
                &metadata,
            )
        }
        CommandError::GroupInUse { group, users } => {
            let metadata = [("security_group", group.as_str()), ("users", users)];
            status(
                Code::FailedPrecondition,
                "SECURITY_GROUP_IN_USE",
                message,
                &metadata,
            )
        }
        CommandError::ForeignNetwork { field, .. }
        | CommandError::AddressOutside { field, .. }
        | CommandError::NoForwards { field, .. }
        | CommandError::NoVlans { field, .. } => {
            let problem = message
                .trim_start_matches(field.as_str())
                .trim_start_matches(": ");
            invalid_field(field.clone(), problem)
        }
        CommandError::NoDisk { vm, disk, .. } => {
            let metadata = [("vm", vm.as_str()), ("disk", disk)];
            status(Code::NotFound, "NO_DISK", message, &metadata)
        }
        CommandError::NoDevice { vm, device, .. } => {
            let metadata = [("vm", vm.as_str()), ("device", device)];
            status(Code::NotFound, "NO_DEVICE", message, &metadata)
        }
        CommandError::NoNic { vm, nic, .. } => {
            let metadata = [("vm", vm.as_str()), ("nic", nic)];
            status(Code::NotFound, "NO_NIC", message, &metadata)
        }
        CommandError::NotAVolume { vm, disk, .. } => {
            let metadata = [("vm", vm.as_str()), ("disk", disk)];
            status(Code::FailedPrecondition, "NOT_A_VOLUME", message, &metadata)
        }
        CommandError::Shrink { volume, size_bytes } => {
            let size_bytes = size_bytes.to_string();
            let metadata = [("volume", volume.as_str()), ("size_bytes", &size_bytes)];
            status(Code::InvalidArgument, "SHRINK", message, &metadata)
        }
        CommandError::VolumeNotReady { volume, phase } => {
            let metadata = [("volume", volume.as_str()), ("phase", phase)];
            status(
                Code::FailedPrecondition,
                "VOLUME_NOT_READY",
                message,
                &metadata,
            )
        }
        CommandError::NotAMirror { operation } => {
            let metadata = [("operation", operation.as_str())];
            status(Code::FailedPrecondition, "NOT_A_MIRROR", message, &metadata)
        }
        CommandError::UpgradeUnderWay { operation } => {
            let metadata = [("operation", operation.as_str())];
            status(
                Code::FailedPrecondition,
                "UPGRADE_UNDER_WAY",
                message,
                &metadata,
            )
        }
        CommandError::TooManyHosts { found, most } => {
            let (found, most) = (found.to_string(), most.to_string());
            let metadata = [("found", found.as_str()), ("most", &most)];
            status(Code::InvalidArgument, "TOO_MANY_HOSTS", message, &metadata)
        }
        CommandError::NotCancellable { operation } => {
            let metadata = [("operation", operation.as_str())];
            status(
                Code::FailedPrecondition,
                "NOT_CANCELLABLE",
                message,
                &metadata,
            )
        }
        CommandError::NoSuchProject { project } => {
            let metadata = [("project", project.as_str())];
            status(
                Code::FailedPrecondition,
                "PROJECT_NOT_FOUND",
                message,
                &metadata,
            )
        }
        CommandError::HostNotLost { host, what } => {
            let metadata = [("host", host.as_str()), ("vms", what)];
            status(
                Code::FailedPrecondition,
                "HOST_NOT_LOST",
                message,
                &metadata,
            )
        }
        CommandError::ExportTaken { export, volume } => {
            let metadata = [("export", export.as_str()), ("volume", volume)];
            status(Code::AlreadyExists, "EXPORT_TAKEN", message, &metadata)
        }
        CommandError::VolumeHeld { volume, vm } => {
            let metadata = [("volume", volume.as_str()), ("vm", vm)];
            status(Code::FailedPrecondition, "VOLUME_HELD", message, &metadata)
        }
        CommandError::PoolInUse { pool, volume } => {
            let metadata = [("pool", pool.as_str()), ("volume", volume)];
            status(Code::FailedPrecondition, "POOL_IN_USE", message, &metadata)
        }
        CommandError::SharedVolume { volume } => {
            let metadata = [("volume", volume.as_str())];
            status(
                Code::FailedPrecondition,
                "SHARED_VOLUME",
                message,
                &metadata,
            )
        }
        CommandError::ProjectInUse { project } => {
            let metadata = [("project", project.as_str())];
            status(
                Code::FailedPrecondition,
                "PROJECT_IN_USE",
                message,
                &metadata,
            )
        }
        CommandError::QuotaExceeded {
            project,
            figure,
            limit,
            used,
            asked,
        } => {
            let [limit, used, asked] = [limit, used, asked].map(ToString::to_string);
            let metadata = [
                ("project", project.as_str()),
                ("figure", figure),
                ("limit", &limit),
                ("used", &used),
                ("asked", &asked),
            ];
            status(
                Code::ResourceExhausted,
                "QUOTA_EXCEEDED",
                message,
                &metadata,
            )
        }
        CommandError::Store(StoreError::Conflict { key }) => status(
            Code::Aborted,
            "CONTENTION",
            format!("{key} is being changed by others all the time; try again"),
            &[("key", key)],
        ),
        CommandError::Store(error) => store_status_ref(error),
    }
}

fn store_status(error: StoreError) -> Status {
    store_status_ref(&error)
}

fn store_status_ref(error: &StoreError) -> Status {
    match error {
        StoreError::Compacted { oldest, .. } => status(
            Code::OutOfRange,
            "COMPACTED",
            format!("{error}; list again and watch from the list's revision"),
            &[("oldest", &oldest.to_string())],
        ),
        StoreError::Full(_) => {
            tracing::error!(error = %with_source(error), "the store is full");
            status(
                Code::ResourceExhausted,
                "STORE_FULL",
                error.to_string(),
                &[],
            )
        }
        _ => {
            tracing::error!(error = %with_source(error), "the store failed");
            status(Code::Unavailable, "STORE_FAILED", with_source(error), &[])
        }
    }
}
