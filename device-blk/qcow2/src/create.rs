//! New images and overlays.
//!
//! Everything is laid out in one go: header, refcount table, refcount blocks, L1 table, and with
//! preallocation the L2 tables and the data. The header is written last, when the rest is on
//! stable storage: a file that was begun and not finished is not taken for an image.

use std::fs::File;
use std::sync::Arc;

use crate::entry::COPIED;
use crate::error::Error;
use crate::header::{BackingRef, Header, MAGIC, V3_LEN, at, extension, put32, put64};
use crate::refcount;
use crate::storage::{Buffer, SECTOR_BYTES, Storage};

/// As QEMU's default.
const DEFAULT_CLUSTER_BYTES: u32 = 64 << 10;
/// 16-bit reference counts, as version 2 has and QEMU makes.
const REFCOUNT_ORDER: u32 = 4;
/// Zeroes written at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// What to create.
#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    /// Size of the disk, in whole sectors of 512 bytes.
    pub capacity_bytes: u64,
    /// A power of two from 512 to 2 MiB; 0 for 64 KiB.
    pub cluster_bytes: u32,
    /// What the image is based on, with its format.
    pub backing: Option<BackingRef>,
    /// How much is allocated at once.
    pub preallocation: Preallocation,
}

/// What a new image has allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: the image grows as it is written.
    #[default]
    Off,
    /// The map of every cluster; the file is sparse.
    Metadata,
    /// Also the blocks of the file system.
    Falloc,
    /// Every byte is written.
    Full,
}

/// Makes a qcow2 image (version 3) of the empty `file`, which is open for reading and writing.
///
/// # Errors
/// The file is not empty, the options contradict one another, or the kernel refused.
pub fn create(file: &File, options: &CreateOptions) -> Result<(), Error> {
    let file = file
        .try_clone()
        .map_err(Error::io("duplicate the descriptor"))?;
    let storage = Storage::new(Arc::new(file), None).map_err(Error::io("inspect the file"))?;
    let len_bytes = storage.len_bytes().map_err(Error::io("measure the file"))?;
    if len_bytes != 0 && !storage.is_block_device() {
        return Err(Error::Invalid(format!(
            "a new image needs an empty file, and this one has {len_bytes} bytes; name another one"
        )));
    }
    let layout = Layout::plan(options)?;
    storage
        .extend(layout.end_clusters() << layout.cluster_bits)
        .map_err(Error::io("enlarge the file"))?;
    layout.write_refcounts(&storage)?;
    layout.write_l1(&storage)?;
    layout.write_l2(&storage)?;
    layout.prepare_data(&storage, options.preallocation)?;
    storage.sync().map_err(Error::io("flush the new image"))?;
    storage
        .write(&layout.header(options), 0)
        .map_err(Error::io("write the header"))?;
    storage.sync().map_err(Error::io("flush the new image"))
}

/// Cluster numbers of the new image's parts, one behind the other.
#[derive(Debug)]
struct Layout {
    cluster_bits: u32,
    capacity_bytes: u64,
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    /// 0 without preallocation, as are data clusters.
    l2_tables: u64,
    data_clusters: u64,
}

