//! The transmission phase of one connection, as the client.
//!
//! One thread frames requests, sends, receives and takes replies apart. Nothing a server sends
//! is believed: cookies, lengths and offsets are checked against what was asked, and a read
//! counts only when each of its bytes came exactly once.
//!
//! A connection must not be left while the server may still carry out writes of it: one that comes
//! late would undo what is written over the next connection. Hence:
//! - A server that is silent is waited for, whatever it takes; its end, or its kernel's, shows.
//! - When another connection of the session is lost, this one is used up: it takes nothing new,
//!   and is closed when everything was answered.
//! - Where sessions are ordered by a claim the server sees to all that: a silent connection is
//!   closed on our half after the stall timeout and given up after another one.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::request::{Command, Request};
use crate::channel::{Channel, Received};
use crate::inbox::Inbox;
use crate::wire::{
    self, ChunkHeader, RequestHeader, SIMPLE_REPLY_BYTES, be32, be64, chunk, command, errno,
    transmission,
};

/// Requests under way on one connection.
const MAX_INFLIGHT: usize = 128;
/// No further request is framed while this much waits to be sent.
const MAX_UNSENT_BYTES: usize = 256 << 10;
/// Longest error text that is taken.
const MAX_ERROR_BYTES: u32 = 4096 + 64;
/// Zeroes for holes.
const ZEROES: [u8; 4096] = [0; 4096];

/// How a link ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Asked to.
    Stopped,
    /// The connection is gone; what was under way is back in the inbox.
    Lost(io::Error),
    /// The server says that another owner has taken over.
    Fenced,
}

/// Why nothing more is taken from a connection that works.
enum End {
    Fenced,
    ShuttingDown,
}

/// What a link knows of its session and its client.
pub(super) struct Terms<'a> {
    pub(super) inbox: &'a Inbox<Box<dyn Request>>,
    pub(super) ledger: &'a super::ledger::Ledger,
    /// Set when the session ends, with a wake-up.
    pub(super) stop: &'a AtomicBool,
    /// Set before that when the client ends: nobody waits for anything any more.
    pub(super) is_closing: &'a AtomicBool,
    /// Set while the server owes answers and does not give them.
    pub(super) is_stalled: &'a AtomicBool,
    /// `NBD_FLAG_*`
    pub(super) flags: u16,
    pub(super) structured_replies: bool,
    /// A claim orders our sessions; see the module's text.
    pub(super) is_claimed: bool,
    pub(super) every_write_durable: bool,
    pub(super) stall_timeout: Duration,
}

/// Serves the inbox until the session ends.
pub(super) fn run(channel: Channel, terms: &Terms<'_>) -> Outcome {
    let mut link = Link {
        channel,
        terms,
        slots: (0..MAX_INFLIGHT).map(|_| None).collect(),
        free: (0..MAX_INFLIGHT).collect(),
        next_sequence: 0,
        incoming: Incoming::Header,
        last_progress: Instant::now(),
        leaving: Leaving::No,
    };
    let outcome = link.serve();
    if !matches!(outcome, Outcome::Stopped) {
        link.await_end();
    }
    terms.is_stalled.store(false, Ordering::Relaxed);
    link.put_back();
    outcome
}

struct Link<'a> {
    channel: Channel,
    terms: &'a Terms<'a>,
    slots: Vec<Option<Inflight>>,
    free: VecDeque<usize>,
    /// Makes cookies unique, and tells the order.
    next_sequence: u64,
    incoming: Incoming,
    /// When the server last sent something, or was given something to do after a pause.
    last_progress: Instant,
    leaving: Leaving,
}

/// How far we are from leaving the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// Nothing new is taken.
    UsedUp,
    /// Our half is closed, since then.
    Closed(Instant),
}

struct Inflight {
    request: Box<dyn Request>,
    command: Command,
    sequence: u64,
    received: Coverage,
    error: Option<u32>,
    /// Of [`super::ledger::Ledger`], for a flush.
    mark: u64,
}

