//! What stands between a NIC's rings and its other end: the policy, the rate limits and captures, and the end
//! of the time that it was allowed.
//!
//! Whoever moves a frame asks, in this order, as far as it is needed:
//!
//! 1. [`Guard::is_active`]: one relaxed load. While nothing is set, that is all there is to it.
//! 2. [`Guard::check`]: a verdict about a copy of the frame's first bytes, at most
//!    [`HEAD_LEN_BYTES`]. What is sent on must begin with that very copy: the driver may change its
//!    memory after it was looked at.
//! 3. [`Guard::admit`]: whether the frame may go now, or when to ask again.
//!
//! All of it may be called by several threads, and be changed meanwhile.

mod config;
mod lease;
mod limiter;
mod misbehaviour;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use api::device::{NetLimits, Policy};
use faults::{DeviceFaults, Wake};
use filter::capture::{self, Capture, FrameBytes};
use filter::flow::FlowInfo;
use filter::gate::Gate;
use filter::packet::Packet;
use filter::{Direction, DropReason, Verdict};
use vhost_user::ring::BatchChain;

pub(crate) use config::ConfigError;
pub(crate) use filter::packet::HEAD_LEN_BYTES;
use limiter::Limiter;
use misbehaviour::Misbehaviour;
pub(crate) use misbehaviour::Mishap;

use crate::nic::MacAddress;

/// Captures of one NIC at a time: each costs every frame a look.
const MAX_CAPTURES: usize = 4;

/// Bits of [`Guard::watches`].
const POLICY: u32 = 1;
const CAPTURE: u32 = 2;
const INGRESS_LIMIT: u32 = 4;
const EGRESS_LIMIT: u32 = 8;
const FAULTS: u32 = 16;
const LEASE: u32 = 32;

/// A frame that was held when the time was over asks again after this.
const LATE_RETRY_NS: u64 = 50_000_000;

/// Of one NIC.
#[derive(Debug)]
pub(crate) struct Guard {
    /// What needs to look at frames now.
    watches: AtomicU32,
    gate: Gate,
    limiter: Limiter,
    captures: Mutex<Vec<Arc<Capture>>>,
    /// By [`Direction`] and [`DropReason`].
    drops: [[AtomicU64; DropReason::ALL.len()]; 2],
    /// The manager's, whatever the driver sets.
    mac: MacAddress,
    policy: Mutex<Option<Policy>>,
    misbehaviour: Misbehaviour,
    /// Until when frames may pass, by `CLOCK_BOOTTIME`, if that ends.
    lease: Mutex<Option<u64>>,
}

/// A frame on its way.
#[derive(Clone, Copy)]
pub(crate) struct Frame<'a> {
    /// A copy of its first bytes: all of them, or [`HEAD_LEN_BYTES`].
    pub(crate) head: &'a [u8],
    /// All of it; only looked at by captures, behind the head.
    pub(crate) bytes: &'a dyn FrameBytes,
    pub(crate) len_bytes: usize,
    /// Where somebody is to put a checksum into it, from the frame's beginning on.
    pub(crate) checksum_at: Option<usize>,
}

impl Guard {
    /// One that lets everything pass.
    #[cfg(test)]
    pub(crate) fn new(mac: MacAddress) -> Self {
        Self::faulty(mac, DeviceFaults::none())
    }

    /// One that lets everything pass that faults do not keep.
    pub(crate) fn faulty(mac: MacAddress, faults: Arc<DeviceFaults>) -> Self {
        Self {
            watches: AtomicU32::new(0),
            gate: Gate::default(),
            limiter: Limiter::default(),
            captures: Mutex::default(),
            drops: Default::default(),
            mac,
            policy: Mutex::default(),
            misbehaviour: Misbehaviour::new(faults),
            lease: Mutex::default(),
        }
    }

