//! Disks of machines, in requests of the controller and of the node agent, and work on them.

use super::*;
use crate::{controller as pb, node};

/// CPUs that a disk's queues can be bound to; Linux itself stops at 8192.
const MAX_CPU: u32 = 8191;
const MAX_DISK_CPUS: usize = 64;
/// Names that an NBD server may give an export (the protocol's own limit).
const MAX_EXPORT_BYTES: usize = 4096;
/// So that a rate times a second, and bursts on top, cannot overflow.
const MAX_RATE: u64 = 1 << 50;

/// What requests of both levels say of a disk.
pub(super) struct DiskFields<'a> {
    has_path: bool,
    has_volume: bool,
    num_queues: u32,
    serial: &'a str,
    format: &'a str,
    /// iops, bytes_per_second, burst_ios and burst_bytes of reads, then of writes.
    limits: Option<[[u64; 4]; 2]>,
    block_size: u32,
    polling_is_known: bool,
    cpus: &'a [u32],
    nbd: Option<NbdFields<'a>>,
}

pub(super) struct NbdFields<'a> {
    address: &'a str,
    export: &'a str,
    tls_file: &'a str,
    tls_hostname: &'a str,
}

pub(super) fn node_disk(disk: &node::DiskSpec) -> DiskFields<'_> {
    use node::disk_spec::Source;
    let rate = |limit: &Option<node::RateLimit>| {
        let limit = limit.unwrap_or_default();
        [
            limit.iops,
            limit.bytes_per_second,
            limit.burst_ios,
            limit.burst_bytes,
        ]
    };
    DiskFields {
        has_path: matches!(disk.source, Some(Source::Path(_))),
        has_volume: matches!(disk.source, Some(Source::Volume(_))),
        num_queues: disk.num_queues,
        serial: &disk.serial,
        format: &disk.format,
        limits: disk
            .limits
            .as_ref()
            .map(|limits| [rate(&limits.read), rate(&limits.write)]),
        block_size: disk.block_size,
        polling_is_known: node::Polling::try_from(disk.polling).is_ok(),
        cpus: &disk.cpus,
        nbd: disk.nbd.as_ref().map(|nbd| NbdFields {
            address: &nbd.address,
            export: &nbd.export,
            tls_file: &nbd.tls_file,
            tls_hostname: &nbd.tls_hostname,
        }),
    }
}

pub(super) fn controller_disk(disk: &pb::Disk) -> DiskFields<'_> {
    use pb::disk::Source;
    DiskFields {
        has_path: matches!(disk.source, Some(Source::Path(_))),
        has_volume: matches!(disk.source, Some(Source::Volume(_))),
        num_queues: disk.num_queues,
        serial: &disk.serial,
        format: &disk.format,
        limits: disk.limits.as_ref().map(controller_limits),
        block_size: disk.block_size,
        polling_is_known: pb::Polling::try_from(disk.polling).is_ok(),
        cpus: &disk.cpus,
        nbd: disk.nbd.as_ref().map(|nbd| NbdFields {
            address: &nbd.address,
            export: &nbd.export,
            tls_file: &nbd.tls_file,
            tls_hostname: &nbd.tls_hostname,
        }),
    }
}

fn controller_limits(limits: &pb::RateLimits) -> [[u64; 4]; 2] {
    let rate = |limit: &Option<pb::RateLimit>| {
        let limit = limit.unwrap_or_default();
        [
            limit.iops,
            limit.bytes_per_second,
            limit.burst_ios,
            limit.burst_bytes,
        ]
    };
    [rate(&limits.read), rate(&limits.write)]
}

