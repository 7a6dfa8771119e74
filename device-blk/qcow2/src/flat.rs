//! The whole chain's map, flattened: for each granule of the disk the file and offset its bytes
//! are at, for lookups without a lock.
//!
//! A granule is the smallest cluster of the chain. Pages of 512 granules are kept in a
//! set-associative cache of bounded size. Each slot is a sequence lock: a page is replaced between
//! two steps of its version, and a reader that saw the version change takes it for a miss. Single
//! entries are changed in place. Memory of a slot is never freed, so that readers need no
//! protection from that. Writers take turns under a lock of their caller's.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Granules of a page: with 64 KiB clusters one page maps 32 MiB in 4 KiB.
pub(crate) const PAGE_GRANULES: usize = 512;
/// Pages at most: 16 MiB, which map 128 GiB of 64 KiB clusters.
const MAX_PAGES: u64 = 4096;
/// Slots that a page may be in.
const WAYS: u64 = 4;

/// Where a granule is.
///
/// | bits | |
/// |---|---|
/// | 0 to 46 | sector of the file |
/// | 48 to 55 | file's number in the chain |
/// | 60 | may be written in place |
/// | 61 to 63 | kind |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(u64);

const KIND_SHIFT: u32 = 61;
const ZEROES: u64 = 1 << KIND_SHIFT;
const FILE: u64 = 2 << KIND_SHIFT;
const WORK: u64 = 3 << KIND_SHIFT;
const WRITABLE: u64 = 1 << 60;
const FILE_SHIFT: u32 = 48;
const SECTOR_MASK: u64 = (1 << 47) - 1;

impl Entry {
    /// Reads zeroes.
    pub(crate) const ZEROES: Self = Self(ZEROES);
    /// Takes more than one file read: compressed, partly behind an end, or broken.
    pub(crate) const WORK: Self = Self(WORK);

    /// At `offset_bytes`, below 2^56 and in whole sectors, of a file of the chain.
    pub(crate) fn file(number: usize, offset_bytes: u64, writable: bool) -> Self {
        debug_assert!(number < 256 && offset_bytes / 512 <= SECTOR_MASK);
        let writable = if writable { WRITABLE } else { 0 };
        Self(FILE | writable | (number as u64) << FILE_SHIFT | (offset_bytes / 512))
    }

    /// Number and offset, if it is in a file.
    pub(crate) fn as_file(self) -> Option<(usize, u64)> {
        (self.0 >> KIND_SHIFT == FILE >> KIND_SHIFT).then(|| {
            let number = (self.0 >> FILE_SHIFT & 0xff) as usize;
            (number, (self.0 & SECTOR_MASK) * 512)
        })
    }

    pub(crate) fn is_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }

    /// What the next granule must have for both to be one stretch.
    fn next(self, granule_sectors: u64) -> Self {
        match self.0 >> KIND_SHIFT {
            2 => Self(self.0 + granule_sectors),
            _ => self,
        }
    }
}

/// Cached pages.
#[derive(Debug)]
pub(crate) struct FlatMap {
    granule_bits: u32,
    /// Slots in sets of [`WAYS`]; a power of two of sets.
    slots: Box<[Slot]>,
}

#[derive(Debug)]
struct Slot {
    /// Odd while the page is replaced.
    version: AtomicU64,
    page: AtomicU64,
    /// Looked at since the hand went by.
    used: AtomicBool,
    entries: OnceLock<Box<[AtomicU64; PAGE_GRANULES]>>,
}

/// No page has this number.
const NO_PAGE: u64 = u64::MAX;

impl FlatMap {
    pub(crate) fn new(capacity_bytes: u64, granule_bits: u32) -> Self {
        let pages = capacity_bytes
            .div_ceil(PAGE_GRANULES as u64)
            .div_ceil(1 << granule_bits);
        let sets = pages
            .clamp(WAYS, MAX_PAGES)
            .div_ceil(WAYS)
            .next_power_of_two();
        let slots = (0..sets * WAYS).map(|_| Slot {
            version: AtomicU64::new(0),
            page: AtomicU64::new(NO_PAGE),
            used: AtomicBool::new(false),
            entries: OnceLock::new(),
        });
        Self {
            granule_bits,
            slots: slots.collect(),
        }
    }

    pub(crate) fn granule_bits(&self) -> u32 {
        self.granule_bits
    }

    /// The entry of `granule`, and for how many granules, at most `max`, the stretch goes on in
    /// its page. `None` when the page is not here.
    pub(crate) fn stretch(&self, granule: u64, max: u64) -> Option<(Entry, u64)> {
        let (page, index) = split(granule);
        let slot = self.find(page)?;
        let version = slot.version.load(Ordering::SeqCst);
        if version & 1 != 0 || slot.page.load(Ordering::SeqCst) != page {
            return None;
        }
        let entries = slot.entries.get()?;
        let first = Entry(entries[index].load(Ordering::SeqCst));
        let granule_sectors = 1 << (self.granule_bits - 9);
        let mut expected = first;
        let mut count = 1;
        let last = (index as u64).saturating_add(max).min(PAGE_GRANULES as u64) as usize;
        for entry in &entries[(index + 1).min(last)..last] {
            expected = expected.next(granule_sectors);
            if entry.load(Ordering::SeqCst) != expected.0 {
                break;
            }
            count += 1;
        }
        if slot.version.load(Ordering::SeqCst) != version {
            return None;
        }
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some((first, count))
    }

