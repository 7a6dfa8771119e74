//! What serves one ring, apart from the thread it is served on.
//!
//! It owns the [`Ring`](crate::ring::Ring); the session sends it [`Command`]s.
//!
//! ```text
//!            start_queue fails, ring error
//!   serving ------------------------------> broken (completes what is in flight, takes nothing new)
//!      |  ^                                    |
//!      |  | SetEnabled                         |
//!      v  |                                    |
//!   paused                                     |
//!      |                                       |
//!      +------------ Stop: drain --------------+--> ended
//! ```

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use faults::{DeviceFaults, Point};

use super::shared::{Mail, OwnRing, SharedRing};
use super::worker::{Command, QueueStats, Stop};
use super::{Device, QueueHandler, Wake, misbehaviour};
use crate::eventfd::{Doorbell, EventFd};
use crate::ring::{Intake, Ring, RingError};

/// Event descriptors a handler may have.
const MAX_EVENTS: usize = 8;

/// See the module's description.
pub(super) struct Serving {
    label: String,
    index: u16,
    features: u64,
    ring: OwnRing,
    pub(super) kick: Option<EventFd>,
    err: Option<Doorbell>,
    pub(super) mail: Arc<Mail>,
    inbox: Receiver<Command>,
    stats: Arc<QueueStats>,
    /// The ring takes no more requests, whatever the frontend enables.
    pub(super) is_broken: bool,
    pub(super) events_polled: bool,
    /// Part of the ring's completions that `stats` has.
    reported_completed: u64,
    faults: Option<Arc<DeviceFaults>>,
}

impl Serving {
    #[expect(clippy::too_many_arguments, reason = "what a ring is served with")]
    pub(super) fn new(
        label: &str,
        device: &dyn Device,
        mut ring: Ring,
        kick: EventFd,
        err: Option<Doorbell>,
        mail: &Arc<Mail>,
        inbox: Receiver<Command>,
        stats: Arc<QueueStats>,
    ) -> Serving {
        let (index, features) = (ring.index(), ring.features());
        let faults = device.faults();
        if let Some(faults) = &faults {
            ring.use_faults(Arc::clone(faults));
            let waker: Arc<dyn faults::Wake> = mail.clone();
            faults.add_waker(&waker);
        }
        Serving {
            label: label.to_owned(),
            index,
            features,
            ring: if device.shares_ring(index, features) {
                OwnRing::Shared(Arc::new(SharedRing::new(ring, Arc::clone(mail))))
            } else {
                OwnRing::Alone(ring)
            },
            kick: Some(kick),
            err,
            mail: Arc::clone(mail),
            inbox,
            stats,
            is_broken: false,
            events_polled: true,
            reported_completed: 0,
            faults,
        }
    }

    /// Has the device build what serves the ring; None when it cannot.
    pub(super) fn start(&mut self, device: &dyn Device) -> Option<Box<dyn QueueHandler>> {
        self.stats.set_worker(Some(Arc::clone(&self.mail)));
        let started = match &self.ring {
            OwnRing::Alone(_) => device.start_queue(self.index, self.features),
            OwnRing::Shared(ring) => device.start_shared_queue(ring),
        };
        let handler = match started {
            Ok(handler) => Some(handler),
            Err(error) => {
                self.break_ring(&RingError::Device(error));
                None
            }
        };
        self.stats
            .running
            .store(handler.is_some(), Ordering::Relaxed);
        handler
    }

    /// Completes what is in flight and ends the ring.
    pub(super) fn stop(mut self, handler: Option<Box<dyn QueueHandler>>, stop: Stop) {
        let Stop {
            successor,
            deadline,
            answer,
        } = stop;
        self.stats.set_worker(None);
        self.ring.get().end_faults();
        let mut handler = handler;
        if let Some(handler) = &mut handler {
            self.drain(handler.as_mut(), deadline);
        }
        self.ring.get().notify();
        // What the kernel still does for this ring ends here, before anybody hears of the stop.
        drop(handler);
        self.stats.running.store(false, Ordering::Relaxed);
        self.report();
        let mut state = self.ring.into_ring().finish(successor);
        if self.is_broken {
            // The driver broke the ring: what could not be taken up again any more stays in the
            // region, but does not keep the frontend from stopping the ring.
            state.in_flight -= state.left_to_resubmit;
        }
        self.stats
            .in_flight
            .store(u32::from(state.in_flight), Ordering::Relaxed);
        let _ = answer.send(state);
    }

    /// Completes what is in flight, also what a predecessor left and nobody took up yet.
    fn drain(&mut self, handler: &mut dyn QueueHandler, deadline: Instant) {
        self.ring.get().set_intake(Intake::Draining);
        loop {
            let left = handler.drain(&mut self.ring.get(), deadline);
            if left > 0 {
                let queue = self.index;
                tracing::warn!(device = self.label, queue, left, "requests left in flight");
            }
            let to_resubmit = self.ring.get().left_to_resubmit();
            if left > 0 || to_resubmit == 0 || self.is_broken || Instant::now() >= deadline {
                break;
            }
            let processed = handler.process(&mut self.ring.get(), Wake::Kick);
            if let Err(error) = processed {
                self.break_ring(&error);
            }
            if self.ring.get().left_to_resubmit() == to_resubmit {
                break;
            }
        }
        self.ring.get().set_intake(Intake::Closed);
    }

