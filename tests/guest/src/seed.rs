//! What cloud-init finds: the NoCloud seed, a disk that is known by its label.

use std::fs;
use std::path::Path;
use std::time::Duration;

use guest::report::Report;
use nix::mount::{MsFlags, mount, umount};

use crate::system::wait_for;

const LABEL: &[u8] = b"cidata";
const MOUNT_POINT: &str = "/mnt";
/// Of ISO 9660's primary volume descriptor: its sector, and where it has the volume's identifier.
const DESCRIPTOR_AT: usize = 16 * 2048;
const IDENTIFIER_AT: usize = DESCRIPTOR_AT + 40;

/// Finds the seed by its label, as stock images do, mounts it and reads its files.
pub(crate) fn read() -> Report {
    let (files, error) = match try_read() {
        Ok(files) => (files, None),
        Err(error) => (Default::default(), Some(error)),
    };
    let [user_data, meta_data, network_config] = files;
    Report::Seed {
        user_data,
        meta_data,
        network_config,
        error,
    }
}

fn try_read() -> Result<[String; 3], String> {
    wait_for("a disk labelled cidata", Duration::from_secs(20), || {
        labelled().is_some()
    })?;
    let device = labelled().ok_or("the seed is gone again")?;
    mount(
        Some(device.as_str()),
        MOUNT_POINT,
        Some("iso9660"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .map_err(|error| format!("cannot mount {device}: {error}"))?;
    let files = ["user-data", "meta-data", "network-config"].map(|name| {
        fs::read_to_string(Path::new(MOUNT_POINT).join(name))
            .map_err(|error| format!("{name}: {error}"))
    });
    umount(MOUNT_POINT).map_err(|error| format!("unmount: {error}"))?;
    let [user_data, meta_data, network_config] = files;
    Ok([user_data?, meta_data?, network_config?])
}

fn labelled() -> Option<String> {
    let devices = fs::read_dir("/sys/block").ok()?;
    let mut names = devices
        .flatten()
        .filter_map(|device| device.file_name().into_string().ok());
    names
        .find(|name| name.starts_with("vd") && has_label(name))
        .map(|name| format!("/dev/{name}"))
}

fn has_label(name: &str) -> bool {
    use std::os::unix::fs::FileExt;
    let mut identifier = [0; LABEL.len()];
    let device = fs::File::open(format!("/dev/{name}"));
    device
        .and_then(|device| device.read_exact_at(&mut identifier, IDENTIFIER_AT as u64))
        .is_ok_and(|()| identifier.eq_ignore_ascii_case(LABEL))
}
