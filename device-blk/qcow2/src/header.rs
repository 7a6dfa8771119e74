//! The header: the first cluster of an image, taken for hostile until every field was checked.
//!
//! Offsets and names follow QEMU's `docs/interop/qcow2.rst`. All numbers are big-endian.

use std::fs::File;
use std::sync::{Arc, PoisonError};

use crate::error::Error;
use crate::storage::{Buffer, SECTOR_BYTES, Storage};

pub(crate) const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bytes of a version 2 header.
const V2_LEN: usize = 72;
/// Bytes of a version 3 header with the compression type, as QEMU writes it.
pub(crate) const V3_LEN: usize = 112;
const MIN_CLUSTER_BITS: u32 = 9;
const MAX_CLUSTER_BITS: u32 = 21;
/// As QEMU: `QCOW_MAX_L1_SIZE`, in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;
/// As QEMU: `QCOW_MAX_REFTABLE_SIZE`, in bytes.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The specification's bound for the backing file's name.
const MAX_BACKING_NAME_BYTES: u32 = 1023;

/// Where a field lies.
pub(crate) mod at {
    pub(crate) const VERSION: usize = 4;
    pub(crate) const BACKING_OFFSET: usize = 8;
    pub(crate) const BACKING_LEN: usize = 16;
    pub(crate) const CLUSTER_BITS: usize = 20;
    pub(crate) const SIZE: usize = 24;
    pub(crate) const CRYPT_METHOD: usize = 32;
    pub(crate) const L1_SIZE: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(crate) const NUM_SNAPSHOTS: usize = 60;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const AUTOCLEAR: usize = 88;
    pub(crate) const REFCOUNT_ORDER: usize = 96;
    pub(crate) const HEADER_LEN: usize = 100;
    pub(crate) const COMPRESSION_TYPE: usize = 104;
}

/// Bits of `incompatible_features`.
pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1 << 0;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const EXTERNAL_DATA: u64 = 1 << 2;
    pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
}

/// Bit of `autoclear_features` that says that the bitmaps in the image are up to date.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

/// Types of header extensions.
pub(crate) mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
}

/// The image that an overlay is based on, as its header names it. A name in an image is input
/// from whoever wrote the image: it must not be opened without a look at where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// A file name, relative to the overlay's directory, or one of QEMU's pseudo-protocols.
    pub name: String,
    /// `raw`, `qcow2`, ...; `None` when the header leaves it to guessing, which is unsafe.
    pub format: Option<String>,
}

/// A checked header.
#[derive(Clone, Debug)]
pub struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) capacity_bytes: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) refcount_order: u32,
    pub(crate) num_snapshots: u32,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) has_bitmaps: bool,
    pub(crate) backing: Option<BackingRef>,
}

impl Header {
    /// Reads and checks the header of an image, without taking a lock.
    ///
    /// # Errors
    /// It is not a qcow2 image, has fields that cannot be, or needs what is not served; the
    /// text names the remedy.
    pub fn read(file: &File) -> Result<Self, Error> {
        let file = file
            .try_clone()
            .map_err(Error::io("duplicate the descriptor"))?;
        let storage = Storage::new(Arc::new(file), None).map_err(Error::io("inspect the image"))?;
        Self::load(&storage)
    }

