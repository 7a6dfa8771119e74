//! A cable that is taken out and put back in on purpose: see [`faults`].

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use faults::{Action, DeviceFaults, Event, Point, Strike, Wake, monotonic_ns};

use super::ServedNic;

/// Where one cable is.
#[derive(Default)]
enum Cable {
    #[default]
    Left,
    Out {
        until_ns: u64,
        up: Duration,
        strike: Strike,
    },
    /// Until it is taken out again.
    In { until_ns: u64 },
}

/// Watches over the cable of one NIC.
pub(super) struct LinkFlap {
    faults: Arc<DeviceFaults>,
    nic: Weak<ServedNic>,
    cable: Mutex<Cable>,
}

impl LinkFlap {
    pub(super) fn watch(faults: &Arc<DeviceFaults>, nic: &Weak<ServedNic>) -> Arc<dyn Wake> {
        let flap: Arc<dyn Wake> = Arc::new(Self {
            faults: Arc::clone(faults),
            nic: Weak::clone(nic),
            cable: Mutex::default(),
        });
        faults.add_waker(&flap);
        flap
    }

    fn take_out(&self, nic: &ServedNic, now_ns: u64) -> Cable {
        let times = |action: &Action| match action {
            Action::LinkFlap { down, up } => Some((*down, *up)),
            _ => None,
        };
        let event = Event::at(Point::Link);
        // A cable that the manager took out is not put in by a fault.
        if !nic.state().is_link_up() {
            return Cable::Left;
        }
        let Some(((down, up), strike)) = self.faults.strike_first(&event, times) else {
            return Cable::Left;
        };
        let until_ns = now_ns.saturating_add(down.as_nanos() as u64);
        nic.set_link(false);
        self.faults.wake_at(until_ns);
        Cable::Out {
            until_ns,
            up,
            strike,
        }
    }
}

impl Wake for LinkFlap {
    fn wake(&self) {
        let Some(nic) = self.nic.upgrade() else {
            return;
        };
        let mut cable = self.cable.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ns = monotonic_ns();
        let is_armed = self.faults.is_armed(Point::Link);
        *cable = match std::mem::take(&mut *cable) {
            Cable::Out {
                until_ns,
                up,
                strike,
            } if now_ns < until_ns && !strike.is_over() => Cable::Out {
                until_ns,
                up,
                strike,
            },
            Cable::Out { up, .. } => {
                nic.set_link(true);
                let until_ns = now_ns.saturating_add(up.as_nanos() as u64);
                self.faults.wake_at(until_ns);
                Cable::In { until_ns }
            }
            Cable::In { until_ns } if now_ns < until_ns && is_armed => Cable::In { until_ns },
            Cable::In { .. } | Cable::Left if is_armed => self.take_out(&nic, now_ns),
            Cable::In { .. } | Cable::Left => Cable::Left,
        };
    }
}
