//! Between users' messages and hosts' messages.

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::names::Name;
use api::node;

use super::{VmRecord, VolumeRecord};

/// Used when the request names none.
const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;

/// What a host is told about a VM. `volume` and `network_node_id` know the volumes and networks that the
/// spec names.
pub fn node_vm_spec<'a>(
    record: &VmRecord,
    volume: impl Fn(&str) -> Option<&'a VolumeRecord>,
    network_node_id: impl Fn(&str) -> Option<String>,
) -> node::VmSpec {
    let spec = record.vm.spec.clone().unwrap_or_default();
    // Of its disks on other hosts: whoever serves them refuses the hosts that it was on before.
    let attachment = record.placements.saturating_sub(1);
    let attachment = attachment.saturating_add(record.placements_base);
    node::VmSpec {
        id: record.node_id.clone(),
        generation: record.vm.generation,
        power: power(record.vm.desired_power()) as i32,
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        kernel: spec.kernel,
        initramfs: spec.initramfs,
        cmdline: spec.cmdline,
        disks: spec
            .disks
            .into_iter()
            .map(|disk| node_disk(disk, (attachment, record), &volume))
            .collect(),
        nics: spec
            .nics
            .into_iter()
            .map(|nic| node_nic(nic, &network_node_id))
            .collect(),
        vhost_user: spec.vhost_user.into_iter().map(node_vhost_user).collect(),
        shutdown_grace_ms: spec.shutdown_grace_ms,
        // Its content is added on the way to the host.
        cloud_init: spec.cloud_init.map(|_| node::CloudInit::default()),
        warm_spare: spec.warm_spare,
        outage_policies: spec
            .outage_policies
            .iter()
            .map(node_outage_policy)
            .collect(),
        // Both enumerations are the same.
        restart_policy: spec.restart_policy,
        autostart: spec.autostart,
        autostart_order: spec.autostart_order,
        // Whoever tells a host knows its session.
        lease_session: String::new(),
    }
}

fn node_outage_policy(policy: &pb::OutagePolicy) -> node::OutagePolicy {
    node::OutagePolicy {
        device: policy.device.clone(),
        // Both enumerations are the same.
        action: policy.action,
        error_after_ms: policy.error_after_ms,
    }
}

fn power(desired: pb::DesiredPower) -> node::Power {
    match desired {
        pb::DesiredPower::On => node::Power::On,
        pb::DesiredPower::OffNow => node::Power::OffNow,
        pb::DesiredPower::Off | pb::DesiredPower::Unspecified => node::Power::Off,
    }
}

fn node_disk<'a>(
    disk: pb::Disk,
    (placement, vm): (u64, &VmRecord),
    volume: impl Fn(&str) -> Option<&'a VolumeRecord>,
) -> node::DiskSpec {
    use node::disk_spec::Source;
    let mut generation = 0;
    let mut nbd = disk.nbd.map(|nbd| node::NbdSource {
        address: nbd.address,
        export: nbd.export,
        generation: nbd.generation.saturating_add(placement),
        tls_file: nbd.tls_file,
        tls_hostname: nbd.tls_hostname,
    });
    let source = disk.source.and_then(|source| match source {
        pb::disk::Source::Path(path) => Some(Source::Path(path)),
        pb::disk::Source::Volume(name) => {
            let attachment = vm.attachments.get(&name).copied().unwrap_or_default();
            let record = volume(&name);
            match record.and_then(VolumeRecord::shared) {
                Some(Kind::Nbd(pool)) => {
                    nbd = Some(node::NbdSource {
                        address: pool.address.clone(),
                        export: record.map(VolumeRecord::export).unwrap_or_default(),
                        generation: attachment,
                        tls_file: pool.tls_file.clone(),
                        tls_hostname: pool.tls_hostname.clone(),
                    });
                    None
                }
                Some(Kind::SharedDirectory(directory)) => {
                    record.map(|record| Source::Path(super::pool::file(directory, record)))
                }
                Some(Kind::Local(_)) | None => {
                    generation = attachment;
                    let node_id = record.map(|record| record.node_id.clone());
                    // A volume that is gone keeps its own id, so that the host says which one it misses.
                    let id = || Name::parse_volume(&name).ok().map(|name| name.id);
                    Some(Source::Volume(node_id.or_else(id).unwrap_or(name)))
                }
            }
        }
    });
    node::DiskSpec {
        name: disk.name,
        source,
        read_only: disk.read_only,
        num_queues: disk.num_queues,
        serial: disk.serial,
        format: disk.format,
        limits: disk.limits.as_ref().map(node_limits),
        block_size: disk.block_size,
        polling: disk.polling,
        cpus: disk.cpus,
        page_cache: disk.page_cache,
        slow_request_ms: disk.slow_request_ms,
        nbd,
        generation,
    }
}