pub(super) fn disk_fields(found: &mut Violations, at: &str, disk: &DiskFields<'_>) {
    let sources =
        usize::from(disk.has_path) + usize::from(disk.has_volume) + usize::from(disk.nbd.is_some());
    found.require(sources == 1, at, || {
        "give one of path, volume and nbd".into()
    });
    at_most(
        found,
        &format!("{at}.num_queues"),
        disk.num_queues,
        MAX_QUEUES,
    );
    serial(found, &format!("{at}.serial"), disk.serial);
    image_format(found, &format!("{at}.format"), disk.format);
    found.require(
        disk.format.is_empty() || disk.has_path,
        &format!("{at}.format"),
        || "is for an image named by path; a volume knows its own".into(),
    );
    let block_size = disk.block_size;
    found.require(
        matches!(block_size, 0 | 512 | 4096),
        &format!("{at}.block_size"),
        || format!("must be 512 or 4096, not {block_size}"),
    );
    found.require(disk.polling_is_known, &format!("{at}.polling"), || {
        "is of an unknown kind".into()
    });
    let cpus = disk.cpus;
    found.require(
        cpus.len() <= MAX_DISK_CPUS && cpus.iter().all(|cpu| *cpu <= MAX_CPU),
        &format!("{at}.cpus"),
        || format!("must be at most {MAX_DISK_CPUS} numbers up to {MAX_CPU}"),
    );
    if let Some(limits) = &disk.limits {
        rate_limits(found, &format!("{at}.limits"), limits);
    }
    if let Some(nbd) = &disk.nbd {
        nbd_source(found, &format!("{at}.nbd"), nbd);
    }
}

fn rate_limits(found: &mut Violations, at: &str, limits: &[[u64; 4]; 2]) {
    for (direction, rate) in ["read", "write"].into_iter().zip(limits) {
        let [iops, bytes, burst_ios, burst_bytes] = *rate;
        for (name, value) in [
            ("iops", iops),
            ("bytes_per_second", bytes),
            ("burst_ios", burst_ios),
            ("burst_bytes", burst_bytes),
        ] {
            found.require(
                value <= MAX_RATE,
                &format!("{at}.{direction}.{name}"),
                || format!("must be at most {MAX_RATE}, not {value}"),
            );
        }
        found.require(
            (burst_ios == 0 || iops > 0) && (burst_bytes == 0 || bytes > 0),
            &format!("{at}.{direction}"),
            || "has a burst without the limit that it is for".into(),
        );
    }
}

fn nbd_source(found: &mut Violations, at: &str, nbd: &NbdFields<'_>) {
    let is_address = match nbd.address.strip_prefix("unix:") {
        Some(path) => path.starts_with('/'),
        None => nbd
            .address
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()),
    };
    let field = format!("{at}.address");
    found.require(is_address, &field, || {
        format!("{:?} must be HOST:PORT or unix:/PATH", nbd.address)
    });
    no_control_characters(found, &field, nbd.address);
    found.require(
        nbd.export.len() <= MAX_EXPORT_BYTES,
        &format!("{at}.export"),
        || format!("is longer than {MAX_EXPORT_BYTES} bytes"),
    );
    no_control_characters(found, &format!("{at}.export"), nbd.export);
    if !nbd.tls_file.is_empty() {
        absolute(found, &format!("{at}.tls_file"), nbd.tls_file);
    }
    no_control_characters(found, &format!("{at}.tls_hostname"), nbd.tls_hostname);
}

pub(super) fn image_format(found: &mut Violations, field: &str, format: &str) {
    found.require(matches!(format, "" | "raw" | "qcow2"), field, || {
        format!("{format:?} must be raw or qcow2")
    });
}

/// The figures of a disk that can be changed while its VM runs, by the paths of update masks.
pub const DISK_MASK: &[&str] = &[
    "spec.limits",
    "spec.limits.read",
    "spec.limits.read.iops",
    "spec.limits.read.bytes_per_second",
    "spec.limits.read.burst_ios",
    "spec.limits.read.burst_bytes",
    "spec.limits.write",
    "spec.limits.write.iops",
    "spec.limits.write.bytes_per_second",
    "spec.limits.write.burst_ios",
    "spec.limits.write.burst_bytes",
    "spec.polling",
];

/// Checks a change of a disk, and parses its name: the VM and the disk.
///
/// # Errors
/// As [`attach_request`].
pub fn update_disk_request(
    request: &pb::UpdateDiskRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let disk = request.disk.clone().unwrap_or_default();
    let paths = request
        .update_mask
        .as_ref()
        .map(|mask| mask.paths.as_slice())
        .unwrap_or_default();
    found.require(!paths.is_empty(), "update_mask", || {
        format!("is empty; name what is to change: {}", DISK_MASK.join(", "))
    });
    for path in paths {
        found.require(DISK_MASK.contains(&path.as_str()), "update_mask", || {
            format!(
                "{path:?} cannot be changed; these can: {}",
                DISK_MASK.join(", ")
            )
        });
    }
    let spec = disk.spec.unwrap_or_default();
    found.require(
        pb::Polling::try_from(spec.polling).is_ok(),
        "disk.spec.polling",
        || "is of an unknown kind".into(),
    );
    disk_name(found, "disk.name", &disk.name)
}

