//! Which parts of a disk were written: bitmaps for incremental backups and mirrors.
//!
//! A write is noted when it has completed and before it is answered, whatever its outcome: a
//! copier that takes a block out of the map and then reads it can so never miss a write that was
//! under way meanwhile. Bitmaps that stand for an instant are added and emptied while the disk's
//! gate is closed, when no write is under way at all.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::engine::backend::WriteObserver;

/// Unit in which writes are noted unless said otherwise.
pub(crate) const DEFAULT_GRANULARITY: u32 = 64 << 10;
/// Bitmaps of one disk, those of jobs included.
pub(crate) const MAX_BITMAPS: usize = 16;

/// One bit for each block of a disk.
#[derive(Debug)]
pub(crate) struct Bitmap {
    shift: u32,
    num_blocks: u64,
    words: Box<[AtomicU64]>,
}

impl Bitmap {
    /// All clean. `granularity` is a power of two.
    pub(crate) fn new(capacity_bytes: u64, granularity: u32) -> Self {
        debug_assert!(granularity.is_power_of_two());
        let shift = granularity.trailing_zeros();
        let num_blocks = capacity_bytes.div_ceil(u64::from(granularity));
        let num_words = num_blocks.div_ceil(64) as usize;
        Self {
            shift,
            num_blocks,
            words: (0..num_words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(crate) fn granularity(&self) -> u32 {
        1 << self.shift
    }

    pub(crate) fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    /// Notes bytes of the disk.
    pub(crate) fn mark(&self, offset_bytes: u64, len_bytes: u64) {
        self.each_word(offset_bytes, len_bytes, |word, bits| {
            // A block that is written often costs no more than a look at it.
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::AcqRel);
            }
        });
    }

    /// Whether any of these bytes is noted.
    pub(crate) fn has_any(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        let mut found = false;
        self.each_word(offset_bytes, len_bytes, |word, bits| {
            found |= word.load(Ordering::Acquire) & bits != 0;
        });
        found
    }

    /// Whether block `index` is noted.
    pub(crate) fn contains(&self, index: u64) -> bool {
        self.words[(index / 64) as usize].load(Ordering::Acquire) & 1 << (index % 64) != 0
    }

    /// Takes block `index` out; true when it was in.
    pub(crate) fn take(&self, index: u64) -> bool {
        let bit = 1 << (index % 64);
        self.words[(index / 64) as usize].fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// Puts block `index` in; true when it was not.
    pub(crate) fn put(&self, index: u64) -> bool {
        let bit = 1 << (index % 64);
        self.words[(index / 64) as usize].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// The first block from `index` on that is in.
    pub(crate) fn next(&self, index: u64) -> Option<u64> {
        let mut at = (index / 64) as usize;
        let mut bits = self.words.get(at)?.load(Ordering::Acquire) & (u64::MAX << (index % 64));
        while bits == 0 {
            at += 1;
            bits = self.words.get(at)?.load(Ordering::Acquire);
        }
        Some(at as u64 * 64 + u64::from(bits.trailing_zeros()))
    }

    /// Blocks that are in.
    pub(crate) fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }

    /// Puts in what `other`, of the same disk, has.
    pub(crate) fn add_all(&self, other: &Bitmap) {
        if self.shift != other.shift {
            let mut from = 0;
            while let Some(index) = other.next(from) {
                self.mark(index << other.shift, 1 << other.shift);
                from = index + 1;
            }
            return;
        }
        for (word, other) in self.words.iter().zip(&other.words) {
            word.fetch_or(other.load(Ordering::Acquire), Ordering::AcqRel);
        }
    }

    /// Puts in every block of which `other`, of the same disk and no coarser, has a part.
    pub(crate) fn add_coarser(&self, other: &Bitmap) {
        let mut from = 0;
        while let Some(index) = other.next(from) {
            self.mark(index << other.shift, 1);
            // Behind the block that was just put in.
            let next = ((index << other.shift >> self.shift) + 1) << self.shift;
            from = next >> other.shift;
        }
    }

    /// Puts in every block.
    pub(crate) fn fill(&self) {
        self.mark(0, self.num_blocks << self.shift);
    }

    fn each_word(&self, offset_bytes: u64, len_bytes: u64, mut f: impl FnMut(&AtomicU64, u64)) {
        if len_bytes == 0 {
            return;
        }
        let last_byte = offset_bytes.saturating_add(len_bytes - 1);
        let (mut first, last) = (offset_bytes >> self.shift, last_byte >> self.shift);
        // A disk that grew since: what is behind the end of the map is noted by nobody here.
        let last = last.min(self.num_blocks.saturating_sub(1));
        while first <= last {
            let Some(word) = self.words.get((first / 64) as usize) else {
                return;
            };
            let low = first % 64;
            let in_word = (last - first + 1).min(64 - low);
            let bits = (u64::MAX >> (64 - in_word)) << low;
            f(word, bits);
            first += in_word;
        }
    }
}

/// The bitmaps of one disk that are being written to.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    is_active: AtomicBool,
    bitmaps: RwLock<Vec<Tracked>>,
}

#[derive(Clone, Debug)]
struct Tracked {
    /// Empty for a job's own.
    name: String,
    bitmap: Arc<Bitmap>,
}

impl WriteObserver for Tracker {
    fn mark(&self, offset_bytes: u64, len_bytes: u64) {
        if self.is_active() {
            self.mark_all(offset_bytes, len_bytes);
        }
    }
}

impl Tracker {
    fn is_active(&self) -> bool {
        self.is_active.load(Ordering::Relaxed)
    }

