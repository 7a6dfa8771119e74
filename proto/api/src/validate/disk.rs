//! Disks: how one is attached, and what is asked of one that is served.

use super::*;

/// Images of a chain, the top one not counted. Each costs a lookup for what is not above it.
pub const MAX_BACKING_IMAGES: usize = 64;
/// Coarsest unit in which writes are noted.
pub const MAX_BITMAP_GRANULARITY: u32 = 64 << 20;

/// Bits of `cpu_set_t`.
const MAX_CPUS: u32 = 1024;
/// Bytes of an NBD export's name (NBD protocol, "string").
const MAX_EXPORT_BYTES: usize = 4096;
const FORMATS: [&str; 2] = ["raw", "qcow2"];

pub(super) fn blk_config(found: &mut Violations, at: &str, blk: &device::BlkConfig) {
    match &blk.nbd {
        Some(source) => {
            nbd_source(found, &format!("{at}.nbd"), source);
            found.require(blk.image_fd.is_none(), &format!("{at}.image_fd"), || {
                "excludes nbd; give one of the two".into()
            });
        }
        None => token(found, &format!("{at}.image_fd"), blk.image_fd.as_ref()),
    }
    serial(found, &format!("{at}.serial"), &blk.serial);
    let queues = format!("{at}.num_queues");
    at_most(found, &queues, blk.num_queues, MAX_QUEUES);
    format_name(found, &format!("{at}.format"), &blk.format);
    backing(found, &format!("{at}.backing"), blk);
    if let Some(key) = &blk.key_fd {
        token(found, &format!("{at}.key_fd"), Some(key));
    }
    if let Some(limits) = &blk.limits {
        rate_limits(found, &format!("{at}.limits"), limits);
    }
    let block_size = format!("{at}.block_size");
    found.require(
        matches!(blk.block_size, 0 | 512 | 4096),
        &block_size,
        || format!("must be 512 or 4096, not {}", blk.block_size),
    );
    polling(found, &format!("{at}.polling"), blk.polling);
    for (index, &cpu) in blk.cpus.iter().enumerate() {
        at_most(found, &format!("{at}.cpus[{index}]"), cpu, MAX_CPUS - 1);
    }
}

fn backing(found: &mut Violations, at: &str, blk: &device::BlkConfig) {
    found.require(blk.backing.is_empty() || blk.format == "qcow2", at, || {
        "only a qcow2 image is based on others".into()
    });
    found.require(blk.backing.len() <= MAX_BACKING_IMAGES, at, || {
        format!(
            "has {} images; {MAX_BACKING_IMAGES} at most",
            blk.backing.len()
        )
    });
    for (index, image) in blk.backing.iter().take(MAX_BACKING_IMAGES).enumerate() {
        let at = format!("{at}[{index}]");
        token(found, &format!("{at}.image_fd"), image.image_fd.as_ref());
        format_name(found, &format!("{at}.format"), &image.format);
        no_control_characters(found, &format!("{at}.name"), &image.name);
    }
}

fn format_name(found: &mut Violations, field: &str, format: &str) {
    found.require(
        format.is_empty() || FORMATS.contains(&format),
        field,
        || format!("must be raw or qcow2, not {format:?}; convert other formats first"),
    );
}

fn nbd_source(found: &mut Violations, at: &str, source: &device::NbdSource) {
    found.require(!source.address.is_empty(), &format!("{at}.address"), || {
        "is missing: HOST:PORT or unix:PATH".into()
    });
    no_control_characters(found, &format!("{at}.address"), &source.address);
    no_control_characters(found, &format!("{at}.export"), &source.export);
    found.require(
        source.export.len() <= MAX_EXPORT_BYTES,
        &format!("{at}.export"),
        || format!("is longer than {MAX_EXPORT_BYTES} bytes"),
    );
    if let Some(tls) = &source.tls_fd {
        token(found, &format!("{at}.tls_fd"), Some(tls));
    }
}

pub(super) fn rate_limits(found: &mut Violations, at: &str, limits: &device::RateLimits) {
    for (direction, limit) in [("read", &limits.read), ("write", &limits.write)] {
        let Some(limit) = limit else { continue };
        let rates = [
            ("burst_ios", limit.burst_ios, "iops", limit.iops),
            (
                "burst_bytes",
                limit.burst_bytes,
                "bytes_per_second",
                limit.bytes_per_second,
            ),
        ];
        for (burst_name, burst, rate_name, rate) in rates {
            found.require(
                burst == 0 || rate > 0,
                &format!("{at}.{direction}.{burst_name}"),
                || format!("means nothing without {rate_name}"),
            );
        }
    }
}