    pub(crate) fn load(storage: &Storage) -> Result<Self, Error> {
        let first = storage
            .read_new(0, 4096)
            .map_err(Error::io("read the header"))?;
        if first[..4] != *MAGIC {
            return Err(Error::NotQcow2);
        }
        let cluster_bits = be32(&first, at::CLUSTER_BITS);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible"
            )));
        }
        let cluster = if cluster_bits > 12 {
            storage
                .read_new(0, 1 << cluster_bits)
                .map_err(Error::io("read the header"))?
        } else {
            first
        };
        Self::parse(&cluster[..1 << cluster_bits])
    }

    /// Parses the first cluster. `COMPRESSION_TYPE` and the like are refused here, because
    /// nothing in such an image can be read.
    pub(crate) fn parse(cluster: &[u8]) -> Result<Self, Error> {
        let version = be32(cluster, at::VERSION);
        if !matches!(version, 2 | 3) {
            return Err(Error::Version(version));
        }
        let cluster_bits = be32(cluster, at::CLUSTER_BITS);
        let (incompatible, autoclear, refcount_order, header_len) = if version == 2 {
            (0, 0, 4, V2_LEN)
        } else {
            (
                be64(cluster, at::INCOMPATIBLE),
                be64(cluster, at::AUTOCLEAR),
                be32(cluster, at::REFCOUNT_ORDER),
                be32(cluster, at::HEADER_LEN) as usize,
            )
        };
        let header_len_ok = if version == 2 {
            true
        } else {
            header_len >= at::COMPRESSION_TYPE && header_len.is_multiple_of(8)
        };
        if !header_len_ok || header_len > cluster.len() {
            return Err(Error::corrupt(format!("a header of {header_len} bytes")));
        }
        refuse_features(cluster, incompatible, header_len)?;
        if refcount_order > 6 {
            return Err(Error::corrupt(format!(
                "reference counts of 2^{refcount_order} bits"
            )));
        }
        match be32(cluster, at::CRYPT_METHOD) {
            0 => {}
            method => {
                return Err(Error::Unsupported {
                    feature: match method {
                        1 => "AES encryption inside qcow2".into(),
                        2 => "LUKS encryption inside qcow2".into(),
                        other => format!("encryption method {other}"),
                    },
                    remedy: "convert it to a plain image with `qemu-img convert`, and encrypt the volume instead",
                });
            }
        }
        let extensions = Extensions::parse(cluster, header_len)?;
        let header = Self {
            version,
            cluster_bits,
            capacity_bytes: be64(cluster, at::SIZE),
            l1_entries: be32(cluster, at::L1_SIZE),
            l1_offset: be64(cluster, at::L1_OFFSET),
            refcount_table_offset: be64(cluster, at::REFCOUNT_TABLE_OFFSET),
            refcount_table_clusters: be32(cluster, at::REFCOUNT_TABLE_CLUSTERS),
            refcount_order,
            num_snapshots: be32(cluster, at::NUM_SNAPSHOTS),
            incompatible,
            autoclear,
            has_bitmaps: extensions.has_bitmaps,
            backing: backing(cluster, extensions.backing_format)?,
        };
        header.check_tables()?;
        Ok(header)
    }

    fn check_tables(&self) -> Result<(), Error> {
        let cluster_bytes = self.cluster_bytes();
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(Error::corrupt(format!(
                "an L1 table of {} entries",
                self.l1_entries
            )));
        }
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster_bytes) {
            return Err(Error::corrupt(format!(
                "a refcount table of {} clusters",
                self.refcount_table_clusters
            )));
        }
        for (what, offset, len) in [
            ("the L1 table", self.l1_offset, l1_bytes),
            (
                "the refcount table",
                self.refcount_table_offset,
                table_bytes,
            ),
        ] {
            let fits = offset.checked_add(len).is_some_and(|end| end <= MAX_OFFSET);
            let is_missing = len > 0 && offset == 0;
            if is_missing || !offset.is_multiple_of(cluster_bytes) || !fits {
                return Err(Error::corrupt(format!("{what} at offset {offset:#x}")));
            }
        }
        if !self.capacity_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::Unsupported {
                feature: format!("a size of {} bytes, no whole sectors", self.capacity_bytes),
                remedy: "round it up with `qemu-img resize`",
            });
        }
        let needed = self.l1_entries_for(self.capacity_bytes);
        if needed > u64::from(self.l1_entries) {
            return Err(Error::corrupt(format!(
                "an L1 table of {} entries, where {} bytes need {needed}",
                self.l1_entries, self.capacity_bytes
            )));
        }
        Ok(())
    }

    /// Size of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// A power of two from 512 to 2 MiB.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What it is based on, if it is an overlay.
    pub fn backing(&self) -> Option<&BackingRef> {
        self.backing.as_ref()
    }

    /// Snapshots inside the image, which are not served but kept from harm.
    pub fn num_snapshots(&self) -> u32 {
        self.num_snapshots
    }

    /// Left by a program that ended without bringing the reference counts up to date.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Somebody found broken metadata in it.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// log2 of the entries of an L2 table.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3
    }

    pub(crate) fn l1_entries_for(&self, capacity_bytes: u64) -> u64 {
        let shift = self.cluster_bits + self.l2_bits();
        capacity_bytes.div_ceil(1 << shift)
    }

    /// What the specification allows for the L1 table.
    pub(crate) fn max_capacity_bytes(&self) -> u64 {
        let shift = self.cluster_bits + self.l2_bits();
        (MAX_L1_BYTES / 8).saturating_mul(1 << shift)
    }

    /// Refuses what must not be written.
    pub(crate) fn check_writable(&self) -> Result<(), Error> {
        if self.is_corrupt() {
            return Err(Error::NeedsRepair {
                mark: "corrupt",
                remedy: "repair it with `qemu-img check -r all IMAGE`, or serve it read-only to save what is there",
            });
        }
        if self.is_dirty() {
            return Err(Error::NeedsRepair {
                mark: "dirty: its reference counts are not up to date",
                remedy: "bring them up to date with `qemu-img check -r all IMAGE`",
            });
        }
        if self.num_snapshots > 0 {
            return Err(Error::Unsupported {
                feature: format!("{} internal snapshots", self.num_snapshots),
                remedy: "delete them with `qemu-img snapshot -d`, serve it read-only, or use it as the backing image of an overlay",
            });
        }
        Ok(())
    }
}

