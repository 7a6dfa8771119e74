//! What the store holds: records, their keys, and how they look to users and to hosts.
//!
//! ```text
//! vms/{project}/{vm}           VmRecord
//! volumes/{project}/{volume}   VolumeRecord
//! networks/{project}/{network}            NetworkRecord
//! securityGroups/{project}/{group}      SecurityGroupRecord
//! claims/{mac|ipv4|ipv6|port}/...       who has it
//! network-layout                        changes with every new network
//! node-ids/{kind}/{node id}    name of the resource that has this id on hosts
//! operations/{id}              controller.v1 Operation; ids sort by age
//! pending/{id}                 nothing: the operation is not done
//! jobs/{id}                    JobRecord of the operation
//! requests/{project}/{id}      RequestRecord
//! events/{id}                  controller.v1 Event; ids sort by age
//! faultExperiments/{project}/{id}       controller.v1 FaultExperiment
//! fault-reports/{project}/{id}          its controller.v1 FaultReport
//! fault-switch-off                      there while nothing may be broken on purpose
//! projects/{project}           ProjectRecord
//! pools/{pool}                 PoolRecord
//! exports/{place}/{export}     ExportRecord
//! quota-fence/{project}        changes with all that counts against the project's quota
//! audit/{id}                   controller.v1 AuditEntry; ids sort by age
//! host-upgrade                 see `host_upgrade`
//! lease-terms                  how long the longest lease of a host lasts that was ever granted
//! seeds/{project}/{vm}         node.v1 CloudInit of the VM, if it has one
//! hosts/{host}, reservations/{host}, evictions/{host}/{node id}, upload-hosts/{project}/{upload}   see `host`
//! ```

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use api::controller as pb;
use api::names::{DEFAULT_PROJECT, NETWORKS, Name, SECURITY_GROUPS, VMS};
use prost::Message;
use prost_types::Timestamp;

mod convert;
mod device;
mod host;
mod host_upgrade;
mod network;
mod nic;
mod pool;
mod project;
mod seed;

pub use convert::{
    complete_spec, disk_status, node_create_volume, node_vm_spec, vm_status, volume_status,
};
pub use device::{device, device_events, noted_device};
pub use host::{
    EVICTIONS, HOSTS, HostRecord, PromiseRecord, RESERVATIONS, ReservationRecord, eviction_key,
    has_labels, host, host_id, host_name, inventory, labelled, reservation_key, upload_host_key,
};
pub use host_upgrade::{HOST_UPGRADE, HostProgress, HostUpgradeRecord, UpgradeStage};
pub use nic::{capture, flow, nic_status};
pub use pool::{ExportRecord, PoolRecord, is_fenced, pool_key};
pub use project::{
    EXPLICIT_PROJECTS, PROJECT_COLLECTIONS, ProjectRecord, project_key, quota_fence_key,
};
pub use seed::{seed_key, take_seed};

pub use network::{
    NetworkRecord, SecurityGroupRecord, claim, eui64, has_host, ipv4_pool, ipv4_subnet,
    network_status, node_network_spec,
};

/// A VM as stored.
#[derive(Clone, PartialEq, Message)]
pub struct VmRecord {
    /// What users see; `status` holds what was last recorded.
    #[prost(message, required, tag = "1")]
    pub vm: pb::Vm,
    /// Its id on hosts.
    #[prost(string, tag = "2")]
    pub node_id: String,
    /// The generation that the host refused for good; `vm.status.error` says why.
    #[prost(uint64, tag = "3")]
    pub rejected_generation: u64,
    /// Id of the host that was chosen for it; empty: none is.
    #[prost(string, tag = "4")]
    pub host: String,
    /// How often a host was chosen for it.
    #[prost(uint64, tag = "5")]
    pub placements: u64,
    /// Why no host can have it, as was told last; empty while one has it.
    #[prost(string, tag = "6")]
    pub unplaced: String,
    /// What its host promised it.
    #[prost(message, optional, tag = "7")]
    pub promised: Option<PromiseRecord>,
    /// It is shut down to be started on another host.
    #[prost(bool, tag = "8")]
    pub moving: bool,
    /// Why a drain leaves it where it is, after the drain's operation and a blank.
    #[prost(string, tag = "9")]
    pub stays: String,
    /// Which owner of its volumes it is, by their names, since it was started last.
    #[prost(btree_map = "string, uint64", tag = "20")]
    pub attachments: BTreeMap<String, u64>,
    /// What its placements count from: each restore of the state is higher than all before it.
    #[prost(uint64, tag = "21")]
    pub placements_base: u64,
}

