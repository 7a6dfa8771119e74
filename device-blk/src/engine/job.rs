//! One request on its way through the kernel.
//!
//! ```text
//!            next()                 completed()
//!   Job ───────────────► Submit ───────────────► Job   (short, interrupted, or more steps)
//!    │                                             │
//!    ├─► NeedsBounce: again when a buffer is free  └─► failed: Status
//!    └─► Done(Status)
//! ```
//!
//! A job has at most one operation in the ring: a transfer is one read or write, continued
//! where the kernel stopped short; a discard goes range by range. So a job never needs more
//! than the ring entry that was free when it began.

use std::sync::OnceLock;

use io_uring::{opcode, squeue, types};
use vhost_user::ring::{DescChain, Segment};

use super::bounce::{BOUNCE_BYTES, BouncePool};
use super::buffer::AlignedBuffer;
use crate::image::{RawImage, SECTOR_BYTES};
use crate::request::{ByteRange, HEADER_BYTES, OpKind, RangeOp, Status};

/// `UIO_MAXIOV`.
const MAX_IOVECS: usize = 1024;
/// How often an operation that was interrupted or found no resources is tried again.
const MAX_RETRIES: u32 = 1000;
/// Zeroes written where the file system cannot zero by itself.
const ZEROES_BYTES: usize = 64 << 10;
/// Times [`ZEROES_BYTES`] in one operation: 4 MiB.
const ZEROES_IOVECS: usize = 64;

/// What jobs work on, besides themselves.
pub(super) struct Backing<'a> {
    pub(super) image: &'a RawImage,
    /// Complete writes only when they are on stable storage.
    pub(super) write_through: bool,
    pub(super) bounce: &'a mut BouncePool,
    /// Cleared when the file system turns out not to zero ranges.
    pub(super) zero_range_works: &'a mut bool,
}

/// What a job wants.
pub(super) enum Next {
    /// Put this into the ring.
    Submit(squeue::Entry),
    /// Ask again when a bounce buffer was given back.
    NeedsBounce,
    /// Answer.
    Done(Status),
}

/// A request that was taken off the ring and is not answered yet.
pub(super) struct Job {
    pub(super) chain: DescChain,
    pub(super) kind: OpKind,
    work: Work,
    retries: u32,
}

enum Work {
    Transfer(Transfer),
    Flush { done: bool },
    Ranges(Ranges),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Image to guest.
    Read,
    /// Guest to image.
    Write,
}

struct Transfer {
    direction: Direction,
    offset_bytes: u64,
    len_bytes: usize,
    done_bytes: usize,
    bounce: Option<AlignedBuffer>,
}

