//! From a head to buffers: follows a descriptor chain, through an indirect table if there is one,
//! checks it, and resolves its buffers in the memory table.

use super::RingError;
use super::chain::{Segment, SegmentVec};
use super::layout::{Desc, RingAreas};
use crate::memory::{MAX_REGIONS, MemoryTable};

/// Entries of an indirect table at most. Linux makes indirect chains longer than a small ring, so
/// the bound is not the ring's size but IOV_MAX, what the kernel takes in one call.
pub const MAX_INDIRECT_DESCS: u32 = 1024;

/// The walk along one chain.
pub(super) struct Walk<'a> {
    pub(super) head: u16,
    pub(super) table: &'a MemoryTable,
    pub(super) region_hint: &'a mut usize,
    pub(super) segments: SegmentVec,
    /// Index of the first writable segment, once a writable descriptor was seen.
    pub(super) writable_from: Option<u32>,
    /// Readable and writable bytes.
    pub(super) len_bytes: [u32; 2],
    /// Borders between memory regions that the buffers cross.
    pub(super) borders: usize,
}

impl Walk<'_> {
    pub(super) fn direct(
        &mut self,
        areas: &RingAreas,
        indirect_desc: bool,
    ) -> Result<(), RingError> {
        let head = self.head;
        let mut index = head;
        for _ in 0..areas.size() {
            let desc = areas.desc(index);
            if desc.is_indirect() {
                let reason = "indirect descriptor, but the feature was not negotiated";
                return match indirect_desc {
                    true => self.indirect(&desc),
                    false => Err(RingError::BadIndirect { head, reason }),
                };
            }
            self.add(&desc)?;
            let Some(next) = desc.next() else {
                return Ok(());
            };
            if next >= areas.size() {
                return Err(RingError::BadNext { head, next });
            }
            index = next;
        }
        Err(RingError::Loop { head })
    }

    fn indirect(&mut self, table: &Desc) -> Result<(), RingError> {
        let head = self.head;
        let bad = |reason| Err(RingError::BadIndirect { head, reason });
        let count = table.len_bytes() / Desc::SIZE_BYTES;
        if table.next().is_some() {
            return bad("descriptor is both indirect and chained");
        }
        if !table.len_bytes().is_multiple_of(Desc::SIZE_BYTES)
            || count == 0
            || count > MAX_INDIRECT_DESCS
        {
            return bad("indirect table is empty, too long or not a multiple of 16 bytes");
        }
        let mut index = 0;
        for _ in 0..count {
            let desc = self.read_indirect(table.gpa(), index)?;
            if desc.is_indirect() {
                return bad("indirect descriptor inside an indirect table");
            }
            self.add(&desc)?;
            let Some(next) = desc.next() else {
                return Ok(());
            };
            if u32::from(next) >= count {
                return Err(RingError::BadNext { head, next });
            }
            index = u32::from(next);
        }
        Err(RingError::Loop { head })
    }

    /// Copies one entry of an indirect table; the table may span regions, an entry may not.
    fn read_indirect(&mut self, table_gpa: u64, index: u32) -> Result<Desc, RingError> {
        let len_bytes = Desc::SIZE_BYTES;
        let gpa = table_gpa.wrapping_add(u64::from(index * len_bytes));
        let bad = RingError::BadAddress {
            head: self.head,
            gpa,
            len_bytes,
        };
        match self.table.translate(gpa, self.region_hint) {
            Some((host, following)) if following >= u64::from(len_bytes) => {
                // SAFETY: `translate` says that 16 bytes follow in the mapping, which `table`
                // holds.
                Ok(unsafe { Desc::read_unaligned(host) })
            }
            _ => Err(bad),
        }
    }

    /// Adds a buffer, split where it crosses from one region into the next.
    #[inline]
    fn add(&mut self, desc: &Desc) -> Result<(), RingError> {
        let head = self.head;
        let direction = usize::from(desc.is_writable());
        match (desc.is_writable(), self.writable_from) {
            (true, None) => self.writable_from = Some(self.segments.len() as u32),
            (false, Some(_)) => return Err(RingError::ReadableAfterWritable { head }),
            _ => {}
        }
        self.len_bytes[direction] = self.len_bytes[direction]
            .checked_add(desc.len_bytes())
            .ok_or(RingError::TooManyBytes { head })?;
        let (mut gpa, mut left) = (desc.gpa(), u64::from(desc.len_bytes()));
        while left > 0 {
            let Some((host, following)) = self.table.translate(gpa, self.region_hint) else {
                return Err(RingError::BadAddress {
                    head,
                    gpa: desc.gpa(),
                    len_bytes: desc.len_bytes(),
                });
            };
            let len = left.min(following);
            self.segments.push(Segment::new(host, len as usize));
            // No overflow: the region ends below 2^64. Past its end the next region is looked up.
            gpa = gpa.saturating_add(len);
            left -= len;
            if left > 0 {
                // Else a thousand descriptors across hundreds of tiny regions would make half a
                // million segments of one chain.
                self.borders += 1;
                if self.borders > MAX_REGIONS {
                    return Err(RingError::TooScattered { head });
                }
            }
        }
        Ok(())
    }
}
