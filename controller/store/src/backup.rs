//! The whole state as one file, and back. Also the way from one kind of store to another.
//!
//! ```text
//! MORTISE-STATE 1\n                       the format's version
//! Frame { header }                        what it is of; each frame preceded by its length (u32, LE)
//! Frame { entry } ...                     key and value, in the order of keys
//! Frame { end }                           how many, and SHA-256 of all bytes before this frame
//! ```
//!
//! A restore reads and checks everything before it writes anything. While it writes, the key
//! [`RESTORING_KEY`] is there, and no controller leads.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::leader::{self, EPOCH_BASE_KEY};
use crate::schema;
use crate::{
    FencedStore, LeaseId, Listing, Range, SharedStore, Store as _, StoreError, Transaction, Write,
};

/// There while a restore is under way, or was cut off.
pub const RESTORING_KEY: &str = "restoring";

const MAGIC: &[u8] = b"MORTISE-STATE 1\n";
const MAGIC_STEM: &[u8] = b"MORTISE-STATE ";
/// A value of etcd's largest request, and its key.
const MAX_FRAME_BYTES: usize = 16 << 20;
/// Writes of one transaction; etcd takes 128.
const BATCH_LEN: usize = 100;
/// Bytes of one transaction; etcd takes 1.5 MiB.
const BATCH_BYTES: usize = 1 << 20;
/// How long the lease of a restore lasts.
const LEASE: Duration = Duration::from_secs(30);

