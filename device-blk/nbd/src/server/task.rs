//! One request of a client, carried out on a thread of the pool.

use std::io;
use std::sync::Arc;

use super::export::{Export, Zeroing};
use super::fence::Lease;
use crate::inbox::Inbox;
use crate::wire::{self, RequestHeader, command, errno};

/// A request that was checked, with its data.
pub(super) struct Task {
    pub(super) header: RequestHeader,
    pub(super) data: Vec<u8>,
    pub(super) held_bytes: usize,
    pub(super) export: Arc<dyn Export>,
    /// `None` where owners are not ordered.
    pub(super) lease: Option<Lease>,
    pub(super) answers: Arc<Inbox<Answer>>,
}

/// What became of it: the data of the answer, or `NBD_E*`.
pub(super) struct Answer {
    pub(super) header: RequestHeader,
    pub(super) result: Result<Vec<u8>, u32>,
    /// As counted when the request was taken.
    pub(super) held_bytes: usize,
}

impl RequestHeader {
    pub(super) fn is_write(&self) -> bool {
        matches!(
            self.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        )
    }
}

impl Task {
    pub(super) fn carry_out(mut self) {
        let result = self.attempt();
        self.answers.push(Answer {
            header: self.header,
            result,
            held_bytes: self.held_bytes,
        });
    }

    fn attempt(&mut self) -> Result<Vec<u8>, u32> {
        // Held until the write is over: a newer owner waits for it.
        let entry = match &self.lease {
            Some(lease) => Some(lease.enter().ok_or(errno::EPERM)?),
            None => None,
        };
        let answer = self.work().map_err(|error| wire_errno(&error));
        drop(entry);
        answer
    }

    fn work(&mut self) -> io::Result<Vec<u8>> {
        let RequestHeader {
            flags,
            offset_bytes,
            len_bytes,
            ..
        } = self.header;
        let export = &*self.export;
        let len_bytes = u64::from(len_bytes);
        let mut answer = Vec::new();
        match self.header.command {
            command::READ => {
                answer = vec![0; len_bytes as usize];
                export.read_at(&mut answer, offset_bytes)?;
            }
            command::WRITE => {
                export.write_at(&std::mem::take(&mut self.data), offset_bytes)?;
            }
            command::WRITE_ZEROES if len_bytes > 0 => {
                let how = Zeroing {
                    may_unmap: flags & command::FLAG_NO_HOLE == 0,
                    fast_only: flags & command::FLAG_FAST_ZERO != 0,
                };
                export.write_zeroes(offset_bytes, len_bytes, how)?;
            }
            command::TRIM if len_bytes > 0 => export.trim(offset_bytes, len_bytes)?,
            command::FLUSH => export.flush()?,
            command::BLOCK_STATUS => {
                let asks_one = flags & command::FLAG_REQ_ONE != 0;
                answer = self.allocation(offset_bytes, len_bytes, asks_one)?;
            }
            // Writes of nothing.
            _ => (),
        }
        if flags & command::FLAG_FUA != 0 && self.header.is_write() {
            export.flush()?;
        }
        Ok(answer)
    }

    /// Descriptors of a block status chunk.
    fn allocation(&self, offset_bytes: u64, len_bytes: u64, asks_one: bool) -> io::Result<Vec<u8>> {
        let mut extents = self.export.extents(offset_bytes, len_bytes)?;
        if asks_one {
            extents.truncate(1);
        }
        let mut descriptors = Vec::with_capacity(extents.len() * 8);
        for extent in extents {
            let flags = if extent.is_hole {
                wire::STATE_HOLE | wire::STATE_ZERO
            } else {
                0
            };
            let len_bytes = extent.len_bytes.min(len_bytes) as u32;
            descriptors.extend_from_slice(&len_bytes.to_be_bytes());
            descriptors.extend_from_slice(&flags.to_be_bytes());
        }
        Ok(descriptors)
    }
}

/// The number that may travel. A disk that is full is told apart, the rest is EIO.
fn wire_errno(error: &io::Error) -> u32 {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => errno::ENOSPC,
        Some(libc::EOPNOTSUPP) => errno::ENOTSUP,
        Some(libc::ENOMEM) => errno::ENOMEM,
        Some(libc::EINVAL) => errno::EINVAL,
        _ => errno::EIO,
    }
}
