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

mod counts;
mod metadata;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use counts::read_table;
pub(crate) use metadata::Metadata;

use crate::epoch::Epochs;
use crate::error::Error;
use crate::header::{Header, MAX_OFFSET};
use crate::storage::Storage;
use counts::Counts;

/// A batch is between these sizes.
const MIN_BATCH_BYTES: u64 = 1 << 20;
const MAX_BATCH_BYTES: u64 = 64 << 20;
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

/// The allocator of one image that is written.
#[derive(Debug)]
pub(crate) struct Allocator {
    storage: Storage,
    cluster_bits: u32,
    order: u32,
    metadata: Arc<Metadata>,
    epochs: Arc<Epochs>,
    counts: Mutex<Counts>,
    /// See [`Allocator::count_late`].
    #[cfg(debug_assertions)]
    late: Mutex<Option<Vec<Run>>>,
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
        let tables = metadata::tables_of(header, &table, l1)?;
        let metadata = Arc::new(Metadata::default());
        metadata.end.store(end, Ordering::Release);
        metadata.add(tables);
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
            #[cfg(debug_assertions)]
            late: Mutex::default(),
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
        // In the order in which `reclaim` locks them.
        let draining = self.draining.lock().unwrap_or_else(PoisonError::into_inner);
        let freed = self.freed.lock().unwrap_or_else(PoisonError::into_inner);
        // What was let go just now has yet to be counted down: nobody else may do that.
        !freed.is_empty() || draining.is_some() || !self.lock().unsynced.is_empty()
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
            self.count_up(counts, *run)?;
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

    /// Writes counts of a batch only with the next one: what a crash test must find.
    #[cfg(debug_assertions)]
    pub(crate) fn count_late(&self) {
        *self.late.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    fn count_up(&self, counts: &mut Counts, run: Run) -> io::Result<()> {
        let due = vec![run];
        #[cfg(debug_assertions)]
        let due = match &mut *self.late.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(late) => std::mem::replace(late, due),
            None => due,
        };
        for run in due {
            self.change(counts, run.first, run.count, |count| Some(count + 1))?;
        }
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

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sorts runs and joins those that touch. A cluster that was freed once for each of several
/// references stays as often in the list.
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