    /// Whether frames need to be looked at at all.
    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        self.watches.load(Ordering::Relaxed) != 0
    }

    /// Judges a frame, and shows it to captures. `now_ns` is of [`monotonic_ns`]. A frame that
    /// may not pass is counted by its reason.
    ///
    /// # Errors
    /// Why it must be dropped.
    #[inline]
    pub(crate) fn check(
        &self,
        direction: Direction,
        frame: &Frame<'_>,
        now_ns: u64,
    ) -> Result<(), DropReason> {
        let watches = self.watches.load(Ordering::Relaxed);
        if watches & (POLICY | CAPTURE | LEASE) == 0 {
            return Ok(());
        }
        let packet = Packet::parse(frame.head, frame.len_bytes);
        let packet = match frame.checksum_at {
            Some(offset) => packet.map(|packet| packet.with_checksum_at(offset)),
            None => packet,
        };
        let verdict = match &packet {
            _ if watches & LEASE != 0 => Verdict::Drop(DropReason::LeaseEnded),
            _ if watches & POLICY == 0 => Verdict::Pass,
            Some(packet) => self.gate.check(packet, direction, now_ns),
            None => Verdict::Drop(DropReason::Malformed),
        };
        if let Some(packet) = &packet
            && watches & CAPTURE != 0
        {
            self.show(packet, direction, verdict, frame);
        }
        match verdict {
            Verdict::Pass => Ok(()),
            Verdict::Drop(reason) => {
                self.count_drop(direction, reason);
                Err(reason)
            }
        }
    }

    /// What happens on purpose to a frame that may pass.
    #[inline]
    pub(crate) fn mishap(
        &self,
        direction: Direction,
        head: &[u8],
        len_bytes: usize,
        now_ns: u64,
    ) -> Mishap {
        if self.watches.load(Ordering::Relaxed) & FAULTS == 0 {
            return Mishap::default();
        }
        self.misbehaviour.strike(direction, head, len_bytes, now_ns)
    }

    /// Whether anything may happen to frames on purpose now.
    pub(crate) fn is_faulty(&self) -> bool {
        self.watches.load(Ordering::Relaxed) & FAULTS != 0
    }

    /// Until when frames are held up on purpose, if they are: for who asks about each by itself.
    pub(crate) fn held_until_ns(&self, direction: Direction, now_ns: u64) -> Option<u64> {
        match self.is_faulty() {
            true => self.misbehaviour.held_until_ns(direction, now_ns),
            false => None,
        }
    }

    /// How many frames came along while something could happen to them.
    pub(crate) fn shown_to_faults(&self, direction: Direction) -> u64 {
        self.misbehaviour.shown(direction)
    }

    /// Takes a frame's share of the limits. For who can let frames wait.
    ///
    /// # Errors
    /// When to ask again about the same frame, which is soon if nobody knows better.
    #[inline]
    pub(crate) fn admit(
        &self,
        direction: Direction,
        len_bytes: usize,
        now_ns: u64,
    ) -> Result<(), u64> {
        let watches = self.watches.load(Ordering::Relaxed);
        if watches & LEASE != 0 {
            // It was held since before: those that come now do not get here.
            return Err(now_ns + LATE_RETRY_NS);
        }
        if watches & FAULTS != 0
            && let Some(at_ns) = self.misbehaviour.held_until_ns(direction, now_ns)
        {
            return Err(at_ns);
        }
        if watches & limit_bit(direction) == 0 {
            return Ok(());
        }
        self.limiter.admit(direction, len_bytes, now_ns)
    }

    /// As [`Guard::admit`], for who cannot let frames wait: one that comes too early is counted as
    /// dropped.
    ///
    /// # Errors
    /// It must be dropped.
    #[inline]
    pub(crate) fn police(
        &self,
        direction: Direction,
        len_bytes: usize,
        now_ns: u64,
    ) -> Result<(), DropReason> {
        self.admit(direction, len_bytes, now_ns).map_err(|_| {
            self.count_drop(direction, DropReason::RateLimit);
            DropReason::RateLimit
        })
    }

    fn count_drop(&self, direction: Direction, reason: DropReason) {
        self.drops[direction as usize][reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Frames that were dropped, by reasons; those that never occurred are left out.
    pub(crate) fn drops(
        &self,
        direction: Direction,
    ) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let counters = &self.drops[direction as usize];
        DropReason::ALL
            .iter()
            .map(|&reason| {
                (
                    reason.name(),
                    counters[reason as usize].load(Ordering::Relaxed),
                )
            })
            .filter(|&(_, count)| count > 0)
    }

    /// Replaces the policy; `None` lets everything pass.
    ///
    /// # Errors
    /// It cannot be understood, and nothing has changed.
    pub(crate) fn set_policy(&self, policy: Option<Policy>) -> Result<(), ConfigError> {
        let compiled = config::policy(policy.as_ref(), self.mac)?;
        let mut current = lock(&self.policy);
        // What is not looked at needs no flows; but nothing must pass unseen in between.
        self.gate.set_policy(&compiled);
        let is_empty = compiled == filter::policy::Policy::default();
        self.watch(POLICY, !is_empty);
        *current = policy;
        Ok(())
    }

    pub(crate) fn policy(&self) -> Option<Policy> {
        lock(&self.policy).clone()
    }

    /// Replaces the limits.
    pub(crate) fn set_limits(&self, limits: NetLimits) {
        self.limiter.set(limits, monotonic_ns());
        for direction in Direction::ALL {
            self.watch(limit_bit(direction), self.limiter.is_limited(direction));
        }
    }

    pub(crate) fn limits(&self) -> NetLimits {
        self.limiter.limits()
    }

    /// How often frames had to wait.
    pub(crate) fn throttled(&self, direction: Direction) -> u64 {
        self.limiter.throttled(direction)
    }

    /// All flows that are tracked, most recently used first; `None` if none are.
    pub(crate) fn flows(&self) -> Option<Vec<FlowInfo>> {
        let is_tracking = lock(&self.policy)
            .as_ref()
            .is_some_and(|policy| policy.track_flows || policy.security.is_some());
        is_tracking.then(|| self.gate.flows(monotonic_ns()))
    }

    pub(crate) fn num_flows(&self) -> usize {
        self.gate.num_flows()
    }

    pub(crate) fn num_flows_evicted(&self) -> u64 {
        self.gate.num_evicted()
    }

    /// Begins a capture, which lasts until the handle is dropped; `None` when there are too many.
    pub(crate) fn capture(
        self: &Arc<Self>,
        request: capture::Request,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Option<Capturing> {
        let capture = Arc::new(Capture::new(request, wake));
        let mut captures = lock(&self.captures);
        if captures.len() == MAX_CAPTURES {
            return None;
        }
        captures.push(capture.clone());
        self.watch(CAPTURE, true);
        Some(Capturing {
            guard: Arc::downgrade(self),
            capture,
        })
    }

    pub(crate) fn num_captures(&self) -> usize {
        lock(&self.captures).len()
    }

    /// Ends all captures: the NIC goes away.
    pub(crate) fn close(&self) {
        for capture in &*lock(&self.captures) {
            capture.end();
        }
    }

    #[cold]
    fn show(&self, packet: &Packet, direction: Direction, verdict: Verdict, frame: &Frame<'_>) {
        let time = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let frame = capture::Frame {
            packet,
            head: frame.head,
            bytes: frame.bytes,
            len_bytes: frame.len_bytes,
            direction,
            verdict,
            time_ns: time.as_nanos() as u64,
        };
        for capture in &*lock(&self.captures) {
            capture.offer(&frame);
        }
    }

    fn watch(&self, bit: u32, is_on: bool) {
        if is_on {
            self.watches.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.watches.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// Rules for the NIC's frames came or went.
impl Wake for Guard {
    fn wake(&self) {
        self.watch(FAULTS, self.misbehaviour.is_armed());
    }
}

/// A capture that is running.
#[derive(Debug)]
pub(crate) struct Capturing {
    guard: Weak<Guard>,
    capture: Arc<Capture>,
}

impl std::ops::Deref for Capturing {
    type Target = Capture;

    fn deref(&self) -> &Capture {
        &self.capture
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        let Some(guard) = self.guard.upgrade() else {
            return;
        };
        let mut captures = lock(&guard.captures);
        captures.retain(|capture| !Arc::ptr_eq(capture, &self.capture));
        guard.watch(CAPTURE, !captures.is_empty());
    }
}

/// A frame that a driver sends, behind its virtio-net header.
pub(crate) struct SentFrame<'a> {
    pub(crate) chain: BatchChain<'a>,
    pub(crate) header_len_bytes: usize,
}

impl FrameBytes for SentFrame<'_> {
    fn read_at(&self, offset: usize, target: &mut [u8]) -> usize {
        self.chain.read_at(self.header_len_bytes + offset, target)
    }
}

/// The clock that frames are judged by: `CLOCK_MONOTONIC` in nanoseconds.
#[inline]
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid buffer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn limit_bit(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => INGRESS_LIMIT,
        Direction::Egress => EGRESS_LIMIT,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
