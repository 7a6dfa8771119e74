//! Whether the reference counts are what the tables say.
//!
//! All tables are walked, and references counted; then every count in the image is compared.
//! Counts that are too low, and entries that cannot be, are corruptions: data is or may get lost.
//! Counts that are too high are leaks: space is lost, until it is repaired.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::alloc::{Allocator, Run, read_table};
use crate::entry::{self, COPIED, Host, Mapping};
use crate::epoch::Epochs;
use crate::error::Error;
use crate::header::{AUTOCLEAR_BITMAPS, Header, be64};
use crate::image::Image;
use crate::map::read_l1;
use crate::refcount;
use crate::storage::Storage;

/// Findings that are put into words.
const MAX_FINDINGS: usize = 20;
/// Clusters that can be counted, in four bytes each.
const MAX_CLUSTERS: u64 = 1 << 28;
/// How long those that use freed clusters are waited for.
const QUIET_PATIENCE: Duration = Duration::from_secs(10);
/// Runs of clusters whose counts are set between two looks whether the image may still be written.
const RUNS_AT_ONCE: usize = 64;

/// What to do about what is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is only read.
    Nothing,
    /// Give leaked clusters back, if there is no corruption.
    Leaks,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// References to what is not counted, and entries that cannot be.
    pub corruptions: u64,
    /// Counted more often than used, repaired ones included.
    pub leaked_clusters: u64,
    /// Leaks that are no more.
    pub repaired_clusters: u64,
    /// Guest clusters that have a host cluster.
    pub allocated_clusters: u64,
    /// The first findings, in words.
    pub findings: Vec<String>,
}

/// Checks an image that nobody uses; `file` is locked by the caller, for writing if leaks are to
/// be repaired. What the image is based on is not looked at.
///
/// # Errors
/// The kernel's, or the image is not one that can be checked.
pub fn check(file: &File, repair: Repair) -> Result<CheckReport, Error> {
    let file = file
        .try_clone()
        .map_err(Error::io("duplicate the descriptor"))?;
    let storage = Storage::new(Arc::new(file), None).map_err(Error::io("inspect the image"))?;
    let (mut report, leaks) = Walk::run(&storage)?;
    if repair == Repair::Leaks && report.corruptions == 0 && !leaks.is_empty() {
        let header = Header::load(&storage)?;
        header.check_writable()?;
        let l1 = read_l1(&storage, &header)?;
        let (allocator, _) = Allocator::open(storage, &header, &l1, Arc::new(Epochs::default()))?;
        report.repaired_clusters = give_back(&allocator, &leaks, &|| true)?;
    }
    Ok(report)
}

impl Image {
    /// Checks the top of the chain while it is used. Writes that need clusters wait meanwhile;
    /// others do not. Whether the image may be written is asked of `may_write` time and again.
    ///
    /// # Errors
    /// As [`check`], or requests in flight do not end, or the image may not be written any more.
    pub fn check(
        &self,
        repair: Repair,
        may_write: &dyn Fn() -> bool,
    ) -> Result<CheckReport, Error> {
        let Some(live) = &self.live else {
            return Walk::run(&self.layers[0].storage).map(|(report, _)| report);
        };
        let _resizing = live.resizing.lock();
        let _all = live.ranges.take(0..u64::MAX);
        if !may_write() {
            return Err(late());
        }
        live.allocator
            .settle(QUIET_PATIENCE)
            .map_err(Error::io("give reserved clusters back"))?;
        if live.allocator.has_users() {
            return Err(Error::Invalid(
                "requests in flight do not end; check the image again later".into(),
            ));
        }
        let (mut report, leaks) = Walk::run(&live.storage)?;
        if repair == Repair::Leaks && report.corruptions == 0 {
            report.repaired_clusters = give_back(&live.allocator, &leaks, may_write)?;
        }
        Ok(report)
    }
}

