//! A read or write, stretch by stretch.

use faults::TornEnd;
use io_uring::{opcode, squeue, types};
use vhost_user::ring::{DescChain, Segment};

use super::bounce::BOUNCE_BYTES;
use super::buffer::AlignedBuffer;
use super::job::{Backing, Next, Served, check_flush, check_progress, flush};
use super::misbehaviour::TransferFault;
use super::sync;
use super::workers::Operation;
use crate::image::{Access, Place, SECTOR_BYTES, Ticket};
use request::{HEADER_BYTES, Status};

/// `UIO_MAXIOV`.
const MAX_IOVECS: usize = 1024;

/// How far it is.
pub(super) struct Transfer {
    access: Access,
    offset_bytes: u64,
    len_bytes: usize,
    done_bytes: usize,
    step: Step,
    bounce: Option<AlignedBuffer>,
    ticket: Option<Ticket>,
    /// What goes wrong on purpose.
    pub(super) fault: Option<Box<TransferFault>>,
}

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// As many bytes as the result says.
    File,
    /// So many bytes, or none.
    Worker {
        len_bytes: usize,
    },
    /// After the last stretch of a write that must be on stable storage.
    Flush,
    Flushed,
}

impl Transfer {
    pub(super) fn new(access: Access, offset_bytes: u64, len_bytes: usize) -> Self {
        Self {
            access,
            offset_bytes,
            len_bytes,
            done_bytes: 0,
            step: Step::File,
            bounce: None,
            ticket: None,
            fault: None,
        }
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(super) fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(super) fn next(
        &mut self,
        chain: &DescChain,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Next {
        loop {
            let mut left_bytes = self.len_bytes - self.done_bytes;
            if left_bytes == 0 {
                return self.end(backing);
            }
            if self.fault.is_some() {
                match self.misbehave(left_bytes, backing) {
                    Some(Ok(bytes)) => left_bytes = bytes,
                    Some(Err(errno)) => return Next::Failed(errno),
                    None => return self.end(backing),
                }
            }
            match self.place(backing.served, left_bytes) {
                Place::File {
                    fd,
                    offset_bytes,
                    len_bytes,
                    ticket,
                } => {
                    let len_bytes = left_bytes.min(len_bytes as usize);
                    let Some(is_direct) =
                        self.gather(chain, len_bytes, MAX_IOVECS, backing, iovecs)
                    else {
                        return Next::NeedsBounce;
                    };
                    self.step = Step::File;
                    let at_once = is_direct
                        .then(|| sync::try_now(self.access, fd, offset_bytes, iovecs, backing))
                        .flatten();
                    let Some(result) = at_once else {
                        self.ticket = ticket;
                        return Next::Submit(self.entry(fd, offset_bytes, backing, iovecs));
                    };
                    match check_progress(result, backing.served) {
                        Ok(moved_bytes) => self.done_bytes += moved_bytes,
                        Err(errno) => return Next::Failed(errno),
                    }
                }
                Place::Zeroes { len_bytes } => {
                    let len_bytes = left_bytes.min(len_bytes as usize);
                    match &mut self.fault {
                        None => chain.zero_at(self.done_bytes, len_bytes),
                        Some(fault) => {
                            let mut zeroes = vec![0; len_bytes];
                            fault.spoil(&mut zeroes);
                            chain.write_at(self.done_bytes, &zeroes)
                        }
                    };
                    self.done_bytes += len_bytes;
                }
                Place::Worker { len_bytes } => {
                    let len_bytes = left_bytes.min(len_bytes as usize);
                    if self
                        .gather(chain, len_bytes, usize::MAX, backing, iovecs)
                        .is_none()
                    {
                        return Next::NeedsBounce;
                    }
                    let len_bytes = iovecs.iter().map(|iovec| iovec.iov_len).sum();
                    self.step = Step::Worker { len_bytes };
                    let offset_bytes = self.offset_bytes + self.done_bytes as u64;
                    return Next::Perform(match self.access {
                        Access::Read => Operation::Read { offset_bytes },
                        Access::Write => Operation::Write { offset_bytes },
                    });
                }
            }
        }
    }

    /// How much of the rest is moved next, as far as faults say; an error to answer with, or None
    /// when nothing more is to be done.
    #[cold]
    fn misbehave(
        &mut self,
        left_bytes: usize,
        backing: &Backing<'_>,
    ) -> Option<Result<usize, i32>> {
        let fault = self.fault.as_mut()?;
        let block_bytes = backing.served.direct.map_or(1, |direct| direct.block_bytes);
        let mut bytes = left_bytes;
        if let Some(short_bytes) = fault.short_bytes.take() {
            bytes = bytes.min(short_bytes.next_multiple_of(block_bytes));
        }
        let Some((torn_bytes, end)) = fault.torn else {
            return Some(Ok(bytes));
        };
        let torn_bytes = torn_bytes / block_bytes * block_bytes;
        bytes = bytes.min(torn_bytes.saturating_sub(self.done_bytes));
        if bytes > 0 {
            return Some(Ok(bytes));
        }
        match end {
            TornEnd::Error => Some(Err(libc::EIO)),
            TornEnd::Success => {
                self.done_bytes = self.len_bytes;
                None
            }
            TornEnd::Crash => faults::crash(),
        }
    }

    /// See [`super::job::Job::misdirect`].
    pub(super) fn misdirect(&mut self, sectors: i64, capacity_sectors: u64) {
        let sector = self.offset_bytes / SECTOR_BYTES;
        let len_sectors = (self.len_bytes as u64).div_ceil(SECTOR_BYTES);
        if let Some(elsewhere) = sector.checked_add_signed(sectors)
            && elsewhere
                .checked_add(len_sectors)
                .is_some_and(|end| end <= capacity_sectors)
        {
            self.offset_bytes = elsewhere * SECTOR_BYTES;
        }
    }

    /// Where the rest begins.
    #[inline]
    fn place(&self, served: &Served, left_bytes: usize) -> Place {
        let offset_bytes = self.offset_bytes + self.done_bytes as u64;
        match served.plain_file {
            Some(fd) => Place::File {
                fd,
                offset_bytes,
                len_bytes: left_bytes as u64,
                ticket: None,
            },
            None => served
                .image
                .locate(self.access, offset_bytes, left_bytes as u64),
        }
    }

    /// A plain file was told by each write's flags to be through.
    fn end(&mut self, backing: &Backing<'_>) -> Next {
        let must_flush = self.access == Access::Write
            && backing.write_through
            && backing.served.plain_file.is_none()
            && self.step != Step::Flushed;
        if !must_flush {
            return Next::Done(Status::Ok);
        }
        self.step = Step::Flush;
        flush(backing.served)
    }

    /// Collects memory for the next `len_bytes` at most: the guest's, or a bounce buffer where
    /// that does not do. Tells whether it is the guest's; `None` when there is no bounce buffer.
    #[inline]
    fn gather(
        &mut self,
        chain: &DescChain,
        len_bytes: usize,
        max_iovecs: usize,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Option<bool> {
        debug_assert_ne!(len_bytes, 0, "a stretch has a length");
        iovecs.clear();
        let segments = match self.access {
            Access::Read => chain.writable_range(self.done_bytes, len_bytes),
            Access::Write => chain.readable_range(HEADER_BYTES + self.done_bytes, len_bytes),
        };
        let (mut address_bits, mut length_bits) = (0, 0);
        for segment in segments.take(max_iovecs) {
            address_bits |= segment.as_ptr().addr();
            length_bits |= segment.len();
            iovecs.extend_from_slice(Segment::as_iovecs(&[segment]));
        }
        let is_spoiled = self
            .fault
            .as_ref()
            .is_some_and(|fault| fault.corrupt.is_some());
        let is_usable = !backing.served.has_cipher
            && !is_spoiled
            && backing.served.direct.is_none_or(|direct| {
                address_bits & (direct.mem_align_bytes - 1) == 0
                    && length_bits & (direct.block_bytes - 1) == 0
            });
        if is_usable {
            return Some(true);
        }
        self.bounce(chain, len_bytes, backing, iovecs)
            .then_some(false)
    }

    /// Puts a bounce buffer in the place of the guest's; false when there is none.
    #[cold]
    fn bounce(
        &mut self,
        chain: &DescChain,
        len_bytes: usize,
        backing: &mut Backing<'_>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> bool {
        let Some(mut buffer) = backing.bounce.take() else {
            return false;
        };
        let len_bytes = len_bytes.min(BOUNCE_BYTES);
        if self.access == Access::Write {
            let into = &mut buffer.as_mut_slice()[..len_bytes];
            let copied = chain.read_at(HEADER_BYTES + self.done_bytes, into);
            debug_assert_eq!(copied, len_bytes, "lengths were checked");
            if let Some(fault) = &mut self.fault {
                fault.spoil(into);
            }
            if let Some(cipher) = backing.served.image.cipher() {
                cipher.encrypt(self.offset_bytes + self.done_bytes as u64, into);
            }
        }
        iovecs.clear();
        iovecs.push(libc::iovec {
            iov_base: buffer.as_ptr().cast(),
            iov_len: len_bytes,
        });
        self.bounce = Some(buffer);
        true
    }

    fn entry(
        &self,
        fd: i32,
        offset_bytes: u64,
        backing: &Backing<'_>,
        iovecs: &[libc::iovec],
    ) -> squeue::Entry {
        let fd = types::Fd(fd);
        let sync_flag = match backing.write_through && backing.served.plain_file.is_some() {
            true => libc::RWF_DSYNC,
            false => 0,
        };
        match (self.access, iovecs) {
            (Access::Read, [one]) => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset_bytes)
                .build(),
            (Access::Read, many) => opcode::Readv::new(fd, many.as_ptr(), many.len() as u32)
                .offset(offset_bytes)
                .build(),
            (Access::Write, [one]) => {
                opcode::Write::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32)
                    .offset(offset_bytes)
                    .rw_flags(sync_flag)
                    .build()
            }
            (Access::Write, many) => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                .offset(offset_bytes)
                .rw_flags(sync_flag)
                .build(),
        }
    }

    pub(super) fn completed(
        &mut self,
        chain: &DescChain,
        result: i32,
        backing: &mut Backing<'_>,
    ) -> Result<(), i32> {
        self.ticket = None;
        let moved_bytes = match self.step {
            Step::File => check_progress(result, backing.served),
            Step::Worker { len_bytes } if result >= 0 => Ok(len_bytes),
            Step::Worker { .. } => Err(-result),
            Step::Flush | Step::Flushed => {
                self.step = Step::Flushed;
                return check_flush(result, backing.served);
            }
        };
        if let Some(mut buffer) = self.bounce.take() {
            if let (Access::Read, Ok(moved_bytes)) = (self.access, &moved_bytes) {
                let read = &mut buffer.as_mut_slice()[..*moved_bytes];
                if let Some(cipher) = backing.served.image.cipher() {
                    cipher.decrypt(self.offset_bytes + self.done_bytes as u64, read);
                }
                if let Some(fault) = &mut self.fault {
                    fault.spoil(read);
                }
                chain.write_at(self.done_bytes, read);
            }
            backing.bounce.give_back(buffer);
        }
        self.done_bytes += moved_bytes?;
        Ok(())
    }

    /// The operation is to be begun anew.
    pub(super) fn interrupted(&mut self, backing: &mut Backing<'_>) {
        self.ticket = None;
        if let Some(buffer) = self.bounce.take() {
            backing.bounce.give_back(buffer);
        }
    }
}