/// Where in the stream of replies we are.
#[derive(Clone, Copy, Debug)]
enum Incoming {
    Header,
    /// The data of a read, to be stored at byte `at` of the slot's range.
    Data {
        slot: usize,
        at_bytes: usize,
        left_bytes: usize,
        is_last: bool,
    },
}

/// A server's breach of the protocol.
struct Breach(&'static str);

impl From<Breach> for io::Error {
    fn from(Breach(what): Breach) -> Self {
        Self::new(io::ErrorKind::InvalidData, what)
    }
}

impl Link<'_> {
    fn serve(&mut self) -> Outcome {
        loop {
            match self.step() {
                Ok(None) => (),
                Ok(Some(outcome)) => return outcome,
                Err(error) => return Outcome::Lost(error),
            }
        }
    }

    fn step(&mut self) -> io::Result<Option<Outcome>> {
        if self.terms.stop.load(Ordering::SeqCst) {
            if self.terms.is_closing.load(Ordering::SeqCst) {
                self.say_goodbye();
                return Ok(Some(Outcome::Stopped));
            }
            if self.terms.is_claimed {
                self.close();
            } else if self.leaving == Leaving::No {
                self.leaving = Leaving::UsedUp;
            }
            if self.inflight() == 0 {
                self.say_goodbye();
                return Ok(Some(Outcome::Stopped));
            }
        }
        self.frame_requests();
        self.channel.send()?;
        let received = self.channel.receive()?;
        if received == Received::Bytes {
            self.last_progress = Instant::now();
            self.terms.is_stalled.store(false, Ordering::Relaxed);
            return match self.take_replies()? {
                None => Ok(None),
                Some(End::Fenced) => Ok(Some(Outcome::Fenced)),
                Some(End::ShuttingDown) => Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "the server is shutting down",
                )),
            };
        }
        if received == Received::End {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.check_stall()?;
        if self
            .terms
            .inbox
            .fall_asleep(self.takes_requests(), self.sign_to_wake())
        {
            let ready = self
                .channel
                .wait(true, self.terms.inbox.wake_fd(), self.patience())?;
            if ready.woken {
                self.terms.inbox.woke_up();
            }
        }
        Ok(None)
    }

    /// What has not been heeded yet.
    fn sign_to_wake(&self) -> &AtomicBool {
        match self.leaving {
            Leaving::No => self.terms.stop,
            Leaving::UsedUp | Leaving::Closed(_) => self.terms.is_closing,
        }
    }

    fn close(&mut self) {
        if !matches!(self.leaving, Leaving::Closed(_)) {
            self.leaving = Leaving::Closed(Instant::now());
            self.channel.close_write();
        }
    }

    /// Waits for the server to close a connection that is lost, which it does at once if it was
    /// the server's doing.
    fn await_end(&mut self) {
        self.close();
        loop {
            match self.channel.receive() {
                Ok(Received::Bytes) => {
                    let len = self.channel.input().len();
                    self.channel.consume(len);
                    continue;
                }
                Ok(Received::Nothing) => (),
                Ok(Received::End) | Err(_) => return,
            }
            if self.terms.is_closing.load(Ordering::SeqCst) || self.check_stall().is_err() {
                return;
            }
            let inbox = self.terms.inbox;
            if inbox.fall_asleep(false, self.terms.is_closing) {
                let waited = self.channel.wait(true, inbox.wake_fd(), self.patience());
                inbox.woke_up();
                if waited.is_err() {
                    return;
                }
            }
        }
    }

    fn inflight(&self) -> usize {
        MAX_INFLIGHT - self.free.len()
    }

    fn takes_requests(&self) -> bool {
        self.leaving == Leaving::No
            && !self.free.is_empty()
            && self.channel.unsent_bytes() < MAX_UNSENT_BYTES
    }

    /// How long nothing may happen.
    fn patience(&self) -> Duration {
        /// For what is an event: answers, the end.
        const LOOK_INTERVAL: Duration = Duration::from_secs(60);
        let since = match self.leaving {
            Leaving::Closed(since) => since,
            // Keepalive tells of a dead peer, and then the socket becomes readable.
            _ if self.inflight() == 0 => return LOOK_INTERVAL,
            _ => self.last_progress,
        };
        let left = (since + self.terms.stall_timeout).saturating_duration_since(Instant::now());
        if left.is_zero() { LOOK_INTERVAL } else { left }
    }

    fn check_stall(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let is_late = |since: Instant| now >= since + self.terms.stall_timeout;
        match self.leaving {
            Leaving::Closed(since) => {
                if self.terms.is_claimed && is_late(since) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Leaving::No | Leaving::UsedUp => {
                if self.inflight() == 0 || !is_late(self.last_progress) {
                    return Ok(());
                }
                if !self.terms.is_stalled.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        requests = self.inflight(),
                        "the NBD server owes answers and has been silent for {:?}",
                        self.terms.stall_timeout
                    );
                }
                if self.terms.is_claimed {
                    // A request that is cut in two thereby is never carried out.
                    self.close();
                }
            }
        }
        Ok(())
    }

    fn frame_requests(&mut self) {
        while self.takes_requests() {
            let Some(request) = self.terms.inbox.pop() else {
                return;
            };
            self.frame(request);
        }
    }

    fn frame(&mut self, mut request: Box<dyn Request>) {
        let asked = request.command();
        let can = |flag: u16| self.terms.flags & flag != 0;
        let fua_flag = |fua: bool| {
            if (fua || self.terms.every_write_durable) && can(transmission::SEND_FUA) {
                command::FLAG_FUA
            } else {
                0
            }
        };
        let (code, flags) = match asked {
            Command::Read { .. } => (command::READ, 0),
            Command::Write { fua, .. } => (command::WRITE, fua_flag(fua)),
            Command::WriteZeroes { fua, may_unmap, .. } => {
                let no_hole = if may_unmap { 0 } else { command::FLAG_NO_HOLE };
                (command::WRITE_ZEROES, fua_flag(fua) | no_hole)
            }
            // Advice that cannot be followed is no failure.
            Command::Trim { .. } if !can(transmission::SEND_TRIM) => {
                return request.complete(Ok(()));
            }
            Command::Trim { .. } => (command::TRIM, 0),
            // Nothing is cached by a server without this flag.
            Command::Flush if !can(transmission::SEND_FLUSH) => {
                return request.complete(self.terms.ledger.may_flush());
            }
            Command::Flush => match self.terms.ledger.may_flush() {
                Ok(()) => (command::FLUSH, 0),
                refused => return request.complete(refused),
            },
        };
        let (offset_bytes, len_bytes) = asked.range().unwrap_or((0, 0));
        let slot = self
            .free
            .pop_front()
            .expect("takes_requests looked for a free slot");
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        if self.inflight() == 1 {
            self.last_progress = Instant::now();
        }
        let header = RequestHeader {
            flags,
            command: code,
            cookie: cookie(sequence, slot),
            offset_bytes,
            len_bytes,
        };
        self.channel.put(&header.encode());
        if matches!(asked, Command::Write { .. }) {
            self.channel
                .put_with(len_bytes as usize, |into| request.payload(0, into));
        }
        self.slots[slot] = Some(Inflight {
            request,
            command: asked,
            sequence,
            received: Coverage::default(),
            error: None,
            mark: self.terms.ledger.mark(),
        });
    }

    /// Takes apart what has been received.
    fn take_replies(&mut self) -> Result<Option<End>, Breach> {
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

    /// The end of a session that has nothing under way: the server need not find out by itself.
    fn say_goodbye(&mut self) {
        if self.channel.unsent_bytes() == 0 && !matches!(self.leaving, Leaving::Closed(_)) {
            let disc = RequestHeader {
                flags: 0,
                command: command::DISC,
                cookie: 0,
                offset_bytes: 0,
                len_bytes: 0,
            };
            self.channel.put(&disc.encode());
            let _ = self.channel.send();
        }
        self.channel.close_write();
    }

    fn put_back(&mut self) {
        let mut left: Vec<Inflight> = self.slots.iter_mut().filter_map(Option::take).collect();
        left.sort_by_key(|inflight| inflight.sequence);
        let requests = left.into_iter().map(|inflight| inflight.request).collect();
        self.terms.inbox.put_back(requests);
    }
}

