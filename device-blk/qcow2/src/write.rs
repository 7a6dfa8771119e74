//! Writes that need clusters, or clusters of another kind.
//!
//! A write takes its clusters' range, works out what each cluster is now, and goes through runs
//! of clusters that are treated alike: those that are written in place, and those that get a new
//! host cluster. Clusters that read zeroes are mapped in advance for a stream of writes. For the
//! others the order is: take clusters (counted already), write the data
//! and what surrounds it, then publish the new map. A write that is killed in between leaves
//! clusters that are counted and not used. One that is run a second time finds the clusters in
//! place.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::alloc::{Run, runs_of};
use crate::data::Source;
use crate::entry::{Host, Mapping};
use crate::image::{Image, Live};
use crate::publish::Changes;
use crate::storage::{Buffer, SECTOR_BYTES};

/// How much of a stream is mapped at once.
const AHEAD_BYTES: u64 = 4 << 20;
/// Clusters worked on at a time, which bounds what is reserved for one request.
const MAX_CLUSTERS: u64 = 256;

impl Image {
    /// Writes to the disk. Memory must be aligned as the top demands.
    ///
    /// # Errors
    /// The kernel's, or that the map is broken there. The bytes may have been written in part.
    pub fn write(&self, offset_bytes: u64, source: &dyn Source) -> io::Result<()> {
        let live = self.live()?;
        let len_bytes = source.len_bytes() as u64;
        self.check_range(offset_bytes, len_bytes)?;
        let bits = live.map.geometry().cluster_bits;
        let end = offset_bytes + len_bytes;
        let mut offset = offset_bytes;
        while offset < end {
            let first = offset >> bits;
            let to = end.min((first + MAX_CLUSTERS) << bits);
            let clusters = first..((to - 1) >> bits) + 1;
            let ahead = self.stream_of(live, offset..to, &clusters);
            let _taken = live.ranges.take(first..ahead.end.max(clusters.end));
            // The write may need less than this; if not, it will tell what is wrong.
            let _ = self.map_ahead(live, ahead);
            let piece = Piece {
                image: self,
                live,
                source,
                origin: offset_bytes,
            };
            piece.write(offset..to)?;
            self.load_page_of(offset);
            offset = to;
        }
        Ok(())
    }

    /// Lets queues find what was just written by themselves: by then the threads that would work
    /// the page out may all be waiting for a medium that takes no writes. Without the page it works
    /// as well.
    fn load_page_of(&self, offset_bytes: u64) {
        let granule = offset_bytes >> self.flat.granule_bits();
        if self.flat.stretch(granule, 1).is_none() {
            let _ = self.fill_page(granule / crate::flat::PAGE_GRANULES as u64);
        }
    }

    /// The clusters to map for a write that continues what was written last; none for others.
    fn stream_of(&self, live: &Live, range: Range<u64>, clusters: &Range<u64>) -> Range<u64> {
        let bits = live.map.geometry().cluster_bits;
        let last = live.stream_end.swap(range.end, Ordering::Relaxed);
        let maps_ahead = live.maps_ahead.load(Ordering::Relaxed);
        if !maps_ahead || last.abs_diff(range.start) > AHEAD_BYTES {
            return clusters.start..clusters.start;
        }
        let ahead = (AHEAD_BYTES >> bits).clamp(1, MAX_CLUSTERS);
        let whole_clusters = self.capacity_bytes() >> bits;
        let end = whole_clusters.min(clusters.start + ahead);
        live.stream_end.store(end << bits, Ordering::Relaxed);
        clusters.start..end.max(clusters.start)
    }

    /// Gives clusters that read zeroes a host cluster that does, too: the write itself and those
    /// that follow find them in place, and the map is written once for all.
    fn map_ahead(&self, live: &Live, clusters: Range<u64>) -> io::Result<()> {
        let bits = live.map.geometry().cluster_bits;
        let mut empty = clusters.start..clusters.start;
        for cluster in clusters {
            // What is wrong with a cluster is told to whoever writes it.
            let is_empty = matches!(
                self.mapping(live, cluster),
                Ok(Mapping::Absent | Mapping::Zero { host: None })
            );
            match (is_empty, empty.is_empty()) {
                (true, true) => empty = cluster..cluster + 1,
                (true, false) => empty.end += 1,
                (false, true) => {}
                (false, false) => break,
            }
        }
        while !empty.is_empty() && self.reads_zeroes(empty.start << bits..empty.end << bits)? {
            let run = live.allocator.take(empty.end - empty.start)?;
            if !run.zeroed {
                live.allocator.put_back(run);
                break;
            }
            self.publish(live, entries(empty.start, run, bits), false)?;
            empty.start += run.count;
        }
        Ok(())
    }