/// Sets the counts of leaked clusters, those side by side at once.
fn give_back(
    allocator: &Allocator,
    leaks: &[Leak],
    may_write: &dyn Fn() -> bool,
) -> Result<u64, Error> {
    let mut runs: Vec<(Run, u64)> = Vec::new();
    for leak in leaks {
        match runs.last_mut() {
            Some((run, used)) if run.first + run.count == leak.cluster && *used == leak.used => {
                run.count += 1;
            }
            _ => {
                let run = Run {
                    first: leak.cluster,
                    count: 1,
                    zeroed: false,
                };
                runs.push((run, leak.used));
            }
        }
    }
    for runs in runs.chunks(RUNS_AT_ONCE) {
        if !may_write() {
            return Err(late());
        }
        allocator
            .set_counts(runs)
            .map_err(Error::io("repair the reference counts"))?;
    }
    Ok(leaks.len() as u64)
}

fn late() -> Error {
    Error::Invalid(
        "the time is over that it may be written; check it again when that was extended".into(),
    )
}

/// A cluster whose count is too high.
struct Leak {
    cluster: u64,
    /// References that there are.
    used: u64,
}

struct Walk<'a> {
    storage: &'a Storage,
    header: Header,
    /// References found, by cluster of the file.
    used: Vec<u16>,
    /// What the image says; more than fits is as much as fits.
    counts: Vec<u16>,
    refcount_table: Vec<u64>,
    report: CheckReport,
}

impl<'a> Walk<'a> {
    fn run(storage: &'a Storage) -> Result<(CheckReport, Vec<Leak>), Error> {
        let header = Header::load(storage)?;
        refuse_what_is_not_walked(&header)?;
        let file_len = storage
            .len_bytes()
            .map_err(Error::io("measure the image"))?;
        let clusters = file_len.div_ceil(header.cluster_bytes());
        if clusters > MAX_CLUSTERS {
            return Err(Error::Unsupported {
                feature: format!("{clusters} clusters"),
                remedy: "check it with `qemu-img check`",
            });
        }
        let refcount_table = read_table(storage, &header, file_len)?;
        let mut walk = Self {
            storage,
            header,
            used: vec![0; clusters as usize],
            counts: vec![0; clusters as usize],
            refcount_table,
            report: CheckReport::default(),
        };
        let mut leaks = Vec::new();
        walk.load_counts(&mut leaks)
            .map_err(Error::io("read the reference counts"))?;
        walk.count_fixed_parts();
        walk.count_tables()?;
        walk.compare(&mut leaks);
        Ok((walk.report, leaks))
    }

    fn count_fixed_parts(&mut self) {
        let bits = self.header.cluster_bits;
        let l1_clusters =
            (u64::from(self.header.l1_entries) * 8).div_ceil(self.header.cluster_bytes());
        let l1_first = self.header.l1_offset >> bits;
        let table_first = self.header.refcount_table_offset >> bits;
        let table_clusters = u64::from(self.header.refcount_table_clusters);
        self.refer(0, "the header");
        for cluster in l1_first..l1_first + l1_clusters {
            self.refer(cluster, "the L1 table");
        }
        for cluster in table_first..table_first + table_clusters {
            self.refer(cluster, "the refcount table");
        }
        let blocks = std::mem::take(&mut self.refcount_table);
        for &block in blocks.iter().filter(|&&block| block != 0) {
            self.refer(block >> bits, "a refcount block");
        }
        self.refcount_table = blocks;
    }

    fn count_tables(&mut self) -> Result<(), Error> {
        let l1 = read_l1(self.storage, &self.header)?;
        for (index, &l1_entry) in l1.iter().enumerate() {
            let table = match entry::l2_table(l1_entry, self.header.cluster_bits) {
                Ok(Some(table)) => table,
                Ok(None) => continue,
                Err(error) => {
                    self.corrupt(format!("L1 entry {index}: {error}"));
                    continue;
                }
            };
            let what = format!("L1 entry {index}");
            if self.refer(table >> self.header.cluster_bits, &what) {
                self.check_copied(table, l1_entry & COPIED != 0, &what);
                self.count_l2(index as u64, table)?;
            }
        }
        Ok(())
    }

