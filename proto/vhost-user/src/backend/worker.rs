//! The thread that serves one ring.
//!
//! It owns the [`Ring`] and its [`QueueHandler`]; the session sends it [`Command`]s and reads
//! [`QueueStats`].
//!
//! ```text
//!            start_queue fails, ring error
//!   serving ------------------------------> broken (completes what is in flight, takes nothing new)
//!      |  ^                                    |
//!      |  | SetEnabled                         |
//!      v  |                                    |
//!   paused                                     |
//!      |                                       |
//!      +------------ Stop: drain --------------+--> thread ends
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::poller::{Look, Poller};
use super::{Device, Polling, QueueHandler, Wake};
use crate::eventfd::{self, Doorbell, EventFd};
use crate::log_limit::LogLimit;
use crate::memory::MemoryTable;
use crate::ring::{Intake, Ring, RingError, RingState};

/// How long a worker may take to answer a command beyond the work that the command asks for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks whether a worker that is held up is released.
const RELEASE_INTERVAL: Duration = Duration::from_millis(5);

/// Rounds of processing without a look at commands and events, while the driver keeps adding.
const BUSY_ROUNDS: u32 = 16;

/// Event descriptors a handler may have.
const MAX_EVENTS: usize = 8;

/// What a worker tells about its ring, without being asked.
#[derive(Debug, Default)]
pub(super) struct QueueStats {
    pub(super) running: AtomicBool,
    pub(super) in_flight: AtomicU32,
    pub(super) completed_total: AtomicU64,
    /// A driver can break its ring, reset the device and begin again at will.
    complaints: Mutex<LogLimit>,
}

enum Command {
    Stop {
        deadline: Instant,
        answer: SyncSender<RingState>,
    },
    SetMemory {
        memory: Arc<MemoryTable>,
        answer: SyncSender<Result<(), RingError>>,
    },
    SetEnabled {
        enabled: bool,
        answer: SyncSender<()>,
    },
    SetKick(EventFd),
    SetCall(Option<Doorbell>),
    SetErr(Option<Doorbell>),
}

/// Why a worker did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    #[error("queue {index}: its worker does not answer")]
    Silent { index: u16 },
    #[error("queue {index}: its worker is gone")]
    Gone { index: u16 },
    #[error("queue {index}: {in_flight} requests were not completed in time")]
    NotDrained { index: u16, in_flight: u16 },
    #[error("queue {index}")]
    Ring {
        index: u16,
        #[source]
        source: RingError,
    },
}

/// The session's handle on a worker.
#[derive(Debug)]
pub(super) struct Worker {
    index: u16,
    commands: Sender<Command>,
    /// There are commands; for a worker that does not sleep.
    has_commands: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// A stop that was asked for and not yet answered.
pub(super) struct PendingStop {
    index: u16,
    deadline: Instant,
    answer: Receiver<RingState>,
}

impl Worker {
    /// Starts serving `ring`.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
    pub(super) fn start(
        name: &str,
        device: Arc<dyn Device>,
        ring: Ring,
        kick: EventFd,
        err: Option<Doorbell>,
        stats: Arc<QueueStats>,
    ) -> io::Result<Worker> {
        let (commands, inbox) = channel();
        let has_commands = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new()?;
        let index = ring.index();
        let serving = Serving {
            label: name.to_owned(),
            ring,
            kick: Some(kick),
            err,
            wake: wake.try_clone()?,
            has_commands: Arc::clone(&has_commands),
            inbox,
            poller: Poller::default(),
            stats,
            is_broken: false,
            events_polled: true,
            reported_completed: 0,
        };
        // Thread names have 15 characters; the queue number matters most.
        let short_name: String = name.chars().take(10).collect();
        let thread = thread::Builder::new()
            .name(format!("{short_name}/q{index}"))
            .spawn(move || serving.run(&*device))?;
        Ok(Worker {
            index,
            commands,
            has_commands,
            wake,
            thread: Some(thread),
        })
    }

    /// Asks the worker to complete what is in flight and end.
    pub(super) fn begin_stop(&self, deadline: Instant) -> PendingStop {
        let (sender, answer) = sync_channel(1);
        self.send(Command::Stop {
            deadline,
            answer: sender,
        });
        PendingStop {
            index: self.index,
            deadline,
            answer,
        }
    }

