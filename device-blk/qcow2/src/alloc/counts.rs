//! Reference counts: the table, the blocks, and the pieces of blocks that are in memory.
//!
//! Everything that is changed here is written first. Blocks are read and written in pieces of a
//! page; a new block counts itself, and a longer table takes blocks with it that count it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;

use super::{Allocator, Run};
use crate::error::Error;
use crate::header::{self, Header, MAX_OFFSET, at, be64, put32, put64};
use crate::refcount;
use crate::storage::{Buffer, SECTOR_BYTES, Storage};

/// Pieces are at most of this size.
const MAX_PIECE_BYTES: u64 = 4096;
/// Cached pieces (1 MiB).
const MAX_PIECES: usize = 256;
/// As QEMU: `QCOW_MAX_REFTABLE_SIZE`, in bytes.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// What the allocator knows, under its lock.
#[derive(Debug)]
pub(super) struct Counts {
    /// Offsets of refcount blocks; 0 for none.
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    pub(super) table_clusters: u64,
    pub(super) pieces: HashMap<u64, Buffer>,
    /// Oldest first.
    pub(super) order: VecDeque<u64>,
    /// No cluster below is free.
    pub(super) hint: u64,
    /// No cluster from here on was ever used.
    pub(super) fresh_from: u64,
    pub(super) reserved: VecDeque<Run>,
    pub(super) batch_clusters: u64,
    /// No longer used, and waiting for a flush.
    pub(super) unsynced: Vec<Run>,
}

impl Allocator {
    /// Makes a refcount block, if there is none for these clusters yet. It takes the first
    /// cluster that it counts.
    pub(super) fn ensure_block(&self, counts: &mut Counts, block: u64) -> io::Result<()> {
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

    pub(super) fn counts_per_block(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    fn piece_bytes(&self) -> u64 {
        (1 << self.cluster_bits).min(MAX_PIECE_BYTES)
    }

    pub(super) fn counts_per_piece(&self) -> u64 {
        (self.piece_bytes() * 8) >> self.order
    }

    /// The count of a cluster; 0 where there is no block.
    pub(super) fn count(&self, counts: &mut Counts, cluster: u64) -> io::Result<u64> {
        let piece = cluster / self.counts_per_piece();
        let index = (cluster % self.counts_per_piece()) as usize;
        Ok(match self.piece(counts, piece)? {
            Some((bytes, _)) => refcount::get(bytes, self.order, index),
            None => 0,
        })
    }

    /// The first cluster from this one on, in its piece, whose count is 0.
    pub(super) fn first_free_in_piece(
        &self,
        counts: &mut Counts,
        cluster: u64,
    ) -> io::Result<Option<u64>> {
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
    pub(super) fn change(
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