/// How reading the stream of replies goes on.
enum Advance {
    More,
    NeedsInput,
    Over(End),
}

impl Inflight {
    /// Where in the request's range a chunk lies.
    fn place(&self, offset_bytes: u64, len_bytes: u32) -> Result<usize, Breach> {
        let Command::Read {
            offset_bytes: start,
            len_bytes: whole,
        } = self.command
        else {
            return Err(Breach("data for a request that reads nothing"));
        };
        let at_bytes = offset_bytes.checked_sub(start);
        match at_bytes {
            Some(at)
                if len_bytes > 0
                    && at
                        .checked_add(u64::from(len_bytes))
                        .is_some_and(|end| end <= u64::from(whole)) =>
            {
                Ok(at as usize)
            }
            _ => Err(Breach("data beyond what was asked for")),
        }
    }
}

/// Which bytes of a read have come.
#[derive(Debug, Default)]
struct Coverage {
    /// Sorted, neither touching nor overlapping.
    ranges: Vec<(usize, usize)>,
}

impl Coverage {
    fn add(&mut self, at_bytes: usize, len_bytes: usize) -> Result<(), Breach> {
        let end = at_bytes + len_bytes;
        let index = self.ranges.partition_point(|range| range.0 < at_bytes);
        let overlaps_before = index > 0 && self.ranges[index - 1].1 > at_bytes;
        let overlaps_after = self.ranges.get(index).is_some_and(|range| range.0 < end);
        if overlaps_before || overlaps_after {
            return Err(Breach("the same bytes of a read twice"));
        }
        // Chunks come in order from every server that is known: one range, growing.
        if index > 0 && self.ranges[index - 1].1 == at_bytes {
            self.ranges[index - 1].1 = end;
        } else {
            self.ranges.insert(index, (at_bytes, end));
        }
        if self.ranges.len() > MAX_RANGES {
            return Err(Breach("a read answered in too many pieces"));
        }
        Ok(())
    }

