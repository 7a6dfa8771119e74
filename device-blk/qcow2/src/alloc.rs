//! Which host clusters are in use, and how new ones are got.
//!
//! ```text
//!             reserve: count = 1 ─► sync            the map is written
//!   free ──────────────────────────────► reserved ────────────────────► in use
//!    ▲                                     │ settle                        │ free()
//!    │                                     ▼                               ▼
//!    └──── count = 0 ◄──── sync ◄──── nobody uses it ◄──── no longer mapped
//! ```
//!
//! On disk, the count of a cluster is at no time below the number of references to it: counts go
//! up, and are on stable storage, before anything can refer to the cluster; they go down when what
//! no longer refers to it is on stable storage. So a crash can leave clusters that are counted
//! and not used, never the opposite. Clusters are reserved in batches that grow with the demand,
//! which makes the write and the flush for it rare.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::entry;
use crate::epoch::Epochs;
use crate::error::Error;
use crate::header::{self, Header, MAX_OFFSET, at, be64, put32, put64};
use crate::refcount;
use crate::storage::{Buffer, SECTOR_BYTES, Storage};

/// A batch is between these sizes.
const MIN_BATCH_BYTES: u64 = 1 << 20;
const MAX_BATCH_BYTES: u64 = 64 << 20;
/// Refcount blocks are read and written in pieces of at most this size.
const MAX_PIECE_BYTES: u64 = 4096;
/// Cached pieces (1 MiB).
const MAX_PIECES: usize = 256;
/// As QEMU: `QCOW_MAX_REFTABLE_SIZE`, in bytes.
const MAX_TABLE_BYTES: u64 = 8 << 20;
/// Freed runs of clusters that may wait for a flush by somebody else.
const MAX_WAITING: usize = 1024;
/// How often tickets are looked at while they are waited for.
const TICKET_POLL: Duration = Duration::from_micros(50);

/// Host clusters side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// They read as zeroes.
    pub(crate) zeroed: bool,
}

/// Clusters that hold tables, and where the file ends: nothing else is taken for data.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    clusters: RwLock<HashSet<u64>>,
    /// Clusters of the file.
    end: AtomicU64,
}

impl Metadata {
    /// Whether a data cluster can be here.
    pub(crate) fn admits(&self, cluster: u64) -> bool {
        cluster < self.end.load(Ordering::Acquire) && !self.contains(cluster)
    }

    fn contains(&self, cluster: u64) -> bool {
        self.clusters
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&cluster)
    }

    pub(crate) fn add(&self, clusters: impl IntoIterator<Item = u64>) {
        self.clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(clusters);
    }

    pub(crate) fn remove(&self, clusters: impl IntoIterator<Item = u64>) {
        let mut set = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters {
            set.remove(&cluster);
        }
    }
}

/// The allocator of one image that is written.
#[derive(Debug)]
pub(crate) struct Allocator {
    storage: Storage,
    cluster_bits: u32,
    order: u32,
    metadata: Arc<Metadata>,
    epochs: Arc<Epochs>,
    counts: Mutex<Counts>,
    freed: Mutex<Vec<Freed>>,
    draining: Mutex<Option<Draining>>,
}

/// Clusters that the map on disk no longer names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Freed {
    pub(crate) run: Run,
    /// What was in them no longer matters, even if a power failure brings the old map back. Their
    /// blocks are given back at once.
    pub(crate) discarded: bool,
}

/// Freed clusters whose last users are waited for.
#[derive(Debug)]
struct Draining {
    period: u64,
    freed: Vec<Freed>,
}

#[derive(Debug)]
struct Counts {
    /// Offsets of refcount blocks; 0 for none.
    table: Vec<u64>,
    table_offset: u64,
    table_clusters: u64,
    pieces: HashMap<u64, Buffer>,
    /// Oldest first.
    order: VecDeque<u64>,
    /// No cluster below is free.
    hint: u64,
    /// No cluster from here on was ever used.
    fresh_from: u64,
    reserved: VecDeque<Run>,
    batch_clusters: u64,
    /// No longer used, and waiting for a flush.
    unsynced: Vec<Run>,
}