fn node_limits(limits: &pb::RateLimits) -> node::RateLimits {
    let rate = |limit: &Option<pb::RateLimit>| {
        limit.as_ref().map(|limit| node::RateLimit {
            iops: limit.iops,
            bytes_per_second: limit.bytes_per_second,
            burst_ios: limit.burst_ios,
            burst_bytes: limit.burst_bytes,
        })
    };
    node::RateLimits {
        read: rate(&limits.read),
        write: rate(&limits.write),
    }
}

fn limits(limits: &node::RateLimits) -> pb::RateLimits {
    let rate = |limit: &Option<node::RateLimit>| {
        limit.as_ref().map(|limit| pb::RateLimit {
            iops: limit.iops,
            bytes_per_second: limit.bytes_per_second,
            burst_ios: limit.burst_ios,
            burst_bytes: limit.burst_bytes,
        })
    };
    pb::RateLimits {
        read: rate(&limits.read),
        write: rate(&limits.write),
    }
}

/// What users are told about a disk that a host reports.
pub fn disk_status(seen: &node::DiskStatus) -> pb::DiskStatus {
    pb::DiskStatus {
        served: seen.served,
        size_bytes: seen.capacity_bytes,
        format: seen.format.clone(),
        encrypted: seen.encrypted,
        read_only: seen.read_only,
        direct_io: seen.direct_io,
        layers: seen.layers.iter().map(layer).collect(),
        limits: seen.limits.as_ref().map(limits),
        read_requests: seen.read_requests,
        read_bytes: seen.read_bytes,
        write_requests: seen.write_requests,
        write_bytes: seen.write_bytes,
        flush_requests: seen.flush_requests,
        errors: seen.errors,
        throttled: seen.throttled,
        slow_requests: seen.slow_requests,
        latency_p50_us: seen.latency_p50_us,
        latency_p99_us: seen.latency_p99_us,
        latency_p999_us: seen.latency_p999_us,
        latency_max_us: seen.latency_max_us,
        bitmaps: seen
            .bitmaps
            .iter()
            .map(|bitmap| pb::DiskBitmap {
                bitmap: bitmap.bitmap.clone(),
                granularity_bytes: bitmap.granularity_bytes,
                dirty_bytes: bitmap.dirty_bytes,
            })
            .collect(),
        inflight: seen.inflight,
    }
}

fn layer(seen: &node::Layer) -> pb::Layer {
    pb::Layer {
        path: seen.path.clone(),
        format: seen.format.clone(),
        allocated_bytes: seen.allocated_bytes,
        snapshot: seen.snapshot.clone(),
        create_time: seen.create_time,
    }
}

fn node_nic(nic: pb::Nic, network_node_id: impl Fn(&str) -> Option<String>) -> node::NicSpec {
    let network = Name::parse_network(&nic.network)
        .map(|name| network_node_id(&nic.network).unwrap_or(name.id))
        .unwrap_or_default();
    node::NicSpec {
        network,
        name: nic.name,
        tap: nic.tap,
        mac: nic.mac,
        queue_pairs: nic.queue_pairs,
        host_cidr: nic.host_cidr,
        bridge: nic.bridge,
        mtu: nic.mtu,
        user: nic.user.map(|user| node::UserNetwork {
            port_forwards: nic.port_forwards.into_iter().map(port_forward).collect(),
            host_loopback: user.host_loopback,
        }),
        limits: nic.limits.as_ref().map(super::nic::node_limits),
        link_down: nic.link_down,
        track_flows: nic.track_flows,
        vlan: nic.vlan,
        trunk_vlans: nic.trunk_vlans,
    }
}

pub(super) fn port_forward(forward: pb::PortForward) -> node::PortForward {
    node::PortForward {
        protocol: forward.protocol,
        host_address: forward.host_address,
        host_port: forward.host_port,
        guest_port: match forward.guest_port {
            0 => forward.host_port,
            port => port,
        },
    }
}

fn node_vhost_user(device: pb::VhostUserDevice) -> node::VhostUserSpec {
    node::VhostUserSpec {
        name: device.name,
        r#type: device.r#type,
        socket: device.socket,
        num_queues: device.num_queues,
        queue_size: device.queue_size,
        config: device.config,
    }
}