    fn is_whole(&self, len_bytes: usize) -> bool {
        let mut end = 0;
        for range in &self.ranges {
            if range.0 != end {
                return false;
            }
            end = range.1;
        }
        end == len_bytes
    }
}

/// Pieces out of order; each is an entry to search.
const MAX_RANGES: usize = 8192;

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

fn cookie(sequence: u64, slot: usize) -> u64 {
    sequence * MAX_INFLIGHT as u64 + slot as u64
}

fn uncookie(cookie: u64) -> (u64, usize) {
    let slots = MAX_INFLIGHT as u64;
    (cookie / slots, (cookie % slots) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_count_when_every_byte_came_once() {
        let mut whole = Coverage::default();
        for (at, len) in [(512, 512), (0, 512), (1024, 1024)] {
            assert!(!whole.is_whole(2048));
            assert!(whole.add(at, len).is_ok());
        }
        assert!(whole.is_whole(2048));
        for (at, len) in [(0, 1), (2047, 1), (511, 2), (0, 4096)] {
            assert!(whole.add(at, len).is_err(), "{at}+{len}");
        }
    }

    #[test]
    fn cookies_tell_slot_and_sequence() {
        for (sequence, slot) in [(0, 0), (1, 127), (u64::from(u32::MAX), 5)] {
            assert_eq!(uncookie(cookie(sequence, slot)), (sequence, slot));
        }
    }
}