    fn count_l2(&mut self, l1_index: u64, table: u64) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let bytes = self
            .storage
            .read_new(table, 1 << bits)
            .map_err(Error::io("read an L2 table"))?;
        for (index, bytes) in bytes.chunks_exact(8).enumerate() {
            let raw = be64(bytes, 0);
            if raw == 0 {
                continue;
            }
            let cluster = (l1_index << self.header.l2_bits()) + index as u64;
            let what = || format!("guest cluster {cluster}");
            match Mapping::decode(raw, self.header.version, bits) {
                Ok(Mapping::Absent | Mapping::Zero { host: None }) => {}
                Ok(Mapping::Data(host) | Mapping::Zero { host: Some(host) }) => {
                    self.report.allocated_clusters += 1;
                    let Host { offset, copied } = host;
                    if self.refer(offset >> bits, &what()) {
                        self.check_copied(offset, copied, &what());
                    }
                }
                Ok(Mapping::Compressed(stretch)) => {
                    self.report.allocated_clusters += 1;
                    for host in stretch.clusters(bits) {
                        self.refer(host, &what());
                    }
                }
                Err(error) => self.corrupt(format!("{}: {error}", what())),
            }
        }
        Ok(())
    }

    /// Notes a reference. False when there is no such cluster.
    fn refer(&mut self, cluster: u64, what: &str) -> bool {
        match self.used.get_mut(cluster as usize) {
            Some(used) => {
                *used = used.saturating_add(1);
                true
            }
            None => {
                let offset = cluster << self.header.cluster_bits;
                self.corrupt(format!("{what}: offset {offset:#x} is behind the end"));
                false
            }
        }
    }

    /// An entry says truly whether its cluster belongs to it alone.
    fn check_copied(&mut self, offset: u64, copied: bool, what: &str) {
        let count = self.counts[(offset >> self.header.cluster_bits) as usize];
        if copied != (count == 1) {
            self.corrupt(format!(
                "{what}: marked as {}, and counted {count} times",
                if copied { "its own" } else { "shared" }
            ));
        }
    }

    /// Reads all counts. Those of clusters behind the end are leaks at once.
    fn load_counts(&mut self, leaks: &mut Vec<Leak>) -> io::Result<()> {
        let per_block = self.counts_per_block();
        let order = self.header.refcount_order;
        let blocks = self.refcount_table.clone();
        for (block, offset) in (0..).zip(blocks).filter(|(_, offset)| *offset != 0) {
            let content = self
                .storage
                .read_new(offset, 1 << self.header.cluster_bits)?;
            for index in 0..per_block {
                let count = refcount::get(&content, order, index as usize);
                let cluster = block * per_block + index;
                match self.counts.get_mut(cluster as usize) {
                    Some(known) => *known = u16::try_from(count).unwrap_or(u16::MAX),
                    None if count > 0 => {
                        self.leak(cluster, 0, count);
                        leaks.push(Leak { cluster, used: 0 });
                    }
                    None => {}
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, leaks: &mut Vec<Leak>) {
        for cluster in 0..self.used.len() {
            let (used, count) = (self.used[cluster], self.counts[cluster]);
            let (cluster, used) = (cluster as u64, u64::from(used));
            let count = u64::from(count);
            if count < used {
                self.corrupt(format!(
                    "cluster {cluster}: used {used} times, counted {count}"
                ));
            } else if count > used {
                self.leak(cluster, used, count);
                leaks.push(Leak { cluster, used });
            }
        }
    }

    fn counts_per_block(&self) -> u64 {
        (8 << self.header.cluster_bits) >> self.header.refcount_order
    }

    fn corrupt(&mut self, what: String) {
        self.report.corruptions += 1;
        self.note(what);
    }

    fn leak(&mut self, cluster: u64, used: u64, count: u64) {
        self.report.leaked_clusters += 1;
        self.note(format!(
            "cluster {cluster}: leaked, used {used} times, counted {count}"
        ));
    }

    fn note(&mut self, what: String) {
        if self.report.findings.len() < MAX_FINDINGS {
            self.report.findings.push(what);
        }
    }
}

fn refuse_what_is_not_walked(header: &Header) -> Result<(), Error> {
    let refuse = |feature: &str| {
        Err(Error::Unsupported {
            feature: feature.into(),
            remedy: "check it with `qemu-img check`",
        })
    };
    if header.num_snapshots > 0 {
        return refuse("internal snapshots");
    }
    if header.has_bitmaps && header.autoclear & AUTOCLEAR_BITMAPS != 0 {
        return refuse("persistent bitmaps");
    }
    Ok(())
}
