//! The notify structure: one address for each queue, which signals the queue's kick eventfd
//! without an exit. While kicks go wrong on purpose (see [`faults`]), each of them exits, and is
//! rung by hand if at all.

use std::sync::Arc;

use faults::{Action, DeviceFaults, Event, Point, Strike, monotonic_ns};
use vhost_user::eventfd;
use vhost_user::log_limit::LogLimit;
use vmm_sys_util::eventfd::EventFd;

use super::layout::{NOTIFY_CFG, NOTIFY_OFF_MULTIPLIER};
use crate::kvm::interrupts::InterruptFabric;

pub(super) struct Doorbells {
    fabric: Arc<dyn InterruptFabric>,
    bells: Vec<Bell>,
    faults: Arc<DeviceFaults>,
    /// Kicks go wrong now.
    by_hand: bool,
    bar_gpa: Option<u64>,
    /// The guest moves BARs at will.
    complaints: LogLimit,
}

struct Bell {
    kick: EventFd,
    /// The queue was enabled once. Firmware and kernel move BARs about while no queue is in use,
    /// and registering with KVM then would only cost time.
    wanted: bool,
    registered_gpa: Option<u64>,
    held_back: Option<HeldBack>,
}

/// A kick that is heard later, and when the fault is over at the latest.
struct HeldBack {
    until_ns: u64,
    strike: Strike,
}

impl Doorbells {
    pub(super) fn new(
        kicks: Vec<EventFd>,
        fabric: Arc<dyn InterruptFabric>,
        faults: Arc<DeviceFaults>,
    ) -> Self {
        let bells = kicks.into_iter().map(|kick| Bell {
            kick,
            wanted: false,
            registered_gpa: None,
            held_back: None,
        });
        Self {
            fabric,
            bells: bells.collect(),
            faults,
            by_hand: false,
            bar_gpa: None,
            complaints: LogLimit::new(),
        }
    }

    /// Rings the bell at `offset` in the notify structure by hand: for accesses that KVM does not
    /// catch.
    pub(super) fn ring(&mut self, offset: u64) {
        let index = usize::try_from(offset / NOTIFY_OFF_MULTIPLIER).unwrap_or(usize::MAX);
        let Some(bell) = self.bells.get_mut(index) else {
            return;
        };
        if self.by_hand
            && let Some(held_back) = hold_back(&self.faults, index)
        {
            self.faults.wake_at(held_back.until_ns);
            let earliest = match bell.held_back.take() {
                Some(other) if other.until_ns <= held_back.until_ns => other,
                _ => held_back,
            };
            bell.held_back = Some(earliest);
            return;
        }
        // The backend has it too, and must not be able to hold a vCPU up.
        eventfd::ring(&bell.kick);
    }

    /// Rules changed, or the time of a kick has come. What was lost is heard once nothing goes wrong
    /// any more: a driver does not kick again for what it has kicked for.
    pub(super) fn look_at_faults(&mut self) {
        let by_hand = self.faults.is_armed(Point::Kick);
        let now_ns = monotonic_ns();
        let is_due = |held: &HeldBack| held.until_ns <= now_ns || held.strike.is_over();
        for bell in &mut self.bells {
            if bell.held_back.as_ref().is_some_and(is_due) {
                bell.held_back = None;
                eventfd::ring(&bell.kick);
            }
        }
        if std::mem::replace(&mut self.by_hand, by_hand) != by_hand {
            self.register();
        }
    }

    /// Lets the registrations follow the BAR and the queues that are enabled.
    pub(super) fn update(&mut self, bar_gpa: Option<u64>, is_enabled: impl Fn(usize) -> bool) {
        for (index, bell) in self.bells.iter_mut().enumerate() {
            bell.wanted |= is_enabled(index);
        }
        self.bar_gpa = bar_gpa;
        self.register();
    }

    fn register(&mut self) {
        let bar_gpa = self.bar_gpa.filter(|_| !self.by_hand);
        for (index, bell) in self.bells.iter_mut().enumerate() {
            let gpa = bar_gpa
                .filter(|_| bell.wanted)
                .map(|bar| bar + NOTIFY_CFG + index as u64 * NOTIFY_OFF_MULTIPLIER);
            if gpa == bell.registered_gpa {
                continue;
            }
            if let Some(old_gpa) = bell.registered_gpa.take()
                && let Err(error) = self.fabric.remove_doorbell(old_gpa, &bell.kick)
                && let Some(withheld) = self.complaints.admit()
            {
                tracing::error!(%error, gpa = old_gpa, withheld, "cannot remove a doorbell");
            }
            let Some(gpa) = gpa else { continue };
            match self.fabric.add_doorbell(gpa, &bell.kick) {
                Ok(()) => bell.registered_gpa = Some(gpa),
                // Kicks then exit to `ring`: slower, but nothing is lost.
                Err(error) => {
                    if let Some(withheld) = self.complaints.admit() {
                        tracing::error!(%error, gpa, withheld, "cannot add a doorbell: the queue will be slow");
                    }
                }
            }
        }
    }

    /// As at power-on: nothing is registered.
    pub(super) fn reset(&mut self) {
        self.update(None, |_| false);
        for bell in &mut self.bells {
            bell.wanted = false;
            bell.held_back = None;
        }
    }
}

/// What is done on purpose to a kick of a queue, if anything is.
#[cold]
fn hold_back(faults: &DeviceFaults, queue: usize) -> Option<HeldBack> {
    let event = Event::of_queue(Point::Kick, u16::try_from(queue).ok()?);
    let delay = |action: &Action| match action {
        Action::LostKick => Some(None),
        Action::LateKick(delay) => Some(Some(*delay)),
        _ => None,
    };
    let (delay, strike) = faults.strike_first(&event, delay)?;
    // Of a lost one, the end of its rule, which is told.
    let until_ns = delay.map_or(u64::MAX, |delay| {
        let delay_ns = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        monotonic_ns().saturating_add(delay_ns)
    });
    Some(HeldBack { until_ns, strike })
}