    /// Lets the handler work until the driver has nothing new, `rounds` more times at most; true
    /// when it still may have (with no more rounds, also when the handler left some of it). The
    /// driver does not kick from now on.
    #[inline]
    pub(super) fn serve(
        &mut self,
        handler: &mut dyn QueueHandler,
        wake: Wake,
        rounds: u32,
    ) -> bool {
        let result = try_serve(&mut self.ring.get(), handler, wake, rounds);
        self.report();
        result.unwrap_or_else(|error| {
            self.ring.get().notify();
            self.break_ring(&error);
            false
        })
    }

    /// Whether there is something for [`Serving::serve`] to do. A broken index is something for
    /// the handler to find.
    #[inline]
    pub(super) fn has_new(&mut self) -> bool {
        self.ring.get().has_new().unwrap_or(true)
    }

    /// Tells the driver not to kick, ever.
    pub(super) fn refuse_kicks(&mut self) {
        self.ring.get().disable_notification();
    }

    /// Makes everything that happens from now on wake the thread; true when something has
    /// happened already.
    pub(super) fn prepare_sleep(&mut self, handler: &mut dyn QueueHandler) -> bool {
        let enabled = self.ring.get().enable_notification();
        match enabled {
            Ok(has_more) => handler.prepare_sleep() || has_more,
            Err(error) => {
                self.break_ring(&error);
                false
            }
        }
    }

    /// Requests completed, as far as they were reported.
    #[inline]
    pub(super) fn completed_total(&self) -> u64 {
        self.reported_completed
    }

    fn report(&mut self) {
        let ring = self.ring.get();
        let (completed_now, in_flight) = (ring.completed_total(), ring.in_flight());
        drop(ring);
        let added = completed_now - std::mem::replace(&mut self.reported_completed, completed_now);
        self.stats
            .completed_total
            .fetch_add(added, Ordering::Relaxed);
        self.stats
            .in_flight
            .store(u32::from(in_flight), Ordering::Relaxed);
    }

    fn break_ring(&mut self, error: &RingError) {
        // A handler that fails again while it completes what is in flight is left alone.
        self.events_polled = !self.is_broken;
        self.is_broken = true;
        self.ring.get().set_intake(Intake::Closed);
        self.stats.running.store(false, Ordering::Relaxed);
        let mut complaints = self
            .stats
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(withheld) = complaints.admit() {
            let error = error as &dyn std::error::Error;
            tracing::warn!(
                device = self.label,
                queue = self.index,
                error,
                withheld,
                "ring stopped"
            );
        }
        drop(complaints);
        if let Some(err) = &self.err {
            err.ring();
        }
    }

    /// Whether the kick that just came is to be heard.
    #[inline]
    pub(super) fn hears_kick(&self) -> bool {
        match &self.faults {
            Some(faults) if faults.is_armed(Point::Kick) => {
                !misbehaviour::loses_kick(faults, self.index)
            }
            _ => true,
        }
    }

    pub(super) fn take_kick(&mut self) {
        if let Some(Err(error)) = self.kick.as_ref().map(EventFd::take) {
            tracing::warn!(device = self.label, queue = self.index, %error, "kick descriptor is dead");
            self.kick = None;
        }
    }

    /// Carries out what was commanded, up to a stop.
    pub(super) fn obey(&mut self) -> Option<Stop> {
        let was_asked = self.stats.answer_look();
        self.ring.get().look_at_faults();
        if was_asked {
            self.ring.get().remind();
        }
        if let OwnRing::Shared(shared) = &self.ring
            && let Some(error) = shared.take_error()
        {
            self.break_ring(&error);
        }
        loop {
            match self.inbox.try_recv() {
                Ok(Command::SetMemory { memory, answer }) => {
                    let _ = answer.send(self.ring.get().set_memory(memory));
                }
                Ok(Command::SetEnabled { enabled, answer }) => {
                    let open = enabled && !self.is_broken;
                    self.ring
                        .get()
                        .set_intake(if open { Intake::Open } else { Intake::Closed });
                    let _ = answer.send(());
                }
                Ok(Command::SetKick(kick)) => self.kick = Some(kick),
                Ok(Command::SetCall(call)) => {
                    self.ring.get().set_call(call);
                }
                Ok(Command::SetErr(err)) => self.err = err,
                Ok(Command::Stop(stop)) => return Some(stop),
                Err(_) => return None,
            }
        }
    }
}

/// The descriptors other than the kick that a handler listens to.
pub(super) fn event_fds(handler: &dyn QueueHandler) -> Vec<RawFd> {
    let fds = handler.event_fds();
    fds.iter()
        .take(MAX_EVENTS)
        .map(AsRawFd::as_raw_fd)
        .collect()
}

#[inline]
fn try_serve(
    ring: &mut Ring,
    handler: &mut dyn QueueHandler,
    wake: Wake,
    rounds: u32,
) -> Result<bool, RingError> {
    ring.look_at_faults();
    ring.disable_notification();
    handler.process(ring, wake)?;
    ring.notify();
    for _ in 0..rounds {
        if !ring.has_new()? {
            return Ok(false);
        }
        handler.process(ring, Wake::Kick)?;
        ring.notify();
    }
    Ok(rounds > 0 || ring.has_available())
}
