//! What happens to frames on purpose: see [`faults`].

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::rate::TokenBucket;
use faults::{Action, DeviceFaults, Event, Op, Point, scramble};
use filter::Direction;

/// What a bottleneck holds before it loses frames.
const BOTTLENECK_NS: u64 = 100_000_000;

/// What happens to one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mishap {
    /// It does not arrive.
    pub(crate) is_lost: bool,
    /// It arrives so many times more.
    pub(crate) copies: u32,
    /// Bits are flipped in so many bytes, which follow from the number.
    corrupt: Option<(u32, u64)>,
    /// So many others go ahead, for so long at most.
    pub(crate) behind: Option<(u32, u64)>,
}

impl Mishap {
    /// Whether anything happens to the frame's bytes.
    pub(crate) fn spoils(&self) -> bool {
        self.corrupt.is_some()
    }

    /// Flips bits behind the addresses, or anywhere in a frame that has no more.
    pub(crate) fn spoil(&self, frame: &mut [u8]) {
        const ADDRESSES_BYTES: usize = 12;
        let Some((bytes, random)) = self.corrupt else {
            return;
        };
        let at = if frame.len() > ADDRESSES_BYTES {
            ADDRESSES_BYTES
        } else {
            0
        };
        let body = &mut frame[at..];
        for number in 0..u64::from(bytes) {
            let bits = scramble(random, number);
            if !body.is_empty() {
                body[(bits >> 3) as usize % body.len()] ^= 1 << (bits & 7);
            }
        }
    }
}

/// The rules for one NIC's frames, and until when they hold frames up.
pub(super) struct Misbehaviour {
    faults: Arc<DeviceFaults>,
    /// By [`Direction`].
    ways: Mutex<[Way; 2]>,
    /// Frames that rules were shown, by [`Direction`].
    shown: [AtomicU64; 2],
}

#[derive(Default)]
struct Way {
    held_until_ns: u64,
    /// What came while others were held goes with them.
    free_until_ns: u64,
    bottleneck: Option<(u64, TokenBucket)>,
}

impl Misbehaviour {
    pub(super) fn new(faults: Arc<DeviceFaults>) -> Self {
        Self {
            faults,
            ways: Mutex::default(),
            shown: Default::default(),
        }
    }

    /// Whether frames are to be shown to rules.
    pub(super) fn is_armed(&self) -> bool {
        self.faults.is_armed(Point::Request)
    }

    /// Shows a frame, of which `head` is the beginning, to the rules.
    pub(super) fn strike(
        &self,
        direction: Direction,
        head: &[u8],
        len_bytes: usize,
        now_ns: u64,
    ) -> Mishap {
        self.shown[direction as usize].fetch_add(1, Ordering::Relaxed);
        let mut mishap = Mishap::default();
        let address = |at: usize| {
            let bytes = head.get(at..at + 6)?;
            bytes.try_into().ok()
        };
        let event = Event {
            op: Some(match direction {
                Direction::Ingress => Op::Receive,
                Direction::Egress => Op::Transmit,
            }),
            addresses: address(0).zip(address(6)),
            ..Event::at(Point::Request)
        };
        for strike in self.faults.strike(&event) {
            let random = strike.random;
            match &strike.action {
                Action::Drop | Action::Partition { .. } => mishap.is_lost = true,
                Action::Duplicate { copies } => mishap.copies += copies,
                Action::Corrupt { bytes } => mishap.corrupt = Some((*bytes, random)),
                Action::Reorder { window, max_delay } => {
                    let until_ns = now_ns.saturating_add(max_delay.as_nanos() as u64);
                    mishap.behind = Some((*window, until_ns.min(strike.ends_ns())));
                }
                Action::Latency { latency, jitter } => {
                    let jitter_ns = jitter.as_nanos() as u64;
                    let ns = latency.as_nanos() as u64 + random % (jitter_ns + 1);
                    let way = &mut self.ways()[direction as usize];
                    if now_ns >= way.free_until_ns {
                        way.held_until_ns = now_ns.saturating_add(ns).min(strike.ends_ns());
                        way.free_until_ns = way.held_until_ns.saturating_add(ns);
                    }
                }
                Action::Rate { bytes_per_second } => {
                    let way = &mut self.ways()[direction as usize];
                    match way.queue_up(*bytes_per_second, len_bytes, now_ns) {
                        Some(at_ns) => way.held_until_ns = at_ns.min(strike.ends_ns()),
                        None => mishap.is_lost = true,
                    }
                }
                Action::Disconnect => self.faults.ask_for_disconnect(),
                Action::Crash => faults::crash(),
                Action::Hang(duration) => faults::hang(&strike, *duration),
                _ => {}
            }
        }
        mishap
    }

    /// How many frames of this direction came along while rules were armed.
    pub(super) fn shown(&self, direction: Direction) -> u64 {
        self.shown[direction as usize].load(Ordering::Relaxed)
    }

    /// When frames of this direction go on; not at all while nothing is armed any more.
    pub(super) fn held_until_ns(&self, direction: Direction, now_ns: u64) -> Option<u64> {
        let until_ns = self.ways()[direction as usize].held_until_ns;
        (until_ns > now_ns && self.is_armed()).then_some(until_ns)
    }

    fn ways(&self) -> MutexGuard<'_, [Way; 2]> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Way {
    /// When a frame is through a bottleneck; None when that is full.
    fn queue_up(&mut self, rate: u64, len_bytes: usize, now_ns: u64) -> Option<u64> {
        if self.bottleneck.as_ref().is_none_or(|(of, _)| *of != rate) {
            self.bottleneck = Some((rate, TokenBucket::empty(rate, rate / 100, now_ns)));
        }
        let (_, bucket) = self.bottleneck.as_mut()?;
        let mut attempt = *bucket;
        let at_ns = attempt.reserve(len_bytes as u64, now_ns);
        if at_ns > now_ns + BOTTLENECK_NS {
            return None;
        }
        *bucket = attempt;
        Some(at_ns)
    }
}

impl fmt::Debug for Misbehaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Misbehaviour")
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}