/// Offsets in tables have bits 9 to 55.
pub(crate) const MAX_OFFSET: u64 = 1 << 56;

fn refuse_features(cluster: &[u8], incompatible: u64, header_len: usize) -> Result<(), Error> {
    let refuse = |feature: String, remedy| Err(Error::Unsupported { feature, remedy });
    let convert = "convert it: qemu-img convert -O qcow2 IMAGE NEW";
    if incompatible & incompatible::EXTERNAL_DATA != 0 {
        return refuse("an external data file".into(), convert);
    }
    if incompatible & incompatible::EXTENDED_L2 != 0 {
        return refuse("extended L2 entries (subclusters)".into(), convert);
    }
    let kind = if header_len > at::COMPRESSION_TYPE {
        cluster[at::COMPRESSION_TYPE]
    } else {
        0
    };
    if incompatible & incompatible::COMPRESSION_TYPE != 0 || kind != 0 {
        let name = if kind == 1 { "zstd" } else { "unknown" };
        return refuse(
            format!("compression by another method than deflate ({name})"),
            "convert it: qemu-img convert -O qcow2 -o compression_type=zlib IMAGE NEW",
        );
    }
    let known = incompatible::DIRTY | incompatible::CORRUPT;
    match incompatible & !known {
        0 => Ok(()),
        unknown => refuse(
            format!("unknown incompatible features ({unknown:#x})"),
            convert,
        ),
    }
}

fn backing(cluster: &[u8], format: Option<String>) -> Result<Option<BackingRef>, Error> {
    let (offset, len) = (
        be64(cluster, at::BACKING_OFFSET),
        be32(cluster, at::BACKING_LEN),
    );
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset)
        .ok()
        .filter(|_| len <= MAX_BACKING_NAME_BYTES)
        .and_then(|offset| cluster.get(offset..offset.checked_add(len as usize)?))
        .ok_or_else(|| {
            Error::corrupt(format!(
                "a backing file name of {len} bytes at offset {offset:#x}"
            ))
        })?;
    let name = std::str::from_utf8(name)
        .ok()
        .filter(|name| !name.contains('\0'))
        .ok_or_else(|| Error::corrupt("a backing file name that is not text"))?;
    Ok(Some(BackingRef {
        name: name.to_owned(),
        format,
    }))
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    has_bitmaps: bool,
}

impl Extensions {
    fn parse(cluster: &[u8], header_len: usize) -> Result<Self, Error> {
        let mut found = Self::default();
        let mut rest = &cluster[header_len..];
        while rest.len() >= 8 {
            let (kind, len) = (be32(rest, 0), be32(rest, 4) as usize);
            if kind == extension::END {
                break;
            }
            let data = rest
                .get(8..8_usize.saturating_add(len))
                .ok_or_else(|| Error::corrupt(format!("a header extension of {len} bytes")))?;
            match kind {
                extension::BACKING_FORMAT => {
                    found.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                extension::BITMAPS => found.has_bitmaps = true,
                _ => {}
            }
            rest = rest.get(8 + len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(found)
    }
}

/// Changes fields of the header on disk, all in its first sector, which is written at once.
pub(crate) fn rewrite(storage: &Storage, change: impl FnOnce(&mut [u8])) -> Result<(), Error> {
    let _turn = storage
        .header_turn()
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let mut sector: Buffer = storage
        .read_new(0, SECTOR_BYTES as usize)
        .map_err(Error::io("read the header"))?;
    change(&mut sector);
    storage
        .write(&sector, 0)
        .map_err(Error::io("write the header"))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

pub(crate) fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}