struct Ranges {
    op: RangeOp,
    ranges: Vec<ByteRange>,
    /// The range in work, and how much of it is done.
    index: usize,
    done_bytes: u64,
    step: RangeStep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RangeStep {
    Fallocate,
    WriteZeroes,
    /// After the last range, for write-through.
    Sync,
    Synced,
}

impl Job {
    pub(super) fn transfer(
        chain: DescChain,
        direction: Direction,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Self {
        let kind = match direction {
            Direction::Read => OpKind::Read,
            Direction::Write => OpKind::Write,
        };
        let transfer = Transfer {
            direction,
            offset_bytes,
            len_bytes: len_bytes as usize,
            done_bytes: 0,
            bounce: None,
        };
        Self {
            chain,
            kind,
            work: Work::Transfer(transfer),
            retries: 0,
        }
    }

    pub(super) fn flush(chain: DescChain) -> Self {
        Self {
            chain,
            kind: OpKind::Flush,
            work: Work::Flush { done: false },
            retries: 0,
        }
    }

    pub(super) fn ranges(chain: DescChain, op: RangeOp, ranges: Vec<ByteRange>) -> Self {
        let kind = match op {
            RangeOp::Discard => OpKind::Discard,
            RangeOp::WriteZeroes => OpKind::WriteZeroes,
        };
        let step = RangeStep::Fallocate;
        let work = Work::Ranges(Ranges {
            op,
            ranges,
            index: 0,
            done_bytes: 0,
            step,
        });
        Self {
            chain,
            kind,
            work,
            retries: 0,
        }
    }

    /// Bytes the request is about, for the statistics.
    pub(super) fn payload_bytes(&self) -> u64 {
        match &self.work {
            Work::Transfer(transfer) => transfer.len_bytes as u64,
            Work::Flush { .. } => 0,
            Work::Ranges(ranges) => ranges.ranges.iter().map(|range| range.len_bytes).sum(),
        }
    }

    /// The operation to put into the ring now. `iovecs` is scratch space that must stay as it
    /// is until the operation was submitted.
    pub(super) fn next(
        &mut self,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Next {
        match &mut self.work {
            Work::Transfer(transfer) => transfer.next(&self.chain, backing, iovecs),
            Work::Flush { done: false } if backing.image.has_lost_writes() => {
                Next::Done(Status::IoErr)
            }
            Work::Flush { done: false } => Next::Submit(sync(backing.image)),
            Work::Flush { done: true } => Next::Done(Status::Ok),
            Work::Ranges(ranges) => ranges.next(backing, iovecs),
        }
    }

    /// Takes the result of the operation that was submitted last.
    ///
    /// # Errors
    /// The error number, when the request failed.
    pub(super) fn completed(&mut self, result: i32, backing: &mut Backing<'_>) -> Result<(), i32> {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            if let Work::Transfer(transfer) = &mut self.work {
                transfer.return_bounce(backing.bounce);
            }
            self.retries += 1;
            return if self.retries > MAX_RETRIES {
                Err(-result)
            } else {
                Ok(())
            };
        }
        match &mut self.work {
            Work::Transfer(transfer) => transfer.completed(&self.chain, result, backing),
            Work::Flush { done } => {
                *done = true;
                check_sync(result, backing.image)
            }
            Work::Ranges(ranges) => ranges.completed(result, backing),
        }
    }
}

impl Transfer {
    fn next(
        &mut self,
        chain: &DescChain,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Next {
        let left_bytes = self.len_bytes - self.done_bytes;
        if left_bytes == 0 {
            return Next::Done(Status::Ok);
        }
        iovecs.clear();
        let segments = match self.direction {
            Direction::Read => chain.writable_range(self.done_bytes, left_bytes),
            Direction::Write => chain.readable_range(HEADER_BYTES + self.done_bytes, left_bytes),
        };
        let mut address_bits = 0;
        let mut length_bits = 0;
        for segment in segments.take(MAX_IOVECS) {
            address_bits |= segment.as_ptr().addr();
            length_bits |= segment.len();
            iovecs.extend_from_slice(Segment::as_iovecs(&[segment]));
        }
        if let Some(direct) = backing.image.direct() {
            let misaligned = address_bits & (direct.mem_align_bytes - 1) != 0
                || length_bits & (SECTOR_BYTES as usize - 1) != 0;
            if misaligned && !self.bounce(chain, left_bytes, backing.bounce, iovecs) {
                return Next::NeedsBounce;
            }
        }
        Next::Submit(self.entry(backing, iovecs))
    }

    /// Puts a bounce buffer in the place of the guest's; false when there is none.
    fn bounce(
        &mut self,
        chain: &DescChain,
        left_bytes: usize,
        pool: &mut BouncePool,
        iovecs: &mut Vec<libc::iovec>,
    ) -> bool {
        let Some(mut buffer) = pool.take() else {
            return false;
        };
        let len_bytes = left_bytes.min(BOUNCE_BYTES);
        if self.direction == Direction::Write {
            let into = &mut buffer.as_mut_slice()[..len_bytes];
            let copied = chain.read_at(HEADER_BYTES + self.done_bytes, into);
            debug_assert_eq!(copied, len_bytes, "lengths were checked");
        }
        iovecs.clear();
        iovecs.push(libc::iovec {
            iov_base: buffer.as_ptr().cast(),
            iov_len: len_bytes,
        });
        self.bounce = Some(buffer);
        true
    }

    fn entry(&self, backing: &Backing<'_>, iovecs: &[libc::iovec]) -> squeue::Entry {
        let fd = types::Fd(backing.image.raw_fd());
        let offset = self.offset_bytes + self.done_bytes as u64;
        let sync_flag = if backing.write_through {
            libc::RWF_DSYNC
        } else {
            0
        };
        match (self.direction, iovecs) {
            (Direction::Read, [one]) => {
                opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
                    .offset(offset)
                    .build()
            }
            (Direction::Read, many) => opcode::Readv::new(fd, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .build(),
            (Direction::Write, [one]) => {
                opcode::Write::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32)
                    .offset(offset)
                    .rw_flags(sync_flag)
                    .build()
            }
            (Direction::Write, many) => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .rw_flags(sync_flag)
                .build(),
        }
    }

    fn completed(
        &mut self,
        chain: &DescChain,
        result: i32,
        backing: &mut Backing<'_>,
    ) -> Result<(), i32> {
        let moved_bytes = check_progress(result, backing.image);
        if let (Some(buffer), Ok(moved_bytes), Direction::Read) =
            (&mut self.bounce, &moved_bytes, self.direction)
        {
            chain.write_at(self.done_bytes, &buffer.as_mut_slice()[..*moved_bytes]);
        }
        self.return_bounce(backing.bounce);
        self.done_bytes += moved_bytes?;
        Ok(())
    }

    fn return_bounce(&mut self, pool: &mut BouncePool) {
        if let Some(buffer) = self.bounce.take() {
            pool.give_back(buffer);
        }
    }
}

impl Ranges {
    fn next(&mut self, backing: &mut Backing<'_>, iovecs: &mut Vec<libc::iovec>) -> Next {
        while let Some(range) = self.ranges.get(self.index) {
            if self.done_bytes < range.len_bytes {
                return Next::Submit(self.range_entry(*range, backing, iovecs));
            }
            self.index += 1;
            self.done_bytes = 0;
        }
        if backing.write_through && self.step != RangeStep::Synced {
            self.step = RangeStep::Sync;
            return Next::Submit(sync(backing.image));
        }
        Next::Done(Status::Ok)
    }

