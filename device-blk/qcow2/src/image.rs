//! A chain of images as one disk: opening, looking up, reading.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::alloc::{Allocator, Metadata};
use crate::compressed::Inflated;
use crate::data::Sink;
use crate::entry::Mapping;
use crate::epoch::{Epochs, Ticket};
use crate::error::Error;
use crate::flat::{Entry, FlatMap, PAGE_GRANULES};
use crate::header::{self, BackingRef, Header, at, put64};
use crate::layer::{Format, Layer, OpenLayer, Origin, Walker};
use crate::map::{MapTable, read_l1};
use crate::publish::{Changes, Publisher, Target};
use crate::ranges::Ranges;
use crate::storage::{SECTOR_BYTES, Storage};

/// Images of a chain. Each costs a look-up where those above it have nothing.
pub const MAX_LAYERS: usize = 64;
/// How often a page is worked out anew because the map changed meanwhile, before its reader
/// goes on without.
const MAX_FILLS: usize = 16;
/// How long freed clusters are waited for when an image is left.
const SETTLE_PATIENCE: Duration = Duration::from_secs(2);

/// What a place is looked up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The bytes as they are.
    Read,
    /// Where they can be overwritten.
    Write,
}

/// Where bytes of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file of the chain.
    File {
        /// Its number: 0 is the top.
        layer: usize,
        /// Where in the file.
        offset_bytes: u64,
        /// How many from there on.
        len_bytes: u64,
        /// To be [released](Image::release) when the I/O is over.
        ticket: Option<Ticket>,
    },
    /// Nowhere: zeroes.
    Zeroes {
        /// How many.
        len_bytes: u64,
    },
    /// Not known without waiting, or not writable in place.
    Worker {
        /// How many.
        len_bytes: u64,
    },
}

/// What an image is.
#[derive(Clone, Debug)]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// A power of two from 512 to 2 MiB.
    pub cluster_bytes: u64,
    /// Size of the disk.
    pub capacity_bytes: u64,
    /// What the header says the image is based on.
    pub backing: Option<BackingRef>,
    /// Images in the chain, this one included.
    pub layers: usize,
}

/// A qcow2 image with all it is based on.
///
/// [`locate`](Self::locate) and [`release`](Self::release) never wait; everything else does.
#[derive(Debug)]
pub struct Image {
    pub(crate) layers: Vec<OpenLayer>,
    header: Header,
    capacity_bytes: AtomicU64,
    pub(crate) flat: FlatMap,
    pub(crate) epochs: Arc<Epochs>,
    /// `None` when the image is only read.
    pub(crate) live: Option<Live>,
    inflated: Mutex<Inflated>,
    /// Who puts a page into the flat map of an image that is only read.
    installing: Mutex<()>,
}

/// What writing takes.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) storage: Storage,
    pub(crate) map: Arc<MapTable>,
    pub(crate) metadata: Arc<Metadata>,
    pub(crate) allocator: Allocator,
    pub(crate) publisher: Publisher,
    pub(crate) ranges: Ranges,
    pub(crate) resizing: Mutex<()>,
    /// Whether streams of writes are mapped in advance.
    pub(crate) maps_ahead: AtomicBool,
    /// How far the clusters of a stream of writes are mapped, roughly.
    pub(crate) stream_end: AtomicU64,
}

