//! The writable layer's own map: its L1 table, and slices of its L2 tables.
//!
//! The file is always at least as new as what is cached here: whoever changes a slice writes it
//! first and then [publishes](MapTable::finish) it. So a slice can be dropped from the cache at
//! any time. While a slice is read from the file or written to it, it is *busy*, and whoever else
//! needs it waits.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::entry;
use crate::header::{Header, be64};
use crate::storage::{SECTOR_BYTES, Storage};

/// A slice is at most as long as a page of memory.
const MAX_SLICE_BYTES: u64 = 4096;
/// Cached slices (2 MiB).
const MAX_SLICES: usize = 512;

/// Entries of a piece of an L2 table.
pub(crate) type Slice = Arc<[u64]>;

/// How guest clusters are spread over L2 tables and their slices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
}

impl Geometry {
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            version: header.version,
            cluster_bits: header.cluster_bits,
        }
    }

    pub(crate) fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    pub(crate) fn slice_bytes(self) -> u64 {
        self.cluster_bytes().min(MAX_SLICE_BYTES)
    }

    pub(crate) fn slice_entries(self) -> u64 {
        self.slice_bytes() / 8
    }

    fn slices_per_table(self) -> u64 {
        self.cluster_bytes() / self.slice_bytes()
    }

    /// Number of the slice that has this guest cluster, and its index there.
    pub(crate) fn slice_of(self, cluster: u64) -> (u64, usize) {
        let entries = self.slice_entries();
        (cluster / entries, (cluster % entries) as usize)
    }

    /// Index in the L1 table of the table that this slice is of.
    pub(crate) fn l1_index(self, slice: u64) -> usize {
        (slice / self.slices_per_table()) as usize
    }

    /// Where the slice starts in its table.
    pub(crate) fn offset_in_table(self, slice: u64) -> u64 {
        slice % self.slices_per_table() * self.slice_bytes()
    }
}

/// Reads a slice of the L2 table that an L1 entry points at; `None` when there is no table.
pub(crate) fn read_slice(
    storage: &Storage,
    geometry: Geometry,
    l1_entry: u64,
    slice: u64,
) -> io::Result<Option<Slice>> {
    let Some(table) = entry::l2_table(l1_entry, geometry.cluster_bits)? else {
        return Ok(None);
    };
    let bytes = storage.read_new(
        table + geometry.offset_in_table(slice),
        geometry.slice_bytes() as usize,
    )?;
    Ok(Some(
        bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect(),
    ))
}

/// Reads a whole L1 table, which must lie inside the file.
pub(crate) fn read_l1(storage: &Storage, header: &Header) -> Result<Vec<u64>, crate::Error> {
    let len_bytes = u64::from(header.l1_entries) * 8;
    let file_len = storage
        .len_bytes()
        .map_err(crate::Error::io("measure the image"))?;
    if header.l1_offset + len_bytes > file_len.next_multiple_of(header.cluster_bytes()) {
        return Err(crate::Error::corrupt(
            "an L1 table behind the end of the file",
        ));
    }
    let padded = len_bytes.next_multiple_of(SECTOR_BYTES) as usize;
    let bytes = storage
        .read_new(header.l1_offset, padded)
        .map_err(crate::Error::io("read the L1 table"))?;
    let entries = bytes.chunks_exact(8).map(|entry| be64(entry, 0));
    Ok(entries.take(header.l1_entries as usize).collect())
}

/// The map of an image that is written.
#[derive(Debug)]
pub(crate) struct MapTable {
    storage: Storage,
    geometry: Geometry,
    state: Mutex<State>,
    no_longer_busy: Condvar,
}

/// Where an L1 table was.
#[derive(Debug)]
pub(crate) struct OldL1 {
    /// Entries.
    pub(crate) len: usize,
    pub(crate) offset: u64,
}

#[derive(Debug)]
struct State {
    l1: Vec<u64>,
    l1_offset: u64,
    slices: HashMap<u64, Slice>,
    /// Oldest first.
    order: VecDeque<u64>,
    busy: HashSet<u64>,
}

