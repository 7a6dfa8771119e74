//! The thread behind a [`Link`](super::Link): brings the backend to what is wanted, again and
//! again. It alone talks to the backend, so it alone ever waits for one.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use faults::DeviceFaults;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{BACKOFF, Connected, Endpoint, Shared, Wiring};
use crate::eventfd;
use crate::frontend::channel::RequestChannel;
use crate::frontend::connection::RequestError;
use crate::frontend::misbehaviour::Hesitation;
use crate::frontend::progress::{QueueProgress, Watched};
use crate::frontend::session::{self, Activation, InflightRegion, Resources};
use crate::log_limit::LogLimit;

/// A connection that lived this long shows a backend that works: the next attempt is at once.
const STABLE_AFTER: Duration = Duration::from_millis(100);

/// Between two looks whether a new backend has completed something.
const LONGEST_LOOK_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Keeper {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    wiring: Wiring,
    err: EventFd,
    connected: Option<Connected>,
    /// What the rings were set up for last; kept while they are stopped or nobody serves them.
    served: Option<Served>,
    retry_at: Instant,
    backoff: Duration,
    faults: Arc<DeviceFaults>,
    hesitation: Hesitation,
    /// After a replay, until a ring moves.
    awaited: Option<Awaited>,
    /// About what drivers do at will.
    complaints: LogLimit,
}

/// The first completion after a replay.
struct Awaited {
    since: Instant,
    /// Where each ring was before it.
    marks: Vec<QueueProgress>,
    /// Whether the lost backend left requests in flight.
    left_some: bool,
}

struct Served {
    id: u64,
    activation: Activation,
    inflight: Option<InflightRegion>,
    started_before: bool,
}

impl Keeper {
    pub(super) fn new(
        shared: Arc<Shared>,
        endpoint: Endpoint,
        mut first: Connected,
        wiring: Wiring,
        faults: Arc<DeviceFaults>,
    ) -> io::Result<Self> {
        first.connection.use_faults(&faults);
        let mut keeper = Self {
            shared,
            endpoint,
            wiring,
            err: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            connected: None,
            served: None,
            retry_at: Instant::now(),
            backoff: BACKOFF.0,
            faults,
            hesitation: Hesitation::default(),
            awaited: None,
            complaints: LogLimit::new(),
        };
        keeper.shared.lock().hang_up = Some(first.connection.hang_up_handle());
        keeper.adopt(first);
        Ok(keeper)
    }

    pub(super) fn run(mut self) {
        loop {
            let (wanted_id, running, paused) = {
                let control = self.shared.lock();
                if control.shutdown {
                    return;
                }
                (
                    control.activation.as_ref().map(|_| control.activation_id),
                    control.running,
                    control.paused,
                )
            };
            if running.is_some() && (running != wanted_id || paused) {
                self.stop_rings();
                continue;
            }
            if self
                .served
                .as_ref()
                .is_some_and(|served| Some(served.id) != wanted_id)
            {
                self.forget_driver();
            }
            if self.connected.is_none()
                && self.retry_at <= Instant::now()
                && self.hesitation.is_over(&self.faults)
            {
                self.connect();
            }
            // First, so that a new backend serves no request in another mode than the driver set.
            if self.connected.is_some() {
                self.pass_config();
            }
            if self.connected.is_some() && running.is_none() {
                self.start_rings();
            }
            self.look_for_completion();
            self.wait();
        }
    }

    fn connect(&mut self) {
        let shared = Arc::clone(&self.shared);
        let attempt = self.endpoint.connect(&self.faults, |hang_up| {
            let mut control = shared.lock();
            if control.shutdown {
                hang_up.hang_up();
            }
            control.hang_up = Some(hang_up);
        });
        match attempt {
            Ok(connected) => self.adopt(connected),
            Err(error) => self.lose(&error),
        }
    }

    fn adopt(&mut self, mut connected: Connected) {
        let config = connected.offer.config.take();
        let mut control = self.shared.lock();
        control.health.connected = control.activation.is_none() || control.paused;
        control.health.replaying = !control.health.connected;
        control.health.incarnations += 1;
        control.outages.connected();
        if control.health.connected {
            let incarnation = control.health.incarnations;
            control.outages.replayed(incarnation);
        }
        control.health.inflight_tracking = connected.offer.tracks_inflight();
        control.repeat_config_writes();
        drop(control);
        self.connected = Some(connected);
        if let Some(config) = config {
            self.tell_config(&config);
        }
    }