    /// Puts a page in, for another one if need be. One caller at a time.
    pub(crate) fn install(&self, page: u64, new: &[Entry; PAGE_GRANULES]) {
        let slot = self.find(page).unwrap_or_else(|| self.victim(page));
        slot.version.fetch_add(1, Ordering::SeqCst);
        let entries = slot
            .entries
            .get_or_init(|| Box::new([const { AtomicU64::new(0) }; PAGE_GRANULES]));
        slot.page.store(page, Ordering::SeqCst);
        for (entry, new) in entries.iter().zip(new) {
            entry.store(new.0, Ordering::SeqCst);
        }
        slot.used.store(true, Ordering::Relaxed);
        slot.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes one entry, if its page is here. One caller at a time.
    pub(crate) fn update(&self, granule: u64, entry: Entry) {
        let (page, index) = split(granule);
        if let Some(slot) = self.find(page)
            && let Some(entries) = slot.entries.get()
        {
            entries[index].store(entry.0, Ordering::SeqCst);
        }
    }

    /// Forgets the page that has this granule: the map is to be asked again. One caller at a time.
    pub(crate) fn forget(&self, granule: u64) {
        let (page, _) = split(granule);
        if let Some(slot) = self.find(page) {
            slot.empty();
        }
    }

    /// Forgets everything. One caller at a time.
    pub(crate) fn clear(&self) {
        self.slots.iter().for_each(Slot::empty);
    }

    fn set(&self, page: u64) -> &[Slot] {
        let sets = self.slots.len() as u64 / WAYS;
        let first = (page & (sets - 1)) * WAYS;
        &self.slots[first as usize..(first + WAYS) as usize]
    }

    fn find(&self, page: u64) -> Option<&Slot> {
        self.set(page)
            .iter()
            .find(|slot| slot.page.load(Ordering::Relaxed) == page)
    }

    /// An empty slot, or one that was not looked at for longest, roughly.
    fn victim(&self, page: u64) -> &Slot {
        let set = self.set(page);
        if let Some(empty) = set
            .iter()
            .find(|slot| slot.page.load(Ordering::Relaxed) == NO_PAGE)
        {
            return empty;
        }
        let idle = set
            .iter()
            .find(|slot| !slot.used.swap(false, Ordering::Relaxed));
        idle.unwrap_or(&set[(page / set.len() as u64) as usize % set.len()])
    }
}

impl Slot {
    fn empty(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
        self.page.store(NO_PAGE, Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
    }
}

fn split(granule: u64) -> (u64, usize) {
    let granules = PAGE_GRANULES as u64;
    (granule / granules, (granule % granules) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_of(first_offset: u64) -> [Entry; PAGE_GRANULES] {
        std::array::from_fn(|index| Entry::file(0, first_offset + index as u64 * 65536, true))
    }

    #[test]
    fn stretch_goes_on_as_long_as_the_file_does() {
        let map = FlatMap::new(1 << 30, 16);
        assert_eq!(map.stretch(0, 4), None);
        let mut page = page_of(1 << 20);
        page[3] = Entry::file(1, 0x30000, false);
        page[4] = Entry::ZEROES;
        page[5] = Entry::ZEROES;
        map.install(0, &page);
        assert_eq!(map.stretch(0, 100), Some((page[0], 3)));
        assert_eq!(map.stretch(1, 1), Some((page[1], 1)));
        assert_eq!(map.stretch(3, 9), Some((page[3], 1)));
        assert_eq!(map.stretch(4, 9), Some((Entry::ZEROES, 2)));
        assert_eq!(map.stretch(500, u64::MAX).unwrap().1, 12);
        map.update(1, Entry::WORK);
        assert_eq!(map.stretch(0, 100), Some((page[0], 1)));
        assert_eq!(page[3].as_file(), Some((1, 0x30000)));
        assert!(!page[3].is_writable() && page[0].is_writable());
    }

    #[test]
    fn cache_is_bounded_and_keeps_what_fits() {
        let map = FlatMap::new(1 << 50, 16);
        for page in 0..2 * MAX_PAGES {
            map.install(page, &page_of(page << 30));
        }
        assert_eq!(map.slots.len() as u64, MAX_PAGES);
        let granules = PAGE_GRANULES as u64;
        let found = (0..2 * MAX_PAGES)
            .filter(|page| map.stretch(page * granules, 1).is_some())
            .count() as u64;
        assert_eq!(found, MAX_PAGES);
    }

    #[test]
    fn reader_never_sees_half_a_page() {
        let map = FlatMap::new(PAGE_GRANULES as u64 * 65536, 16);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // More pages than ways fight for one set.
                for round in 0..20_000_u64 {
                    let page = round % 7;
                    map.install(page, &page_of((page + 1) << 32));
                }
                stop.store(true, Ordering::Release);
            });
            while !stop.load(Ordering::Acquire) {
                for page in 0..7 {
                    let first = page * PAGE_GRANULES as u64;
                    if let Some((entry, count)) = map.stretch(first + 8, 16) {
                        let expected = ((page + 1) << 32) + 8 * 65536;
                        assert_eq!(entry.as_file(), Some((0, expected)));
                        assert_eq!(count, 16);
                    }
                }
            }
        });
    }
}