#[derive(Clone, PartialEq, Message)]
struct Frame {
    #[prost(oneof = "Part", tags = "1, 2, 3")]
    part: Option<Part>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Part {
    #[prost(message, tag = "1")]
    Header(Header),
    #[prost(message, tag = "2")]
    Entry(Entry),
    #[prost(message, tag = "3")]
    End(End),
}

/// What a backup is of.
#[derive(Clone, PartialEq, Message)]
pub struct Header {
    /// When it was made.
    #[prost(message, optional, tag = "1")]
    pub time: Option<prost_types::Timestamp>,
    /// The version of the program that made it.
    #[prost(string, tag = "2")]
    pub version: String,
    /// The store's revision; everything is as of it.
    #[prost(uint64, tag = "3")]
    pub revision: u64,
    /// Epochs of the store were its revisions and this.
    #[prost(uint64, tag = "4")]
    pub epoch_base: u64,
    /// Its schema.
    #[prost(uint32, tag = "5")]
    pub schema: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct End {
    #[prost(uint64, tag = "1")]
    entries: u64,
    #[prost(bytes = "vec", tag = "2")]
    sha256: Vec<u8>,
}

/// What controllers write by themselves before anybody asked for anything.
const UNASKED: &[&str] = &["audit/", "events/", "hosts/", "reservations/"];

/// What belongs to a running fleet and not to its state.
fn is_transient(key: &str) -> bool {
    [leader::KEY, EPOCH_BASE_KEY, RESTORING_KEY].contains(&key)
}

/// The state as of one revision, in pieces to be sent one after the other.
///
/// # Errors
/// When the store fails.
pub async fn take(
    store: &SharedStore,
) -> Result<impl Iterator<Item = Vec<u8>> + use<>, StoreError> {
    let epoch_base = leader::epoch_base(store).await?;
    let Listing {
        items, revision, ..
    } = store.list(Range::all("")).await?;
    let header = Header {
        time: Some(SystemTime::now().into()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision,
        epoch_base,
        schema: schema::of(&items),
    };
    let kept = items.into_iter().filter(|item| !is_transient(&item.key));
    let entries = kept.map(|item| {
        Part::Entry(Entry {
            key: item.key,
            value: item.value,
        })
    });
    let mut parts = std::iter::once(Part::Header(header)).chain(entries);
    let mut digest = Sha256::new();
    digest.update(MAGIC);
    let mut begin = Some(MAGIC.to_vec());
    let (mut count, mut ended) = (0_u64, false);
    Ok(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let mut piece = begin.take().unwrap_or_default();
        while piece.len() < BATCH_BYTES {
            let Some(part) = parts.next() else {
                ended = true;
                let end = End {
                    // The header is none.
                    entries: count - 1,
                    sha256: digest.clone().finalize().to_vec(),
                };
                piece.extend(encode(Part::End(end)));
                break;
            };
            count += 1;
            let frame = encode(part);
            digest.update(&frame);
            piece.extend(frame);
        }
        Some(piece)
    }))
}

fn encode(part: Part) -> Vec<u8> {
    let frame = Frame { part: Some(part) };
    let mut bytes = (frame.encoded_len() as u32).to_le_bytes().to_vec();
    bytes.extend(frame.encode_to_vec());
    bytes
}

/// A backup that is being read; what comes out has been checked as a whole.
#[derive(Default)]
pub struct Reader {
    pending: Vec<u8>,
    begun: bool,
    digest: Sha256,
    header: Option<Header>,
    entries: Vec<Entry>,
    ended: bool,
}

/// A backup, read whole.
pub struct Backup {
    /// What it is of.
    pub header: Header,
    entries: Vec<Entry>,
}

impl Backup {
    /// How many keys it has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The store was empty.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Reader {
    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// When they are not those of a backup, or of a newer program's.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.pending.extend_from_slice(bytes);
        let mut at = 0;
        if !self.begun {
            let Some(magic) = self.pending.get(..MAGIC.len()) else {
                return Ok(());
            };
            if magic != MAGIC {
                let version = magic.strip_prefix(MAGIC_STEM);
                return Err(version.map_or(BackupError::NotABackup, |version| {
                    let found = String::from_utf8_lossy(version).trim().to_owned();
                    BackupError::Newer { found }
                }));
            }
            self.digest.update(MAGIC);
            self.begun = true;
            at = MAGIC.len();
        }
        while let Some(length) = self.pending[at..].first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            if length > MAX_FRAME_BYTES {
                return Err(BackupError::Damaged);
            }
            let Some(frame) = self.pending.get(at..at + 4 + length) else {
                break;
            };
            let part = Frame::decode(&frame[4..]).ok().and_then(|frame| frame.part);
            match part {
                _ if self.ended => return Err(BackupError::Damaged),
                Some(Part::Header(header)) if self.header.is_none() => self.header = Some(header),
                Some(Part::Entry(entry)) if self.header.is_some() => self.entries.push(entry),
                Some(Part::End(end)) => {
                    let found = self.digest.clone().finalize();
                    let whole = end.entries == self.entries.len() as u64;
                    if !whole || end.sha256 != found.as_slice() {
                        return Err(BackupError::Damaged);
                    }
                    self.ended = true;
                }
                _ => return Err(BackupError::Damaged),
            }
            self.digest.update(frame);
            at += 4 + length;
        }
        self.pending.drain(..at);
        Ok(())
    }

    /// The backup, once all of it was there.
    ///
    /// # Errors
    /// When it is cut off.
    pub fn finish(self) -> Result<Backup, BackupError> {
        let header = self
            .header
            .filter(|_| self.ended && self.pending.is_empty());
        Ok(Backup {
            header: header.ok_or(BackupError::CutOff)?,
            entries: self.entries,
        })
    }
}

/// Puts a backup in the place of a store's state. Whoever leads stops before, and somebody leads again
/// after. Only an empty store is filled unless `replace`.
///
/// # Errors
/// When the store is not empty, is newer than this program, or fails. A restore that failed half-way
/// leaves a state that nobody leads; run it again.
pub async fn restore(
    store: &SharedStore,
    backup: &Backup,
    replace: bool,
) -> Result<u64, BackupError> {
    if backup.header.schema > schema::CURRENT {
        return Err(BackupError::NewerSchema {
            found: backup.header.schema,
            known: schema::CURRENT,
        });
    }
    let present = store.list(Range::all("")).await?;
    let interrupted = present.items.iter().any(|item| item.key == RESTORING_KEY);
    let mine = |key: &str| {
        is_transient(key) || key == schema::KEY || UNASKED.iter().any(|own| key.starts_with(own))
    };
    let found = present.items.iter().filter(|item| !mine(&item.key)).count();
    if found > 0 && !replace && !interrupted {
        return Err(BackupError::NotEmpty { found });
    }
    // Epochs must not go backwards on hosts: neither past those of the backup's store, nor past those
    // of this one, nor past those of an earlier restore of the same backup.
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = u64::try_from(now_ms.unwrap_or_default().as_millis()).unwrap_or(0);
    let before = leader::epoch_base(store).await?;
    let theirs = backup
        .header
        .epoch_base
        .saturating_add(backup.header.revision);
    let base = now_ms.max(theirs).max(before).saturating_add(1);

    let lease = store.grant(LEASE).await?;
    let result = fill(store, lease, backup, base).await;
    let revoked = store.revoke(lease).await;
    let revision = result?;
    revoked?;
    Ok(revision)
}