    /// Makes the ring use another memory table.
    ///
    /// # Errors
    /// The ring is not in that table, or the worker does not answer.
    pub(super) fn set_memory(&self, memory: Arc<MemoryTable>) -> Result<(), WorkerError> {
        let index = self.index;
        self.ask(|answer| Command::SetMemory { memory, answer })?
            .map_err(|source| WorkerError::Ring { index, source })
    }

    /// Pauses or resumes taking requests. When it returns, no more are taken.
    ///
    /// # Errors
    /// The worker does not answer.
    pub(super) fn set_enabled(&self, enabled: bool) -> Result<(), WorkerError> {
        self.ask(|answer| Command::SetEnabled { enabled, answer })
    }

    pub(super) fn set_kick(&self, kick: EventFd) {
        self.send(Command::SetKick(kick));
    }

    pub(super) fn set_call(&self, call: Option<Doorbell>) {
        self.send(Command::SetCall(call));
    }

    pub(super) fn set_err(&self, err: Option<Doorbell>) {
        self.send(Command::SetErr(err));
    }

    /// Waits for the thread's end. Only after a stop was answered or the worker is known to be
    /// ending.
    pub(super) fn join(mut self) {
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!(queue = self.index, "queue worker panicked");
        }
    }

    /// As [`Worker::join`], for one that did not answer: a frontend that made `doorbells` blocking
    /// and full at the very instant between look and write holds it up, until they are emptied.
    /// What else may keep it is the device's own work, which must be over before the next frontend
    /// is served: it writes to this one's memory and files.
    pub(super) fn release_and_join(self, doorbells: &[&OwnedFd]) {
        while self
            .thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
        {
            for doorbell in doorbells {
                let _ = eventfd::take(*doorbell);
            }
            thread::sleep(RELEASE_INTERVAL);
        }
        self.join();
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, WorkerError> {
        let (sender, answer) = sync_channel(1);
        self.send(command(sender));
        receive(self.index, &answer, ANSWER_TIMEOUT)
    }

    /// A worker that is gone is noticed by the missing answer, or at the session's end.
    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.has_commands.store(true, Ordering::Release);
        self.wake.ring();
    }
}

impl Drop for Worker {
    /// Whoever lets go of a running worker ends it.
    fn drop(&mut self) {
        drop(self.begin_stop(Instant::now()));
    }
}

impl PendingStop {
    /// Waits for the end of the drain.
    ///
    /// # Errors
    /// Not drained, or no answer.
    pub(super) fn wait(self) -> Result<RingState, WorkerError> {
        let PendingStop {
            index,
            deadline,
            answer,
        } = self;
        let timeout = deadline.saturating_duration_since(Instant::now()) + ANSWER_TIMEOUT;
        let state = receive(index, &answer, timeout)?;
        match state.in_flight {
            0 => Ok(state),
            in_flight => Err(WorkerError::NotDrained { index, in_flight }),
        }
    }
}

fn receive<T>(index: u16, answer: &Receiver<T>, timeout: Duration) -> Result<T, WorkerError> {
    answer.recv_timeout(timeout).map_err(|error| match error {
        RecvTimeoutError::Timeout => WorkerError::Silent { index },
        RecvTimeoutError::Disconnected => WorkerError::Gone { index },
    })
}

/// The thread's side.
struct Serving {
    label: String,
    ring: Ring,
    kick: Option<EventFd>,
    err: Option<Doorbell>,
    wake: EventFd,
    has_commands: Arc<AtomicBool>,
    inbox: Receiver<Command>,
    poller: Poller,
    stats: Arc<QueueStats>,
    /// The ring takes no more requests, whatever the frontend enables.
    is_broken: bool,
    events_polled: bool,
    /// Part of the ring's completions that `stats` has.
    reported_completed: u64,
}

/// Positions in the poll set; the handler's events follow.
const POLL_WAKE: usize = 0;
const POLL_KICK: usize = 1;
const POLL_EVENTS: usize = 2;

