//! What a queue does wrong on purpose: see [`faults`].
//!
//! With a rule armed for requests, each request is shown to the rules before it begins. Some are answered
//! at once, some are held until later, some begin with a [`TransferFault`] that the transfer obeys. A
//! queue for whose disk nothing is armed looks once a batch, and a transfer at a field of its own.

use std::sync::Arc;

use faults::{Action, DeviceFaults, Event, Op, Point, Strike, TornEnd, Wake, monotonic_ns};
use request::{OpKind, Status};
use vhost_user::ring::Ring;

use super::job::Job;
use super::{Backend, BlkQueue};
use crate::image::SECTOR_BYTES;

/// Makes queues look at what changed.
#[derive(Debug)]
pub(crate) struct QueueWaker(pub(crate) Arc<Backend>);

impl Wake for QueueWaker {
    fn wake(&self) {
        self.0.wake_queues();
    }
}

/// What a queue holds back.
#[derive(Default)]
pub(super) struct Misbehaviour {
    /// In the order in which they came.
    held: Vec<Held>,
    /// The queue takes nothing.
    pause: Option<Until>,
}

/// A request that has not begun.
struct Held {
    job: Job,
    until: Until,
    /// Goes once so many others have gone ahead.
    ahead: Option<u32>,
}

struct Until {
    at_ns: u64,
    strike: Strike,
}

impl Until {
    fn is_over(&self, now_ns: u64) -> bool {
        self.ns() <= now_ns
    }

    fn ns(&self) -> u64 {
        self.at_ns.min(self.strike.ends_ns())
    }
}

/// What goes wrong with a transfer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TransferFault {
    /// The first operation moves no more.
    pub(super) short_bytes: Option<usize>,
    /// No more is written, and what then happens.
    pub(super) torn: Option<(usize, TornEnd)>,
    /// Bits are flipped in so many bytes, which follow from the number.
    pub(super) corrupt: Option<(u32, u64)>,
}

impl TransferFault {
    /// Flips bits of the first stretch that is moved.
    pub(super) fn spoil(&mut self, data: &mut [u8]) {
        let Some((bytes, random)) = self.corrupt.take().filter(|_| !data.is_empty()) else {
            return;
        };
        for number in 0..u64::from(bytes) {
            let bits = faults::scramble(random, number);
            data[(bits >> 3) as usize % data.len()] ^= 1 << (bits & 7);
        }
    }
}

impl Misbehaviour {
    /// Whether something is held back.
    #[inline]
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty() || self.pause.is_some()
    }

    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_paused(&self) -> bool {
        self.pause.is_some()
    }

    /// When the thread is to come back.
    pub(super) fn next_ns(&self) -> Option<u64> {
        let held = self.held.iter().map(|held| &held.until);
        held.chain(&self.pause).map(Until::ns).min()
    }
}