impl Image {
    /// Opens a chain, the top first, which must be qcow2. Each file must be locked by the caller.
    ///
    /// # Errors
    /// A header that is broken or needs what is not served; a chain that ends too early or is
    /// too long; an image that must not be written.
    pub fn open(mut layers: Vec<Layer>, read_only: bool) -> Result<Self, Error> {
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return Err(Error::Invalid(format!(
                "a chain of {} images; 1 to {MAX_LAYERS} are possible",
                layers.len()
            )));
        }
        if layers[0].format != Format::Qcow2 {
            return Err(Error::Invalid("the top of a qcow2 chain is raw".into()));
        }
        let lower = layers.split_off(1);
        let top = layers.pop().expect("one was left");
        let storage = Storage::new(Arc::clone(&top.file), top.mem_align_bytes)
            .map_err(Error::io("inspect the image"))?;
        let mut header = Header::load(&storage)?;
        let mut below = Vec::with_capacity(lower.len());
        let mut above = Some(header.clone());
        for spec in lower {
            check_has_backing(above.as_ref())?;
            let (layer, its_header) = OpenLayer::frozen(spec)?;
            below.push(layer);
            above = its_header;
        }
        if let Some(backing) = above.as_ref().and_then(Header::backing) {
            return Err(Error::NoBacking {
                name: backing.name.clone(),
            });
        }
        // Changes the image, so all else must be well.
        let epochs = Arc::new(Epochs::default());
        let (first, live) = if read_only {
            (OpenLayer::frozen(top)?.0, None)
        } else {
            let live = Live::open(storage.clone(), &mut header, Arc::clone(&epochs))?;
            let map = Arc::clone(&live.map);
            let metadata = Arc::clone(&live.metadata);
            (OpenLayer::live(top, storage, map, metadata), Some(live))
        };
        let opened: Vec<_> = std::iter::once(first).chain(below).collect();
        let granule_bits = opened
            .iter()
            .filter_map(OpenLayer::geometry)
            .map(|geometry| geometry.cluster_bits)
            .min()
            .expect("the top is qcow2");
        Ok(Self {
            flat: FlatMap::new(header.capacity_bytes, granule_bits),
            layers: opened,
            capacity_bytes: AtomicU64::new(header.capacity_bytes),
            header,
            epochs,
            live,
            inflated: Mutex::default(),
            installing: Mutex::default(),
        })
    }

    /// Size of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Acquire)
    }

    pub(crate) fn set_capacity_bytes(&self, capacity_bytes: u64) {
        self.capacity_bytes.store(capacity_bytes, Ordering::Release);
    }

    /// Nothing can be written.
    pub fn is_read_only(&self) -> bool {
        self.live.is_none()
    }

    /// What the image is.
    pub fn info(&self) -> Info {
        Info {
            version: self.header.version,
            cluster_bytes: self.header.cluster_bytes(),
            capacity_bytes: self.capacity_bytes(),
            backing: self.header.backing.clone(),
            layers: self.layers.len(),
        }
    }

    /// The files of the chain, top first: for opening another chain on top of it.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().map(|layer| &layer.spec)
    }

    /// Whether discarded clusters read zeroes afterwards and are given back: version 2 has no way
    /// to hide a backing image.
    pub fn discards(&self) -> bool {
        self.live.is_some() && self.can_hide()
    }

    pub(crate) fn can_hide(&self) -> bool {
        self.header.version >= 3 || self.layers.len() == 1
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Where the bytes from `offset_bytes` on are, for the first stretch of at most `len_bytes`,
    /// which must not be 0.
    #[inline]
    pub fn locate(&self, access: Access, offset_bytes: u64, len_bytes: u64) -> Place {
        let ticket = self.live.is_some().then(|| self.epochs.enter());
        let place = self.look_up(access, offset_bytes, len_bytes, ticket);
        if !matches!(place, Place::File { layer: 0, .. })
            && let Some(ticket) = ticket
        {
            self.epochs.leave(ticket);
        }
        place
    }

    fn look_up(
        &self,
        access: Access,
        offset_bytes: u64,
        len_bytes: u64,
        ticket: Option<Ticket>,
    ) -> Place {
        let bits = self.flat.granule_bits();
        let granule = offset_bytes >> bits;
        let in_granule = offset_bytes & ((1 << bits) - 1);
        let wanted = (in_granule + len_bytes).div_ceil(1 << bits);
        let Some((entry, granules)) = self.flat.stretch(granule, wanted) else {
            return Place::Worker { len_bytes };
        };
        let len_bytes = len_bytes.min((granules << bits) - in_granule);
        match (entry.as_file(), access) {
            (Some((layer, offset)), Access::Read) => Place::File {
                layer,
                offset_bytes: offset + in_granule,
                len_bytes,
                ticket: ticket.filter(|_| layer == 0),
            },
            (Some((layer, offset)), Access::Write) if entry.is_writable() => Place::File {
                layer,
                offset_bytes: offset + in_granule,
                len_bytes,
                ticket,
            },
            (None, Access::Read) if entry == Entry::ZEROES => Place::Zeroes { len_bytes },
            _ => Place::Worker { len_bytes },
        }
    }

    /// The I/O is over that the ticket was for.
    #[inline]
    pub fn release(&self, ticket: Ticket) {
        self.epochs.leave(ticket);
    }

    /// Reads from the disk. Memory must be aligned as the layers demand.
    ///
    /// # Errors
    /// The kernel's, or that the map is broken there.
    pub fn read(&self, offset_bytes: u64, sink: &mut dyn Sink) -> io::Result<()> {
        let len_bytes = sink.len_bytes() as u64;
        self.check_range(offset_bytes, len_bytes)?;
        let mut done = 0;
        while done < len_bytes {
            let (at, left) = (done as usize, len_bytes - done);
            let offset = offset_bytes + done;
            done += match self.locate(Access::Read, offset, left) {
                Place::Zeroes { len_bytes } => {
                    sink.put_zeroes(at, len_bytes as usize);
                    len_bytes
                }
                Place::File {
                    layer,
                    offset_bytes,
                    len_bytes,
                    ticket,
                } => {
                    let read = self.read_file(layer, offset_bytes, sink, at, len_bytes as usize);
                    if let Some(ticket) = ticket {
                        self.release(ticket);
                    }
                    read?;
                    len_bytes
                }
                Place::Worker { .. } => self.read_slowly(offset, left, sink, at)?,
            };
        }
        Ok(())
    }

    /// Works out the page, and reads from the granule if the page does not help.
    fn read_slowly(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn Sink,
        at: usize,
    ) -> io::Result<u64> {
        let granule = offset >> self.flat.granule_bits();
        if self.flat.stretch(granule, 1).is_none() {
            self.fill_page(granule / PAGE_GRANULES as u64)?;
            if matches!(
                self.flat.stretch(granule, 1),
                Some((entry, _)) if entry != Entry::WORK
            ) {
                return Ok(0);
            }
        }
        let ticket = self.epochs.enter();
        let read = self.read_origin(offset, len, sink, at);
        self.epochs.leave(ticket);
        read
    }

    fn read_origin(
        &self,
        offset: u64,
        len: u64,
        sink: &mut dyn Sink,
        at: usize,
    ) -> io::Result<u64> {
        let (origin, here) = Walker::new(&self.layers).origin(0, offset)?;
        let len = len.min(here);
        match origin {
            Origin::Zeroes => sink.put_zeroes(at, len as usize),
            Origin::File { layer, offset, .. } => {
                let bytes = self.layers[layer].storage.read_new(offset, len as usize)?;
                sink.put(at, &bytes);
            }
            Origin::Compressed {
                layer,
                stretch,
                at: from,
            } => {
                let layer = &self.layers[layer];
                let geometry = layer.geometry().expect("raw is not compressed");
                let cluster = crate::compressed::inflate(
                    &layer.storage,
                    stretch,
                    geometry.cluster_bytes() as usize,
                    &self.inflated,
                )?;
                sink.put(at, &cluster[from as usize..(from + len) as usize]);
            }
            Origin::Broken => return Err(io::Error::from_raw_os_error(libc::EIO)),
        }
        Ok(len)
    }

    fn read_file(
        &self,
        layer: usize,
        offset: u64,
        sink: &mut dyn Sink,
        at: usize,
        len: usize,
    ) -> io::Result<()> {
        let storage = &self.layers[layer].storage;
        if storage
            .mem_align_bytes()
            .is_some_and(|align| align > SECTOR_BYTES as usize)
        {
            let bytes = storage.read_new(offset, len)?;
            sink.put(at, &bytes);
            return Ok(());
        }
        let read = sink.read_from(at, len, storage.file(), offset)?;
        sink.put_zeroes(at + read, len - read);
        Ok(())
    }

    /// Puts the page into the flat map.
    pub(crate) fn fill_page(&self, page: u64) -> io::Result<()> {
        for _ in 0..MAX_FILLS {
            let mut walker = Walker::new(&self.layers);
            let capacity_bytes = self.capacity_bytes();
            let entries = self.work_out(page, &mut walker)?;
            match &self.live {
                None => {
                    let _turn = self.installing.lock();
                    self.flat.install(page, &entries);
                    return Ok(());
                }
                Some(live) => {
                    let seen = &walker.seen_on_top;
                    let mut is_current = true;
                    let install = || {
                        // What was looked at ended at the old end if the disk grew meanwhile.
                        is_current = self.capacity_bytes() == capacity_bytes;
                        if is_current {
                            self.flat.install(page, &entries);
                        }
                    };
                    if live.map.if_current(seen, install) && is_current {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn work_out(&self, page: u64, walker: &mut Walker<'_>) -> io::Result<[Entry; PAGE_GRANULES]> {
        let granule_bytes = 1 << self.flat.granule_bits();
        let first = page * PAGE_GRANULES as u64 * granule_bytes;
        let capacity_bytes = self.capacity_bytes();
        let mut entries = [Entry::ZEROES; PAGE_GRANULES];
        let mut index = 0;
        while index < PAGE_GRANULES {
            let offset = first + index as u64 * granule_bytes;
            if offset >= capacity_bytes {
                break;
            }
            let (origin, len) = walker.origin(0, offset)?;
            entries[index] = walker.flatten(origin, len, granule_bytes);
            index += 1;
        }
        Ok(entries)
    }

    /// Shows a new entry of the top to the queues; without one they ask anew. Only under the map's
    /// lock.
    fn show(&self, live: &Live, cluster: u64, raw: Option<u64>) {
        let geometry = live.map.geometry();
        let granules = geometry.cluster_bytes() >> self.flat.granule_bits();
        let Some(raw) = raw else {
            for index in 0..granules {
                self.flat.forget(cluster * granules + index);
            }
            return;
        };
        for index in 0..granules {
            let at = index << self.flat.granule_bits();
            let entry = match Mapping::decode(raw, geometry.version, geometry.cluster_bits) {
                Ok(Mapping::Data(host)) => Entry::file(0, host.offset + at, host.copied),
                // Absent only where there is no backing image.
                Ok(Mapping::Zero { .. } | Mapping::Absent) => Entry::ZEROES,
                Ok(Mapping::Compressed(_)) | Err(_) => Entry::WORK,
            };
            self.flat.update(cluster * granules + index, entry);
        }
    }

    pub(crate) fn publish(
        &self,
        live: &Live,
        changes: Changes,
        needs_sync: bool,
    ) -> io::Result<()> {
        let show = |cluster, raw| self.show(live, cluster, raw);
        let target = Target {
            storage: &live.storage,
            map: &live.map,
            allocator: &live.allocator,
            metadata: &live.metadata,
            show: &show,
        };
        live.publisher.publish(&target, changes, needs_sync)
    }

    /// Puts everything that was written on stable storage. The file of the top alone has changed:
    /// a flush of it by other means does the same.
    ///
    /// # Errors
    /// The kernel's.
    pub fn flush(&self) -> io::Result<()> {
        match &self.live {
            Some(live) => live.storage.sync(),
            None => Ok(()),
        }
    }

    /// Maps clusters that follow a stream of writes in advance, so that queues find them in place.
    /// They read zeroes as before, but are the image's own from then on. Not for an image that is
    /// to be put over another one later, as an increment is: it would hide what is below.
    pub fn map_streams_ahead(&self) {
        if let Some(live) = &self.live {
            live.maps_ahead.store(true, Ordering::Relaxed);
        }
    }

    /// Breaks the order that keeps the image sound when its writer is killed, so that a crash test
    /// can show that it would notice. Not in release builds.
    #[cfg(debug_assertions)]
    #[doc(hidden)]
    pub fn count_late(&self) {
        if let Some(live) = &self.live {
            live.allocator.count_late();
        }
    }

    /// Whether writes that were completed may never reach the storage: no flush succeeds any
    /// more.
    pub fn has_lost_writes(&self) -> bool {
        self.layers[0].storage.has_lost_writes()
    }

    /// A flush of the top's file by other means failed.
    pub fn note_failed_flush(&self) {
        self.layers[0].storage.note_failed_sync();
    }

    /// Gives back clusters that are reserved or were freed. For an image that will not be written
    /// for a while: before it is closed, or becomes a backing image. Without it, they are leaked.
    ///
    /// # Errors
    /// The kernel's.
    pub fn settle(&self) -> io::Result<()> {
        match &self.live {
            Some(live) => live.allocator.settle(SETTLE_PATIENCE),
            None => Ok(()),
        }
    }

    pub(crate) fn live(&self) -> io::Result<&Live> {
        self.live
            .as_ref()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EROFS))
    }

    pub(crate) fn check_range(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let whole = (offset_bytes | len_bytes).is_multiple_of(SECTOR_BYTES);
        let inside = offset_bytes
            .checked_add(len_bytes)
            .is_some_and(|end| end <= self.capacity_bytes());
        if whole && inside {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

impl Live {
    fn open(storage: Storage, header: &mut Header, epochs: Arc<Epochs>) -> Result<Self, Error> {
        header.check_writable()?;
        let l1 = read_l1(&storage, header)?;
        let (allocator, metadata) = Allocator::open(storage.clone(), header, &l1, epochs)?;
        // A last cluster that the file has in part only would not be readable in one piece.
        if !storage.is_block_device() {
            let len_bytes = storage
                .len_bytes()
                .map_err(Error::io("measure the image"))?;
            storage
                .extend(len_bytes.next_multiple_of(header.cluster_bytes()))
                .map_err(Error::io("round the image up to a cluster"))?;
        }
        if header.autoclear != 0 {
            // Bitmaps and whatever else would have to be kept up to date.
            header::rewrite(&storage, |sector| put64(sector, at::AUTOCLEAR, 0))?;
            storage.sync().map_err(Error::io("flush the header"))?;
            header.autoclear = 0;
        }
        Ok(Self {
            map: Arc::new(MapTable::new(storage.clone(), header, l1)),
            storage,
            metadata,
            allocator,
            publisher: Publisher::default(),
            ranges: Ranges::default(),
            resizing: Mutex::default(),
            maps_ahead: AtomicBool::default(),
            stream_end: AtomicU64::default(),
        })
    }
}

fn check_has_backing(header: Option<&Header>) -> Result<(), Error> {
    match header {
        None => Err(Error::Invalid(
            "a raw image has no backing image; the chain goes on behind one".into(),
        )),
        Some(header) if header.backing.is_none() => Err(Error::Invalid(
            "a backing image was named for an image that has none; leave it out".into(),
        )),
        Some(_) => Ok(()),
    }
}
