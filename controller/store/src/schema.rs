//! Which records the store holds: their schema's version, so that a program that is older than the
//! state refuses it and one that is newer brings it up to date.
//!
//! Changes that older programs do not notice (a new field whose absence means what was before) need no
//! new version. A change that they would undo or misread is a step here: it runs once, in the leader,
//! before that does anything else, and may be cut off at any point and run again.

use prost::Message;
use thiserror::Error;

use crate::backup::RESTORING_KEY;
use crate::{Item, SharedStore, StoreError, Transaction};

/// Where the version is kept.
pub const KEY: &str = "schema";
/// There once the state was moved to another store; its value says which.
pub const MOVED_KEY: &str = "moved-to";
/// The version this program writes: 1 was one host; since 2 VMs and volumes name theirs.
pub const CURRENT: u32 = 2;
/// The oldest programs that may use what this one writes, by the version they write.
const OLDEST_READER: u32 = 2;

#[derive(Clone, PartialEq, Message)]
struct SchemaRecord {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// Programs that write an older version than this one do not understand it.
    #[prost(uint32, tag = "2")]
    oldest_reader: u32,
    /// The program that wrote it.
    #[prost(string, tag = "3")]
    program: String,
}

/// Of what a store holds. A state of before versions were kept is 1, an empty one is this program's.
pub(crate) fn of(items: &[Item]) -> u32 {
    match items.iter().find(|item| item.key == KEY) {
        Some(item) => {
            SchemaRecord::decode(item.value.as_slice())
                .unwrap_or_default()
                .version
        }
        None if items.is_empty() => CURRENT,
        None => 1,
    }
}

/// Whether this program may serve from the store at all. Every replica asks when it starts.
///
/// # Errors
/// When the state is newer than the program, was moved away, or a restore was cut off.
pub async fn check_usable(store: &SharedStore) -> Result<(), SchemaError> {
    if let Some(item) = store.get(KEY).await? {
        let record = SchemaRecord::decode(item.value.as_slice()).unwrap_or_default();
        if record.oldest_reader > CURRENT {
            return Err(SchemaError::Newer {
                found: record.version,
                known: CURRENT,
                program: record.program,
            });
        }
    }
    if let Some(item) = store.get(MOVED_KEY).await? {
        let to = String::from_utf8_lossy(&item.value).into_owned();
        return Err(SchemaError::Moved { to });
    }
    if store.get(RESTORING_KEY).await?.is_some() {
        return Err(SchemaError::HalfRestored);
    }
    Ok(())
}

/// One step: brings the state from `from` to the next version.
#[tonic::async_trait]
pub trait Migration: Send + Sync {
    /// The version it begins with.
    fn from(&self) -> u32;
    /// Runs again where it was cut off.
    async fn run(&self, store: &SharedStore) -> Result<(), StoreError>;
}

/// Brings the state up to date. The leader does this first, with its fenced store.
///
/// # Errors
/// As for [`check_usable`], or when a step fails.
pub async fn bring_up_to_date(
    store: &SharedStore,
    steps: &[&dyn Migration],
) -> Result<(), SchemaError> {
    check_usable(store).await?;
    let kept = store.get(KEY).await?;
    let mut version = match &kept {
        Some(item) => {
            SchemaRecord::decode(item.value.as_slice())
                .unwrap_or_default()
                .version
        }
        // What a leader writes before it comes here is not state.
        None => 1,
    };
    if version >= CURRENT && kept.is_some() {
        return Ok(());
    }
    while version < CURRENT {
        if let Some(step) = steps.iter().find(|step| step.from() == version) {
            tracing::info!(from = version, "bringing the store's records up to date");
            step.run(store).await?;
        }
        version += 1;
        let record = SchemaRecord {
            version,
            oldest_reader: OLDEST_READER.min(version),
            program: env!("CARGO_PKG_VERSION").to_owned(),
        };
        store
            .commit(Transaction::new().put(KEY, record.encode_to_vec()))
            .await?;
    }
    Ok(())
}

/// Why the store's state cannot be used.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// A newer program wrote it.
    #[error(
        "the state was written by version {program} (schema {found}), and this program knows schemas up to {known}: use that version, or restore a backup into another store"
    )]
    Newer {
        /// Of the state.
        found: u32,
        /// Of this program.
        known: u32,
        /// Who wrote it.
        program: String,
    },
    /// It is elsewhere now.
    #[error("the state was moved to {to}: start the controller with that store")]
    Moved {
        /// Where it is.
        to: String,
    },
    /// A restore was cut off.
    #[error(
        "a restore of this state is under way or was cut off; wait for it, or run it again: vmctl restore FILE"
    )]
    HalfRestored,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests;
