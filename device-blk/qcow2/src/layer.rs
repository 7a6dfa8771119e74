//! One image of a chain, and the walk down the chain to where bytes really are.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::alloc::Metadata;
use crate::entry::{Compressed, Mapping};
use crate::error::Error;
use crate::flat::Entry;
use crate::header::Header;
use crate::map::{Geometry, MapTable, Slice, read_l1, read_slice};
use crate::storage::{SECTOR_BYTES, Storage};

/// How an image's bytes are to be understood. Never guessed from the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Guest bytes are where the file has them.
    Raw,
    /// The subject of this crate.
    Qcow2,
}

/// An image that is open, to become part of a chain. It should be locked.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Open for reading, and for writing if it is the top of a chain that is written.
    pub file: Arc<File>,
    /// What it is, from whoever set the chain up.
    pub format: Format,
    /// If the description has `O_DIRECT`: the alignment of memory, at most 4096. Offsets and
    /// lengths of 512 bytes must be possible.
    pub mem_align_bytes: Option<usize>,
}

/// A layer in use.
#[derive(Debug)]
pub(crate) struct OpenLayer {
    pub(crate) spec: Layer,
    pub(crate) storage: Storage,
    /// Bytes of the disk that this layer decides about, in whole sectors. The live top's can
    /// grow; its own field says where it began.
    capacity_bytes: u64,
    /// Bytes of the file when it was opened.
    file_len: u64,
    table: Table,
}

#[derive(Debug)]
enum Table {
    Raw,
    Frozen { header: Header, l1: Box<[u64]> },
    Live(Arc<MapTable>, Arc<Metadata>),
}

/// Where some bytes of the disk come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Zeroes,
    File {
        layer: usize,
        offset: u64,
        /// The cluster belongs to nobody else.
        copied: bool,
    },
    Compressed {
        layer: usize,
        stretch: Compressed,
        /// Of the first byte in the inflated cluster.
        at: u64,
    },
    /// The map says something impossible.
    Broken,
}

impl OpenLayer {
    /// Opens a layer that is only read.
    pub(crate) fn frozen(spec: Layer) -> Result<(Self, Option<Header>), Error> {
        let storage = Storage::new(Arc::clone(&spec.file), spec.mem_align_bytes)
            .map_err(Error::io("inspect the image"))?;
        let file_len = storage
            .len_bytes()
            .map_err(Error::io("measure the image"))?;
        let (capacity_bytes, table, header) = match spec.format {
            Format::Raw => (file_len.next_multiple_of(SECTOR_BYTES), Table::Raw, None),
            Format::Qcow2 => {
                let header = Header::load(&storage)?;
                let l1 = read_l1(&storage, &header)?.into_boxed_slice();
                let table = Table::Frozen {
                    header: header.clone(),
                    l1,
                };
                (header.capacity_bytes, table, Some(header))
            }
        };
        let layer = Self {
            spec,
            storage,
            capacity_bytes,
            file_len,
            table,
        };
        Ok((layer, header))
    }

    /// The top of a chain that is written.
    pub(crate) fn live(
        spec: Layer,
        storage: Storage,
        table: Arc<MapTable>,
        metadata: Arc<Metadata>,
    ) -> Self {
        Self {
            spec,
            storage,
            capacity_bytes: u64::MAX,
            file_len: u64::MAX,
            table: Table::Live(table, metadata),
        }
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// `None` for raw.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        match &self.table {
            Table::Raw => None,
            Table::Frozen { header, .. } => Some(Geometry::of(header)),
            Table::Live(table, _) => Some(table.geometry()),
        }
    }

    /// Whether a data cluster can be here. What is only read cannot do harm.
    fn admits(&self, cluster: u64) -> bool {
        match &self.table {
            Table::Live(_, metadata) => metadata.admits(cluster),
            Table::Raw | Table::Frozen { .. } => true,
        }
    }

    fn slice(&self, geometry: Geometry, slice: u64) -> io::Result<Option<Slice>> {
        match &self.table {
            Table::Raw => Ok(None),
            Table::Live(table, _) => table.slice(slice),
            Table::Frozen { l1, .. } => match l1.get(geometry.l1_index(slice)) {
                Some(&l1_entry) => read_slice(&self.storage, geometry, l1_entry, slice),
                None => Ok(None),
            },
        }
    }
}