fn polling(found: &mut Violations, field: &str, value: i32) {
    found.require(device::Polling::try_from(value).is_ok(), field, || {
        format!("unknown value {value}")
    });
}

/// Checks which disk is asked about: GetImage, ListBitmaps.
///
/// # Errors
/// As [`attach_request`].
pub fn disk_request(disk: &str) -> Result<(), Status> {
    one_id("id", disk)
}

/// Checks a disk's new size.
///
/// # Errors
/// As [`attach_request`].
pub fn resize_request(request: &device::ResizeRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    let bytes = request.capacity_bytes;
    found.require(
        bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES),
        "capacity_bytes",
        || format!("must be a multiple of {SECTOR_BYTES} above 0, not {bytes}"),
    );
    found.require(bytes <= MAX_VOLUME_BYTES, "capacity_bytes", || {
        "must be at most 1 PiB".into()
    });
    found.into_result()
}

/// Checks a disk's new limits.
///
/// # Errors
/// As [`attach_request`].
pub fn set_limits_request(request: &device::SetLimitsRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    match &request.limits {
        Some(limits) => rate_limits(&mut found, "limits", limits),
        None => found.add("limits", "is missing; limits of 0 lift all"),
    }
    found.into_result()
}

/// Checks how a disk's queues are to wait.
///
/// # Errors
/// As [`attach_request`].
pub fn set_polling_request(request: &device::SetPollingRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    polling(&mut found, "polling", request.polling);
    found.into_result()
}

/// Checks what a disk's writes are to go to.
///
/// # Errors
/// As [`attach_request`].
pub fn snapshot_request(request: &device::SnapshotRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    token(&mut found, "overlay_fd", request.overlay_fd.as_ref());
    no_control_characters(&mut found, "overlay_name", &request.overlay_name);
    found.into_result()
}

/// Checks a mirror that is to begin.
///
/// # Errors
/// As [`attach_request`].
pub fn start_mirror_request(request: &device::StartMirrorRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    id(&mut found, "job_id", &request.job_id);
    target(&mut found, request.target.as_ref());
    found.into_result()
}

/// Checks a backup that is to begin.
///
/// # Errors
/// As [`attach_request`].
pub fn start_backup_request(request: &device::StartBackupRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    id(&mut found, "job_id", &request.job_id);
    target(&mut found, request.target.as_ref());
    for (field, bitmap) in [
        ("bitmap", &request.bitmap),
        ("new_bitmap", &request.new_bitmap),
    ] {
        if !bitmap.is_empty() {
            id(&mut found, field, bitmap);
        }
    }
    found.require(
        request.bitmap.is_empty() || request.bitmap != request.new_bitmap,
        "new_bitmap",
        || "is the bitmap that says what to copy, which begins anew by itself".into(),
    );
    found.into_result()
}

fn target(found: &mut Violations, target: Option<&device::Target>) {
    let Some(target) = target else {
        return found.add("target", "is missing");
    };
    match &target.nbd {
        Some(source) => {
            nbd_source(found, "target.nbd", source);
            found.require(target.image_fd.is_none(), "target.image_fd", || {
                "excludes nbd; give one of the two".into()
            });
        }
        None => token(found, "target.image_fd", target.image_fd.as_ref()),
    }
    if target.key_fd.is_some() {
        token(found, "target.key_fd", target.key_fd.as_ref());
        found.require(
            target.nbd.is_none() && matches!(target.format.as_str(), "" | "raw"),
            "target.key_fd",
            || "is for a volume in a raw image; leave nbd out and let format be raw".into(),
        );
    }
    format_name(found, "target.format", &target.format);
    no_control_characters(found, "target.name", &target.name);
}

/// Checks which job is asked about or begun: commit, check, Get, Complete, Cancel.
///
/// # Errors
/// As [`attach_request`].
pub fn job_request(disk: &str, job: &str) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", disk);
    id(&mut found, "job_id", job);
    found.into_result()
}

/// Checks a bitmap that is to begin.
///
/// # Errors
/// As [`attach_request`].
pub fn create_bitmap_request(request: &device::CreateBitmapRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    id(&mut found, "bitmap", &request.bitmap);
    let bytes = request.granularity_bytes;
    let fits = bytes.is_power_of_two() && (4096..=MAX_BITMAP_GRANULARITY).contains(&bytes);
    found.require(bytes == 0 || fits, "granularity_bytes", || {
        format!("must be a power of two from 4096 to {MAX_BITMAP_GRANULARITY}, not {bytes}")
    });
    found.into_result()
}

/// Checks which bitmap is meant.
///
/// # Errors
/// As [`attach_request`].
pub fn bitmap_request(disk: &str, bitmap: &str) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", disk);
    id(&mut found, "bitmap", bitmap);
    found.into_result()
}