    /// Starts the rings if that is wanted.
    fn start_rings(&mut self) {
        let Some(connected) = &mut self.connected else {
            return;
        };
        let mut control = self.shared.lock();
        let id = control.activation_id;
        let Some(activation) = control.activation.as_ref().filter(|_| !control.paused) else {
            return;
        };
        let served = match &mut self.served {
            Some(served) if served.id == id => served,
            served => served.insert(Served {
                id,
                activation: activation.clone(),
                inflight: None,
                started_before: false,
            }),
        };
        control.running = Some(id);
        let is_replay = control.outages.stalled_since().is_some();
        let watched = control.watched.clone().filter(|_| is_replay);
        drop(control);
        let marks = watched.map(|watched| watched.progress(&self.wiring.memory));
        let resources = Resources {
            memory: &self.wiring.memory,
            queues: &self.wiring.queues,
            err: &self.err,
        };
        let outcome = session::start(
            &mut connected.connection,
            &connected.offer,
            &mut served.activation,
            &mut served.inflight,
            &resources,
            &mut connected.told_memory,
        );
        if let Err(error) = outcome {
            self.lose(&error);
            return;
        }
        if std::mem::replace(&mut served.started_before, true) {
            self.wiring.renew_events(&served.activation);
        }
        connected.rings_started = true;
        let watched = Watched::new(&served.activation, served.inflight.clone());
        let mut control = self.shared.lock();
        control.watched = Some(watched);
        control.health.connected = true;
        control.health.replaying = false;
        let incarnation = control.health.incarnations;
        control.outages.replayed(incarnation);
        let left_some = control.outages.newest_in_flight() > 0;
        drop(control);
        self.awaited = marks
            .filter(|marks| left_some || marks.iter().any(|queue| queue.due > 0))
            .map(|marks| Awaited {
                since: Instant::now(),
                marks,
                left_some,
            });
    }

    /// Whether the new backend completed something.
    fn look_for_completion(&mut self) {
        let Some(awaited) = &self.awaited else {
            return;
        };
        let mut control = self.shared.lock();
        let Some(watched) = control.watched.clone() else {
            self.awaited = None;
            return;
        };
        drop(control);
        if awaited.is_over(&watched.progress(&self.wiring.memory)) {
            control = self.shared.lock();
            control.outages.completed();
            self.awaited = None;
        }
    }

    fn stop_rings(&mut self) {
        let (Some(connected), Some(served)) = (&mut self.connected, &mut self.served) else {
            unreachable!("rings run only on a connection, for an activation");
        };
        connected
            .connection
            .set_timeout(self.endpoint.timeouts.stop);
        let outcome = session::stop(&mut connected.connection, &mut served.activation);
        connected
            .connection
            .set_timeout(self.endpoint.timeouts.request);
        if let Err(error) = outcome {
            self.lose(&error);
            return;
        }
        let driver_gone = {
            let mut control = self.shared.lock();
            let driver_gone = control.activation.is_none() || control.activation_id != served.id;
            if !driver_gone {
                control.activation = Some(served.activation.clone());
            }
            driver_gone
        };
        // Before the driver may go on: it could set up new rings at once.
        if driver_gone {
            self.forget_driver();
        }
        self.tell_stopped();
    }

    /// The driver reset the device: nothing of its session may reach the next one.
    fn forget_driver(&mut self) {
        self.served = None;
        self.awaited = None;
        self.shared.lock().watched = None;
        let _ = eventfd::take(&self.err);
        let Some(connected) = &mut self.connected else {
            return;
        };
        if !std::mem::take(&mut connected.rings_started)
            || !connected
                .offer
                .protocol_features
                .contains(VhostUserProtocolFeatures::RESET_DEVICE)
        {
            return;
        }
        match connected.connection.reset_device() {
            Ok(()) => {}
            Err(error @ RequestError::Refused { .. }) => {
                if let Some(withheld) = self.complaints.admit() {
                    tracing::warn!(%error, withheld, "device reset is not complete");
                }
            }
            Err(error) => self.lose(&error),
        }
    }