    /// What the top's map says about a cluster, whose range is taken.
    pub(crate) fn mapping(&self, live: &Live, cluster: u64) -> io::Result<Mapping> {
        let geometry = live.map.geometry();
        let raw = live.map.entry(cluster)?;
        let mapping = Mapping::decode(raw, geometry.version, geometry.cluster_bits)?;
        if let Mapping::Data(host) | Mapping::Zero { host: Some(host) } = mapping
            && !live.metadata.admits(host.offset >> geometry.cluster_bits)
        {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(mapping)
    }

    /// Whether all of a range reads zeroes without a look at the data.
    pub(crate) fn reads_zeroes(&self, range: Range<u64>) -> io::Result<bool> {
        let bits = self.flat.granule_bits();
        let mut granule = range.start >> bits;
        while granule << bits < range.end {
            let left = range.end.div_ceil(1 << bits) - granule;
            let found = self.flat.stretch(granule, left);
            let Some((entry, count)) = found else {
                self.fill_page(granule / crate::flat::PAGE_GRANULES as u64)?;
                if self.flat.stretch(granule, 1).is_none() {
                    return Ok(false);
                }
                continue;
            };
            if entry != crate::flat::Entry::ZEROES {
                return Ok(false);
            }
            granule += count;
        }
        Ok(true)
    }
}

/// Maps guest clusters from `first` on to those of `run`.
fn entries(first: u64, run: Run, bits: u32) -> Changes {
    (0..run.count)
        .map(|index| {
            let host = Host {
                offset: (run.first + index) << bits,
                copied: true,
            };
            (first + index, Mapping::Data(host).encode(bits))
        })
        .collect()
}

/// Part of a request.
struct Piece<'a> {
    image: &'a Image,
    live: &'a Live,
    source: &'a dyn Source,
    /// Where on the disk the source's first byte goes.
    origin: u64,
}

/// How a run of clusters is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    InPlace {
        host: u64,
    },
    /// The host cluster is there, but its content does not count.
    Kept {
        host: u64,
    },
    New,
}