impl Allocator {
    pub(crate) fn open(
        storage: Storage,
        header: &Header,
        l1: &[u64],
        epochs: Arc<Epochs>,
    ) -> Result<(Self, Arc<Metadata>), Error> {
        let cluster_bits = header.cluster_bits;
        let file_len = storage
            .len_bytes()
            .map_err(Error::io("measure the image"))?;
        let end = file_len.div_ceil(header.cluster_bytes());
        let table = read_table(&storage, header, file_len)?;
        let metadata = Arc::new(Metadata::default());
        metadata.end.store(end, Ordering::Release);
        metadata.add(tables_of(header, &table, l1)?);
        let counts = Counts {
            table,
            table_offset: header.refcount_table_offset,
            table_clusters: u64::from(header.refcount_table_clusters),
            pieces: HashMap::new(),
            order: VecDeque::new(),
            hint: 0,
            fresh_from: end,
            reserved: VecDeque::new(),
            batch_clusters: (MIN_BATCH_BYTES >> cluster_bits).max(1),
            unsynced: Vec::new(),
        };
        let allocator = Self {
            storage,
            cluster_bits,
            order: header.refcount_order,
            metadata: Arc::clone(&metadata),
            epochs,
            counts: Mutex::new(counts),
            freed: Mutex::new(Vec::new()),
            draining: Mutex::new(None),
        };
        Ok((allocator, metadata))
    }

    /// Takes up to `max` clusters side by side. Their counts are one, on stable storage.
    pub(crate) fn take(&self, max: u64) -> io::Result<Run> {
        let mut counts = self.lock();
        if counts.reserved.is_empty() {
            drop(counts);
            self.reclaim(Duration::ZERO)?;
            counts = self.lock();
            if counts.reserved.is_empty() {
                self.reserve(&mut counts, max)?;
            }
        }
        let run = counts.reserved.front_mut().expect("just reserved");
        let count = max.min(run.count);
        let taken = Run { count, ..*run };
        run.first += count;
        run.count -= count;
        if run.count == 0 {
            counts.reserved.pop_front();
        }
        Ok(taken)
    }

    /// Takes back clusters that nothing refers to. `zeroed` must tell what they are now.
    pub(crate) fn put_back(&self, run: Run) {
        self.lock().reserved.push_front(run);
    }

    /// Takes `count` clusters side by side, which are not zeroed.
    pub(crate) fn take_table(&self, count: u64) -> io::Result<u64> {
        let mut counts = self.lock();
        let first = self.find_side_by_side(&mut counts, count)?;
        self.extend(first + count)?;
        self.change(&mut counts, first, count, |count| Some(count + 1))?;
        counts.fresh_from = counts.fresh_from.max(first + count);
        self.storage.sync()?;
        Ok(first)
    }

    /// Clusters that the map on disk no longer names, each once. They are given back when
    /// nobody uses them any more and a flush has made the map's change last.
    pub(crate) fn free(&self, runs: impl IntoIterator<Item = Run>, discarded: bool) {
        self.freed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(runs.into_iter().map(|run| Freed { run, discarded }));
    }

    /// Brings freed clusters forward, and gives their blocks back to the file system. Waits
    /// `patience` at most for those that still use them; what is left is done next time.
    pub(crate) fn reclaim(&self, patience: Duration) -> io::Result<()> {
        let give_up = Instant::now() + patience;
        let mut draining = self.draining.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..2 {
            if let Some(Draining { period, .. }) = &*draining {
                while !self.epochs.is_over(*period) {
                    if Instant::now() >= give_up {
                        return Ok(());
                    }
                    std::thread::sleep(TICKET_POLL);
                }
                let Draining { freed, .. } = draining.take().expect("just seen");
                self.retire(freed)?;
            }
            let freed =
                std::mem::take(&mut *self.freed.lock().unwrap_or_else(PoisonError::into_inner));
            if freed.is_empty() {
                return Ok(());
            }
            *draining = Some(Draining {
                period: self.epochs.advance(),
                freed,
            });
        }
        Ok(())
    }

