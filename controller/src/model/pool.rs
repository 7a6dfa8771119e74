//! Pools as stored, and what of a volume depends on its pool.

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::names::{DEFAULT_PROJECT, Name};
use prost::Message;

use super::{VolumeRecord, prefix};

/// A pool as stored.
#[derive(Clone, PartialEq, Message)]
pub struct PoolRecord {
    /// What users see.
    #[prost(message, required, tag = "1")]
    pub pool: pb::Pool,
    /// No volume is to be made in it any more.
    #[prost(bool, tag = "2")]
    pub deleting: bool,
    /// Of the request that made it.
    #[prost(string, tag = "3")]
    pub request_id: String,
    /// Of that request, to tell a repetition from a clash.
    #[prost(bytes = "vec", tag = "4")]
    pub fingerprint: Vec<u8>,
}

/// A volume's place in a pool that hosts share, whichever volume that is. It stays when the volume goes:
/// the pool's server remembers how many owners there were.
#[derive(Clone, PartialEq, Message)]
pub struct ExportRecord {
    /// Name of the volume; empty: none is.
    #[prost(string, tag = "1")]
    pub volume: String,
    /// VMs that were started with it so far.
    #[prost(uint64, tag = "2")]
    pub owners: u64,
    /// Name of the last VM that was started to write to it.
    #[prost(string, tag = "3")]
    pub vm: String,
}

/// Key of a pool.
pub fn pool_key(id: &str) -> String {
    format!("{}{id}", prefix::POOLS)
}

/// Whether volumes of such a pool can be written by their latest owner alone.
pub fn is_fenced(kind: Option<&Kind>) -> bool {
    !matches!(kind, Some(Kind::SharedDirectory(_)))
}

impl VolumeRecord {
    /// Where it is, if not in a host's own pool.
    pub fn shared(&self) -> Option<&Kind> {
        match self.pool.as_ref()?.kind.as_ref()? {
            Kind::Local(_) => None,
            kind => Some(kind),
        }
    }

    /// What it is called in a pool that hosts share: projects do not share names.
    pub fn export(&self) -> String {
        let spec = self.volume.spec.as_ref();
        match spec.map(|spec| spec.export.as_str()).unwrap_or_default() {
            "" => match Name::parse_volume(&self.volume.name) {
                Ok(name) if name.project == DEFAULT_PROJECT => name.id,
                Ok(name) => format!("{}.{}", name.project, name.id),
                Err(_) => String::new(),
            },
            export => export.to_owned(),
        }
    }

    /// Key of its [`ExportRecord`], if it is in a pool that hosts share. Two pools may be one place.
    pub fn export_key(&self) -> Option<String> {
        let place = match self.shared()? {
            Kind::Nbd(nbd) => format!("nbd/{}", nbd.address),
            Kind::SharedDirectory(directory) => format!("file{}", directory.path),
            Kind::Local(_) => return None,
        };
        let place = place.trim_end_matches('/');
        Some(format!("exports/{place}/{}", self.export()))
    }

    /// Of a volume in a pool that hosts share: it is there, and nobody makes it.
    pub fn shared_status(&self) -> pb::VolumeStatus {
        let spec = self.volume.spec.clone().unwrap_or_default();
        let path = match self.shared() {
            Some(Kind::Nbd(nbd)) => format!("nbd://{}/{}", nbd.address, self.export()),
            Some(Kind::SharedDirectory(directory)) => file(directory, self),
            _ => String::new(),
        };
        pb::VolumeStatus {
            phase: pb::VolumePhase::Ready as i32,
            size_bytes: spec.size_bytes,
            format: "raw".to_owned(),
            path,
            fenced: is_fenced(self.shared()),
            ..Default::default()
        }
    }
}

/// Of a volume in a plain directory.
pub(super) fn file(directory: &pb::SharedDirectory, record: &VolumeRecord) -> String {
    format!(
        "{}/{}",
        directory.path.trim_end_matches('/'),
        record.export()
    )
}
