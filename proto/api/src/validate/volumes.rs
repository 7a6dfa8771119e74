//! Volumes and uploads, in requests of the controller and of the node agent.

use super::vm_disks::image_format;
use super::*;
use crate::{controller as pb, node};

/// Passphrases longer than this are no passphrases.
pub const MAX_KEY_BYTES: usize = 65536;
/// Data in one message of an upload.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;
/// Files of one upload: a VMDK of 2 TiB in extents of 2 GiB has 1024.
pub const MAX_UPLOAD_FILES: usize = 1100;
/// NAME_MAX
const MAX_FILE_NAME_BYTES: usize = 255;
const CLUSTER_BYTES: std::ops::RangeInclusive<u32> = 512..=2 << 20;
const SHA256_BYTES: usize = 32;

/// What requests of both levels say of a volume.
struct VolumeFields<'a> {
    size_bytes: u64,
    source_path: &'a str,
    format: &'a str,
    preallocated: bool,
    cluster_bytes: u32,
    has_base: bool,
    base_snapshot: &'a str,
    encrypted: bool,
    import: Option<ImportFields<'a>>,
}

struct ImportFields<'a> {
    format: &'a str,
    file: &'a str,
    sha256: &'a [Vec<u8>],
}

/// Checks the volume that a host is asked to make.
///
/// # Errors
/// As [`attach_request`].
pub fn node_create_volume_request(request: &node::CreateVolumeRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    if !request.base.is_empty() {
        id(&mut found, "base", &request.base);
    }
    if let Some(import) = &request.import {
        id(&mut found, "import.upload", &import.upload);
    }
    let fields = VolumeFields {
        size_bytes: request.size_bytes,
        source_path: &request.source_path,
        format: &request.format,
        preallocated: request.preallocate
            || !matches!(
                request.preallocation(),
                node::Preallocation::Unspecified | node::Preallocation::Off
            ),
        cluster_bytes: request.cluster_bytes,
        has_base: !request.base.is_empty(),
        base_snapshot: &request.base_snapshot,
        encrypted: request.encrypted,
        import: request.import.as_ref().map(|import| ImportFields {
            format: &import.format,
            file: &import.file,
            sha256: &import.sha256,
        }),
    };
    volume_fields(&mut found, "", &fields);
    let known = node::Preallocation::try_from(request.preallocation).is_ok();
    found.require(known, "preallocation", || "is of an unknown kind".into());
    found.into_result()
}

/// Checks a volume that is to be created.
///
/// # Errors
/// As [`attach_request`].
pub fn create_volume_request(request: &pb::CreateVolumeRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "volume_id", &request.volume_id);
    request_id(&mut found, &request.request_id);
    key(&mut found, &request.key);
    let Some(spec) = request
        .volume
        .as_ref()
        .and_then(|volume| volume.spec.as_ref())
    else {
        found.add("volume.spec", "is missing");
        return found.into_result();
    };
    placement::host(&mut found, "volume.spec.host", &spec.host);
    super::pools::of_volume(&mut found, spec, &request.parent);
    let at = "volume.spec.";
    let of_this_project = |name: Result<names::Name, names::NameError>| match name {
        Ok(name) if request.parent == format!("projects/{}", name.project) => None,
        Ok(_) => Some("belongs to another project".to_owned()),
        Err(error) => Some(error.to_string()),
    };
    if !spec.base.is_empty()
        && let Some(problem) = of_this_project(names::Name::parse_volume(&spec.base))
    {
        found.add(format!("{at}base"), problem);
    }
    if let Some(import) = &spec.import
        && let Some(problem) = of_this_project(names::Name::parse_upload(&import.upload))
    {
        found.add(format!("{at}import.upload"), problem);
    }
    let fields = VolumeFields {
        size_bytes: spec.size_bytes,
        source_path: &spec.source_path,
        format: &spec.format,
        preallocated: spec.preallocate
            || !matches!(
                spec.preallocation(),
                pb::Preallocation::Unspecified | pb::Preallocation::Off
            ),
        cluster_bytes: spec.cluster_bytes,
        has_base: !spec.base.is_empty(),
        base_snapshot: &spec.base_snapshot,
        encrypted: spec.encrypted,
        import: spec.import.as_ref().map(|import| ImportFields {
            format: &import.format,
            file: &import.file,
            sha256: &import.sha256,
        }),
    };
    volume_fields(&mut found, at, &fields);
    let known = pb::Preallocation::try_from(spec.preallocation).is_ok();
    found.require(known, &format!("{at}preallocation"), || {
        "is of an unknown kind".into()
    });
    found.require(request.key.is_empty() || spec.encrypted, "key", || {
        "is for encrypted volumes".into()
    });
    found.into_result()
}