    /// Gives back what is reserved and what was freed, for an image that is left alone then.
    pub(crate) fn settle(&self, patience: Duration) -> io::Result<()> {
        self.reclaim(patience)?;
        let mut counts = self.lock();
        let reserved = std::mem::take(&mut counts.reserved);
        counts.unsynced.extend(reserved);
        self.storage.sync()?;
        self.release_unsynced(&mut counts)
    }

    /// Whether freed clusters are still waited for.
    pub(crate) fn has_users(&self) -> bool {
        let freed = self.freed.lock().unwrap_or_else(PoisonError::into_inner);
        let draining = self.draining.lock().unwrap_or_else(PoisonError::into_inner);
        !freed.is_empty() || draining.is_some()
    }

    /// Corrects counts that were found to be too high.
    pub(crate) fn set_counts(&self, runs: &[(Run, u64)]) -> io::Result<()> {
        let mut counts = self.lock();
        for &(run, value) in runs {
            self.change(&mut counts, run.first, run.count, |_| Some(value))?;
            if value == 0 {
                counts.hint = counts.hint.min(run.first);
            }
        }
        self.storage.sync()
    }

    /// Punches holes, and lets the clusters wait for a flush.
    fn retire(&self, freed: Vec<Freed>) -> io::Result<()> {
        let mut counts = self.lock();
        let (discarded, replaced): (Vec<_>, Vec<_>) =
            freed.into_iter().partition(|freed| freed.discarded);
        for run in merge(discarded.into_iter().map(|freed| freed.run).collect()) {
            let mut sole = true;
            for cluster in run.first..run.first + run.count {
                sole &= self.count(&mut counts, cluster)? <= 1;
            }
            if sole {
                self.punch(run)?;
            }
            counts.unsynced.push(run);
        }
        counts
            .unsynced
            .extend(replaced.into_iter().map(|freed| freed.run));
        if counts.unsynced.len() > MAX_WAITING {
            self.storage.sync()?;
            self.release_unsynced(&mut counts)?;
        }
        Ok(())
    }

    /// After a flush: counts go down.
    fn release_unsynced(&self, counts: &mut Counts) -> io::Result<()> {
        for run in merge(std::mem::take(&mut counts.unsynced)) {
            self.change(counts, run.first, run.count, |count| {
                if count == 0 {
                    tracing::warn!("a qcow2 cluster was freed twice; the image should be checked");
                }
                count.checked_sub(1)
            })?;
            counts.hint = counts.hint.min(run.first);
        }
        Ok(())
    }

    /// Reserves a batch, at least one cluster.
    fn reserve(&self, counts: &mut Counts, min: u64) -> io::Result<()> {
        let wanted = counts
            .batch_clusters
            .max(min.min(MAX_BATCH_BYTES >> self.cluster_bits));
        let runs = self.find_free(counts, wanted)?;
        let end = runs
            .iter()
            .map(|run| run.first + run.count)
            .max()
            .unwrap_or(0);
        self.extend(end)?;
        let mut zeroed = Vec::with_capacity(runs.len());
        for run in &runs {
            self.change(counts, run.first, run.count, |count| Some(count + 1))?;
            let fresh = run.first >= counts.fresh_from && !self.storage.is_block_device();
            zeroed.push(Run {
                zeroed: fresh || self.punch(*run)?,
                ..*run
            });
        }
        counts.fresh_from = counts.fresh_from.max(end);
        counts.hint = end;
        // Both what is counted now and what no longer refers to freed clusters.
        self.storage.sync()?;
        counts.reserved.extend(zeroed);
        self.release_unsynced(counts)?;
        counts.batch_clusters =
            (wanted * 2).clamp(1, (MAX_BATCH_BYTES >> self.cluster_bits).max(1));
        Ok(())
    }

