//! The only validation of requests. Each server calls the function named after the message before
//! it looks at anything else; what passes has safe names, absolute paths and counts in range.
//!
//! A function collects all violations; see [`crate::errors::Violations`]. Whether a file exists or
//! a name is taken is not decided here.

mod cloud_init;
mod devices;
mod disk;
mod fault_experiments;
mod fault_rules;
mod fields;
mod host_upgrades;
mod leases;
mod machine;
mod net;
mod networks;
mod nic_policy;
mod nics;
mod node_faults;
mod placement;
mod pools;
mod projects;
mod security_groups;
mod upgrades;
mod user_network;
mod vm_disks;
mod volumes;

use tonic::Status;

pub use cloud_init::{
    MAX_META_DATA_BYTES, MAX_NETWORK_CONFIG_BYTES, MAX_SSH_KEYS, MAX_USER_DATA_BYTES, SEED_DISK,
    has_top_level_key,
};
pub use devices::{outage_policy, update_device_request, vm_device_request};
pub use disk::{
    MAX_BACKING_IMAGES, MAX_BITMAP_GRANULARITY, bitmap_request, create_bitmap_request,
    disk_request, job_request, resize_request, set_limits_request, set_polling_request,
    snapshot_request, start_backup_request, start_mirror_request,
};
pub use fault_experiments::{
    MAX_CAMPAIGN_BYTES, create_fault_experiment_request, fault_experiment_request,
};
pub use fault_rules::{MAX_FAULT_TTL_MS, arm_faults_request, fault_id, fault_rule, fault_ttl};
use fields::*;
pub use host_upgrades::{HostSelection, upgrade_agent_request, upgrade_hosts_request};
pub use leases::{allow_io_request, renew_lease_request};
use machine::{Machine, NicFields, VhostUserFields};
pub use networks::*;
pub use nic_policy::{
    MAX_GROUP_ADDRESSES, MAX_LISTED_FLOWS, MAX_SECURITY_RULES, capture_request, list_flows_request,
    nic_request, set_net_limits_request, set_policy_request,
};
pub use nics::{
    capture_nic_request, node_capture_nic_request, node_nic_flows_request, update_nic_request,
    updated_nic, vm_nic_flows_request, vm_nic_request,
};
pub use node_faults::{node_arm_faults_request, node_fault};
pub use placement::update_host_request;
pub use pools::{LOCAL_POOL, create_pool_request, pool_name};
pub use projects::{create_project_request, project_name, update_project_request};
pub use security_groups::*;
pub use upgrades::{DEVICE_PROGRAMS, UpgradeTarget, upgrade_devices_request};
pub use vm_disks::*;
pub use volumes::*;

use crate::errors::Violations;
use crate::{controller, device, names, node};

/// vCPUs of one VM.
pub const MAX_VCPUS: u32 = 32;
/// Queues of one device: an index travels in one byte of vhost-user's messages, and the daemons
/// accept this many.
pub const MAX_QUEUES: u32 = 64;
/// Queue pairs of one NIC.
pub const MAX_QUEUE_PAIRS: u32 = 16;
/// Devices of one VM: slots of its host bridge less the bridge itself.
pub const MAX_DEVICES: usize = 30;
/// Bytes of a virtio-blk serial number (VIRTIO_BLK_ID_BYTES).
pub const MAX_SERIAL_BYTES: usize = 20;
/// What Linux takes on x86-64 (COMMAND_LINE_SIZE), the terminating NUL included.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// Longest wait that WaitOperation accepts.
pub const MAX_WAIT_MS: u32 = 300_000;
/// Largest page of a list.
pub const MAX_PAGE_SIZE: u32 = 1000;

const MIN_MEMORY_BYTES: u64 = 1 << 20;
const MAX_MEMORY_BYTES: u64 = 16 << 40;
const PAGE_BYTES: u64 = 4096;
/// Devices are addressed in units of this, whatever their block size is.
const SECTOR_BYTES: u64 = 512;
const MAX_VOLUME_BYTES: u64 = 1 << 50;
/// IFNAMSIZ less its NUL.
const MAX_INTERFACE_BYTES: usize = 15;
const MAX_QUEUE_SIZE: u32 = 32768;
/// `VHOST_USER_MAX_CONFIG_SIZE`
const MAX_CONFIG_BYTES: usize = 256;
const MAX_GRACE_MS: u32 = 3_600_000;

