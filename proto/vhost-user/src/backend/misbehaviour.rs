//! What a session and the threads of its rings do wrong on purpose: see [`faults`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use faults::{Action, DeviceFaults, Event, Point, Wake};
use vhost::vhost_user::message::FrontendReq;

use super::shared::Mail;
use crate::eventfd::EventFd;

/// Rules changed: the ring's thread looks at its ring.
impl Wake for Mail {
    fn wake(&self) {
        self.post();
    }
}

/// Readable when a session is to end because of something that its connection does not see.
#[derive(Debug)]
pub(super) struct Disconnector {
    faults: Arc<DeviceFaults>,
    event: EventFd,
}

impl Disconnector {
    pub(super) fn new(faults: Arc<DeviceFaults>) -> io::Result<Arc<Self>> {
        // Asked for of an earlier session.
        faults.take_disconnect();
        let disconnector = Arc::new(Self {
            faults,
            event: EventFd::new()?,
        });
        let waker: Arc<dyn Wake> = disconnector.clone();
        disconnector.faults.add_waker(&waker);
        Ok(disconnector)
    }
}

impl AsFd for Disconnector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Wake for Disconnector {
    fn wake(&self) {
        if self.faults.take_disconnect() {
            self.event.ring();
        }
    }
}

/// Whether a kick that came is not heard. Until when it is not follows from the rule: its thread is
/// woken then.
#[cold]
pub(super) fn loses_kick(faults: &DeviceFaults, queue: u16) -> bool {
    let event = Event::of_queue(Point::Kick, queue);
    faults
        .strike_first(&event, |action| {
            matches!(action, Action::LostKick).then_some(())
        })
        .is_some()
}

/// What is to happen before a request of the frontend is handled; false when the session is to end
/// instead. A readable `stop` ends all waiting.
#[cold]
pub(super) fn before_message(faults: &DeviceFaults, request: u32, stop: BorrowedFd<'_>) -> bool {
    let name = FrontendReq::try_from(request).map_or_else(
        |_| format!("REQUEST_{request}"),
        |request| format!("{request:?}"),
    );
    let event = Event {
        message: Some(&name),
        ..Event::at(Point::Message)
    };
    for strike in faults.strike(&event) {
        match strike.action {
            Action::LateReply(delay) | Action::Hang(delay) => {
                faults::wait(&strike, delay, stop);
            }
            Action::Disconnect => {
                tracing::warn!(
                    device = faults.id(),
                    request = name,
                    "a fault ends the session"
                );
                return false;
            }
            Action::Crash => faults::crash(),
            _ => {}
        }
    }
    true
}

/// Feature bits that are not offered.
#[cold]
pub(super) fn refused_features(faults: &DeviceFaults) -> u64 {
    let strikes = faults.strike(&Event::at(Point::Features));
    strikes
        .into_iter()
        .fold(0, |set, strike| match strike.action {
            Action::RefuseFeatures(features) => set | features,
            _ => set,
        })
}

/// Whether an in-flight region that the frontend gives is not taken.
#[cold]
pub(super) fn loses_inflight(faults: &DeviceFaults) -> bool {
    let event = Event::at(Point::Inflight);
    let lost = faults.strike_first(&event, |action| {
        matches!(action, Action::LostInflight).then_some(())
    });
    lost.is_some()
}

/// Pauses while one ring has the new memory table and the next, `queue`, has not.
#[cold]
pub(super) fn amid_memory_change(faults: &DeviceFaults, queue: u16) {
    let event = Event::of_queue(Point::Memory, queue);
    let delay = |action: &Action| match action {
        Action::MemoryRace(delay) => Some(*delay),
        _ => None,
    };
    if let Some((delay, strike)) = faults.strike_first(&event, delay) {
        faults::hang(&strike, delay);
    }
}