    #[cold]
    fn mark_all(&self, offset_bytes: u64, len_bytes: u64) {
        let bitmaps = self.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        for tracked in &*bitmaps {
            tracked.bitmap.mark(offset_bytes, len_bytes);
        }
    }

    /// Begins to note writes in `bitmap`; those that are under way may be missed, unless the gate
    /// is closed. A `name` that is taken is given to the new one.
    ///
    /// # Errors
    /// There are [`MAX_BITMAPS`] already.
    pub(crate) fn add(&self, name: &str, bitmap: Arc<Bitmap>) -> Result<(), TooManyBitmaps> {
        self.change(|bitmaps| {
            if !name.is_empty() {
                bitmaps.retain(|tracked| tracked.name != name);
            }
            if bitmaps.len() >= MAX_BITMAPS {
                return Err(TooManyBitmaps);
            }
            bitmaps.push(Tracked {
                name: name.to_owned(),
                bitmap,
            });
            Ok(())
        })
    }

    /// Ends noting in `bitmap`.
    pub(crate) fn remove(&self, bitmap: &Arc<Bitmap>) {
        self.change(|bitmaps| bitmaps.retain(|tracked| !Arc::ptr_eq(&tracked.bitmap, bitmap)));
    }

    /// The bitmap of this name.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Bitmap>> {
        let named = self.named();
        let (_, bitmap) = named.into_iter().find(|(other, _)| other == name)?;
        Some(bitmap)
    }

    /// All that have names.
    pub(crate) fn named(&self) -> Vec<(String, Arc<Bitmap>)> {
        let bitmaps = self.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        bitmaps
            .iter()
            .filter(|tracked| !tracked.name.is_empty())
            .map(|tracked| (tracked.name.clone(), Arc::clone(&tracked.bitmap)))
            .collect()
    }

    /// The disk grew: bitmaps with names get room for the new part, which counts as written.
    pub(crate) fn grow(&self, capacity_bytes: u64) {
        self.change(|bitmaps| {
            for tracked in bitmaps
                .iter_mut()
                .filter(|tracked| !tracked.name.is_empty())
            {
                let old = &tracked.bitmap;
                let new = Bitmap::new(capacity_bytes, old.granularity());
                new.add_all(old);
                let old_end = old.num_blocks() << old.shift;
                new.mark(old_end, capacity_bytes.saturating_sub(old_end));
                tracked.bitmap = Arc::new(new);
            }
        });
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Tracked>) -> T) -> T {
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut bitmaps);
        self.is_active.store(!bitmaps.is_empty(), Ordering::Release);
        result
    }
}

