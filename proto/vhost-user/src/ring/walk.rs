//! From descriptors to buffers: takes what a chain's descriptors say one after the other, checks
//! it, and resolves the buffers in the memory table.
//!
//! A chain that is broken is walked on to its end where it has one, because its last writable byte
//! is where a driver looks for the answer.

use std::ptr::NonNull;

use super::chain::{Segment, SegmentVec};
use super::fault::ChainFault;
use crate::memory::{MAX_REGIONS, MemoryTable};

/// Entries of an indirect table at most. Linux makes indirect chains longer than a small ring, so
/// the bound is not the ring's size but IOV_MAX, what the kernel takes in one call.
pub const MAX_INDIRECT_DESCS: u32 = 1024;

/// Bytes of a descriptor, in either kind of ring.
pub(super) const DESC_BYTES: u32 = 16;

/// A descriptor of an indirect table.
pub(super) trait Desc: Sized {
    /// As it lies in memory.
    fn of_bytes(bytes: [u8; DESC_BYTES as usize]) -> Self;
    /// What it describes.
    fn buffer(&self) -> Buffer;
    /// Whether that is a table.
    fn is_indirect(&self) -> bool;
    /// The entry that comes after this one at `index` of a table with `count` entries.
    fn following(&self, index: u32, count: u32) -> Option<u32>;
}

/// What a descriptor says of a buffer.
#[derive(Clone, Copy)]
pub(super) struct Buffer {
    pub(super) gpa: u64,
    pub(super) len_bytes: u32,
    pub(super) is_writable: bool,
}

/// The walk along one chain.
pub(super) struct Walk<'a> {
    table: &'a MemoryTable,
    region_hint: &'a mut usize,
    segments: SegmentVec,
    /// Index of the first writable segment, once a writable descriptor was seen.
    writable_from: Option<u32>,
    /// Readable and writable bytes.
    len_bytes: [u32; 2],
    /// Borders between memory regions that the buffers cross.
    borders: usize,
    broken: Option<Broken>,
}

/// What is known of a chain that is broken.
struct Broken {
    fault: ChainFault,
    /// The last writable byte so far, if it is in guest memory.
    status: Option<Segment>,
    /// Writable bytes so far.
    writable_bytes: u64,
}

/// A chain's buffers.
pub(super) struct Buffers {
    pub(super) segments: SegmentVec,
    /// Index of the first writable segment.
    pub(super) writable_from: u32,
    /// Readable and writable bytes.
    pub(super) len_bytes: [u32; 2],
    /// Bytes that can be written from the first writable one on.
    pub(super) written_limit_bytes: u32,
    pub(super) fault: Option<Box<ChainFault>>,
}