impl Piece<'_> {
    fn write(&self, range: Range<u64>) -> io::Result<()> {
        let bits = self.live.map.geometry().cluster_bits;
        let mut offset = range.start;
        while offset < range.end {
            let (how, mut old) = self.how(offset >> bits)?;
            let first = offset >> bits;
            let mut next = first + 1;
            let mut replaced = Vec::new();
            while next << bits < range.end {
                let (other, other_old) = self.how(next)?;
                if other != how.after(next - first, bits) {
                    break;
                }
                replaced.extend(old);
                old = other_old;
                next += 1;
            }
            replaced.extend(old);
            let stretch = offset..range.end.min(next << bits);
            match how {
                How::InPlace { host } => {
                    let in_cluster = stretch.start & ((1 << bits) - 1);
                    self.copy(stretch.clone(), host + in_cluster)?;
                }
                How::Kept { host } => {
                    let run = Run {
                        first: host >> bits,
                        count: next - first,
                        zeroed: false,
                    };
                    let copied = self.fill(stretch.clone(), run)?;
                    self.publish(first, run, copied)?;
                }
                How::New => self.write_new(stretch.clone(), replaced)?,
            }
            offset = stretch.end;
        }
        Ok(())
    }

    /// How a cluster is to be written, and what it gives up.
    fn how(&self, cluster: u64) -> io::Result<(How, Option<Mapping>)> {
        let mapping = self.image.mapping(self.live, cluster)?;
        Ok(match mapping {
            Mapping::Data(Host {
                offset,
                copied: true,
            }) => (How::InPlace { host: offset }, None),
            Mapping::Zero {
                host:
                    Some(Host {
                        offset,
                        copied: true,
                    }),
            } => (How::Kept { host: offset }, None),
            Mapping::Compressed(_) => (How::New, Some(mapping)),
            // What is not marked as this image's own is not given back.
            Mapping::Absent | Mapping::Zero { .. } | Mapping::Data(_) => (How::New, None),
        })
    }

    fn write_new(&self, range: Range<u64>, replaced: Vec<Mapping>) -> io::Result<()> {
        let bits = self.live.map.geometry().cluster_bits;
        let mut offset = range.start;
        while offset < range.end {
            let first = offset >> bits;
            let run = self
                .live
                .allocator
                .take(range.end.div_ceil(1 << bits) - first)?;
            let stretch = offset..range.end.min((first + run.count) << bits);
            match self.fill(stretch.clone(), run) {
                Ok(copied) => self.publish(first, run, copied)?,
                Err(error) => {
                    let zeroed = false;
                    self.live.allocator.put_back(Run { zeroed, ..run });
                    return Err(error);
                }
            }
            offset = stretch.end;
        }
        let clusters = replaced.into_iter().filter_map(|mapping| match mapping {
            Mapping::Compressed(stretch) => Some(stretch.clusters(bits)),
            _ => None,
        });
        self.live.allocator.free(runs_of(clusters.flatten()), false);
        Ok(())
    }

    fn publish(&self, first: u64, run: Run, needs_sync: bool) -> io::Result<()> {
        let bits = self.live.map.geometry().cluster_bits;
        let changes = entries(first, run, bits);
        self.image.publish(self.live, changes, needs_sync)
    }

    /// Fills whole host clusters: with the data, and around it with what is there now. Returns
    /// whether there was something around it.
    fn fill(&self, range: Range<u64>, run: Run) -> io::Result<bool> {
        let bits = self.live.map.geometry().cluster_bits;
        let cluster_bytes = 1_u64 << bits;
        let first = range.start >> bits;
        let host_of = |offset: u64| (run.first << bits) + (offset - (first << bits));
        let head = (first << bits)..range.start;
        let tail = range.end..range.end.next_multiple_of(cluster_bytes);
        let keeps_head = self.must_keep(&head, run)?;
        let keeps_tail = self.must_keep(&tail, run)?;
        let mut plain = range.clone();
        if keeps_head {
            let border = range.end.min((first + 1) << bits);
            self.assemble(range.start..border, host_of(first << bits))?;
            plain.start = border;
        }
        if keeps_tail && plain.start < range.end {
            let border = plain.start.max((range.end - 1) >> bits << bits);
            self.assemble(border..range.end, host_of(border >> bits << bits))?;
            plain.end = border;
        }
        if plain.start < plain.end {
            self.copy(plain.clone(), host_of(plain.start))?;
        }
        Ok(keeps_head || keeps_tail)
    }

    /// Whether the host cluster lacks these bytes of the disk.
    fn must_keep(&self, range: &Range<u64>, run: Run) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(false);
        }
        let inside = range.start..range.end.min(self.image.capacity_bytes().max(range.start));
        Ok(!run.zeroed || !(inside.is_empty() || self.image.reads_zeroes(inside)?))
    }

    /// Writes one host cluster with data for `range` and what is there now around it.
    fn assemble(&self, range: Range<u64>, host: u64) -> io::Result<()> {
        let bits = self.live.map.geometry().cluster_bits;
        let start = range.start >> bits << bits;
        let mut cluster = Buffer::new(1 << bits);
        let end = (start + (1 << bits)).min(self.image.capacity_bytes());
        for around in [start..range.start, range.end..end] {
            if !around.is_empty() {
                let at = (around.start - start) as usize;
                let mut into = &mut cluster[at..at + (around.end - around.start) as usize];
                self.read_aligned(around.start, &mut into)?;
            }
        }
        let at = (range.start - start) as usize;
        let len = (range.end - range.start) as usize;
        let from = (range.start - self.origin) as usize;
        self.source.get(from, &mut cluster[at..at + len]);
        self.live.storage.write(&cluster, host)
    }

    /// Reads through a buffer of its own where the memory may not suit a layer.
    fn read_aligned(&self, offset: u64, into: &mut &mut [u8]) -> io::Result<()> {
        let mut buffer = Buffer::new(into.len());
        let mut sink: &mut [u8] = &mut buffer;
        self.image.read(offset, &mut sink)?;
        into.copy_from_slice(&buffer);
        Ok(())
    }

    /// Writes the data for `range` to the file.
    fn copy(&self, range: Range<u64>, host: u64) -> io::Result<()> {
        let storage = &self.live.storage;
        let from = (range.start - self.origin) as usize;
        let len = (range.end - range.start) as usize;
        if storage
            .mem_align_bytes()
            .is_some_and(|align| align > SECTOR_BYTES as usize)
        {
            let mut buffer = Buffer::new(len);
            self.source.get(from, &mut buffer);
            return storage.write(&buffer, host);
        }
        self.source.write_to(from, len, storage.file(), host)
    }
}

impl How {
    /// What the cluster `count` behind must be, to be treated in one go with this one.
    fn after(self, count: u64, bits: u32) -> Self {
        match self {
            Self::InPlace { host } => Self::InPlace {
                host: host + (count << bits),
            },
            Self::Kept { host } => Self::Kept {
                host: host + (count << bits),
            },
            Self::New => Self::New,
        }
    }
}
