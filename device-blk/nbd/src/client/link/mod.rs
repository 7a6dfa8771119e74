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
//!
//! This file is the connection's life, from its first request to how it is left; `framing` puts
//! requests on it, `replies` takes answers apart, `inflight` is what is in between.

mod coverage;
mod framing;
mod inflight;
mod replies;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use inflight::{Inflight, MAX_INFLIGHT};
use replies::{End, Incoming};

use super::ledger::Ledger;
use super::request::Request;
use crate::channel::{Channel, Received};
use crate::inbox::Inbox;
use crate::wire::{RequestHeader, command};

/// No further request is framed while this much waits to be sent.
const MAX_UNSENT_BYTES: usize = 256 << 10;

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

/// What a link knows of its session and its client.
pub(super) struct Terms<'a> {
    pub(super) inbox: &'a Inbox<Box<dyn Request>>,
    pub(super) ledger: &'a Ledger,
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