    /// Passes on what the driver wrote to configuration space, and reads it again.
    fn pass_config(&mut self) {
        let config_len = self.endpoint.config_len;
        let serves_config = |connected: &Connected| {
            connected
                .offer
                .protocol_features
                .contains(VhostUserProtocolFeatures::CONFIG)
                && config_len > 0
        };
        let mut refresh = std::mem::take(&mut self.shared.lock().refresh_config);
        while let Some(connected) = &mut self.connected {
            let Some((offset, bytes)) = self.shared.lock().config_writes.pop_front() else {
                break;
            };
            if !serves_config(connected) {
                continue;
            }
            refresh = true;
            match connected.connection.set_config(offset, &bytes) {
                Ok(()) => self.shared.lock().keep_config_write(offset, bytes),
                Err(error @ RequestError::Refused { .. }) => {
                    if let Some(withheld) = self.complaints.admit() {
                        tracing::warn!(%error, offset, withheld, "a driver's write is lost");
                    }
                }
                Err(error) => {
                    self.shared.lock().config_writes.push_front((offset, bytes));
                    self.lose(&error);
                }
            }
        }
        let Some(connected) = self
            .connected
            .as_mut()
            .filter(|connected| refresh && serves_config(connected))
        else {
            return;
        };
        match connected.connection.config(config_len) {
            Ok(config) => self.tell_config(&config),
            Err(error) => self.lose(&error),
        }
    }

    fn tell_config(&self, config: &[u8]) {
        let is_current = || self.shared.lock().config_writes.is_empty();
        self.wiring.events.config_read(config, &is_current);
    }

    /// The connection is of no use any more: its rings stand still, and another is made.
    fn lose(&mut self, error: &(dyn Error + 'static)) {
        // It may have completed something since the last look.
        self.look_for_completion();
        let lived = self
            .connected
            .take()
            .map_or(Duration::ZERO, |connected| connected.since.elapsed());
        if lived >= STABLE_AFTER {
            self.backoff = BACKOFF.0;
            self.retry_at = Instant::now();
        } else {
            self.retry_at = Instant::now() + self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
        }
        let message = with_causes(error);
        self.awaited = None;
        let in_flight = self.in_flight();
        let mut control = self.shared.lock();
        // Dropping the link hangs up: that is no failure of anybody's.
        if control.shutdown {
            return;
        }
        if control.health.last_error != message || control.health.connected {
            tracing::warn!(socket = %self.endpoint.socket.display(), error = message, "no backend, connecting again");
        }
        if std::mem::take(&mut control.health.connected) {
            control.outages.begin(&message, in_flight);
        }
        control.health.replaying = false;
        control.health.last_error = message;
        control.hang_up = None;
        drop(control);
        self.tell_stopped();
    }

    /// Requests that whoever served the rings leaves behind.
    fn in_flight(&self) -> u32 {
        let control = self.shared.lock();
        let watched = control.watched.clone();
        let was_serving = control.health.connected;
        drop(control);
        let Some(watched) = watched.filter(|_| was_serving) else {
            return 0;
        };
        watched
            .progress(&self.wiring.memory)
            .iter()
            .map(|queue| u32::from(queue.taken()))
            .sum()
    }

    /// Says that the rings stand still, to whom it concerns.
    fn tell_stopped(&self) {
        let mut control = self.shared.lock();
        let was_running = control.running.take().is_some();
        let reset_waits = was_running && control.activation.is_none();
        drop(control);
        self.shared.changed.notify_all();
        if reset_waits {
            self.wiring.events.stopped();
        }
    }

    /// Waits for something to do.
    fn wait(&mut self) {
        let channel = self
            .connected
            .as_ref()
            .and_then(|connected| connected.connection.channel());
        let quiet_until = channel.and_then(RequestChannel::quiet_until);
        let deadline = match &self.connected {
            Some(_) => quiet_until,
            None => Some(self.hesitation.until().unwrap_or(self.retry_at)),
        };
        let look_at = self.awaited.as_ref().map(Awaited::look_at);
        let deadline = deadline.into_iter().chain(look_at).min();
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // One millisecond more, lest the poll ends a little early and spins.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(borrow(&self.err), PollFlags::POLLIN),
        ];
        if let Some(connected) = &self.connected {
            fds.push(PollFd::new(connected.connection.as_fd(), PollFlags::POLLIN));
            let listening = channel.filter(|_| quiet_until.is_none());
            fds.extend(listening.map(|channel| PollFd::new(channel.as_fd(), PollFlags::POLLIN)));
        }
        // An interrupted poll is a poll without events.
        let _ = poll(&mut fds, timeout);
        let events: Vec<PollFlags> = fds
            .iter()
            .map(|fd| fd.revents().unwrap_or(PollFlags::empty()))
            .collect();
        if !events[0].is_empty() {
            let _ = self.shared.wake.read();
        }
        if !events[1].is_empty() && matches!(eventfd::take(&self.err), Ok(true)) {
            self.wiring.events.ring_broken();
        }
        if events.get(3).is_some_and(|event| !event.is_empty()) {
            self.hear_backend();
        }
        match events.get(2) {
            Some(event) if event.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) => {
                self.lose(&Ended::HungUp);
            }
            Some(event) if !event.is_empty() => self.lose(&Ended::SpokeUnasked),
            _ => {}
        }
    }

    /// The backend speaks by itself.
    fn hear_backend(&mut self) {
        let Some(connected) = &mut self.connected else {
            return;
        };
        let channel = connected.connection.channel_mut();
        match channel.as_mut().map(RequestChannel::hear) {
            Some(Ok(true)) => self.shared.lock().refresh_config = true,
            Some(Err(end)) => {
                tracing::debug!(socket = %self.endpoint.socket.display(), %end, "backend heard no more");
                *channel = None;
            }
            _ => {}
        }
    }
}