/// Checks what a device daemon is asked to serve.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn attach_request(request: &device::AttachRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    match &request.listener {
        Some(device::attach_request::Listener::SocketPath(path)) => {
            absolute(&mut found, "socket_path", path);
        }
        Some(device::attach_request::Listener::SocketFd(fd)) => {
            token(&mut found, "socket_fd", Some(fd));
        }
        None => found.add("listener", "give socket_path or socket_fd"),
    }
    match &request.device {
        Some(device::attach_request::Device::Blk(blk)) => {
            disk::blk_config(&mut found, "blk", blk);
        }
        Some(device::attach_request::Device::Net(net)) => {
            net::net_config(&mut found, "net", net);
        }
        None => found.add("device", "give blk or net"),
    }
    found.into_result()
}

/// Checks which device a daemon is asked to drop.
///
/// # Errors
/// As [`attach_request`].
pub fn detach_request(request: &device::DetachRequest) -> Result<(), Status> {
    one_id("id", &request.id)
}

/// Checks which device is asked for.
///
/// # Errors
/// As [`attach_request`].
pub fn get_device_request(request: &device::GetDeviceRequest) -> Result<(), Status> {
    one_id("id", &request.id)
}

/// Checks what a host is asked to run.
///
/// # Errors
/// As [`attach_request`]; paths begin with `spec.`
pub fn apply_vm_request(request: &node::ApplyVmRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    let Some(spec) = &request.spec else {
        found.add("spec", "is missing");
        return found.into_result();
    };
    id(&mut found, "spec.id", &spec.id);
    found.require(spec.generation > 0, "spec.generation", || {
        "must be at least 1".into()
    });
    match node::Power::try_from(spec.power) {
        Ok(node::Power::Unspecified) => {
            found.add("spec.power", "must be POWER_ON, POWER_OFF or POWER_OFF_NOW");
        }
        Ok(_) => {}
        Err(_) => found.add("spec.power", format!("unknown value {}", spec.power)),
    }
    found.require(spec.vcpus > 0, "spec.vcpus", || "must be at least 1".into());
    let mut machine = Machine::new(&mut found, "spec");
    machine.cpus_and_memory(spec.vcpus, spec.memory_bytes);
    machine.boot(
        &spec.kernel,
        &spec.initramfs,
        &spec.cmdline,
        spec.shutdown_grace_ms,
    );
    for (index, disk) in spec.disks.iter().enumerate() {
        let at = machine.device("disks", index, &disk.name);
        match &disk.source {
            Some(node::disk_spec::Source::Path(path)) => {
                absolute(machine.found, &format!("{at}.path"), path);
            }
            Some(node::disk_spec::Source::Volume(volume)) => {
                id(machine.found, &format!("{at}.volume"), volume);
            }
            None => {}
        }
        machine.disk(&at, &node_disk(disk));
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        let at = machine.device("nics", index, &nic.name);
        machine.nic(
            &at,
            &NicFields {
                tap: &nic.tap,
                mac: &nic.mac,
                queue_pairs: nic.queue_pairs,
                host_cidr: &nic.host_cidr,
                bridge: &nic.bridge,
                mtu: nic.mtu,
            },
        );
        networks::node_nic_network(machine.found, &at, nic);
        if let Some(limits) = &nic.limits {
            nic_policy::net_limits(machine.found, &format!("{at}.limits"), limits);
        }
        if let Some(user) = &nic.user {
            user_network::node(&mut machine, &at, nic, user);
        }
    }
    for (index, dev) in spec.vhost_user.iter().enumerate() {
        let at = machine.device("vhost_user", index, &dev.name);
        machine.vhost_user(
            &at,
            &VhostUserFields {
                kind: &dev.r#type,
                socket: &dev.socket,
                num_queues: dev.num_queues,
                queue_size: dev.queue_size,
                config: &dev.config,
            },
        );
    }
    if let Some(seed) = &spec.cloud_init {
        cloud_init::node(&mut machine, seed);
    }
    let policies = spec.outage_policies.iter();
    machine.outage_policies(
        policies.map(|policy| (&policy.device[..], policy.action, policy.error_after_ms)),
    );
    machine.finish();
    found.into_result()
}