impl BlkQueue {
    /// Shows a request to the rules; it is begun, held back or answered.
    #[cold]
    pub(super) fn misbehave(&mut self, ring: &mut Ring, mut job: Job, limited: bool) {
        let faults = Arc::clone(&self.backend.options.faults);
        let mut answer = None;
        let mut hold: Option<(Until, Option<u32>)> = None;
        for strike in faults.strike(&event_of(&job, self.stats.queue())) {
            let now_ns = monotonic_ns();
            let mut hold_for = |strike: Strike, ns: u64, ahead: Option<u32>| {
                let at_ns = now_ns.saturating_add(ns);
                let is_longer = hold.as_ref().is_none_or(|(until, _)| until.at_ns < at_ns);
                if is_longer {
                    hold = Some((Until { at_ns, strike }, ahead));
                }
            };
            match strike.action.clone() {
                Action::Latency { latency, jitter } => {
                    let jitter_ns = jitter.as_nanos() as u64;
                    let random_ns = strike.random % (jitter_ns + 1);
                    hold_for(strike, latency.as_nanos() as u64 + random_ns, None);
                }
                Action::Reorder { window, max_delay } => {
                    hold_for(strike, max_delay.as_nanos() as u64, Some(window));
                }
                Action::Pause(duration) => {
                    let ns = duration.as_nanos() as u64;
                    let at_ns = now_ns.saturating_add(ns);
                    hold_for(strike.clone(), ns, None);
                    self.misbehaviour.pause = Some(Until { at_ns, strike });
                }
                Action::Drop => answer = Some(Ok(())),
                Action::Error { errno } => answer = Some(Err(errno)),
                Action::Disconnect => faults.ask_for_disconnect(),
                Action::Crash => faults::crash(),
                Action::Hang(duration) => faults::hang(&strike, duration),
                Action::Misdirect { sectors } => {
                    job.misdirect(sectors, self.served.limits.capacity_sectors);
                }
                Action::Short { bytes } => {
                    job.spoil(|fault| fault.short_bytes = Some(bytes as usize));
                }
                Action::Torn { bytes, end } => {
                    job.spoil(|fault| fault.torn = Some((bytes as usize, end)));
                }
                Action::Corrupt { bytes } => {
                    job.spoil(|fault| fault.corrupt = Some((bytes, strike.random)));
                }
                _ => {}
            }
        }
        if let Some(answer) = answer {
            return self.answer_unbegun(ring, job, answer);
        }
        if let Some((until, ahead)) = hold {
            let held = Held { job, until, ahead };
            return self.misbehaviour.held.push(held);
        }
        for held in &mut self.misbehaviour.held {
            held.ahead = held.ahead.map(|ahead| ahead.saturating_sub(1));
        }
        self.begin_or_hold(ring, job, limited);
    }

    /// Begins what was held back and may go on; true when there was something.
    #[cold]
    pub(super) fn release_held_back(&mut self, ring: &mut Ring, limited: bool, all: bool) -> bool {
        let now_ns = monotonic_ns();
        let pause = &mut self.misbehaviour.pause;
        let resumes = pause
            .as_ref()
            .is_some_and(|until| all || until.is_over(now_ns));
        if resumes {
            *pause = None;
        }
        let may_go =
            |held: &Held| all || held.until.is_over(now_ns) || held.ahead.is_some_and(|n| n == 0);
        if !self.misbehaviour.held.iter().any(may_go) {
            return resumes;
        }
        let (go, stay) = std::mem::take(&mut self.misbehaviour.held)
            .into_iter()
            .partition(may_go);
        self.misbehaviour.held = stay;
        let go: Vec<Held> = go;
        for held in go {
            self.begin_or_hold(ring, held.job, limited);
        }
        true
    }

    /// Answers a request of which nothing was done, as if it had been.
    fn answer_unbegun(&mut self, ring: &mut Ring, job: Job, answer: Result<(), i32>) {
        let index = self.place(job);
        match answer {
            Ok(()) => self.retire(ring, index, Status::Ok),
            Err(errno) => self.fail(ring, index, errno),
        }
        self.note_answer(ring);
    }
}

fn event_of(job: &Job, queue: u16) -> Event<'static> {
    let op = match job.kind {
        OpKind::Read => Some(Op::Read),
        OpKind::Write => Some(Op::Write),
        OpKind::Flush => Some(Op::Flush),
        OpKind::Discard => Some(Op::Discard),
        OpKind::WriteZeroes => Some(Op::WriteZeroes),
        _ => None,
    };
    let has_place = !matches!(op, Some(Op::Flush) | None);
    Event {
        op,
        sectors: has_place.then(|| {
            (
                job.offset_bytes() / SECTOR_BYTES,
                job.payload_bytes().div_ceil(SECTOR_BYTES),
            )
        }),
        ..Event::of_queue(Point::Request, queue)
    }
}

/// The rules for one disk, for its queues.
pub(super) fn is_armed(faults: &DeviceFaults) -> bool {
    faults.is_armed(Point::Request)
}
