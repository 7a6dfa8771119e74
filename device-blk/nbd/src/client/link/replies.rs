//! Replies from the server, taken apart and checked against what was asked.

use std::io;

use super::Link;
use super::coverage::Coverage;
use super::inflight::uncookie;
use crate::client::request::{Command, Request};
use crate::wire::{self, ChunkHeader, SIMPLE_REPLY_BYTES, be32, be64, chunk, errno};

/// Longest error text that is taken.
const MAX_ERROR_BYTES: u32 = 4096 + 64;
/// Zeroes for holes.
const ZEROES: [u8; 4096] = [0; 4096];

/// Where in the stream of replies we are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Incoming {
    Header,
    /// The data of a read, to be stored at byte `at` of the slot's range.
    Data {
        slot: usize,
        at_bytes: usize,
        left_bytes: usize,
        is_last: bool,
    },
}

/// Why nothing more is taken from a connection that works.
pub(super) enum End {
    Fenced,
    ShuttingDown,
}

/// A server's breach of the protocol.
pub(super) struct Breach(pub(super) &'static str);

impl From<Breach> for io::Error {
    fn from(Breach(what): Breach) -> Self {
        Self::new(io::ErrorKind::InvalidData, what)
    }
}

/// How reading the stream of replies goes on.
enum Advance {
    More,
    NeedsInput,
    Over(End),
}

impl Link<'_> {
    /// Takes apart what has been received.
    pub(super) fn take_replies(&mut self) -> Result<Option<End>, Breach> {
        loop {
            let advanced = match self.incoming {
                Incoming::Header => self.take_header()?,
                Incoming::Data { .. } => self.take_data()?,
            };
            match advanced {
                Advance::More => (),
                Advance::NeedsInput => return Ok(None),
                Advance::Over(end) => return Ok(Some(end)),
            }
        }
    }

    fn take_header(&mut self) -> Result<Advance, Breach> {
        let input = self.channel.input();
        if input.len() < 4 {
            return Ok(Advance::NeedsInput);
        }
        match be32(input, 0) {
            wire::SIMPLE_REPLY_MAGIC => self.take_simple_reply(),
            wire::STRUCTURED_REPLY_MAGIC if self.terms.structured_replies => self.take_chunk(),
            _ => Err(Breach("a reply without its magic")),
        }
    }

    fn take_simple_reply(&mut self) -> Result<Advance, Breach> {
        let input = self.channel.input();
        if input.len() < SIMPLE_REPLY_BYTES {
            return Ok(Advance::NeedsInput);
        }
        let (error, cookie) = (be32(input, 4), be64(input, 8));
        let slot = self.slot_of(cookie)?;
        self.channel.consume(SIMPLE_REPLY_BYTES);
        let inflight = self.slots[slot].as_mut().expect("slot_of found it");
        match inflight.command {
            Command::Read { .. } if self.terms.structured_replies => {
                Err(Breach("a simple reply to a read, structured ones agreed"))
            }
            Command::Read { len_bytes, .. } if error == 0 => {
                inflight.received = Coverage::default();
                self.begin_data(slot, 0, len_bytes as usize, true)
            }
            _ => {
                inflight.error = (error != 0).then_some(error);
                Ok(self.finish(slot))
            }
        }
    }

    fn take_chunk(&mut self) -> Result<Advance, Breach> {
        let input = self.channel.input();
        let Some(head) = input.first_chunk::<{ ChunkHeader::BYTES }>() else {
            return Ok(Advance::NeedsInput);
        };
        let head = ChunkHeader::decode(head);
        let slot = self.slot_of(head.cookie)?;
        let is_last = head.flags & chunk::FLAG_DONE != 0;
        let body = &input[ChunkHeader::BYTES..];
        let inflight = self.slots[slot].as_mut().expect("slot_of found it");
        match head.kind {
            chunk::NONE => {
                if head.len_bytes != 0 || !is_last {
                    return Err(Breach("an empty chunk that is not empty"));
                }
                self.channel.consume(ChunkHeader::BYTES);
                Ok(self.finish(slot))
            }
            chunk::OFFSET_DATA => {
                if body.len() < 8 {
                    return Ok(Advance::NeedsInput);
                }
                let len_bytes = head
                    .len_bytes
                    .checked_sub(8)
                    .filter(|len| *len > 0)
                    .ok_or(Breach("a data chunk without data"))?;
                let at_bytes = inflight.place(be64(body, 0), len_bytes)?;
                self.channel.consume(ChunkHeader::BYTES + 8);
                self.begin_data(slot, at_bytes, len_bytes as usize, is_last)
            }
            chunk::OFFSET_HOLE => {
                if head.len_bytes != 12 {
                    return Err(Breach("a hole chunk of wrong length"));
                }
                if body.len() < 12 {
                    return Ok(Advance::NeedsInput);
                }
                let len_bytes = be32(body, 8);
                let at_bytes = inflight.place(be64(body, 0), len_bytes)?;
                inflight.received.add(at_bytes, len_bytes as usize)?;
                store_zeroes(&mut *inflight.request, at_bytes, len_bytes as usize);
                self.channel.consume(ChunkHeader::BYTES + 12);
                Ok(self.finish_if(slot, is_last))
            }
            kind if kind & chunk::IS_ERROR != 0 => {
                if !(6..=MAX_ERROR_BYTES).contains(&head.len_bytes) {
                    return Err(Breach("an error chunk of wrong length"));
                }
                let len_bytes = head.len_bytes as usize;
                if body.len() < len_bytes {
                    return Ok(Advance::NeedsInput);
                }
                let error = be32(body, 0);
                inflight.error = Some(if error == 0 { errno::EIO } else { error });
                self.channel.consume(ChunkHeader::BYTES + len_bytes);
                Ok(self.finish_if(slot, is_last))
            }
            _ => Err(Breach("a chunk of a kind that was not asked for")),
        }
    }

    fn begin_data(
        &mut self,
        slot: usize,
        at_bytes: usize,
        len_bytes: usize,
        is_last: bool,
    ) -> Result<Advance, Breach> {
        let inflight = self.slots[slot].as_mut().expect("found by slot_of");
        inflight.received.add(at_bytes, len_bytes)?;
        self.incoming = Incoming::Data {
            slot,
            at_bytes,
            left_bytes: len_bytes,
            is_last,
        };
        Ok(Advance::More)
    }

    fn take_data(&mut self) -> Result<Advance, Breach> {
        let Incoming::Data {
            slot,
            at_bytes,
            left_bytes,
            is_last,
        } = self.incoming
        else {
            unreachable!("take_replies looked");
        };
        let input = self.channel.input();
        let len = input.len().min(left_bytes);
        let inflight = self.slots[slot].as_mut().expect("data belongs to a slot");
        inflight.request.store(at_bytes, &input[..len]);
        self.channel.consume(len);
        if len < left_bytes {
            self.incoming = Incoming::Data {
                slot,
                at_bytes: at_bytes + len,
                left_bytes: left_bytes - len,
                is_last,
            };
            return Ok(Advance::NeedsInput);
        }
        self.incoming = Incoming::Header;
        Ok(self.finish_if(slot, is_last))
    }

    fn slot_of(&self, cookie: u64) -> Result<usize, Breach> {
        let (sequence, slot) = uncookie(cookie);
        match &self.slots[slot] {
            Some(inflight) if inflight.sequence == sequence => Ok(slot),
            _ => Err(Breach("a reply to a request that is not under way")),
        }
    }

    fn finish_if(&mut self, slot: usize, is_last: bool) -> Advance {
        if is_last {
            self.finish(slot)
        } else {
            Advance::More
        }
    }

    fn finish(&mut self, slot: usize) -> Advance {
        let inflight = self.slots[slot].take().expect("found by slot_of");
        // These requests stay under way: they are for the next connection, or for the client to
        // end.
        let end = match inflight.error {
            Some(errno::EPERM) if self.terms.is_claimed => Some(End::Fenced),
            Some(errno::ESHUTDOWN) => Some(End::ShuttingDown),
            _ => None,
        };
        if let Some(end) = end {
            self.slots[slot] = Some(inflight);
            return Advance::Over(end);
        }
        self.free.push_back(slot);
        let result = match (inflight.error, inflight.command) {
            (Some(error), _) => Err(local_errno(error)),
            (None, Command::Read { len_bytes, .. })
                if !inflight.received.is_whole(len_bytes as usize) =>
            {
                tracing::warn!("the NBD server left out a part of what was read");
                Err(libc::EIO)
            }
            (None, Command::Flush) => self.terms.ledger.flushed(inflight.mark),
            (None, command) => {
                if command.writes() {
                    self.terms.ledger.acknowledged();
                }
                Ok(())
            }
        };
        inflight.request.complete(result);
        Advance::More
    }
}

fn store_zeroes(request: &mut dyn Request, at_bytes: usize, len_bytes: usize) {
    let mut done = 0;
    while done < len_bytes {
        let len = (len_bytes - done).min(ZEROES.len());
        request.store(at_bytes + done, &ZEROES[..len]);
        done += len;
    }
}

/// What a server's number means here; numbers that the protocol does not have are EIO.
fn local_errno(error: u32) -> i32 {
    match error {
        errno::EPERM => libc::EPERM,
        errno::ENOMEM => libc::ENOMEM,
        errno::EINVAL => libc::EINVAL,
        errno::ENOSPC => libc::ENOSPC,
        errno::EOVERFLOW => libc::EOVERFLOW,
        errno::ENOTSUP => libc::EOPNOTSUPP,
        _ => libc::EIO,
    }
}
