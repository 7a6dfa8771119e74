//! One request on its way: what to do next, and what a result means.
//!
//! ```text
//!            next()                         completed()
//!   Job ───────────────► Submit, Perform ───────────────► Job   (short, interrupted, more steps)
//!    │                                                     │
//!    ├─► NeedsBounce: again when a buffer is free          └─► failed: errno
//!    └─► Done(Status), Failed(errno)
//! ```
//!
//! A job has at most one operation under way, in the ring or with a worker: a transfer goes
//! stretch by stretch and is continued where the kernel stopped short ([`super::transfer`]); a
//! discard goes range by range ([`super::ranges`]). So a job never needs more than the ring entry
//! that was free when it began.

use std::os::fd::RawFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use vhost_user::ring::DescChain;

use super::backend::Backend;
use super::bounce::BouncePool;
use super::misbehaviour::TransferFault;
use super::ranges::Ranges;
use super::sync::Nowait;
use super::transfer::Transfer;
use super::workers::Operation;
use crate::image::{Access, DirectIo, Image, SECTOR_BYTES};
use request::{ByteRange, Limits, OpKind, RangeOp, Status};

/// How often an operation that was interrupted or found no resources is tried again.
const MAX_RETRIES: u32 = 1000;

/// The image as a queue uses it: asked once, not for each request.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) image: Arc<dyn Image>,
    pub(super) plain_file: Option<RawFd>,
    pub(super) flush_file: Option<RawFd>,
    pub(super) direct: Option<DirectIo>,
    pub(super) is_in_memory: bool,
    pub(super) has_cipher: bool,
    pub(super) limits: Limits,
}

impl Served {
    pub(super) fn of(backend: &Backend) -> Self {
        let image = backend.image();
        Self {
            plain_file: image.plain_file(),
            flush_file: image.flush_file(),
            direct: image.direct(),
            is_in_memory: image.is_in_memory(),
            has_cipher: image.cipher().is_some(),
            limits: backend.limits(&*image),
            image,
        }
    }
}

/// What jobs work on, besides themselves.
pub(super) struct Backing<'a> {
    pub(super) served: &'a Served,
    /// Complete writes only when they are on stable storage.
    pub(super) write_through: bool,
    pub(super) bounce: &'a mut BouncePool,
    /// Cleared when the file system turns out not to zero ranges.
    pub(super) zero_range_works: &'a mut bool,
    pub(super) nowait: &'a mut Nowait,
}

/// What a job wants.
pub(super) enum Next {
    /// Put this into the ring.
    Submit(squeue::Entry),
    /// Give this to a worker, with the job's vectors.
    Perform(Operation),
    /// Ask again when a bounce buffer was given back.
    NeedsBounce,
    /// Answer.
    Done(Status),
    /// Answer, and say why: an error number.
    Failed(i32),
}

/// A request that was taken off the ring and is not answered yet.
pub(super) struct Job {
    pub(super) chain: DescChain,
    pub(super) kind: OpKind,
    /// When it was taken off the ring.
    pub(super) accepted_ns: u64,
    work: Work,
    retries: u32,
}

enum Work {
    Transfer(Transfer),
    Flush { done: bool },
    Ranges(Ranges),
}

