//! What was changed on the host and must be as before afterwards, in a file: also when the agent dies
//! meanwhile.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::process;
use crate::{process::Identity, record::save_json};

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Undo {
    /// A process was stopped.
    Continue(Identity),
    /// Its limit of open files was lowered.
    OpenFiles {
        process: Identity,
        soft: u64,
        hard: u64,
    },
    /// A cgroup was made.
    Cgroup(PathBuf),
    /// The wall clock was set.
    Clock { offset_ms: i64 },
}

/// All changes that hold.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    changes: Vec<Undo>,
}

impl Journal {
    /// What the file says; an unreadable one says nothing.
    pub(super) fn at(path: PathBuf) -> Self {
        let changes = fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self { path, changes }
    }

    /// Before the change is made.
    pub(super) fn note(&mut self, change: Undo) {
        self.changes.push(change);
        self.save();
    }

    /// Undoes one that was noted.
    pub(super) fn undo(&mut self, change: &Undo) {
        if let Err(error) = change.carry_out() {
            tracing::warn!("undoing a fault ({change:?}): {error}");
        }
        self.changes.retain(|other| other != change);
        self.save();
    }

    /// Undoes all, the last one first.
    pub(super) fn undo_all(&mut self) {
        while let Some(change) = self.changes.last().cloned() {
            tracing::info!("undoing a fault that an earlier agent left: {change:?}");
            self.undo(&change);
        }
    }

    fn save(&self) {
        let saved = match self.changes.is_empty() {
            true => remove(&self.path),
            false => save_json(&self.path, &self.changes).map_err(io::Error::other),
        };
        if let Err(error) = saved {
            tracing::warn!("keeping {}: {error}", self.path.display());
        }
    }
}

impl Undo {
    fn carry_out(&self) -> io::Result<()> {
        match self {
            Self::Continue(identity) => process::signal(*identity, Signal::SIGCONT),
            Self::OpenFiles {
                process: identity,
                soft,
                hard,
            } => process::limit_open_files(*identity, *soft, *hard).map(drop),
            Self::Cgroup(path) => process::leave_cgroup(path),
            Self::Clock { offset_ms } => process::step_clock(-offset_ms),
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