/// What a host is told about a volume. `volume_node_id` knows the one that it may be based on.
pub fn node_create_volume(
    record: &VolumeRecord,
    volume_node_id: impl Fn(&str) -> Option<String>,
) -> node::CreateVolumeRequest {
    let spec = record.volume.spec.clone().unwrap_or_default();
    node::CreateVolumeRequest {
        id: record.node_id.clone(),
        size_bytes: spec.size_bytes,
        source_path: spec.source_path,
        preallocate: spec.preallocate,
        format: spec.format,
        preallocation: spec.preallocation,
        cluster_bytes: spec.cluster_bytes,
        // One that is gone keeps its own id, so that the host says which one it misses.
        base: volume_node_id(&spec.base)
            .or_else(|| Name::parse_volume(&spec.base).ok().map(|name| name.id))
            .unwrap_or_default(),
        base_snapshot: spec.base_snapshot,
        encrypted: spec.encrypted,
        import: spec.import.map(|import| node::ImportSource {
            upload: Name::parse_upload(&import.upload)
                .map(|name| super::upload_node_id(&name))
                .unwrap_or_default(),
            format: import.format,
            file: import.file,
            sha256: import.sha256,
        }),
    }
}

/// What users are told about a VM that a host reports.
pub fn vm_status(seen: &node::VmStatus, host: &str) -> pb::VmStatus {
    pb::VmStatus {
        phase: phase(seen.phase()) as i32,
        host: host.to_owned(),
        observed_generation: seen.observed_generation,
        error: (!seen.error.is_empty()).then(|| pb::OperationError {
            code: seen.error_code,
            message: seen.error.clone(),
            reason: "VM_FAILED".to_owned(),
        }),
        stop_reason: seen.stop_reason.clone(),
        processes: seen.processes.iter().map(process).collect(),
        devices: seen.devices.iter().map(device).collect(),
        started_at: seen.started_at,
        boot_ms: seen.first_console_byte_ms,
        resets: seen.resets,
        stale: false,
    }
}

fn phase(phase: node::VmPhase) -> pb::VmPhase {
    match phase {
        node::VmPhase::Unspecified => pb::VmPhase::Pending,
        node::VmPhase::Starting => pb::VmPhase::Starting,
        node::VmPhase::Running => pb::VmPhase::Running,
        node::VmPhase::Paused => pb::VmPhase::Paused,
        node::VmPhase::Stopping => pb::VmPhase::Stopping,
        node::VmPhase::Stopped => pb::VmPhase::Stopped,
        node::VmPhase::Failed => pb::VmPhase::Failed,
    }
}

fn process(seen: &node::ProcessStatus) -> pb::Process {
    pb::Process {
        name: seen.name.clone(),
        pid: seen.pid,
        rss_kib: seen.rss_kib,
        pss_kib: seen.pss_kib,
        devices: seen.devices.clone(),
        restarts: seen.restarts,
        sandbox: seen.sandbox.clone(),
        log: seen.log.clone(),
        last_error: seen.last_error.clone(),
        network: seen.network.clone(),
        version: seen.version.clone(),
        build: seen.build.clone(),
        spare_pid: seen.spare_pid,
    }
}

fn device(seen: &node::DeviceStatus) -> pb::DeviceHealth {
    pb::DeviceHealth {
        name: seen.name.clone(),
        r#type: seen.r#type.clone(),
        connected: seen.connected,
        incarnations: seen.incarnations,
        last_error: seen.last_error.clone(),
        driver_ok: seen.driver_ok,
        failing_requests: seen.failing_requests,
        stalled_since: seen.stalled_since,
        outages_total: seen.outages_total,
        last_recovery_us: seen.last_recovery_us,
        last_outage_in_flight: seen.last_outage_in_flight,
    }
}

/// What users are told about a volume that a host reports.
pub fn volume_status(seen: &node::VolumeStatus, host: &str) -> pb::VolumeStatus {
    let phase = if seen.creating {
        pb::VolumePhase::Creating
    } else {
        pb::VolumePhase::Ready
    };
    pb::VolumeStatus {
        phase: phase as i32,
        host: host.to_owned(),
        size_bytes: seen.size_bytes,
        path: seen.path.clone(),
        attached_to: seen.attached_to.clone(),
        copied_bytes: seen.copied_bytes,
        error: None,
        total_bytes: seen.total_bytes,
        stage: seen.stage.clone(),
        format: seen.format.clone(),
        allocated_bytes: seen.allocated_bytes,
        clones: seen.clones.clone(),
        layers: seen.layers.iter().map(layer).collect(),
        encrypted: seen.encrypted,
        key_present: seen.key_present,
        cluster_bytes: seen.cluster_bytes,
        // Of a host's own pool: locks, and a record of generations.
        fenced: true,
    }
}