impl Layout {
    fn plan(options: &CreateOptions) -> Result<Self, Error> {
        let cluster_bytes = match options.cluster_bytes {
            0 => DEFAULT_CLUSTER_BYTES,
            bytes => bytes,
        };
        if !cluster_bytes.is_power_of_two() || !(512..=2 << 20).contains(&cluster_bytes) {
            return Err(Error::Invalid(format!(
                "clusters of {cluster_bytes} bytes; use a power of two from 512 to 2097152"
            )));
        }
        check_options(options)?;
        let cluster_bits = cluster_bytes.trailing_zeros();
        let capacity_bytes = options.capacity_bytes;
        let mut layout = Self {
            cluster_bits,
            capacity_bytes,
            table_clusters: 1,
            blocks: 1,
            l1_entries: 0,
            l2_tables: 0,
            data_clusters: 0,
        };
        let probe = layout.parsed_header();
        if capacity_bytes > probe.max_capacity_bytes() {
            return Err(Error::Invalid(format!(
                "{capacity_bytes} bytes are too many for clusters of {cluster_bytes}; {} are possible",
                probe.max_capacity_bytes()
            )));
        }
        layout.l1_entries = probe.l1_entries_for(capacity_bytes).max(1);
        if options.preallocation != Preallocation::Off {
            layout.l2_tables = probe.l1_entries_for(capacity_bytes);
            layout.data_clusters = capacity_bytes.div_ceil(u64::from(cluster_bytes));
        }
        // The table covers the whole disk at once, so that it hardly ever has to be moved.
        let whole_clusters = capacity_bytes.div_ceil(u64::from(cluster_bytes)) + layout.l1_entries;
        let whole_blocks =
            (whole_clusters + whole_clusters / 16).div_ceil(layout.counts_per_block());
        let max_table = (8_u64 << 20).div_ceil(u64::from(cluster_bytes));
        layout.table_clusters = (whole_blocks * 8)
            .div_ceil(u64::from(cluster_bytes))
            .clamp(1, max_table);
        loop {
            let needed = layout.end_clusters().div_ceil(layout.counts_per_block());
            if needed == layout.blocks {
                break;
            }
            layout.blocks = needed;
        }
        Ok(layout)
    }

    fn parsed_header(&self) -> Header {
        Header {
            version: 3,
            cluster_bits: self.cluster_bits,
            capacity_bytes: self.capacity_bytes,
            l1_entries: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            refcount_order: REFCOUNT_ORDER,
            num_snapshots: 0,
            incompatible: 0,
            autoclear: 0,
            has_bitmaps: false,
            backing: None,
        }
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn counts_per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> REFCOUNT_ORDER
    }

    fn first_block(&self) -> u64 {
        1 + self.table_clusters
    }

    fn first_l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    fn first_l2(&self) -> u64 {
        self.first_l1() + (self.l1_entries * 8).div_ceil(self.cluster_bytes())
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2_tables
    }

    fn end_clusters(&self) -> u64 {
        self.first_data() + self.data_clusters
    }

    fn write_refcounts(&self, storage: &Storage) -> Result<(), Error> {
        let failed = || Error::io("write the reference counts");
        let mut block = Buffer::new(self.cluster_bytes() as usize);
        for index in 0..self.blocks {
            let first = index * self.counts_per_block();
            let used = (self.end_clusters() - first).min(self.counts_per_block());
            block.fill(0);
            for count in 0..used as usize {
                refcount::set(&mut block, REFCOUNT_ORDER, count, 1);
            }
            let at = (self.first_block() + index) << self.cluster_bits;
            storage.write(&block, at).map_err(failed())?;
        }
        let entries =
            (0..self.blocks).map(|index| (self.first_block() + index) << self.cluster_bits);
        self.write_table(storage, 1, self.table_clusters, entries)
            .map_err(failed())
    }

    fn write_l1(&self, storage: &Storage) -> Result<(), Error> {
        let entries = (0..self.l2_tables)
            .map(|index| COPIED | (self.first_l2() + index) << self.cluster_bits);
        let clusters = self.first_l2() - self.first_l1();
        self.write_table(storage, self.first_l1(), clusters, entries)
            .map_err(Error::io("write the L1 table"))
    }

    fn write_l2(&self, storage: &Storage) -> Result<(), Error> {
        let entries = (0..self.data_clusters)
            .map(|index| COPIED | (self.first_data() + index) << self.cluster_bits);
        self.write_table(storage, self.first_l2(), self.l2_tables, entries)
            .map_err(Error::io("write the L2 tables"))
    }

    /// Writes `clusters` full of entries, and zeroes behind the last.
    fn write_table(
        &self,
        storage: &Storage,
        first: u64,
        clusters: u64,
        mut entries: impl Iterator<Item = u64>,
    ) -> std::io::Result<()> {
        let mut cluster = Buffer::new(self.cluster_bytes() as usize);
        for index in first..first + clusters {
            for bytes in cluster.chunks_exact_mut(8) {
                let entry = entries.next().unwrap_or(0);
                bytes.copy_from_slice(&entry.to_be_bytes());
            }
            storage.write(&cluster, index << self.cluster_bits)?;
        }
        Ok(())
    }

