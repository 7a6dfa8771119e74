//! A discard or write-zeroes, range by range.
//!
//! In a plain file it is `fallocate` by io_uring, or a write of zeroes where the file system
//! knows no better; any other image does it by itself.

use std::os::fd::RawFd;
use std::sync::OnceLock;

use io_uring::{opcode, squeue, types};

use super::buffer::AlignedBuffer;
use super::job::{Backing, Next, check, check_flush, check_progress, flush};
use super::workers::Operation;
use request::{ByteRange, RangeOp, Status};

/// Zeroes written where the file system cannot zero by itself.
const ZEROES_BYTES: usize = 64 << 10;
/// Times [`ZEROES_BYTES`] in one operation: 4 MiB.
const ZEROES_IOVECS: usize = 64;

/// How far it is.
pub(super) struct Ranges {
    op: RangeOp,
    ranges: Vec<ByteRange>,
    /// The range in work, and how much of it is done.
    index: usize,
    done_bytes: u64,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Fallocate,
    WriteZeroes,
    /// The image does it.
    Perform,
    /// After the last range, for write-through.
    Flush,
    Flushed,
}

impl Ranges {
    pub(super) fn new(op: RangeOp, ranges: Vec<ByteRange>) -> Self {
        Self {
            op,
            ranges,
            index: 0,
            done_bytes: 0,
            step: Step::Fallocate,
        }
    }

    pub(super) fn ranges(&self) -> &[ByteRange] {
        &self.ranges
    }

    pub(super) fn next(
        &mut self,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Next {
        iovecs.clear();
        while let Some(range) = self.ranges.get(self.index) {
            if self.done_bytes < range.len_bytes {
                return match backing.served.plain_file {
                    Some(fd) => Next::Submit(self.entry(fd, *range, backing, iovecs)),
                    None => Next::Perform(self.operation(*range)),
                };
            }
            self.index += 1;
            self.done_bytes = 0;
        }
        if backing.write_through && self.step != Step::Flushed {
            self.step = Step::Flush;
            return flush(backing.served);
        }
        Next::Done(Status::Ok)
    }

    fn operation(&mut self, range: ByteRange) -> Operation {
        self.step = Step::Perform;
        let ByteRange {
            offset_bytes,
            len_bytes,
            unmap,
        } = range;
        match self.op {
            RangeOp::Discard => Operation::Discard {
                offset_bytes,
                len_bytes,
            },
            RangeOp::WriteZeroes => Operation::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap,
            },
        }
    }

    fn entry(
        &mut self,
        fd: RawFd,
        range: ByteRange,
        backing: &Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> squeue::Entry {
        let fd = types::Fd(fd);
        let offset = range.offset_bytes + self.done_bytes;
        let left_bytes = range.len_bytes - self.done_bytes;
        let punch = range.unmap && backing.served.image.punches_holes();
        if self.step == Step::Fallocate && !punch && !*backing.zero_range_works {
            self.step = Step::WriteZeroes;
        }
        if self.step == Step::Fallocate {
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

    pub(super) fn completed(&mut self, result: i32, backing: &mut Backing<'_>) -> Result<(), i32> {
        match self.step {
            Step::Fallocate => self.fallocated(result, backing),
            Step::WriteZeroes => {
                self.done_bytes += check_progress(result, backing.served)? as u64;
                Ok(())
            }
            Step::Perform => {
                check(result)?;
                self.done_bytes = self.ranges[self.index].len_bytes;
                Ok(())
            }
            Step::Flush | Step::Flushed => {
                self.step = Step::Flushed;
                check_flush(result, backing.served)
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
            libc::EINVAL => self.step = Step::WriteZeroes,
            libc::EOPNOTSUPP | libc::ENOSYS => {
                let range = self.ranges[self.index];
                if !(range.unmap && backing.served.image.punches_holes()) {
                    *backing.zero_range_works = false;
                }
                self.step = Step::WriteZeroes;
            }
            errno => return Err(errno),
        }
        Ok(())
    }
}

/// Points at zeroes, for `len_bytes` or as much as goes into one operation.
fn zero_iovecs(len_bytes: u64, iovecs: &mut Vec<libc::iovec>) {
    static ZEROES: OnceLock<AlignedBuffer> = OnceLock::new();
    let zeroes = ZEROES.get_or_init(|| AlignedBuffer::new(ZEROES_BYTES));
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