    /// `wanted` free clusters, or those of a stretch that has some.
    fn find_free(&self, counts: &mut Counts, wanted: u64) -> io::Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut found = 0;
        let mut cluster = counts.hint;
        while found < wanted {
            self.check_end(cluster)?;
            self.ensure_block(counts, cluster / self.counts_per_block())?;
            let Some(free) = self.first_free_in_piece(counts, cluster)? else {
                cluster = (cluster / self.counts_per_piece() + 1) * self.counts_per_piece();
                continue;
            };
            cluster = free + 1;
            if self.metadata.contains(free) {
                continue;
            }
            found += 1;
            match runs.last_mut() {
                // Fresh clusters are a run of their own, because they need no hole.
                Some(last) if last.first + last.count == free && free != counts.fresh_from => {
                    last.count += 1;
                }
                _ => runs.push(Run {
                    first: free,
                    count: 1,
                    zeroed: false,
                }),
            }
        }
        Ok(runs)
    }

    fn find_side_by_side(&self, counts: &mut Counts, wanted: u64) -> io::Result<u64> {
        let mut first = counts.hint;
        let mut cluster = first;
        while cluster - first < wanted {
            self.check_end(cluster)?;
            self.ensure_block(counts, cluster / self.counts_per_block())?;
            if self.count(counts, cluster)? != 0 || self.metadata.contains(cluster) {
                first = cluster + 1;
            }
            cluster += 1;
        }
        Ok(first)
    }

    fn check_end(&self, cluster: u64) -> io::Result<()> {
        if cluster >= MAX_OFFSET >> self.cluster_bits {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }

    fn extend(&self, end: u64) -> io::Result<()> {
        self.storage.extend(end << self.cluster_bits)?;
        self.metadata.end.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    fn punch(&self, run: Run) -> io::Result<bool> {
        self.storage.punch(
            run.first << self.cluster_bits,
            run.count << self.cluster_bits,
        )
    }

    /// Makes a refcount block, if there is none for these clusters yet. It takes the first
    /// cluster that it counts.
    fn ensure_block(&self, counts: &mut Counts, block: u64) -> io::Result<()> {
        if block as usize >= counts.table.len() {
            self.grow_table(counts, block + 1)?;
        }
        if counts.table[block as usize] != 0 {
            return Ok(());
        }
        let cluster = block * self.counts_per_block();
        if self.metadata.contains(cluster) {
            return Err(broken("a table where nothing is counted"));
        }
        self.extend(cluster + 1)?;
        let mut content = Buffer::new(1 << self.cluster_bits);
        refcount::set(&mut content, self.order, 0, 1);
        let offset = cluster << self.cluster_bits;
        self.storage.write(&content, offset)?;
        self.storage.sync()?;
        let first = block / 64 * 64;
        let mut sector = Buffer::new(SECTOR_BYTES as usize);
        for (index, bytes) in (first..).zip(sector.chunks_exact_mut(8)) {
            let entry = match index == block {
                true => offset,
                false => counts.table.get(index as usize).copied().unwrap_or(0),
            };
            bytes.copy_from_slice(&entry.to_be_bytes());
        }
        self.storage
            .write(&sector, counts.table_offset + first * 8)?;
        counts.table[block as usize] = offset;
        counts.fresh_from = counts.fresh_from.max(cluster + 1);
        self.metadata.add([cluster]);
        Ok(())
    }

    /// Moves the refcount table behind all that is counted, with room for twice as much. The
    /// blocks that count the new table lie in front of it.
    fn grow_table(&self, counts: &mut Counts, blocks: u64) -> io::Result<()> {
        let per_block = self.counts_per_block();
        let old_blocks = counts.table.len() as u64;
        let cluster_bytes = 1 << self.cluster_bits;
        let entries_per_cluster = cluster_bytes / 8;
        let max_clusters = MAX_TABLE_BYTES.div_ceil(cluster_bytes);
        let mut new_blocks = 1;
        let table_clusters = loop {
            let needed = blocks.max(old_blocks * 2) + new_blocks;
            let clusters = needed.div_ceil(entries_per_cluster).min(max_clusters);
            let described = (new_blocks + clusters).div_ceil(per_block);
            if described == new_blocks {
                break clusters;
            }
            new_blocks = described;
        };
        if (old_blocks + new_blocks).max(blocks) > table_clusters * entries_per_cluster {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let first = old_blocks * per_block;
        let used = new_blocks + table_clusters;
        self.extend(first + used)?;
        let mut table = counts.table.clone();
        for index in 0..new_blocks {
            let mut content = Buffer::new(cluster_bytes as usize);
            let here = used.saturating_sub(index * per_block).min(per_block);
            for count in 0..here as usize {
                refcount::set(&mut content, self.order, count, 1);
            }
            let offset = (first + index) << self.cluster_bits;
            self.storage.write(&content, offset)?;
            table.push(offset);
        }
        table.resize((table_clusters * entries_per_cluster) as usize, 0);
        let mut content = Buffer::new(table.len() * 8);
        for (entry, bytes) in table.iter().zip(content.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&entry.to_be_bytes());
        }
        let table_first = first + new_blocks;
        let table_offset = table_first << self.cluster_bits;
        self.storage.write(&content, table_offset)?;
        self.storage.sync()?;
        header::rewrite(&self.storage, |sector| {
            put64(sector, at::REFCOUNT_TABLE_OFFSET, table_offset);
            put32(sector, at::REFCOUNT_TABLE_CLUSTERS, table_clusters as u32);
        })?;
        self.metadata.add(first..first + used);
        let old = counts.table_offset >> self.cluster_bits;
        let old_clusters = old..old + counts.table_clusters;
        self.metadata.remove(old_clusters);
        counts.unsynced.push(Run {
            first: old,
            count: counts.table_clusters,
            zeroed: false,
        });
        counts.table = table;
        counts.table_offset = table_offset;
        counts.table_clusters = table_clusters;
        counts.fresh_from = counts.fresh_from.max(first + used);
        Ok(())
    }

    fn counts_per_block(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    fn piece_bytes(&self) -> u64 {
        (1 << self.cluster_bits).min(MAX_PIECE_BYTES)
    }

    fn counts_per_piece(&self) -> u64 {
        (self.piece_bytes() * 8) >> self.order
    }

    /// The count of a cluster; 0 where there is no block.
    fn count(&self, counts: &mut Counts, cluster: u64) -> io::Result<u64> {
        let piece = cluster / self.counts_per_piece();
        let index = (cluster % self.counts_per_piece()) as usize;
        Ok(match self.piece(counts, piece)? {
            Some((bytes, _)) => refcount::get(bytes, self.order, index),
            None => 0,
        })
    }

    /// The first cluster from this one on, in its piece, whose count is 0.
    fn first_free_in_piece(&self, counts: &mut Counts, cluster: u64) -> io::Result<Option<u64>> {
        let per_piece = self.counts_per_piece();
        let (piece, order) = (cluster / per_piece, self.order);
        let Some((bytes, _)) = self.piece(counts, piece)? else {
            return Ok(Some(cluster));
        };
        let mut rest = cluster % per_piece..per_piece;
        let free = rest.find(|&index| refcount::get(bytes, order, index as usize) == 0);
        Ok(free.map(|index| piece * per_piece + index))
    }

    /// Changes the counts of clusters side by side, piece by piece. `None` leaves one as it is.
    fn change(
        &self,
        counts: &mut Counts,
        first: u64,
        count: u64,
        change: impl Fn(u64) -> Option<u64>,
    ) -> io::Result<()> {
        let per_piece = self.counts_per_piece();
        let mut cluster = first;
        while cluster < first + count {
            let piece = cluster / per_piece;
            let end = (first + count).min((piece + 1) * per_piece);
            let order = self.order;
            let Some((bytes, offset)) = self.piece(counts, piece)? else {
                return Err(broken("a cluster that is used and not counted"));
            };
            let mut new = Buffer::new(bytes.len());
            new.copy_from_slice(bytes);
            for index in cluster % per_piece..cluster % per_piece + (end - cluster) {
                let now = refcount::get(bytes, order, index as usize);
                if let Some(value) = change(now) {
                    if value > refcount::max(order) {
                        return Err(broken("a reference count that is as high as it can be"));
                    }
                    refcount::set(&mut new, order, index as usize, value);
                }
            }
            self.storage.write(&new, offset)?;
            counts.pieces.insert(piece, new);
            cluster = end;
        }
        Ok(())
    }

    /// A piece of a refcount block, and where it is in the file.
    fn piece<'a>(
        &self,
        counts: &'a mut Counts,
        piece: u64,
    ) -> io::Result<Option<(&'a Buffer, u64)>> {
        let per_block = self.counts_per_block() / self.counts_per_piece();
        let block = counts.table.get((piece / per_block) as usize).copied();
        let Some(block) = block.filter(|&block| block != 0) else {
            return Ok(None);
        };
        let offset = block + piece % per_block * self.piece_bytes();
        if !counts.pieces.contains_key(&piece) {
            let content = self.storage.read_new(offset, self.piece_bytes() as usize)?;
            if counts.pieces.len() >= MAX_PIECES
                && let Some(oldest) = counts.order.pop_front()
            {
                counts.pieces.remove(&oldest);
            }
            counts.pieces.insert(piece, content);
            counts.order.push_back(piece);
        }
        Ok(Some((&counts.pieces[&piece], offset)))
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::from(Error::corrupt(what))
}

/// The refcount table, whose entries were checked.
pub(crate) fn read_table(
    storage: &Storage,
    header: &Header,
    file_len: u64,
) -> Result<Vec<u64>, Error> {
    let len_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    if len_bytes == 0
        || header.refcount_table_offset + len_bytes
            > file_len.next_multiple_of(header.cluster_bytes())
    {
        return Err(Error::corrupt("a refcount table that is not in the file"));
    }
    let bytes = storage
        .read_new(header.refcount_table_offset, len_bytes as usize)
        .map_err(Error::io("read the refcount table"))?;
    let table: Vec<u64> = bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
    let mut seen = HashSet::new();
    for &entry in table.iter().filter(|&&entry| entry != 0) {
        if !entry.is_multiple_of(header.cluster_bytes()) || entry >= MAX_OFFSET {
            return Err(Error::corrupt(format!("a refcount block at {entry:#x}")));
        }
        if !seen.insert(entry) {
            return Err(Error::corrupt(format!("two refcount blocks at {entry:#x}")));
        }
    }
    Ok(table)
}

/// Numbers of the clusters that hold the header and the tables of an image.
///
/// # Errors
/// Two tables lie in the same cluster.
fn tables_of(header: &Header, refcount_table: &[u64], l1: &[u64]) -> Result<HashSet<u64>, Error> {
    let cluster_bits = header.cluster_bits;
    let l1_clusters = (u64::from(header.l1_entries) * 8).div_ceil(header.cluster_bytes());
    let l1_first = header.l1_offset >> cluster_bits;
    let table_first = header.refcount_table_offset >> cluster_bits;
    let mut clusters = HashSet::from([0]);
    let mut add = |cluster| {
        if clusters.insert(cluster) {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "two tables in the cluster at {:#x}",
            cluster << cluster_bits
        )))
    };
    (l1_first..l1_first + l1_clusters).try_for_each(&mut add)?;
    (table_first..table_first + u64::from(header.refcount_table_clusters))
        .try_for_each(&mut add)?;
    for &block in refcount_table.iter().filter(|&&block| block != 0) {
        add(block >> cluster_bits)?;
    }
    for &l1_entry in l1 {
        if let Some(table) = entry::l2_table(l1_entry, cluster_bits)? {
            if l1_entry & entry::COPIED == 0 {
                return Err(Error::corrupt(
                    "an L2 table that is shared, without a snapshot",
                ));
            }
            add(table >> cluster_bits)?;
        }
    }
    Ok(clusters)
}

/// Sorts runs, and joins those that touch and those of one cluster that was freed for each of
/// several references apart from the others.
fn merge(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_by_key(|run| run.first);
    let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.first + last.count == run.first => last.count += run.count,
            _ => merged.push(run),
        }
    }
    merged
}

/// How often each cluster is named, for [`Allocator::free`] of compressed data, which shares
/// clusters.
pub(crate) fn runs_of(clusters: impl IntoIterator<Item = u64>) -> Vec<Run> {
    let mut times: BTreeMap<u64, u64> = BTreeMap::new();
    for cluster in clusters {
        *times.entry(cluster).or_default() += 1;
    }
    let mut runs = Vec::new();
    for (first, times) in times {
        for _ in 0..times {
            runs.push(Run {
                first,
                count: 1,
                zeroed: false,
            });
        }
    }
    runs
}