impl MapTable {
    pub(crate) fn new(storage: Storage, header: &Header, l1: Vec<u64>) -> Self {
        Self {
            storage,
            geometry: Geometry::of(header),
            state: Mutex::new(State {
                l1,
                l1_offset: header.l1_offset,
                slices: HashMap::new(),
                order: VecDeque::new(),
                busy: HashSet::new(),
            }),
            no_longer_busy: Condvar::new(),
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// A slice as it is now; `None` when its table does not exist.
    pub(crate) fn slice(&self, slice: u64) -> io::Result<Option<Slice>> {
        let mut state = self.lock();
        loop {
            if let Some(found) = state.slices.get(&slice) {
                return Ok(Some(Arc::clone(found)));
            }
            if !state.busy.contains(&slice) {
                break;
            }
            state = self.wait(state);
        }
        let l1_entry = state.l1_entry(self.geometry.l1_index(slice));
        if l1_entry == 0 {
            return Ok(None);
        }
        state.busy.insert(slice);
        drop(state);
        let read = read_slice(&self.storage, self.geometry, l1_entry, slice);
        let mut state = self.lock();
        state.busy.remove(&slice);
        if let Ok(Some(read)) = &read {
            state.keep(slice, Arc::clone(read));
        }
        drop(state);
        self.no_longer_busy.notify_all();
        read
    }

    /// The raw entry of a guest cluster.
    pub(crate) fn entry(&self, cluster: u64) -> io::Result<u64> {
        let (slice, index) = self.geometry.slice_of(cluster);
        Ok(self.slice(slice)?.map_or(0, |slice| slice[index]))
    }

    /// The L1 entry for a slice; 0 when there is no table.
    pub(crate) fn l1_entry(&self, slice: u64) -> u64 {
        self.lock().l1_entry(self.geometry.l1_index(slice))
    }

    /// Makes a slice busy, for changing it. Must be followed by [`finish`](Self::finish).
    pub(crate) fn begin(&self, slice: u64) {
        let mut state = self.lock();
        while state.busy.contains(&slice) {
            state = self.wait(state);
        }
        state.busy.insert(slice);
    }

    /// Ends what [`begin`](Self::begin) began: with what is in the file now, or with nothing when
    /// that is not known. `publish` runs before anybody can see the new slice.
    pub(crate) fn finish(&self, slice: u64, new: Option<Slice>, publish: impl FnOnce()) {
        let mut state = self.lock();
        state.busy.remove(&slice);
        match new {
            Some(new) => state.keep(slice, new),
            None => state.forget(slice),
        }
        publish();
        drop(state);
        self.no_longer_busy.notify_all();
    }

    /// A slice that the caller has made busy.
    pub(crate) fn busy_slice(&self, slice: u64) -> io::Result<Option<Slice>> {
        let state = self.lock();
        if let Some(found) = state.slices.get(&slice) {
            return Ok(Some(Arc::clone(found)));
        }
        let l1_entry = state.l1_entry(self.geometry.l1_index(slice));
        drop(state);
        read_slice(&self.storage, self.geometry, l1_entry, slice)
    }

    /// Runs `install` if these slices are still what they were, and nobody can change them
    /// meanwhile.
    pub(crate) fn if_current(&self, seen: &[(u64, Option<Slice>)], install: impl FnOnce()) -> bool {
        let state = self.lock();
        let current = seen.iter().all(|(slice, seen)| match seen {
            Some(seen) => state
                .slices
                .get(slice)
                .is_some_and(|now| Arc::ptr_eq(now, seen)),
            None => state.l1_entry(self.geometry.l1_index(*slice)) == 0,
        });
        if current {
            install();
        }
        current
    }

    /// Writes an L1 entry and then uses it.
    pub(crate) fn set_l1(&self, index: usize, l1_entry: u64) -> io::Result<()> {
        let mut state = self.lock();
        let per_sector = SECTOR_BYTES as usize / 8;
        let first = index - index % per_sector;
        let mut sector = crate::storage::Buffer::new(SECTOR_BYTES as usize);
        for (at, bytes) in sector.chunks_exact_mut(8).enumerate() {
            let now = if first + at == index {
                l1_entry
            } else {
                state.l1.get(first + at).copied().unwrap_or(0)
            };
            bytes.copy_from_slice(&now.to_be_bytes());
        }
        self.storage
            .write(&sector, state.l1_offset + first as u64 * 8)?;
        state.l1[index] = l1_entry;
        Ok(())
    }

    /// Entries in the L1 table.
    pub(crate) fn l1_len(&self) -> usize {
        self.lock().l1.len()
    }

    /// Goes on with a longer L1 table elsewhere, which `write` writes while the present one
    /// cannot change. Returns where that was.
    pub(crate) fn move_l1(
        &self,
        len: usize,
        l1_offset: u64,
        write: impl FnOnce(&[u64]) -> Result<(), crate::Error>,
    ) -> Result<OldL1, crate::Error> {
        let mut state = self.lock();
        let mut l1 = state.l1.clone();
        l1.resize(len, 0);
        write(&l1)?;
        let old = OldL1 {
            len: state.l1.len(),
            offset: state.l1_offset,
        };
        state.l1 = l1;
        state.l1_offset = l1_offset;
        Ok(old)
    }

    /// Runs `change` while no slice can change.
    pub(crate) fn quiet(&self, change: impl FnOnce()) {
        let _state = self.lock();
        change();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.no_longer_busy
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn l1_entry(&self, index: usize) -> u64 {
        self.l1.get(index).copied().unwrap_or(0)
    }

    fn forget(&mut self, slice: u64) {
        if self.slices.remove(&slice).is_some() {
            self.order.retain(|kept| *kept != slice);
        }
    }

    fn keep(&mut self, slice: u64, content: Slice) {
        if self.slices.insert(slice, content).is_none() {
            self.order.push_back(slice);
        }
        if self.slices.len() > MAX_SLICES
            && let Some(oldest) = self.order.pop_front()
        {
            self.slices.remove(&oldest);
        }
    }
}
