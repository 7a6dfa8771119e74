//! The host as a router, for NAT networks and no longer than there are some. Only the interfaces that
//! need it pass packets on; what they were before is kept in a file and comes back with the end of
//! the last network that needs them.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
};

use prost::Message;

use super::{error::NetworkError, record, sysctl};

/// See the module.
pub(super) struct Forwarding {
    file: PathBuf,
    kept: Mutex<Kept>,
}

/// What the file holds.
#[derive(Clone, PartialEq, Message)]
struct Kept {
    /// Networks that need it.
    #[prost(string, repeated, tag = "1")]
    networks: Vec<String>,
    /// What was changed.
    #[prost(message, repeated, tag = "2")]
    changes: Vec<Change>,
}

#[derive(Clone, PartialEq, Message)]
struct Change {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(string, tag = "2")]
    before: String,
}

impl Forwarding {
    /// Reads what an earlier agent changed.
    pub(super) fn open(state_dir: &Path) -> Result<Self, NetworkError> {
        let file = state_dir.join("forwarding");
        let kept = match std::fs::read(&file) {
            Ok(bytes) => Kept::decode(bytes.as_slice()).unwrap_or_default(),
            Err(_) => Kept::default(),
        };
        Ok(Self {
            file,
            kept: Mutex::new(kept),
        })
    }

    /// Lets packets pass between `bridge` and `uplinks` as long as `id` needs it.
    pub(super) fn hold(
        &self,
        id: &str,
        bridge: &str,
        uplinks: &[String],
        has_ipv6: bool,
    ) -> Result<(), NetworkError> {
        let mut kept = self.kept.lock().expect("nothing panics under this lock");
        if !kept.networks.iter().any(|network| network == id) {
            kept.networks.push(id.to_owned());
        }
        for uplink in uplinks {
            self.change(
                id,
                &mut kept,
                &sysctl::path("ipv4", uplink, "forwarding"),
                "1",
            )?;
        }
        if has_ipv6 {
            self.forward_ipv6(id, &mut kept, bridge, uplinks)?;
        }
        record::write(&self.file, &*kept)
    }

    /// Takes back what was changed if no other network needs it.
    pub(super) fn release(&self, id: &str) -> Result<(), NetworkError> {
        let mut kept = self.kept.lock().expect("nothing panics under this lock");
        if !kept.networks.iter().any(|network| network == id) {
            return Ok(());
        }
        kept.networks.retain(|network| network != id);
        if kept.networks.is_empty() {
            for change in std::mem::take(&mut kept.changes).into_iter().rev() {
                // An interface that is gone has no setting to mend.
                sysctl::set(id, Path::new(&change.path), &change.before)?;
            }
        }
        record::write(&self.file, &*kept)
    }

    /// Since Linux 6.17 single interfaces can be told to; before that it is all or nothing, and hosts
    /// that forward take no router advertisements unless told to.
    fn forward_ipv6(
        &self,
        id: &str,
        kept: &mut Kept,
        bridge: &str,
        uplinks: &[String],
    ) -> Result<(), NetworkError> {
        let force = sysctl::path("ipv6", bridge, "force_forwarding");
        if force.exists() {
            sysctl::set(id, &force, "1")?;
            for uplink in uplinks {
                let path = sysctl::path("ipv6", uplink, "force_forwarding");
                self.change(id, kept, &path, "1")?;
            }
        } else {
            for uplink in uplinks {
                let path = sysctl::path("ipv6", uplink, "accept_ra");
                let takes = std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1");
                if takes {
                    self.change(id, kept, &path, "2")?;
                }
            }
            let all = sysctl::path("ipv6", "all", "forwarding");
            self.change(id, kept, &all, "1")?;
        }
        // The bridge says in neighbour advertisements that it is a router.
        sysctl::set(id, &sysctl::path("ipv6", bridge, "forwarding"), "1").map(drop)
    }

    /// Changes are kept before they are made, so that an end of the agent between loses none.
    fn change(
        &self,
        id: &str,
        kept: &mut Kept,
        path: &Path,
        value: &str,
    ) -> Result<(), NetworkError> {
        let Ok(before) = std::fs::read_to_string(path) else {
            return Ok(());
        };
        let name = path.display().to_string();
        let before = before.trim();
        if before != value && !kept.changes.iter().any(|change| change.path == name) {
            kept.changes.push(Change {
                path: name,
                before: before.to_owned(),
            });
            record::write(&self.file, &*kept)?;
        }
        sysctl::set(id, path, value).map(drop)
    }
}