fn volume_fields(found: &mut Violations, at: &str, volume: &VolumeFields<'_>) {
    let size = format!("{at}size_bytes");
    volume_size(found, &size, volume.size_bytes);
    let sources = [
        !volume.source_path.is_empty(),
        volume.has_base,
        volume.import.is_some(),
    ];
    let sources = sources.into_iter().filter(|source| *source).count();
    found.require(sources <= 1, at.trim_end_matches('.'), || {
        "give one of source_path, base and import".into()
    });
    found.require(sources > 0 || volume.size_bytes > 0, &size, || {
        "is missing; only a source can tell it".into()
    });
    if !volume.source_path.is_empty() {
        absolute(found, &format!("{at}source_path"), volume.source_path);
        found.require(
            volume.format != "qcow2" && !volume.encrypted,
            &format!("{at}source_path"),
            || "is copied as it is into a raw volume; import it into other kinds".into(),
        );
    }
    image_format(found, &format!("{at}format"), volume.format);
    let cluster = volume.cluster_bytes;
    let is_qcow2 = volume.format == "qcow2" || volume.has_base;
    found.require(
        cluster == 0 || (is_qcow2 && cluster.is_power_of_two() && CLUSTER_BYTES.contains(&cluster)),
        &format!("{at}cluster_bytes"),
        || "must be a power of two from 512 to 2097152, and is for qcow2 only".into(),
    );
    if volume.has_base {
        found.require(
            volume.format != "raw" && !volume.preallocated && !volume.encrypted,
            &format!("{at}base"),
            || "makes a qcow2 overlay, which is neither raw, preallocated nor encrypted".into(),
        );
    }
    if !volume.base_snapshot.is_empty() {
        id(found, &format!("{at}base_snapshot"), volume.base_snapshot);
        found.require(volume.has_base, &format!("{at}base_snapshot"), || {
            "is of a base, which is missing".into()
        });
    }
    found.require(
        !volume.encrypted || (volume.format != "qcow2" && volume.import.is_none()),
        &format!("{at}encrypted"),
        || "is for raw volumes that are not imported".into(),
    );
    if let Some(import) = &volume.import {
        import_source(found, &format!("{at}import"), import);
    }
}

fn import_source(found: &mut Violations, at: &str, import: &ImportFields<'_>) {
    let format = import.format;
    let known = ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi", "parallels"];
    found.require(known.contains(&format), &format!("{at}.format"), || {
        format!("{format:?} must be one of {}", known.join(", "))
    });
    file_name(found, &format!("{at}.file"), import.file);
    let sums = import.sha256;
    found.require(
        (1..=MAX_UPLOAD_FILES).contains(&sums.len())
            && sums.iter().all(|sum| sum.len() == SHA256_BYTES),
        &format!("{at}.sha256"),
        || format!("must have {SHA256_BYTES} bytes for each file of the upload"),
    );
}

pub(super) fn volume_size(found: &mut Violations, field: &str, size_bytes: u64) {
    found.require(size_bytes.is_multiple_of(SECTOR_BYTES), field, || {
        format!("must be a multiple of {SECTOR_BYTES}, not {size_bytes}")
    });
    found.require(size_bytes <= MAX_VOLUME_BYTES, field, || {
        "must be at most 1 PiB".into()
    });
}