async fn fill(
    store: &SharedStore,
    lease: LeaseId,
    backup: &Backup,
    epoch_base: u64,
) -> Result<u64, BackupError> {
    let begin = Transaction::new().put(RESTORING_KEY, vec![]).put_leased(
        leader::KEY,
        b"restore".to_vec(),
        lease,
    );
    let term = store.commit(begin).await?;
    let fenced = FencedStore::new(store.clone(), leader::KEY, term);
    let present = store.list(Range::all("")).await?;
    let wanted: std::collections::HashSet<&str> = backup
        .entries
        .iter()
        .map(|entry| entry.key.as_str())
        .collect();
    let gone = present.items.into_iter().map(|item| item.key);
    let gone = gone.filter(|key| !is_transient(key) && !wanted.contains(key.as_str()));
    let writes = gone
        .map(Write::Delete)
        .chain(backup.entries.iter().map(|entry| Write::Put {
            key: entry.key.clone(),
            value: entry.value.clone(),
            lease: None,
        }));
    let mut transaction = Transaction::new();
    let mut bytes = 0;
    for write in writes {
        let size = match &write {
            Write::Put { key, value, .. } => key.len() + value.len(),
            Write::Delete(key) => key.len(),
        };
        if transaction.writes.len() >= BATCH_LEN || bytes + size > BATCH_BYTES {
            fenced.commit(std::mem::take(&mut transaction)).await?;
            store.keep_alive(lease).await?;
            bytes = 0;
        }
        bytes += size;
        transaction.writes.push(write);
    }
    let end = transaction
        .put(EPOCH_BASE_KEY, epoch_base.to_string().into_bytes())
        .delete(RESTORING_KEY);
    Ok(fenced.commit(end).await?)
}

/// Copies the state of a store that no controller uses into an empty one. What is left behind says so,
/// and starts no controller any more.
///
/// # Errors
/// As for [`restore`].
pub async fn migrate(
    from: &SharedStore,
    to: &SharedStore,
    to_name: &str,
    replace: bool,
) -> Result<usize, BackupError> {
    schema::check_usable(from).await?;
    let mut reader = Reader::default();
    for piece in take(from).await? {
        reader.feed(&piece)?;
    }
    let backup = reader.finish()?;
    restore(to, &backup, replace).await?;
    let moved = Transaction::new().put(schema::MOVED_KEY, to_name.as_bytes().to_vec());
    from.commit(moved).await?;
    // The copy was made before, but may be of a copy.
    to.commit(Transaction::new().delete(schema::MOVED_KEY))
        .await?;
    Ok(backup.len())
}

/// Why a backup was not made or not restored.
#[derive(Debug, Error)]
pub enum BackupError {
    /// Something else.
    #[error("this is no backup of the state of controllers")]
    NotABackup,
    /// Made by a newer program.
    #[error(
        "the backup's format is {found}, and this program knows 1: restore it with the version that made it"
    )]
    Newer {
        /// Its format.
        found: String,
    },
    /// Made by a newer program.
    #[error(
        "the backup's schema is {found}, and this program knows those up to {known}: restore it with the version that made it"
    )]
    NewerSchema {
        /// Of the backup.
        found: u32,
        /// Of this program.
        known: u32,
    },
    /// It was changed on the way.
    #[error("the backup is damaged: its checksum does not fit; nothing was changed")]
    Damaged,
    /// Some is missing.
    #[error("the backup is cut off; nothing was changed")]
    CutOff,
    /// There is something already.
    #[error(
        "the store has {found} records already; a restore that replaces them must be told so (--force)"
    )]
    NotEmpty {
        /// How many.
        found: usize,
    },
    /// The store cannot be used.
    #[error(transparent)]
    Schema(#[from] schema::SchemaError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests;
