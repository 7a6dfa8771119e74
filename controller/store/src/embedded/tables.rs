//! What is in the database, and how it is read.

use redb::{Database, ReadTransaction, ReadableTable as _, TableDefinition};

use super::file::failed;
use super::{Change, Item, LeaseId, Listing, Range, StoreError, WATCH_BATCH};

/// Value: revision (8 bytes, little endian), then the bytes.
pub(super) const DATA: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("data");
/// (revision, index within the transaction) to the key and, unless it was removed, the value.
pub(super) const LOG: TableDefinition<'_, (u64, u32), LoggedChange> = TableDefinition::new("log");
pub(super) type LoggedChange = (&'static str, Option<&'static [u8]>);
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Leases and how long they last, in milliseconds.
pub(super) const LEASES: TableDefinition<'_, i64, u64> = TableDefinition::new("leases");
/// Keys that have a lease.
pub(super) const LEASED: TableDefinition<'_, &str, i64> = TableDefinition::new("leased");

pub(super) const REVISION: &str = "revision";
/// Highest revision whose changes are gone from the log.
pub(super) const COMPACTED: &str = "compacted";
/// The lease that was granted last.
pub(super) const LAST_LEASE: &str = "last-lease";
/// Rises with every transaction of the file: which of them it has.
pub(super) const BATCH: &str = "batch";
/// How the tables are laid out; absent in files of before this was written down, which are alike.
const LAYOUT: &str = "layout";
const THIS_LAYOUT: u64 = 1;

/// Makes the tables that are not there, and refuses a layout this program does not know.
pub(super) fn create(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write().map_err(failed)?;
    transaction.open_table(DATA).map_err(failed)?;
    transaction.open_table(LOG).map_err(failed)?;
    transaction.open_table(LEASES).map_err(failed)?;
    transaction.open_table(LEASED).map_err(failed)?;
    {
        let mut meta = transaction.open_table(META).map_err(failed)?;
        let layout = meta.get(LAYOUT).map_err(failed)?.map(|value| value.value());
        match layout {
            Some(newer) if newer > THIS_LAYOUT => {
                let words = format!(
                    "its layout is {newer}, and this program knows those up to {THIS_LAYOUT}: use the version that wrote it"
                );
                return Err(StoreError::Backend(words.into()));
            }
            Some(_) => {}
            None => drop(meta.insert(LAYOUT, THIS_LAYOUT).map_err(failed)?),
        }
    }
    transaction.commit().map_err(failed)
}

/// The revision, and the leases with their milliseconds.
pub(super) fn begin(
    transaction: &ReadTransaction,
) -> Result<(u64, Vec<(LeaseId, u64)>), StoreError> {
    let leases = transaction.open_table(LEASES).map_err(failed)?;
    let mut found = Vec::new();
    for entry in leases.range::<i64>(..).map_err(failed)? {
        let (lease, ttl_ms) = entry.map_err(failed)?;
        found.push((LeaseId(lease.value()), ttl_ms.value()));
    }
    Ok((number(transaction, REVISION)?, found))
}

/// The number of the last transaction of the file.
pub(super) fn batch(transaction: &ReadTransaction) -> Result<u64, StoreError> {
    number(transaction, BATCH)
}

fn number(transaction: &ReadTransaction, name: &str) -> Result<u64, StoreError> {
    let meta = transaction.open_table(META).map_err(failed)?;
    let value = meta.get(name).map_err(failed)?;
    Ok(value.map_or(0, |value| value.value()))
}

pub(super) fn get(transaction: &ReadTransaction, key: &str) -> Result<Option<Item>, StoreError> {
    let data = transaction.open_table(DATA).map_err(failed)?;
    let value = data.get(key).map_err(failed)?;
    Ok(value.map(|value| item(key, value.value())))
}

pub(super) fn list(transaction: &ReadTransaction, range: &Range) -> Result<Listing, StoreError> {
    let revision = number(transaction, REVISION)?;
    let data = transaction.open_table(DATA).map_err(failed)?;
    let mut items: Vec<Item> = Vec::new();
    let mut more = false;
    let limit = match range.limit {
        0 => usize::MAX,
        limit => limit,
    };
    let prefix = range.prefix.as_str();
    if range.reverse {
        // No key has this character.
        let mut end = format!("{prefix}{}", char::MAX);
        if let Some(after) = range.after.as_ref().filter(|after| **after < end) {
            end.clone_from(after);
        }
        if end.as_str() < prefix {
            return Ok(Listing {
                items,
                more,
                revision,
            });
        }
        for entry in data.range(prefix..end.as_str()).map_err(failed)?.rev() {
            let (key, value) = entry.map_err(failed)?;
            if items.len() == limit {
                more = true;
                break;
            }
            items.push(item(key.value(), value.value()));
        }
        return Ok(Listing {
            items,
            more,
            revision,
        });
    }
    let after = range.after.as_deref();
    let start = after.filter(|after| *after > prefix).unwrap_or(prefix);
    for entry in data.range(start..).map_err(failed)? {
        let (key, value) = entry.map_err(failed)?;
        if !key.value().starts_with(prefix) {
            break;
        }
        if after.is_some_and(|after| key.value() <= after) {
            continue;
        }
        if items.len() == limit {
            more = true;
            break;
        }
        items.push(item(key.value(), value.value()));
    }
    Ok(Listing {
        items,
        more,
        revision,
    })
}

/// Changes up to and including revision `upto`.
pub(super) struct Batch {
    pub(super) changes: Vec<Change>,
    pub(super) upto: u64,
}

pub(super) fn changes(
    transaction: &ReadTransaction,
    prefix: &str,
    after: u64,
) -> Result<Batch, StoreError> {
    let newest = number(transaction, REVISION)?;
    let oldest = number(transaction, COMPACTED)?;
    // What is yet to come was another store's: the state was restored.
    if after < oldest || after > newest {
        let oldest = oldest.max(after.min(newest));
        return Err(StoreError::Compacted { after, oldest });
    }
    let log = transaction.open_table(LOG).map_err(failed)?;
    let mut batch = Batch {
        changes: Vec::new(),
        upto: newest,
    };
    for entry in log.range((after.saturating_add(1), 0)..).map_err(failed)? {
        let (position, change) = entry.map_err(failed)?;
        let (revision, _) = position.value();
        // A transaction is never torn apart.
        if batch.changes.len() >= WATCH_BATCH
            && batch
                .changes
                .last()
                .is_some_and(|last| last.revision < revision)
        {
            batch.upto = revision - 1;
            break;
        }
        let (key, value) = change.value();
        if key.starts_with(prefix) {
            let (key, value) = (key.to_owned(), value.map(<[u8]>::to_vec));
            batch.changes.push(Change {
                key,
                value,
                revision,
            });
        }
    }
    Ok(batch)
}

pub(super) fn item(key: &str, stored: &[u8]) -> Item {
    let (revision, value) = stored.split_at_checked(8).unwrap_or((&[0; 8], stored));
    let revision = u64::from_le_bytes(revision.try_into().expect("eight bytes were split off"));
    Item {
        key: key.to_owned(),
        value: value.to_vec(),
        revision,
    }
}