/// A volume as stored.
#[derive(Clone, PartialEq, Message)]
pub struct VolumeRecord {
    /// What users see; `status` holds what was last recorded.
    #[prost(message, required, tag = "1")]
    pub volume: pb::Volume,
    /// Its id on hosts.
    #[prost(string, tag = "2")]
    pub node_id: String,
    /// Id of the host whose pool has it; empty: none was chosen.
    #[prost(string, tag = "3")]
    pub host: String,
    /// The size that it was last asked to get; it counts against the quota from then on.
    #[prost(uint64, tag = "30")]
    pub wanted_bytes: u64,
    /// Where it is, if not in a host's own pool.
    #[prost(message, optional, tag = "40")]
    pub pool: Option<pb::PoolSpec>,
    /// VMs that were started with it so far, while it is in a host's own pool: whoever had it before the
    /// last one may not write any more.
    #[prost(uint64, tag = "41")]
    pub attachments: u64,
}

/// Work that a host does for an operation.
#[derive(Clone, PartialEq, Message)]
pub struct JobRecord {
    /// What the host is told; the job has the operation's id.
    #[prost(message, required, tag = "1")]
    pub start: api::node::StartJobRequest,
    /// A mirror is to switch over.
    #[prost(bool, tag = "2")]
    pub complete: bool,
    /// It is to end.
    #[prost(bool, tag = "3")]
    pub cancel: bool,
    /// Id of the host that does it.
    #[prost(string, tag = "4")]
    pub host: String,
    /// Ids of hosts that do it after that one, if it went well there.
    #[prost(string, repeated, tag = "5")]
    pub then: Vec<String>,
}

/// A request that was given an id.
#[derive(Clone, PartialEq, Message)]
pub struct RequestRecord {
    /// Name of the operation it began.
    #[prost(string, tag = "1")]
    pub operation: String,
    /// Method and request, to tell a repetition from a clash.
    #[prost(bytes = "vec", tag = "2")]
    pub fingerprint: Vec<u8>,
}

impl VmRecord {
    /// What was last recorded of it.
    pub fn status(&self) -> pb::VmStatus {
        self.vm.status.clone().unwrap_or_default()
    }
}

/// Key prefixes.
pub mod prefix {
    /// VMs of all projects.
    pub const VMS: &str = "vms/";
    /// Volumes of all projects.
    pub const VOLUMES: &str = "volumes/";
    /// Networks of all projects.
    pub const NETWORKS: &str = "networks/";
    /// Security groups of all projects.
    pub const SECURITY_GROUPS: &str = "securityGroups/";
    /// Fault experiments of all projects.
    pub const FAULT_EXPERIMENTS: &str = "faultExperiments/";
    /// Operations.
    pub const OPERATIONS: &str = "operations/";
    /// Ids of operations that are not done.
    pub const PENDING: &str = "pending/";
    /// Work of operations on hosts.
    pub const JOBS: &str = "jobs/";
    /// Events.
    pub const EVENTS: &str = "events/";
    /// Projects.
    pub const PROJECTS: &str = "projects/";
    /// Pools.
    pub const POOLS: &str = "pools/";
}

/// Key of a VM or volume.
pub fn key(name: &Name) -> String {
    format!("{}/{}/{}", name.collection, name.project, name.id)
}

/// Key that reserves a node id.
pub fn node_id_key(name: &Name, node_id: &str) -> String {
    format!("node-ids/{}/{node_id}", name.collection)
}

/// Key of a request id.
pub fn request_key(project: &str, request_id: &str) -> String {
    format!("requests/{project}/{request_id}")
}

/// Key of an operation's job.
pub fn job_key(operation: &str) -> String {
    format!("jobs/{}", job_id(operation))
}

/// The id of an operation's job: the operation's own.
pub fn job_id(operation: &str) -> &str {
    operation.trim_start_matches(prefix::OPERATIONS)
}