/// Checks limits as they come out of a change.
///
/// # Errors
/// As [`attach_request`].
pub fn disk_limits(limits: &pb::RateLimits) -> Result<(), Status> {
    let mut found = Violations::new();
    rate_limits(&mut found, "disk.spec.limits", &controller_limits(limits));
    found.into_result()
}

/// Checks the fields that requests about a disk share, and parses its name: the VM and the disk.
///
/// # Errors
/// As [`attach_request`].
pub fn vm_disk_request(name: &str, request: &str) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, request);
    disk_name(found, "name", name)
}

/// Checks a snapshot that is to be made.
///
/// # Errors
/// As [`attach_request`].
pub fn snapshot_disk_request(
    request: &pb::SnapshotDiskRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    id(&mut found, "snapshot_id", &request.snapshot_id);
    disk_name(found, "name", &request.name)
}

/// Checks a mirror that is to be begun.
///
/// # Errors
/// As [`attach_request`].
pub fn mirror_disk_request(
    request: &pb::MirrorDiskRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    image_format(&mut found, "format", &request.format);
    if !request.path.is_empty() {
        absolute(&mut found, "path", &request.path);
    }
    disk_name(found, "name", &request.name)
}

/// Checks a backup that is to be begun.
///
/// # Errors
/// As [`attach_request`].
pub fn backup_disk_request(
    request: &pb::BackupDiskRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    backup(
        &mut found,
        &request.path,
        &request.format,
        &request.bitmap,
        &request.new_bitmap,
    );
    disk_name(found, "name", &request.name)
}

fn backup(found: &mut Violations, path: &str, format: &str, bitmap: &str, new_bitmap: &str) {
    absolute(found, "path", path);
    image_format(found, "format", format);
    for (field, name) in [("bitmap", bitmap), ("new_bitmap", new_bitmap)] {
        if !name.is_empty() {
            id(found, field, name);
        }
    }
}

/// Checks work that a host is asked to begin.
///
/// # Errors
/// As [`attach_request`].
pub fn start_job_request(request: &node::StartJobRequest) -> Result<(), Status> {
    use node::start_job_request::Work;
    let mut found = Violations::new();
    let job = &request.job_id;
    // What is put in front of it at the daemon has room.
    let fits = (1..=names::MAX_ID_BYTES - 4).contains(&job.len())
        && job
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    found.require(fits, "job_id", || {
        format!("{job:?} must be 1 to 59 of a-z, 0-9 and hyphen")
    });
    match &request.work {
        Some(Work::Resize(work)) => {
            id(&mut found, "resize.volume", &work.volume);
            volume_size(&mut found, "resize.size_bytes", work.size_bytes);
            found.require(work.size_bytes > 0, "resize.size_bytes", || {
                "is missing".into()
            });
        }
        Some(Work::Snapshot(work)) => {
            id(&mut found, "snapshot.volume", &work.volume);
            id(&mut found, "snapshot.snapshot", &work.snapshot);
        }
        Some(Work::Mirror(work)) => {
            id(&mut found, "mirror.volume", &work.volume);
            image_format(&mut found, "mirror.format", &work.format);
            if !work.path.is_empty() {
                absolute(&mut found, "mirror.path", &work.path);
            }
        }
        Some(Work::Backup(work)) => {
            id(&mut found, "backup.vm_id", &work.vm_id);
            id(&mut found, "backup.disk", &work.disk);
            backup(
                &mut found,
                &work.path,
                &work.format,
                &work.bitmap,
                &work.new_bitmap,
            );
        }
        Some(Work::Commit(work)) => id(&mut found, "commit.volume", &work.volume),
        Some(Work::Check(work)) => id(&mut found, "check.volume", &work.volume),
        Some(Work::Upgrade(work)) => super::upgrades::upgrade_daemons(&mut found, work),
        None => found.add("work", "is missing"),
    }
    found.into_result()
}

fn disk_name(
    mut found: Violations,
    field: &str,
    name: &str,
) -> Result<(names::Name, String), Status> {
    match names::Name::parse_disk(name) {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add(field, error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}