impl<'a> Walk<'a> {
    /// `segments` is empty storage.
    pub(super) fn new(
        table: &'a MemoryTable,
        region_hint: &'a mut usize,
        segments: SegmentVec,
    ) -> Walk<'a> {
        Walk {
            table,
            region_hint,
            segments,
            writable_from: None,
            len_bytes: [0; 2],
            borders: 0,
            broken: None,
        }
    }

    /// The chain's next buffer.
    #[inline]
    pub(super) fn add(&mut self, buffer: Buffer) {
        if self.broken.is_some() {
            return self.look_for_status(buffer);
        }
        let sound = self.segments.len();
        if let Err(fault) = self.try_add(buffer) {
            self.segments.truncate(sound);
            self.spoil(fault);
            self.look_for_status(buffer);
        }
    }

    /// The chain is broken here, and has no end that could be found.
    #[cold]
    pub(super) fn cut(&mut self, fault: ChainFault) {
        self.spoil(fault);
        if let Some(broken) = &mut self.broken {
            broken.status = None;
        }
    }

    /// The table that an indirect descriptor names, entry by entry.
    pub(super) fn indirect<D: Desc>(&mut self, table: Buffer) {
        let count = table.len_bytes / DESC_BYTES;
        if !table.len_bytes.is_multiple_of(DESC_BYTES) || count == 0 || count > MAX_INDIRECT_DESCS {
            return self.cut(ChainFault::BadIndirect {
                reason: "indirect table is empty, too long or not a multiple of 16 bytes",
            });
        }
        let mut index = 0;
        for _ in 0..count {
            let desc = match self.read_indirect::<D>(table.gpa, index) {
                Ok(desc) => desc,
                Err(fault) => return self.cut(fault),
            };
            if desc.is_indirect() {
                return self.cut(ChainFault::BadIndirect {
                    reason: "indirect descriptor inside an indirect table",
                });
            }
            self.add(desc.buffer());
            let Some(next) = desc.following(index, count) else {
                return;
            };
            if next >= count {
                let next = next as u16;
                return self.cut(ChainFault::BadNext { next });
            }
            index = next;
        }
        self.cut(ChainFault::Loop);
    }

    /// All buffers were added, or the chain was cut.
    #[inline]
    pub(super) fn finish(self) -> Buffers {
        if self.broken.is_some() {
            return self.salvage();
        }
        Buffers {
            writable_from: self.writable_from.unwrap_or(self.segments.len() as u32),
            segments: self.segments,
            len_bytes: self.len_bytes,
            written_limit_bytes: self.len_bytes[1],
            fault: None,
        }
    }

    /// Of a broken chain nothing is left but the place of the answer.
    #[cold]
    fn salvage(mut self) -> Buffers {
        self.segments.clear();
        let broken = self.broken.expect("only broken chains are salvaged");
        self.segments.extend(broken.status);
        let status_bytes = self.segments.len() as u32;
        let is_first_byte = broken.writable_bytes == 1;
        Buffers {
            segments: self.segments,
            writable_from: 0,
            len_bytes: [0, status_bytes],
            written_limit_bytes: if is_first_byte { status_bytes } else { 0 },
            fault: Some(Box::new(broken.fault)),
        }
    }

    /// The chain is broken here. The first fault is what counts; the buffers so far are sound.
    #[cold]
    pub(super) fn spoil(&mut self, fault: ChainFault) {
        if self.broken.is_some() {
            return;
        }
        let writable = self.writable_from.unwrap_or(u32::MAX) as usize;
        let last = self
            .segments
            .last()
            .filter(|_| writable < self.segments.len());
        self.broken = Some(Broken {
            fault,
            status: last.and_then(|last| last.slice(last.len() - 1, 1)),
            writable_bytes: self.segments[writable.min(self.segments.len())..]
                .iter()
                .map(|segment| segment.len() as u64)
                .sum(),
        });
    }

    /// The status byte of a broken chain is the last byte of its last writable buffer, or cannot
    /// be written.
    #[cold]
    fn look_for_status(&mut self, buffer: Buffer) {
        let Some(broken) = &mut self.broken else {
            return;
        };
        if !buffer.is_writable || buffer.len_bytes == 0 {
            return;
        }
        let last_gpa = buffer.gpa.checked_add(u64::from(buffer.len_bytes) - 1);
        let found = last_gpa.and_then(|gpa| self.table.translate(gpa, self.region_hint));
        broken.status = found.map(|(host, _)| Segment::new(host, 1));
        broken.writable_bytes += u64::from(buffer.len_bytes);
    }

    /// Adds a buffer, split where it crosses from one region into the next.
    #[inline]
    fn try_add(&mut self, buffer: Buffer) -> Result<(), ChainFault> {
        let Buffer {
            mut gpa,
            len_bytes,
            is_writable,
        } = buffer;
        match (is_writable, self.writable_from) {
            (true, None) => self.writable_from = Some(self.segments.len() as u32),
            (false, Some(_)) => return Err(ChainFault::ReadableAfterWritable),
            _ => {}
        }
        if len_bytes == 0 {
            return Err(ChainFault::EmptyBuffer);
        }
        let total = &mut self.len_bytes[usize::from(is_writable)];
        *total = total
            .checked_add(len_bytes)
            .ok_or(ChainFault::TooManyBytes)?;
        let mut left = u64::from(len_bytes);
        while left > 0 {
            let Some((host, following)) = self.table.translate(gpa, self.region_hint) else {
                return Err(ChainFault::BadAddress {
                    gpa: buffer.gpa,
                    len_bytes,
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
                    return Err(ChainFault::TooScattered);
                }
            }
        }
        Ok(())
    }

    /// Copies one entry of an indirect table; the table may span regions, an entry may not.
    fn read_indirect<D: Desc>(&mut self, table_gpa: u64, index: u32) -> Result<D, ChainFault> {
        let gpa = table_gpa.wrapping_add(u64::from(index * DESC_BYTES));
        match self.table.translate(gpa, self.region_hint) {
            Some((host, following)) if following >= u64::from(DESC_BYTES) => {
                let mut bytes = [0; DESC_BYTES as usize];
                // SAFETY: `translate` says that 16 bytes follow in the mapping, which `table`
                // holds; the target is ours and that long.
                unsafe {
                    host.copy_to_nonoverlapping(NonNull::from(&mut bytes).cast(), bytes.len())
                };
                Ok(D::of_bytes(bytes))
            }
            _ => Err(ChainFault::BadAddress {
                gpa,
                len_bytes: DESC_BYTES,
            }),
        }
    }
}
