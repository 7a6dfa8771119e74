//! What cloud-init in a guest configures itself from: a NoCloud seed, which is a small read-only disk
//! with the volume label `cidata`. It is made anew in the VM's run directory at each start and goes with
//! the run's other files; [`iso9660`] knows how it is laid out.

mod iso9660;

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use api::validate::SEED_DISK;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::spec::{Disk, DiskSource};

/// Of the file system; cloud-init looks for it.
const LABEL: &str = "cidata";

/// The files of a seed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CloudInit {
    user_data: Secret,
    meta_data: Secret,
    /// Empty for none.
    network_config: Secret,
}

/// Bytes that are not printed. In records they are base64.
#[derive(Clone, PartialEq, Eq)]
struct Secret(Vec<u8>);

impl CloudInit {
    /// Of a seed that `api::validate` accepted.
    pub(crate) fn from_api(api: &api::node::CloudInit) -> Self {
        Self {
            user_data: Secret(api.user_data.clone()),
            meta_data: Secret(api.meta_data.clone()),
            network_config: Secret(api.network_config.clone()),
        }
    }

    /// Makes the image in a VM's run directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        let mut files = vec![
            ("user-data", self.user_data.0.as_slice()),
            ("meta-data", &self.meta_data.0),
        ];
        if !self.network_config.0.is_empty() {
            files.push(("network-config", &self.network_config.0));
        }
        let mut image = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path(dir))?;
        image.write_all(&iso9660::image(LABEL, &files))
    }
}

/// Where a VM's seed is.
pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join("cidata.iso")
}

/// The disk that the guest finds it on.
pub(crate) fn disk(dir: &Path) -> Disk {
    Disk {
        name: SEED_DISK.to_owned(),
        source: DiskSource::Path(path(dir)),
        read_only: true,
        num_queues: 1,
        serial: String::new(),
        format: Default::default(),
        block_size: 0,
        cpus: Vec::new(),
        page_cache: false,
        slow_request_ms: 0,
        tuning: Default::default(),
        generation: 0,
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({} bytes)", self.0.len())
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD
            .decode(text)
            .map(Self)
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    pub(crate) fn example() -> CloudInit {
        CloudInit::from_api(&api::node::CloudInit {
            user_data: b"#cloud-config\npassword: sesame\n".to_vec(),
            meta_data: b"instance-id: i-1\nlocal-hostname: web\n".to_vec(),
            network_config: vec![0x1f, 0x8b, 0xff],
        })
    }

    #[test]
    fn content_is_in_records_but_not_in_print() {
        let seed = example();
        let json = serde_json::to_string(&seed).unwrap();
        assert_eq!(serde_json::from_str::<CloudInit>(&json).unwrap(), seed);
        assert!(!format!("{seed:?}").contains("sesame"), "{seed:?}");
    }

    #[test]
    fn image_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        example().write(dir.path()).unwrap();
        let metadata = std::fs::metadata(path(dir.path())).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(metadata.len().is_multiple_of(2048));
    }
}
