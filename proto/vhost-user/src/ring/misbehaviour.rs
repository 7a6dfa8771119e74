//! What a ring does wrong on purpose: see [`faults`].
//!
//! [`Ring::look_at_faults`] takes over once for a batch which kinds of faults are armed; with none, every
//! other place that could do something wrong tests one field of the ring.

use std::sync::Arc;

use faults::{Action, DeviceFaults, Event, Point, Strike, monotonic_ns};

use super::Ring;

/// Where rings ask.
const POINTS: u32 =
    Point::Pop as u32 | Point::Complete as u32 | Point::Publish as u32 | Point::Call as u32;

/// What a ring holds back, and because of whom.
#[derive(Debug)]
pub(super) struct RingFaults {
    device: Arc<DeviceFaults>,
    /// Completions that others go ahead of, oldest first.
    late: Vec<Late>,
    /// Nothing is shown to the driver.
    stall: Option<Stall>,
    /// The driver was not told of something.
    lost_call: Option<Strike>,
    /// Of the chains completed, those that were published.
    published_total: u64,
}

#[derive(Debug)]
struct Late {
    head: u16,
    written_bytes: u32,
    /// Others that are still to go ahead.
    ahead: u32,
    strike: Strike,
}

#[derive(Debug)]
struct Stall {
    until_ns: u64,
    strike: Strike,
}

impl Stall {
    fn is_over(&self) -> bool {
        self.strike.is_over() || self.until_ns <= monotonic_ns()
    }
}

impl RingFaults {
    /// Whether a request of this ring counts as broken.
    #[cold]
    pub(super) fn breaks_request(&self, queue: u16) -> bool {
        self.strike(Point::Pop, queue, |action| {
            matches!(action, Action::BadDescriptor).then_some(())
        })
        .is_some()
    }

    fn strike<T>(
        &self,
        point: Point,
        queue: u16,
        pick: impl Fn(&Action) -> Option<T>,
    ) -> Option<(T, Strike)> {
        let event = Event::of_queue(point, queue);
        self.device.strike_first(&event, pick)
    }
}

impl Ring {
    /// Does from now on what the rules for its device say.
    pub(crate) fn use_faults(&mut self, device: Arc<DeviceFaults>) {
        self.faults = Some(Box::new(RingFaults {
            device,
            late: Vec::new(),
            stall: None,
            lost_call: None,
            published_total: self.completed_total,
        }));
        self.look_at_faults();
    }

    /// Takes over what is armed now, and lets go of what is over.
    #[inline]
    pub(crate) fn look_at_faults(&mut self) {
        let Some(faults) = &self.faults else { return };
        let armed = faults.device.armed_points() & POINTS;
        if armed | self.armed != 0 {
            self.change_faults(armed);
        }
    }

    #[cold]
    fn change_faults(&mut self, armed: u32) {
        let Some(faults) = &mut self.faults else {
            return;
        };
        if faults.stall.as_ref().is_some_and(Stall::is_over) {
            faults.stall = None;
        }
        let is_call_due = faults.lost_call.as_ref().is_some_and(Strike::is_over);
        if is_call_due {
            faults.lost_call = None;
        }
        let (due, late) = std::mem::take(&mut faults.late)
            .into_iter()
            .partition(|late: &Late| late.strike.is_over());
        faults.late = late;
        let mut holding = 0;
        if !faults.late.is_empty() {
            holding |= Point::Complete.bit() | Point::Publish.bit();
        }
        if faults.stall.is_some() {
            holding |= Point::Publish.bit();
        }
        if faults.lost_call.is_some() {
            holding |= Point::Call.bit();
        }
        self.armed = armed | holding;
        self.complete_due(due);
        if is_call_due {
            // Else the driver would wait for ever, and nothing would be as before.
            self.publish();
            if let Some(call) = &self.call {
                call.ring();
            }
        }
    }

    /// Lets go of everything: the ring is to end in order.
    pub(crate) fn end_faults(&mut self) {
        self.armed = 0;
        if let Some(faults) = self.faults.take() {
            self.complete_due(faults.late);
        }
    }

    /// As the ring's `complete`, with what the rules say.
    #[cold]
    pub(super) fn complete_armed(&mut self, head: u16, written_bytes: u32) {
        let queue = self.index;
        let Some(faults) = &mut self.faults else {
            return self.complete_head(head, written_bytes);
        };
        let window = |action: &Action| match action {
            Action::OutOfOrder { window } => Some(*window),
            _ => None,
        };
        if let Some((ahead, strike)) = faults.strike(Point::Complete, queue, window) {
            faults.late.push(Late {
                head,
                written_bytes,
                ahead,
                strike,
            });
            // Also the publishing must look whether anything else is left to come.
            self.armed |= Point::Publish.bit();
            return;
        }
        for late in &mut faults.late {
            late.ahead = late.ahead.saturating_sub(1);
        }
        let (due, late) = std::mem::take(&mut faults.late)
            .into_iter()
            .partition(|late| late.ahead == 0);
        faults.late = late;
        self.complete_head(head, written_bytes);
        self.complete_due(due);
    }

    fn complete_due(&mut self, due: Vec<Late>) {
        for late in due {
            self.complete_head(late.head, late.written_bytes);
        }
    }

    /// Whether what is complete is not to be shown.
    #[cold]
    pub(super) fn is_publishing_stalled(&mut self) -> bool {
        let (queue, completed_total) = (self.index, self.completed_total);
        let outstanding = usize::from(self.outstanding());
        let Some(faults) = &mut self.faults else {
            return false;
        };
        if faults.late.len() == outstanding {
            // Nothing else is in flight that could go ahead.
            let due = std::mem::take(&mut faults.late);
            self.complete_due(due);
        }
        let Some(faults) = &mut self.faults else {
            return false;
        };
        if let Some(stall) = &faults.stall {
            if !stall.is_over() {
                return true;
            }
            faults.stall = None;
        }
        if faults.published_total == completed_total {
            return false;
        }
        let duration = |action: &Action| match action {
            Action::UsedStall(duration) => Some(*duration),
            _ => None,
        };
        if let Some((duration, strike)) = faults.strike(Point::Publish, queue, duration) {
            let until_ns = monotonic_ns().saturating_add(duration.as_nanos() as u64);
            faults.device.wake_at(until_ns);
            faults.stall = Some(Stall { until_ns, strike });
            return true;
        }
        faults.published_total = completed_total;
        false
    }

    /// Whether the driver is not to be told.
    #[cold]
    pub(super) fn loses_call(&mut self) -> bool {
        let queue = self.index;
        let Some(faults) = &mut self.faults else {
            return false;
        };
        let is_lost = |action: &Action| matches!(action, Action::LostCall).then_some(());
        let Some(((), strike)) = faults.strike(Point::Call, queue, is_lost) else {
            return false;
        };
        faults.lost_call = Some(strike);
        true
    }
}