/// The id that an upload has on hosts: its own in the default project; elsewhere a digest of the
/// project is appended (FNV-1a, 32 bits).
pub fn upload_node_id(name: &Name) -> String {
    if name.project == DEFAULT_PROJECT {
        return name.id.clone();
    }
    let digest = name.project.bytes().fold(0x811c_9dc5_u32, |digest, byte| {
        (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let id = &name.id[..name.id.len().min(54)];
    format!("{id}-{digest:08x}")
}

/// Key that marks an operation as not done.
pub fn pending_key(operation: &str) -> String {
    format!(
        "{}{}",
        prefix::PENDING,
        operation.trim_start_matches(prefix::OPERATIONS)
    )
}

/// The id that a resource has on hosts: its own in the default project. Elsewhere part of the uid is
/// appended, because two projects may use the same id.
pub fn node_id(name: &Name, uid: &str) -> String {
    if name.project == DEFAULT_PROJECT {
        return name.id.clone();
    }
    // 63 bytes with a hyphen and 8 digits.
    let id = &name.id[..name.id.len().min(54)];
    format!("{id}-{}", &uid[..8])
}

/// A new operation on `target`, not done.
pub fn new_operation(
    kind: pb::OperationKind,
    target: &impl std::fmt::Display,
    generation: u64,
) -> pb::Operation {
    pb::Operation {
        name: format!("{}{}", prefix::OPERATIONS, sortable_id()),
        metadata: Some(pb::OperationMetadata {
            kind: kind as i32,
            target: target.to_string(),
            generation,
            ..Default::default()
        }),
        create_time: Some(now()),
        ..Default::default()
    }
}

/// An event about `target`; its revision is known once it is stored.
pub fn new_event(target: &str, reason: &str, message: impl Into<String>) -> pb::Event {
    pb::Event {
        name: format!("{}{}", prefix::EVENTS, sortable_id()),
        time: Some(now()),
        target: target.to_owned(),
        reason: reason.to_owned(),
        message: message.into(),
        ..Default::default()
    }
}

/// How people and `vmctl` name it: `vm web`.
pub fn short(name: &Name) -> String {
    let kind = match name.collection {
        VMS => "vm",
        NETWORKS => "network",
        SECURITY_GROUPS => "security group",
        _ => "volume",
    };
    if name.project == DEFAULT_PROJECT {
        format!("{kind} {}", name.id)
    } else {
        format!("{kind} {}/{}", name.project, name.id)
    }
}

/// Fowler-Noll-Vo, 64 bits: the standard library's hashes may change between versions.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The etag of something at a generation.
pub fn etag(uid: &str, generation: u64) -> String {
    format!("{}-{generation}", &uid[..8.min(uid.len())])
}

/// A fresh uid.
pub fn new_uid() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The current time.
pub fn now() -> Timestamp {
    SystemTime::now().into()
}

/// Ids that sort by the time of their making: microseconds in hexadecimal, then chance.
fn sortable_id() -> String {
    let micros = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_micros();
    format!("{micros:015x}-{}", &new_uid()[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ids_are_plain_in_the_default_project_and_fit_elsewhere() {
        let uid = "0123456789ab";
        assert_eq!(node_id(&Name::vm("default", "web"), uid), "web");
        let long = node_id(&Name::vm("p", &"a".repeat(63)), uid);
        assert!(api::names::is_id(&long), "{long}");
        assert_ne!(node_id(&Name::vm("p", "web"), uid), "web");
    }

    #[test]
    fn records_survive_encoding() {
        let record = VmRecord {
            vm: pb::Vm {
                name: "projects/default/vms/a".into(),
                ..Default::default()
            },
            node_id: "a".into(),
            rejected_generation: 3,
            ..Default::default()
        };
        assert_eq!(
            VmRecord::decode(record.encode_to_vec().as_slice()).unwrap(),
            record
        );
    }

    #[test]
    fn operations_sort_by_age() {
        let target = Name::vm("default", "a");
        let names: Vec<String> = (0..3)
            .map(|_| {
                std::thread::sleep(std::time::Duration::from_micros(2));
                new_operation(pb::OperationKind::StartVm, &target, 1).name
            })
            .collect();
        assert!(names.is_sorted(), "{names:?}");
        assert!(
            names
                .iter()
                .all(|name| api::names::flat_id(name, "operations").is_ok())
        );
    }
}