    fn prepare_data(&self, storage: &Storage, preallocation: Preallocation) -> Result<(), Error> {
        let start = self.first_data() << self.cluster_bits;
        let len_bytes = self.data_clusters << self.cluster_bits;
        match preallocation {
            Preallocation::Falloc if len_bytes > 0 => storage
                .allocate(start, len_bytes)
                .map_err(Error::io("allocate the data clusters")),
            Preallocation::Full => {
                let zeroes = Buffer::new(CHUNK_BYTES as usize);
                let mut done = 0;
                while done < len_bytes {
                    let len = CHUNK_BYTES.min(len_bytes - done);
                    storage
                        .write(&zeroes[..len as usize], start + done)
                        .map_err(Error::io("write the data clusters"))?;
                    done += len;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The first cluster.
    fn header(&self, options: &CreateOptions) -> Buffer {
        let mut bytes = Buffer::new(self.cluster_bytes() as usize);
        bytes[..4].copy_from_slice(MAGIC);
        put32(&mut bytes, at::VERSION, 3);
        put32(&mut bytes, at::CLUSTER_BITS, self.cluster_bits);
        put64(&mut bytes, at::SIZE, self.capacity_bytes);
        put32(&mut bytes, at::L1_SIZE, self.l1_entries as u32);
        put64(
            &mut bytes,
            at::L1_OFFSET,
            self.first_l1() << self.cluster_bits,
        );
        put64(&mut bytes, at::REFCOUNT_TABLE_OFFSET, self.cluster_bytes());
        put32(
            &mut bytes,
            at::REFCOUNT_TABLE_CLUSTERS,
            self.table_clusters as u32,
        );
        put32(&mut bytes, at::REFCOUNT_ORDER, REFCOUNT_ORDER);
        put32(&mut bytes, at::HEADER_LEN, V3_LEN as u32);
        if let Some(BackingRef { name, format }) = &options.backing {
            let format = format.as_deref().expect("checked");
            put32(&mut bytes, V3_LEN, extension::BACKING_FORMAT);
            put32(&mut bytes, V3_LEN + 4, format.len() as u32);
            let from = V3_LEN + 8;
            bytes[from..from + format.len()].copy_from_slice(format.as_bytes());
            let name_at = from + format.len().next_multiple_of(8) + 8;
            put64(&mut bytes, at::BACKING_OFFSET, name_at as u64);
            put32(&mut bytes, at::BACKING_LEN, name.len() as u32);
            bytes[name_at..name_at + name.len()].copy_from_slice(name.as_bytes());
        }
        bytes
    }
}

fn check_options(options: &CreateOptions) -> Result<(), Error> {
    let invalid = |what: String| Err(Error::Invalid(what));
    if !options.capacity_bytes.is_multiple_of(SECTOR_BYTES) {
        return invalid(format!(
            "a size of {} bytes; use a multiple of 512",
            options.capacity_bytes
        ));
    }
    let Some(backing) = &options.backing else {
        return Ok(());
    };
    if options.preallocation != Preallocation::Off {
        return invalid(
            "an overlay cannot be preallocated: it would hide its backing image".into(),
        );
    }
    match backing.format.as_deref() {
        Some("raw" | "qcow2") => {}
        Some(other) => {
            return invalid(format!(
                "a backing image in the {other} format; use raw or qcow2"
            ));
        }
        None => return invalid("a backing image without its format; say raw or qcow2".into()),
    }
    let cluster_bytes = match options.cluster_bytes {
        0 => DEFAULT_CLUSTER_BYTES,
        bytes => bytes,
    } as usize;
    let room = cluster_bytes.saturating_sub(V3_LEN + 8 + 8 + 8).min(1023);
    if backing.name.is_empty() || backing.name.len() > room || backing.name.contains('\0') {
        return invalid(format!(
            "a backing file name of {} bytes; 1 to {room} are possible",
            backing.name.len()
        ));
    }
    Ok(())
}