impl Serving {
    fn run(mut self, device: &dyn Device) {
        let mut handler = match device.start_queue(self.ring.index(), self.ring.features()) {
            Ok(handler) => Some(handler),
            Err(error) => {
                self.break_ring(&RingError::Device(error));
                None
            }
        };
        self.stats
            .running
            .store(handler.is_some(), Ordering::Relaxed);
        let (deadline, answer) = self.serve_until_stopped(&mut handler);

        if let Some(handler) = &mut handler {
            self.drain(handler.as_mut(), deadline);
        }
        self.ring.notify();
        // What the kernel still does for this ring ends here, before anybody hears of the stop.
        drop(handler);
        self.stats.running.store(false, Ordering::Relaxed);
        self.report();
        let mut state = self.ring.finish();
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
        self.ring.set_intake(Intake::Draining);
        loop {
            let left = handler.drain(&mut self.ring, deadline);
            if left > 0 {
                let queue = self.ring.index();
                tracing::warn!(device = self.label, queue, left, "requests left in flight");
            }
            let to_resubmit = self.ring.left_to_resubmit();
            if left > 0 || to_resubmit == 0 || self.is_broken || Instant::now() >= deadline {
                break;
            }
            if let Err(error) = handler.process(&mut self.ring, Wake::Kick) {
                self.break_ring(&error);
            }
            if self.ring.left_to_resubmit() == to_resubmit {
                break;
            }
        }
        self.ring.set_intake(Intake::Closed);
    }

    fn serve_until_stopped(
        &mut self,
        handler: &mut Option<Box<dyn QueueHandler>>,
    ) -> (Instant, SyncSender<RingState>) {
        let event_fds: Vec<RawFd> = handler.as_ref().map_or_else(Vec::new, |handler| {
            handler
                .event_fds()
                .iter()
                .take(MAX_EVENTS)
                .map(AsRawFd::as_raw_fd)
                .collect()
        });
        // What was made available before this ring was served had its kick long ago.
        let mut again = true;
        let mut polls = Vec::with_capacity(POLL_EVENTS + event_fds.len());
        loop {
            if again && let Some(handler) = handler {
                again = self.serve(handler.as_mut(), Wake::Kick);
            } else {
                again = false;
            }
            let idle_since = (!again).then(Instant::now);
            let found = match (&idle_since, &mut *handler) {
                (Some(idle_since), Some(handler)) => self.look(handler.as_mut(), *idle_since),
                _ => false,
            };
            if !again
                && !found
                && let Some(handler) = handler
            {
                again = self.prepare_sleep(handler.as_mut());
            }
            let has_commands = self.has_commands.swap(false, Ordering::AcqRel);
            polls.clear();
            if !found {
                self.fill_poll_set(&mut polls, handler.as_deref(), &event_fds);
                poll(&mut polls, again || has_commands);
            }
            again |= found;
            if let Some(idle_since) = idle_since {
                self.poller.note_gap(idle_since, Instant::now());
            }
            if has_commands || polls.get(POLL_WAKE).is_some_and(is_readable) {
                match self.obey() {
                    Some(Command::Stop { deadline, answer }) => return (deadline, answer),
                    _ => again = true,
                }
            }
            if polls.get(POLL_KICK).is_some_and(is_readable) {
                again = true;
                self.take_kick();
            }
            let Some(handler) = handler else { continue };
            for (index, event) in polls.iter().skip(POLL_EVENTS).enumerate() {
                if is_readable(event) {
                    again |= self.serve(handler.as_mut(), Wake::Event(index));
                }
            }
        }
    }

    /// Lets the handler work until the driver has nothing new; true when it still may have. The
    /// driver does not kick from now on.
    fn serve(&mut self, handler: &mut dyn QueueHandler, wake: Wake) -> bool {
        let result = self.try_serve(handler, wake);
        self.report();
        result.unwrap_or_else(|error| {
            self.ring.notify();
            self.break_ring(&error);
            false
        })
    }

    fn try_serve(&mut self, handler: &mut dyn QueueHandler, wake: Wake) -> Result<bool, RingError> {
        self.ring.disable_notification();
        handler.process(&mut self.ring, wake)?;
        self.ring.notify();
        for _ in 0..BUSY_ROUNDS {
            if !self.ring.has_new()? {
                return Ok(false);
            }
            handler.process(&mut self.ring, Wake::Kick)?;
            self.ring.notify();
        }
        Ok(true)
    }