    fn range_entry(
        &mut self,
        range: ByteRange,
        backing: &Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> squeue::Entry {
        let fd = types::Fd(backing.image.raw_fd());
        let offset = range.offset_bytes + self.done_bytes;
        let left_bytes = range.len_bytes - self.done_bytes;
        let punch = range.unmap && backing.image.punches_holes();
        if self.step == RangeStep::Fallocate && !punch && !*backing.zero_range_works {
            self.step = RangeStep::WriteZeroes;
        }
        if self.step == RangeStep::Fallocate {
            let how = if punch {
                libc::FALLOC_FL_PUNCH_HOLE
            } else {
                libc::FALLOC_FL_ZERO_RANGE
            };
            return opcode::Fallocate::new(fd, left_bytes)
                .offset(offset)
                .mode(how | libc::FALLOC_FL_KEEP_SIZE)
                .build();
        }
        zero_iovecs(left_bytes, iovecs);
        opcode::Writev::new(fd, iovecs.as_ptr(), iovecs.len() as u32)
            .offset(offset)
            .build()
    }

    fn completed(&mut self, result: i32, backing: &mut Backing<'_>) -> Result<(), i32> {
        match self.step {
            RangeStep::Fallocate => self.fallocated(result, backing),
            RangeStep::WriteZeroes => {
                self.done_bytes += check_progress(result, backing.image)? as u64;
                Ok(())
            }
            RangeStep::Sync | RangeStep::Synced => {
                self.step = RangeStep::Synced;
                check_sync(result, backing.image)
            }
        }
    }

    fn fallocated(&mut self, result: i32, backing: &mut Backing<'_>) -> Result<(), i32> {
        match -result {
            0 => self.done_bytes = self.ranges[self.index].len_bytes,
            // A discard is advice; where it cannot be followed nothing is lost. EINVAL: a block
            // device with blocks larger than sectors, and a range that does not fill them.
            libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL if self.op == RangeOp::Discard => {
                self.done_bytes = self.ranges[self.index].len_bytes;
            }
            libc::EINVAL => self.step = RangeStep::WriteZeroes,
            libc::EOPNOTSUPP | libc::ENOSYS => {
                let range = self.ranges[self.index];
                if !(range.unmap && backing.image.punches_holes()) {
                    *backing.zero_range_works = false;
                }
                self.step = RangeStep::WriteZeroes;
            }
            errno => return Err(errno),
        }
        Ok(())
    }
}

/// fdatasync: covers every write that completed before.
fn sync(image: &RawImage) -> squeue::Entry {
    opcode::Fsync::new(types::Fd(image.raw_fd()))
        .flags(types::FsyncFlags::DATASYNC)
        .build()
}

/// Points at zeroes, for `len_bytes` or as much as goes into one operation.
fn zero_iovecs(len_bytes: u64, iovecs: &mut Vec<libc::iovec>) {
    static ZEROES: OnceLock<AlignedBuffer> = OnceLock::new();
    let zeroes = ZEROES.get_or_init(|| AlignedBuffer::new(ZEROES_BYTES));
    iovecs.clear();
    let mut left_bytes = len_bytes;
    while left_bytes > 0 && iovecs.len() < ZEROES_IOVECS {
        let iov_len = left_bytes.min(ZEROES_BYTES as u64) as usize;
        iovecs.push(libc::iovec {
            iov_base: zeroes.as_ptr().cast(),
            iov_len,
        });
        left_bytes -= iov_len as u64;
    }
}

fn check(result: i32) -> Result<(), i32> {
    if result < 0 { Err(-result) } else { Ok(()) }
}

fn check_sync(result: i32, image: &RawImage) -> Result<(), i32> {
    check(result).inspect_err(|_| image.note_failed_flush())
}

/// Bytes moved, in whole sectors where direct I/O has to go on from there. None at all means
/// that the image ends early: it was truncated.
fn check_progress(result: i32, image: &RawImage) -> Result<usize, i32> {
    check(result)?;
    let moved_bytes = result as usize;
    let usable_bytes = match image.direct() {
        Some(_) => moved_bytes - moved_bytes % SECTOR_BYTES as usize,
        None => moved_bytes,
    };
    if usable_bytes == 0 {
        Err(libc::EIO)
    } else {
        Ok(usable_bytes)
    }
}
