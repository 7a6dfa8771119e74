//! Changes of the map, written to the file.
//!
//! Threads that have changes at the same time share the writes: one of them carries out what has
//! come together, and the others wait. For a batch the order is:
//!
//! 1. new L2 tables are written;
//! 2. a flush, if clusters got data that was copied from elsewhere (after a power failure a new
//!    entry must not show a cluster whose copied part did not make it), or tables were made;
//! 3. L1 entries;
//! 4. slices of L2 tables, each in one write;
//! 5. the caches, from which the queues see the change.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::alloc::{Allocator, Metadata};
use crate::entry::{self, COPIED};
use crate::map::{MapTable, Slice};
use crate::storage::{Buffer, Storage};

/// New L2 entries of guest clusters.
pub(crate) type Changes = Vec<(u64, u64)>;

/// Whoever changes the map does it through this.
#[derive(Debug, Default)]
pub(crate) struct Publisher {
    state: Mutex<State>,
    progress: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    waiting: Vec<Request>,
    /// By id, as error numbers: an `io::Error` cannot be given to several.
    results: HashMap<u64, Result<(), i32>>,
    is_led: bool,
}

#[derive(Debug)]
struct Request {
    id: u64,
    changes: Changes,
    needs_sync: bool,
}

/// What a batch is carried out with.
pub(crate) struct Target<'a> {
    pub(crate) storage: &'a Storage,
    pub(crate) map: &'a MapTable,
    pub(crate) allocator: &'a Allocator,
    pub(crate) metadata: &'a Metadata,
    /// Shows one changed entry to the queues, or that it is not known what became of it.
    pub(crate) show: &'a dyn Fn(u64, Option<u64>),
}

impl Publisher {
    /// Writes changes of the map. The clusters must be this caller's alone meanwhile.
    ///
    /// # Errors
    /// The changes may or may not be in the file: what they name must not be used again.
    pub(crate) fn publish(
        &self,
        target: &Target<'_>,
        changes: Changes,
        needs_sync: bool,
    ) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut state = self.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.waiting.push(Request {
            id,
            changes,
            needs_sync,
        });
        loop {
            if let Some(result) = state.results.remove(&id) {
                return result.map_err(io::Error::from_raw_os_error);
            }
            if state.is_led {
                state = self
                    .progress
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.is_led = true;
            let batch = std::mem::take(&mut state.waiting);
            drop(state);
            let result = carry_out(target, &batch).map_err(|error| {
                tracing::warn!(%error, "the map of a qcow2 image could not be changed");
                error.raw_os_error().unwrap_or(libc::EIO)
            });
            state = self.lock();
            state.is_led = false;
            state
                .results
                .extend(batch.iter().map(|request| (request.id, result)));
            self.progress.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn carry_out(target: &Target<'_>, batch: &[Request]) -> io::Result<()> {
    let geometry = target.map.geometry();
    let mut by_slice: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
    for request in batch {
        for &(cluster, entry) in &request.changes {
            let (slice, _) = geometry.slice_of(cluster);
            by_slice.entry(slice).or_default().push((cluster, entry));
        }
    }
    let new_tables = make_tables(target, by_slice.keys().copied())?;
    if !new_tables.is_empty() || batch.iter().any(|request| request.needs_sync) {
        target.storage.sync()?;
    }
    for (l1_index, table) in new_tables {
        target.map.set_l1(l1_index, table | COPIED)?;
    }
    for (slice, changes) in by_slice {
        target.map.begin(slice);
        match write_slice(target, slice, &changes) {
            Ok(new) => target.map.finish(slice, Some(new), || {
                for &(cluster, entry) in &changes {
                    (target.show)(cluster, Some(entry));
                }
            }),
            // The file may have it all the same: whoever went by what was there before would write
            // to clusters that are not the image's any more. So the file is asked again.
            Err(error) => {
                target.map.finish(slice, None, || {
                    for &(cluster, _) in &changes {
                        (target.show)(cluster, None);
                    }
                });
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Writes empty L2 tables where there are none; returns their L1 indices and offsets.
fn make_tables(
    target: &Target<'_>,
    slices: impl Iterator<Item = u64>,
) -> io::Result<BTreeMap<usize, u64>> {
    let geometry = target.map.geometry();
    let mut made = BTreeMap::new();
    for slice in slices {
        let l1_index = geometry.l1_index(slice);
        if target.map.l1_entry(slice) != 0 || made.contains_key(&l1_index) {
            continue;
        }
        let run = target.allocator.take(1)?;
        let offset = run.first << geometry.cluster_bits;
        target
            .storage
            .write(&Buffer::new(geometry.cluster_bytes() as usize), offset)?;
        target.metadata.add([run.first]);
        made.insert(l1_index, offset);
    }
    Ok(made)
}

/// Writes a slice with its changes, and returns it.
fn write_slice(target: &Target<'_>, slice: u64, changes: &[(u64, u64)]) -> io::Result<Slice> {
    let geometry = target.map.geometry();
    let old = target
        .map
        .busy_slice(slice)?
        .ok_or_else(|| io::Error::other("an L2 table vanished"))?;
    let mut new = old.to_vec();
    for &(cluster, entry) in changes {
        let (_, index) = geometry.slice_of(cluster);
        new[index] = entry;
    }
    let mut bytes = Buffer::new(geometry.slice_bytes() as usize);
    for (entry, bytes) in new.iter().zip(bytes.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&entry.to_be_bytes());
    }
    let table = entry::l2_table(target.map.l1_entry(slice), geometry.cluster_bits)?
        .ok_or_else(|| io::Error::other("an L2 table vanished"))?;
    target
        .storage
        .write(&bytes, table + geometry.offset_in_table(slice))?;
    Ok(new.into())
}
