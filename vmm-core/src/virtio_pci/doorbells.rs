//! The notify structure: one address for each queue, which signals the queue's kick eventfd
//! without an exit.

use std::sync::Arc;

use vhost_user::eventfd;
use vhost_user::log_limit::LogLimit;
use vmm_sys_util::eventfd::EventFd;

use super::layout::{NOTIFY_CFG, NOTIFY_OFF_MULTIPLIER};
use crate::kvm::interrupts::InterruptFabric;

pub(super) struct Doorbells {
    fabric: Arc<dyn InterruptFabric>,
    bells: Vec<Bell>,
    /// The guest moves BARs at will.
    complaints: LogLimit,
}

struct Bell {
    kick: EventFd,
    /// The queue was enabled once. Firmware and kernel move BARs about while no queue is in use,
    /// and registering with KVM then would only cost time.
    wanted: bool,
    registered_gpa: Option<u64>,
}

impl Doorbells {
    pub(super) fn new(kicks: Vec<EventFd>, fabric: Arc<dyn InterruptFabric>) -> Self {
        let bells = kicks.into_iter().map(|kick| Bell {
            kick,
            wanted: false,
            registered_gpa: None,
        });
        Self {
            fabric,
            bells: bells.collect(),
            complaints: LogLimit::new(),
        }
    }

    /// Rings the bell at `offset` in the notify structure by hand: for accesses that KVM does not
    /// catch.
    pub(super) fn ring(&self, offset: u64) {
        let bell = usize::try_from(offset / NOTIFY_OFF_MULTIPLIER)
            .ok()
            .and_then(|at| self.bells.get(at));
        if let Some(bell) = bell {
            // The backend has it too, and must not be able to hold a vCPU up.
            eventfd::ring(&bell.kick);
        }
    }

    /// Lets the registrations follow the BAR and the queues that are enabled.
    pub(super) fn update(&mut self, bar_gpa: Option<u64>, is_enabled: impl Fn(usize) -> bool) {
        for (index, bell) in self.bells.iter_mut().enumerate() {
            bell.wanted |= is_enabled(index);
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
        self.bells.iter_mut().for_each(|bell| bell.wanted = false);
    }
}