/// Checks an id that a host is asked about: GetVm, ResetVm, DeleteVm, DeleteVolume.
///
/// # Errors
/// As [`attach_request`].
pub fn node_id(value: &str) -> Result<(), Status> {
    one_id("id", value)
}

/// Checks a VM that is to be created.
///
/// # Errors
/// As [`attach_request`].
pub fn create_vm_request(request: &controller::CreateVmRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "vm_id", &request.vm_id);
    request_id(&mut found, &request.request_id);
    let Some(spec) = request.vm.as_ref().and_then(|vm| vm.spec.as_ref()) else {
        found.add("vm.spec", "is missing");
        return found.into_result();
    };
    let mut machine = Machine::new(&mut found, "vm.spec");
    machine.cpus_and_memory(spec.vcpus, spec.memory_bytes);
    machine.boot(
        &spec.kernel,
        &spec.initramfs,
        &spec.cmdline,
        spec.shutdown_grace_ms,
    );
    for (index, disk) in spec.disks.iter().enumerate() {
        let at = machine.device("disks", index, &disk.name);
        match &disk.source {
            Some(controller::disk::Source::Path(path)) => {
                absolute(machine.found, &format!("{at}.path"), path);
            }
            Some(controller::disk::Source::Volume(volume)) => {
                if let Err(error) = names::Name::parse_volume(volume) {
                    machine.found.add(format!("{at}.volume"), error.to_string());
                }
            }
            None => {}
        }
        machine.disk(&at, &controller_disk(disk));
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        let at = machine.device("nics", index, &nic.name);
        machine.nic(
            &at,
            &NicFields {
                tap: &nic.tap,
                mac: &nic.mac,
                queue_pairs: nic.queue_pairs,
                host_cidr: &nic.host_cidr,
                bridge: &nic.bridge,
                mtu: nic.mtu,
            },
        );
        networks::nic_network(machine.found, &at, nic);
        nics::changeable(machine.found, &at, nic);
        if let Some(user) = &nic.user {
            user_network::controller(&mut machine, &at, nic, user);
        }
    }
    for (index, dev) in spec.vhost_user.iter().enumerate() {
        let at = machine.device("vhost_user", index, &dev.name);
        machine.vhost_user(
            &at,
            &VhostUserFields {
                kind: &dev.r#type,
                socket: &dev.socket,
                num_queues: dev.num_queues,
                queue_size: dev.queue_size,
                config: &dev.config,
            },
        );
    }
    if let Some(seed) = &spec.cloud_init {
        cloud_init::controller(&mut machine, seed);
    }
    placement::placement(machine.found, "vm.spec", spec);
    let policies = spec.outage_policies.iter();
    machine.outage_policies(
        policies.map(|policy| (&policy.device[..], policy.action, policy.error_after_ms)),
    );
    machine.finish();
    found.into_result()
}

/// Checks the fields that requests changing a VM share, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn vm_request(name: &str, request: &str) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, request);
    resource(found, names::Name::parse_vm(name))
}

/// Checks the fields that requests changing a volume share, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn volume_request(name: &str, request: &str) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, request);
    resource(found, names::Name::parse_volume(name))
}

/// Checks a list's parent.
///
/// # Errors
/// As [`attach_request`].
pub fn list_parent(parent: &str) -> Result<names::Parent, Status> {
    names::Parent::parse(parent)
        .map_err(|error| crate::errors::invalid_field("parent", error.to_string()))
}

/// Checks a name such as `operations/…` and gives its id.
///
/// # Errors
/// As [`attach_request`].
pub fn flat_name<'a>(name: &'a str, collection: &'static str) -> Result<&'a str, Status> {
    names::flat_id(name, collection)
        .map_err(|error| crate::errors::invalid_field("name", error.to_string()))
}

/// The size of a page: what was asked for, at most [`MAX_PAGE_SIZE`], or 100.
pub fn page_size(asked: u32) -> usize {
    match asked {
        0 => 100,
        asked => asked.min(MAX_PAGE_SIZE) as usize,
    }
}

#[cfg(test)]
mod tests;