/// How a connection ended while nothing was asked.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the backend hung up")]
    HungUp,
    #[error("the backend sent a message that nobody asked for")]
    SpokeUnasked,
}

impl Awaited {
    /// Whether a ring moved, or nothing is left that could move one: what seemed to be in flight may have
    /// been published just before the loss, and the driver may ask for nothing more.
    fn is_over(&self, now: &[QueueProgress]) -> bool {
        let has_moved = |mark: &QueueProgress| {
            let queue = now.iter().find(|queue| queue.index == mark.index);
            queue.is_some_and(|queue| queue.used_idx != mark.used_idx)
        };
        self.marks.iter().any(has_moved)
            || now.iter().all(|queue| queue.due == 0)
            || (self.left_some && now.iter().all(|queue| queue.taken() == 0))
    }

    /// The longer it takes, the less it matters when exactly it ends.
    fn look_at(&self) -> Instant {
        let waited = self.since.elapsed();
        Instant::now() + (waited / 16).clamp(Duration::ZERO, LONGEST_LOOK_INTERVAL)
    }
}

impl Wiring {
    /// A new incarnation must look at its rings, and the driver at what the old one completed
    /// without getting to the interrupt.
    fn renew_events(&self, activation: &Activation) {
        for queue in &activation.queues {
            let events = &self.queues[usize::from(queue.index)];
            eventfd::ring(&events.kick);
            eventfd::ring(&events.call);
        }
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open while `event` lives, and the result lives no longer.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn awaited(left_some: bool, marks: &[QueueProgress]) -> Awaited {
        Awaited {
            since: Instant::now(),
            marks: marks.to_vec(),
            left_some,
        }
    }

    fn queue(used_idx: u16, due: u16, in_flight: Option<u16>) -> QueueProgress {
        QueueProgress {
            index: 0,
            avail_idx: used_idx.wrapping_add(due),
            used_idx,
            due,
            in_flight,
        }
    }

    #[test]
    fn outage_with_requests_due_ends_when_a_ring_moves() {
        let awaited = awaited(false, &[queue(7, 2, Some(0))]);
        assert!(!awaited.is_over(&[queue(7, 2, Some(0))]));
        assert!(!awaited.is_over(&[queue(7, 2, Some(2))]));
        assert!(awaited.is_over(&[queue(8, 1, Some(1))]));
    }

    #[test]
    fn outage_ends_when_what_was_in_flight_had_been_published() {
        // An idle driver never makes the ring move again.
        assert!(awaited(true, &[queue(7, 0, Some(1))]).is_over(&[queue(7, 0, Some(0))]));
        // Buffers for packets are always due.
        let waiting = awaited(true, &[queue(7, 64, Some(1))]);
        assert!(!waiting.is_over(&[queue(7, 64, Some(1))]));
        assert!(waiting.is_over(&[queue(7, 64, Some(0))]));
        let unknown = awaited(true, &[queue(7, 3, None)]);
        assert!(!unknown.is_over(&[queue(7, 3, None)]));
    }
}