    /// Looks for work for a while, if that may pay; true when there is some.
    fn look(&mut self, handler: &mut dyn QueueHandler, idle_since: Instant) -> bool {
        let polling = handler.polling();
        if polling == Polling::Never || self.is_broken {
            return false;
        }
        let Serving {
            ring,
            has_commands,
            poller,
            ..
        } = self;
        let look = poller.look(polling, idle_since, || {
            // A broken index is something for `process` to find.
            ring.has_new().unwrap_or(true)
                || handler.has_events()
                || has_commands.load(Ordering::Relaxed)
        });
        look == Look::Found
    }

    /// Makes everything that happens from now on wake the thread; true when something has
    /// happened already.
    fn prepare_sleep(&mut self, handler: &mut dyn QueueHandler) -> bool {
        match self.ring.enable_notification() {
            Ok(has_more) => handler.prepare_sleep() || has_more,
            Err(error) => {
                self.break_ring(&error);
                false
            }
        }
    }

    fn report(&mut self) {
        let completed_now = self.ring.completed_total();
        let added = completed_now - std::mem::replace(&mut self.reported_completed, completed_now);
        self.stats
            .completed_total
            .fetch_add(added, Ordering::Relaxed);
        self.stats
            .in_flight
            .store(u32::from(self.ring.in_flight()), Ordering::Relaxed);
    }

    fn break_ring(&mut self, error: &RingError) {
        // A handler that fails again while it completes what is in flight is left alone.
        self.events_polled = !self.is_broken;
        self.is_broken = true;
        self.ring.set_intake(Intake::Closed);
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
                queue = self.ring.index(),
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

    fn take_kick(&mut self) {
        if let Some(Err(error)) = self.kick.as_ref().map(EventFd::take) {
            tracing::warn!(device = self.label, queue = self.ring.index(), %error, "kick descriptor is dead");
            self.kick = None;
        }
    }

    /// Carries out what was commanded, up to a stop.
    fn obey(&mut self) -> Option<Command> {
        let _ = self.wake.take();
        loop {
            match self.inbox.try_recv() {
                Ok(Command::SetMemory { memory, answer }) => {
                    let _ = answer.send(self.ring.set_memory(memory));
                }
                Ok(Command::SetEnabled { enabled, answer }) => {
                    let open = enabled && !self.is_broken;
                    self.ring
                        .set_intake(if open { Intake::Open } else { Intake::Closed });
                    let _ = answer.send(());
                }
                Ok(Command::SetKick(kick)) => self.kick = Some(kick),
                Ok(Command::SetCall(call)) => {
                    self.ring.set_call(call);
                }
                Ok(Command::SetErr(err)) => self.err = err,
                Ok(stop @ Command::Stop { .. }) => return Some(stop),
                Err(_) => return None,
            }
        }
    }

    fn fill_poll_set(
        &self,
        polls: &mut Vec<libc::pollfd>,
        handler: Option<&dyn QueueHandler>,
        event_fds: &[RawFd],
    ) {
        // poll ignores negative descriptors, which keeps positions fixed.
        let entry = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let kick = self.kick.as_ref().filter(|_| !self.is_broken);
        polls.clear();
        polls.push(entry(self.wake.as_fd().as_raw_fd()));
        polls.push(entry(kick.map_or(-1, |kick| kick.as_fd().as_raw_fd())));
        for (index, &fd) in event_fds.iter().enumerate() {
            let wanted =
                self.events_polled && handler.is_some_and(|handler| handler.wants_event(index));
            polls.push(entry(if wanted { fd } else { -1 }));
        }
    }
}

fn is_readable(entry: &libc::pollfd) -> bool {
    entry.revents != 0
}

/// Waits until something is readable. The wait has no time limit of its own: the session's
/// commands and its end always ring the wake descriptor.
fn poll(polls: &mut [libc::pollfd], at_once: bool) {
    let timeout_ms = if at_once { 0 } else { -1 };
    // SAFETY: a valid slice of pollfds; descriptors are kept open by worker and handler.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    if ready < 0 {
        // EINTR: the entries' revents are unspecified.
        polls.iter_mut().for_each(|entry| entry.revents = 0);
    }
}