/// Checks a change of a volume, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn update_volume_request(request: &pb::UpdateVolumeRequest) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let paths = request
        .update_mask
        .as_ref()
        .map(|mask| mask.paths.as_slice());
    found.require(
        paths.is_some_and(|paths| paths == ["spec.size_bytes"]),
        "update_mask",
        || "must be spec.size_bytes; nothing else of a volume can be changed".into(),
    );
    let volume = request.volume.clone().unwrap_or_default();
    let size_bytes = volume.spec.unwrap_or_default().size_bytes;
    volume_size(&mut found, "volume.spec.size_bytes", size_bytes);
    found.require(size_bytes > 0, "volume.spec.size_bytes", || {
        "is missing".into()
    });
    match names::Name::parse_volume(&volume.name) {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add("volume.name", error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

/// Checks a key for a volume, and parses the volume's name.
///
/// # Errors
/// As [`attach_request`].
pub fn set_volume_key_request(request: &pb::SetVolumeKeyRequest) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    key(&mut found, &request.key);
    resource(found, names::Name::parse_volume(&request.name))
}

/// Checks a key for a host's volume.
///
/// # Errors
/// As [`attach_request`].
pub fn node_set_volume_key_request(request: &node::SetVolumeKeyRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    key(&mut found, &request.key);
    found.into_result()
}

fn key(found: &mut Violations, key: &[u8]) {
    found.require(key.len() <= MAX_KEY_BYTES, "key", || {
        format!("has {} bytes, at most {MAX_KEY_BYTES} can be", key.len())
    });
}

/// Checks an upload that is to be begun, and gives its name.
///
/// # Errors
/// As [`attach_request`].
pub fn create_upload_request(request: &pb::CreateUploadRequest) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "upload_id", &request.upload_id);
    placement::host(&mut found, "host", &request.host);
    upload_files(
        &mut found,
        request
            .files
            .iter()
            .map(|file| (file.name.as_str(), file.size_bytes)),
    );
    found.into_result()?;
    let project = request.parent.trim_start_matches("projects/");
    Ok(names::Name::upload(project, &request.upload_id))
}

/// Checks an upload that a host is to take.
///
/// # Errors
/// As [`attach_request`].
pub fn node_create_upload_request(request: &node::CreateUploadRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    upload_files(
        &mut found,
        request
            .files
            .iter()
            .map(|file| (file.name.as_str(), file.size_bytes)),
    );
    found.into_result()
}

/// Parses the name of an upload.
///
/// # Errors
/// As [`attach_request`].
pub fn upload_request(name: &str) -> Result<names::Name, Status> {
    resource(Violations::new(), names::Name::parse_upload(name))
}

fn upload_files<'a>(found: &mut Violations, files: impl Iterator<Item = (&'a str, u64)>) {
    let mut seen = std::collections::HashSet::new();
    let mut count = 0;
    for (name, size_bytes) in files.take(MAX_UPLOAD_FILES + 1) {
        let at = format!("files[{count}]");
        file_name(found, &format!("{at}.name"), name);
        found.require(seen.insert(name), &format!("{at}.name"), || {
            format!("{name:?} is the name of another file of this upload")
        });
        found.require(
            (1..=MAX_VOLUME_BYTES).contains(&size_bytes),
            &format!("{at}.size_bytes"),
            || format!("must be 1 byte to 1 PiB, not {size_bytes}"),
        );
        count += 1;
    }
    found.require((1..=MAX_UPLOAD_FILES).contains(&count), "files", || {
        format!("must be 1 to {MAX_UPLOAD_FILES}")
    });
}

/// A name without a path, as it is made in a directory of the host. A leading dot or hyphen would
/// make it hidden or an option.
fn file_name(found: &mut Violations, field: &str, name: &str) {
    let fits = (1..=MAX_FILE_NAME_BYTES).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && !name.contains(['/', '\\', ',', ':'])
        && !name.contains(|c: char| c.is_control());
    found.require(fits, field, || {
        format!(
            "{name:?} must be a plain file name of at most {MAX_FILE_NAME_BYTES} bytes, without / \\ , and : and not beginning with . or -"
        )
    });
}