/// No room for another bitmap.
#[derive(Debug, thiserror::Error)]
#[error("the disk has {MAX_BITMAPS} bitmaps already; delete one that no backup needs any more")]
pub(crate) struct TooManyBitmaps;

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(bitmap: &Bitmap) -> Vec<u64> {
        let mut from = 0;
        std::iter::from_fn(|| {
            let found = bitmap.next(from)?;
            from = found + 1;
            Some(found)
        })
        .collect()
    }

    #[test]
    fn every_block_that_a_write_touches_is_noted() {
        let bitmap = Bitmap::new(1 << 20, 4096);
        bitmap.mark(4095, 2);
        bitmap.mark(8192, 4096);
        bitmap.mark(1 << 19, 0);
        bitmap.mark((1 << 20) - 512, 512);
        assert_eq!(blocks(&bitmap), [0, 1, 2, 255]);
        assert_eq!(bitmap.count(), 4);
        assert!(bitmap.has_any(0, 1) && !bitmap.has_any(12288, 4096));
        assert!(bitmap.has_any(12288, 1 << 20));
    }

    #[test]
    fn ranges_fill_whole_words() {
        let bitmap = Bitmap::new(300 * 4096, 4096);
        bitmap.mark(3 * 4096, 200 * 4096);
        assert_eq!(blocks(&bitmap), (3..203).collect::<Vec<_>>());
        bitmap.fill();
        assert_eq!(bitmap.count(), 300);
    }

    #[test]
    fn writes_behind_the_end_are_not_noted_and_do_no_harm() {
        let bitmap = Bitmap::new(10_000, 4096);
        assert_eq!(bitmap.num_blocks(), 3);
        bitmap.mark(1 << 40, 4096);
        bitmap.mark(u64::MAX - 10, u64::MAX);
        assert_eq!(bitmap.count(), 0);
        bitmap.mark(8192, 1 << 40);
        assert_eq!(blocks(&bitmap), [2]);
        Bitmap::new(0, 4096).mark(0, 1);
    }

    #[test]
    fn coarser_map_has_every_block_that_was_touched() {
        let fine = Bitmap::new(1 << 20, 4096);
        for index in [0, 3, 17, 18, 200] {
            fine.put(index);
        }
        let coarse = Bitmap::new(1 << 20, 65536);
        coarse.add_coarser(&fine);
        assert_eq!(blocks(&coarse), [0, 1, 12]);
        let same = Bitmap::new(1 << 20, 4096);
        same.add_coarser(&fine);
        assert_eq!(blocks(&same), blocks(&fine));
        let back = Bitmap::new(1 << 20, 4096);
        back.add_all(&coarse);
        let of_block = |block: u64| block * 16..(block + 1) * 16;
        let whole: Vec<u64> = [0, 1, 12].into_iter().flat_map(of_block).collect();
        assert_eq!(blocks(&back), whole);
    }

    #[test]
    fn blocks_are_taken_once() {
        let bitmap = Bitmap::new(1 << 20, 4096);
        bitmap.mark(70 * 4096, 1);
        assert!(bitmap.take(70) && !bitmap.take(70));
        assert!(bitmap.put(70) && !bitmap.put(70));
        assert_eq!(bitmap.next(71), None);
    }

    #[test]
    fn tracker_notes_in_all_its_bitmaps_while_they_are_there() {
        let tracker = Tracker::default();
        tracker.mark(0, 4096);
        let (a, b) = (
            Arc::new(Bitmap::new(1 << 20, 4096)),
            Arc::new(Bitmap::new(1 << 20, 65536)),
        );
        tracker.add("a", Arc::clone(&a)).unwrap();
        tracker.add("", Arc::clone(&b)).unwrap();
        tracker.mark(65536, 4096);
        tracker.remove(&a);
        tracker.mark(0, 512);
        assert_eq!((blocks(&a), blocks(&b)), (vec![16], vec![0, 1]));
        assert!(tracker.find("a").is_none() && tracker.named().is_empty());
        tracker.remove(&b);
        assert!(!tracker.is_active());
    }

    #[test]
    fn number_of_bitmaps_is_bounded() {
        let tracker = Tracker::default();
        let bitmap = || Arc::new(Bitmap::new(4096, 4096));
        for number in 0..MAX_BITMAPS {
            tracker.add(&number.to_string(), bitmap()).unwrap();
        }
        assert!(tracker.add("more", bitmap()).is_err());
        tracker.add("0", bitmap()).unwrap();
    }

    #[test]
    fn grown_part_of_a_disk_counts_as_written() {
        let tracker = Tracker::default();
        tracker
            .add("a", Arc::new(Bitmap::new(10 * 4096, 4096)))
            .unwrap();
        tracker.mark(4096, 1);
        tracker.grow(12 * 4096);
        let grown = tracker.find("a").unwrap();
        assert_eq!(blocks(&grown), [1, 10, 11]);
    }
}
