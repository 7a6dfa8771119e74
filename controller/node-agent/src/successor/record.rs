//! What the processes of an exchange leave for one another: STATE_DIR/agent-upgrade.json.

use std::path::{Path, PathBuf};

use api::node::{AgentUpgrade, AgentUpgradeState};
use serde::{Deserialize, Serialize};

use super::check::Stamp;
use crate::record::{RecordError, load_json, save_json};

/// Of the file.
pub(crate) const VERSION: u32 = 1;
const FILE: &str = "agent-upgrade.json";

/// How far it is, as far as the file knows: which process serves is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Begun and not over.
    Exchanging,
    /// The new one stays.
    Done,
    /// The old one is back.
    RolledBack,
}

/// The last exchange of this host's agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Exchange {
    /// [`VERSION`].
    pub(crate) version: u32,
    /// Who asked knows it by this.
    pub(crate) upgrade_id: String,
    /// The new program.
    pub(crate) binary: PathBuf,
    /// Which file that was when it was checked.
    pub(crate) stamp: Stamp,
    /// The directory of the other programs, which stays what it was.
    pub(crate) bin_dir: PathBuf,
    /// Of the old program.
    pub(crate) from_version: String,
    /// Of the new one.
    pub(crate) to_version: String,
    /// Of the new one.
    pub(crate) protocol: u32,
    /// From the new agent's start.
    pub(crate) confirm_within_ms: u64,
    /// How far it is.
    pub(crate) phase: Phase,
    /// Why it was rolled back.
    pub(crate) error: String,
}

impl Exchange {
    /// The one that there was last, if there was any.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn load(state_dir: &Path) -> Result<Option<Self>, RecordError> {
        let path = state_dir.join(FILE);
        match path.exists() {
            true => load_json(&path, VERSION).map(Some),
            false => Ok(None),
        }
    }

    /// On return it is durable.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn save(&self, state_dir: &Path) -> Result<(), RecordError> {
        save_json(&state_dir.join(FILE), self)
    }

    /// What the API says of it.
    pub(crate) fn status(&self) -> AgentUpgrade {
        let state = match self.phase {
            Phase::Exchanging => AgentUpgradeState::Exchanging,
            Phase::Done => AgentUpgradeState::Done,
            Phase::RolledBack => AgentUpgradeState::RolledBack,
        };
        AgentUpgrade {
            upgrade_id: self.upgrade_id.clone(),
            state: state.into(),
            binary: self.binary.display().to_string(),
            from_version: self.from_version.clone(),
            to_version: self.to_version.clone(),
            protocol: self.protocol,
            error: self.error.clone(),
            ..Default::default()
        }
    }
}