impl Job {
    pub(super) fn transfer(
        chain: DescChain,
        access: Access,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Self {
        let kind = match access {
            Access::Read => OpKind::Read,
            Access::Write => OpKind::Write,
        };
        let transfer = Transfer::new(access, offset_bytes, len_bytes as usize);
        Self::new(chain, kind, Work::Transfer(transfer))
    }

    pub(super) fn flush(chain: DescChain) -> Self {
        Self::new(chain, OpKind::Flush, Work::Flush { done: false })
    }

    pub(super) fn ranges(chain: DescChain, op: RangeOp, ranges: Vec<ByteRange>) -> Self {
        let kind = match op {
            RangeOp::Discard => OpKind::Discard,
            RangeOp::WriteZeroes => OpKind::WriteZeroes,
        };
        Self::new(chain, kind, Work::Ranges(Ranges::new(op, ranges)))
    }

    fn new(chain: DescChain, kind: OpKind, work: Work) -> Self {
        Self {
            chain,
            kind,
            accepted_ns: 0,
            work,
            retries: 0,
        }
    }

    /// Makes a read or write go to a place so many sectors further on, if there is such a place.
    pub(super) fn misdirect(&mut self, sectors: i64, capacity_sectors: u64) {
        if let Work::Transfer(transfer) = &mut self.work {
            transfer.misdirect(sectors, capacity_sectors);
        }
    }

    /// Lets a read or write go wrong.
    pub(super) fn spoil(&mut self, how: impl FnOnce(&mut TransferFault)) {
        if let Work::Transfer(transfer) = &mut self.work {
            how(transfer.fault.get_or_insert_default());
        }
    }

    /// Bytes the request is about, for the statistics.
    pub(super) fn payload_bytes(&self) -> u64 {
        match &self.work {
            Work::Transfer(transfer) => transfer.len_bytes() as u64,
            Work::Flush { .. } => 0,
            Work::Ranges(ranges) => ranges.ranges().iter().map(|range| range.len_bytes).sum(),
        }
    }

    /// Where the request begins, as far as it has a place.
    pub(super) fn offset_bytes(&self) -> u64 {
        match &self.work {
            Work::Transfer(transfer) => transfer.offset_bytes(),
            Work::Flush { .. } => 0,
            Work::Ranges(ranges) => ranges
                .ranges()
                .first()
                .map_or(0, |range| range.offset_bytes),
        }
    }

    /// What is read or written, and how much data moves, for whoever limits it. Discards and
    /// write-zeroes move none.
    pub(super) fn cost(&self) -> Option<(Access, u64)> {
        match &self.work {
            Work::Transfer(transfer) => Some((transfer.access(), transfer.len_bytes() as u64)),
            Work::Ranges(_) => Some((Access::Write, 0)),
            Work::Flush { .. } => None,
        }
    }

    /// Calls `mark` for each range that the job changes.
    pub(super) fn each_change(&self, mut mark: impl FnMut(u64, u64)) {
        match &self.work {
            Work::Transfer(transfer) if transfer.access() == Access::Write => {
                mark(transfer.offset_bytes(), transfer.len_bytes() as u64);
            }
            Work::Transfer(_) | Work::Flush { .. } => {}
            Work::Ranges(ranges) => {
                for range in ranges.ranges() {
                    mark(range.offset_bytes, range.len_bytes);
                }
            }
        }
    }

    /// What to do now. `iovecs` is scratch space that must stay as it is until the operation was
    /// submitted.
    #[inline]
    pub(super) fn next(
        &mut self,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Next {
        match &mut self.work {
            Work::Transfer(transfer) => transfer.next(&self.chain, backing, iovecs),
            Work::Flush { done: false } => flush(backing.served),
            Work::Flush { done: true } => Next::Done(Status::Ok),
            Work::Ranges(ranges) => ranges.next(backing, iovecs),
        }
    }

    /// Takes the result of the operation that was begun last.
    ///
    /// # Errors
    /// The error number, when the request failed.
    #[inline]
    pub(super) fn completed(&mut self, result: i32, backing: &mut Backing<'_>) -> Result<(), i32> {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            if let Work::Transfer(transfer) = &mut self.work {
                transfer.interrupted(backing);
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
                check_flush(result, backing.served)
            }
            Work::Ranges(ranges) => ranges.completed(result, backing),
        }
    }
}

/// Covers every write that completed before.
pub(super) fn flush(served: &Served) -> Next {
    if served.image.has_lost_writes() {
        return Next::Done(Status::IoErr);
    }
    match served.flush_file {
        // There is no medium to wait for.
        Some(_) if served.is_in_memory => Next::Done(Status::Ok),
        Some(fd) => Next::Submit(
            opcode::Fsync::new(types::Fd(fd))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        ),
        None => Next::Perform(Operation::Flush),
    }
}

pub(super) fn check(result: i32) -> Result<(), i32> {
    if result < 0 { Err(-result) } else { Ok(()) }
}

pub(super) fn check_flush(result: i32, served: &Served) -> Result<(), i32> {
    check(result).inspect_err(|_| {
        if served.flush_file.is_some() {
            served.image.note_failed_flush();
        }
    })
}

/// Bytes moved, in whole blocks where direct I/O or a cipher has to go on from there. None at all
/// means that the image ends early: it was truncated.
pub(super) fn check_progress(result: i32, served: &Served) -> Result<usize, i32> {
    check(result)?;
    let moved_bytes = result as usize;
    let block_bytes = match served.direct {
        _ if served.has_cipher => (served.limits.block_sectors * SECTOR_BYTES) as usize,
        Some(direct) => direct.block_bytes,
        None => 1,
    };
    let usable_bytes = moved_bytes & !(block_bytes - 1);
    if usable_bytes == 0 {
        Err(libc::EIO)
    } else {
        Ok(usable_bytes)
    }
}