/// Fills in what a VM's spec may leave out: sizes, and names of devices.
pub fn complete_spec(mut spec: pb::VmSpec) -> pb::VmSpec {
    if spec.vcpus == 0 {
        spec.vcpus = 1;
    }
    if spec.memory_bytes == 0 {
        spec.memory_bytes = DEFAULT_MEMORY_BYTES;
    }
    let mut taken: Vec<String> = spec
        .disks
        .iter()
        .map(|disk| &disk.name)
        .chain(spec.nics.iter().map(|nic| &nic.name))
        .chain(spec.vhost_user.iter().map(|device| &device.name))
        .filter(|name| !name.is_empty())
        .cloned()
        .collect();
    let mut name = |given: &mut String, stem: &str| {
        if given.is_empty() {
            let free = (0..)
                .map(|n| format!("{stem}{n}"))
                .find(|name| !taken.contains(name))
                .expect("numbers do not end");
            taken.push(free.clone());
            *given = free;
        }
    };
    spec.disks
        .iter_mut()
        .for_each(|disk| name(&mut disk.name, "disk"));
    spec.nics
        .iter_mut()
        .for_each(|nic| name(&mut nic.name, "nic"));
    spec.vhost_user
        .iter_mut()
        .for_each(|device| name(&mut device.name, "dev"));
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameless_devices_get_free_names() {
        let disk = |name: &str| pb::Disk {
            name: name.into(),
            ..Default::default()
        };
        let spec = complete_spec(pb::VmSpec {
            disks: vec![disk(""), disk("disk0"), disk("")],
            nics: vec![pb::Nic::default()],
            ..Default::default()
        });
        let names: Vec<&str> = spec.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["disk1", "disk0", "disk2"]);
        assert_eq!(spec.nics[0].name, "nic0");
        assert_eq!((spec.vcpus, spec.memory_bytes), (1, DEFAULT_MEMORY_BYTES));
    }

    #[test]
    fn hosts_get_a_volume_by_its_id_there() {
        let record = VmRecord {
            vm: pb::Vm {
                generation: 4,
                desired_power: pb::DesiredPower::On as i32,
                spec: Some(pb::VmSpec {
                    disks: vec![pb::Disk {
                        source: Some(pb::disk::Source::Volume("projects/p/volumes/data".into())),
                        ..Default::default()
                    }],
                    ..Default::default()
                }),
                ..Default::default()
            },
            node_id: "web".into(),
            rejected_generation: 0,
            ..Default::default()
        };
        let volume = VolumeRecord {
            node_id: "data-1234".into(),
            ..Default::default()
        };
        let spec = node_vm_spec(&record, |_| Some(&volume), |_| None);
        assert_eq!((spec.id.as_str(), spec.generation), ("web", 4));
        assert_eq!(spec.power(), node::Power::On);
        let source = spec.disks[0].source.clone().unwrap();
        assert_eq!(source, node::disk_spec::Source::Volume("data-1234".into()));
    }

    #[test]
    fn volume_of_a_shared_pool_is_presented_with_the_number_of_its_owner() {
        let name = "projects/default/volumes/data";
        let mut record = VmRecord {
            placements: 7,
            vm: pb::Vm {
                spec: Some(pb::VmSpec {
                    disks: vec![pb::Disk {
                        source: Some(pb::disk::Source::Volume(name.into())),
                        ..Default::default()
                    }],
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        record.attachments.insert(name.into(), 3);
        let volume_in = |kind: Kind| VolumeRecord {
            volume: pb::Volume {
                name: name.into(),
                ..Default::default()
            },
            pool: Some(pb::PoolSpec { kind: Some(kind) }),
            ..Default::default()
        };
        let served = volume_in(Kind::Nbd(pb::NbdPool {
            address: "10.0.0.1:10809".into(),
            ..Default::default()
        }));
        let spec = node_vm_spec(&record, |_| Some(&served), |_| None);
        let nbd = spec.disks[0].nbd.clone().unwrap();
        assert_eq!((nbd.export.as_str(), nbd.generation), ("data", 3));
        assert_eq!(spec.disks[0].source, None);
        assert!(served.shared_status().fenced);
        let plain = volume_in(Kind::SharedDirectory(pb::SharedDirectory {
            path: "/srv/pool/".into(),
        }));
        let spec = node_vm_spec(&record, |_| Some(&plain), |_| None);
        let path = node::disk_spec::Source::Path("/srv/pool/data".into());
        assert_eq!(spec.disks[0].source, Some(path));
        assert!(!plain.shared_status().fenced);
        let own = VolumeRecord {
            node_id: "data".into(),
            ..Default::default()
        };
        let spec = node_vm_spec(&record, |_| Some(&own), |_| None);
        assert_eq!(spec.disks[0].generation, 3);
    }
}