/// Walks down a chain, and keeps the slice of each layer that it used last.
#[derive(Debug)]
pub(crate) struct Walker<'a> {
    layers: &'a [OpenLayer],
    last: Vec<Option<(u64, Option<Slice>)>>,
    /// Slices of the first layer that were used, for whoever must know that they did not change.
    pub(crate) seen_on_top: Vec<(u64, Option<Slice>)>,
}

impl<'a> Walker<'a> {
    pub(crate) fn new(layers: &'a [OpenLayer]) -> Self {
        Self {
            layers,
            last: vec![None; layers.len()],
            seen_on_top: Vec::new(),
        }
    }

    /// Where the bytes at `offset` come from, seen from layer `from` down, and how many from
    /// there on have the same origin, at least.
    pub(crate) fn origin(&mut self, from: usize, offset: u64) -> io::Result<(Origin, u64)> {
        let mut len = u64::MAX;
        for (number, layer) in self.layers.iter().enumerate().skip(from) {
            if offset >= layer.capacity_bytes {
                return Ok((Origin::Zeroes, len));
            }
            len = len.min(layer.capacity_bytes - offset);
            let Some(geometry) = layer.geometry() else {
                let origin = Origin::File {
                    layer: number,
                    offset,
                    copied: false,
                };
                return Ok((origin, len));
            };
            let in_cluster = offset % geometry.cluster_bytes();
            len = len.min(geometry.cluster_bytes() - in_cluster);
            let raw = match self.entry(number, geometry, offset >> geometry.cluster_bits) {
                Ok(raw) => raw,
                Err(error) if is_broken(&error) => return Ok((Origin::Broken, len)),
                Err(error) => return Err(error),
            };
            let Ok(mapping) = Mapping::decode(raw, geometry.version, geometry.cluster_bits) else {
                return Ok((Origin::Broken, len));
            };
            match mapping {
                Mapping::Absent => {}
                Mapping::Zero { .. } => return Ok((Origin::Zeroes, len)),
                Mapping::Data(host) if !layer.admits(host.offset >> geometry.cluster_bits) => {
                    return Ok((Origin::Broken, len));
                }
                Mapping::Data(host) => {
                    let origin = Origin::File {
                        layer: number,
                        offset: host.offset + in_cluster,
                        copied: host.copied,
                    };
                    return Ok((origin, len));
                }
                Mapping::Compressed(stretch) => {
                    let origin = Origin::Compressed {
                        layer: number,
                        stretch,
                        at: in_cluster,
                    };
                    return Ok((origin, len));
                }
            }
        }
        Ok((Origin::Zeroes, len))
    }

    /// The raw entry that a layer has for a cluster of its own.
    pub(crate) fn entry(
        &mut self,
        number: usize,
        geometry: Geometry,
        cluster: u64,
    ) -> io::Result<u64> {
        let (slice, index) = geometry.slice_of(cluster);
        if self.last[number]
            .as_ref()
            .is_none_or(|(last, _)| *last != slice)
        {
            let found = self.layers[number].slice(geometry, slice)?;
            if number == 0 {
                self.seen_on_top.push((slice, found.clone()));
            }
            self.last[number] = Some((slice, found));
        }
        let (_, found) = self.last[number].as_ref().expect("just looked up");
        Ok(found.as_ref().map_or(0, |slice| slice[index]))
    }

    /// An origin of `len` bytes as an entry of the flat map, if it is one for a whole granule.
    pub(crate) fn flatten(&self, origin: Origin, len: u64, granule_bytes: u64) -> Entry {
        match origin {
            Origin::Zeroes if len >= granule_bytes => Entry::ZEROES,
            Origin::File {
                layer,
                offset,
                copied,
            } if len >= granule_bytes => {
                let opened = &self.layers[layer];
                let live = matches!(opened.table, Table::Live(..));
                if offset.saturating_add(granule_bytes) > opened.file_len {
                    Entry::WORK
                } else {
                    Entry::file(layer, offset, live && copied)
                }
            }
            _ => Entry::WORK,
        }
    }
}

/// Whether an error says that a table is impossible, and not that the kernel refused.
fn is_broken(error: &io::Error) -> bool {
    error.raw_os_error().is_none() && error.get_ref().is_some_and(|inner| inner.is::<Error>())
}
