//! What a frontend does wrong on purpose: see [`faults`].

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use faults::{Action, DeviceFaults, Event, Point, Strike};

/// What is to happen before `request` is sent over `stream`, whose end ends all waiting.
///
/// # Errors
/// The connection is to be closed instead.
#[cold]
pub(super) fn before_request(
    faults: &DeviceFaults,
    request: &str,
    stream: BorrowedFd<'_>,
) -> io::Result<()> {
    let event = Event {
        message: Some(request),
        ..Event::at(Point::Message)
    };
    for strike in faults.strike(&event) {
        match strike.action {
            Action::LateReply(delay) => faults::wait(&strike, delay, stream),
            Action::Disconnect => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "a fault closes the connection",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Lets a backend be looked for later than it could be.
#[derive(Debug, Default)]
pub(super) struct Hesitation {
    /// Until when, unless the rule is over before.
    held_back: Option<(Instant, Strike)>,
}

impl Hesitation {
    /// Whether to look for a backend now. An attempt that is held back is one event, however often it
    /// is asked for.
    pub(super) fn is_over(&mut self, faults: &DeviceFaults) -> bool {
        if let Some((until, strike)) = &self.held_back {
            if Instant::now() < *until && !strike.is_over() {
                return false;
            }
            self.held_back = None;
            return true;
        }
        if !faults.is_armed(Point::Connect) {
            return true;
        }
        let delay = |action: &Action| match action {
            Action::LateReconnect(delay) => Some(*delay),
            _ => None,
        };
        let struck: Option<(Duration, Strike)> =
            faults.strike_first(&Event::at(Point::Connect), delay);
        self.held_back = struck.map(|(delay, strike)| (Instant::now() + delay, strike));
        self.held_back.is_none()
    }

    /// When to ask again.
    pub(super) fn until(&self) -> Option<Instant> {
        self.held_back.as_ref().map(|(until, _)| *until)
    }
}
