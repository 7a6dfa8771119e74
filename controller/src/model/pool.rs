//! Pools as stored, and what of a volume depends on its pool.

use api::controller as pb;
use api::controller::pool_spec::Kind;
use api::names::Name;
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

    /// What it is called in a pool that hosts share.
    pub fn export(&self) -> String {
        let spec = self.volume.spec.as_ref();
        match spec.map(|spec| spec.export.as_str()).unwrap_or_default() {
            "" => {
                Name::parse_volume(&self.volume.name).map_or_else(|_| String::new(), |name| name.id)
            }
            export => export.to_owned(),
        }
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
