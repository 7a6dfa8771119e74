//! The session's handle on whoever serves a ring: a [thread](super::lone) of the ring's own, or one
//! that it shares with the rings of other devices (a [group](super::group)).
//!
//! The session sends [`Command`]s and reads [`QueueStats`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::serving::Serving;
use super::shared::{Mail, Waker};
use super::{Device, lone};
use crate::eventfd::{self, Doorbell, EventFd};
use crate::log_limit::LogLimit;
use crate::memory::MemoryTable;
use crate::ring::{Ring, RingError, RingState, Successor};

/// How long a worker may take to answer a command beyond the work that the command asks for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks whether a worker that is held up is released.
const RELEASE_INTERVAL: Duration = Duration::from_millis(5);

/// What a worker tells about its ring, without being asked.
#[derive(Debug, Default)]
pub(super) struct QueueStats {
    pub(super) running: AtomicBool,
    pub(super) in_flight: AtomicU32,
    pub(super) completed_total: AtomicU64,
    /// A driver can break its ring, reset the device and begin again at will.
    pub(super) complaints: Mutex<LogLimit>,
    pub(super) look: Mutex<Look>,
}

/// Whether the thread of a ring answers. It does while requests wait for storage; one that is stuck does
/// not.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Whom to ask; none while the ring is not served or is being stopped, which may take a while.
    worker: Option<Arc<Mail>>,
    /// Not answered since.
    asked: Option<Instant>,
}

impl QueueStats {
    /// How long the ring's thread has not answered, and asks it once more. Asking makes it look at its
    /// ring as well, so that a kick that was lost is made up for, and a signal that was: see
    /// [`Ring::remind`].
    pub(super) fn unresponsive(&self) -> Duration {
        let mut look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(worker) = &look.worker else {
            return Duration::ZERO;
        };
        match look.asked {
            Some(asked) => asked.elapsed(),
            None => {
                worker.post();
                look.asked = Some(Instant::now());
                Duration::ZERO
            }
        }
    }

    /// Its thread looks at its mail; whether it was asked.
    pub(super) fn answer_look(&self) -> bool {
        let mut look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        look.asked.take().is_some()
    }

    pub(super) fn set_worker(&self, worker: Option<Arc<Mail>>) {
        *self.look.lock().unwrap_or_else(PoisonError::into_inner) = Look {
            worker,
            asked: None,
        };
    }
}

/// A stop that was commanded.
pub(super) struct Stop {
    pub(super) successor: Successor,
    /// Until when what is in flight may complete.
    pub(super) deadline: Instant,
    /// Who waits for it.
    pub(super) answer: SyncSender<RingState>,
}

/// What the session wants of a worker.
pub(super) enum Command {
    Stop(Stop),
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
    mail: Arc<Mail>,
    end: End,
}

/// How a worker is known to have ended.
#[derive(Debug)]
enum End {
    /// None once joined.
    Thread(Option<JoinHandle<()>>),
    /// Closed when the group has let go of the ring.
    Member(Receiver<()>),
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
        let index = ring.index();
        let seat = device.group();
        let waker = match &seat {
            Some(seat) => Arc::clone(seat.waker()),
            None => Arc::new(Waker::new()?),
        };
        let mail = Arc::new(Mail::new(waker));
        let serving = Serving::new(name, &*device, ring, kick, err, &mail, inbox, stats);
        let end = match seat {
            Some(seat) => {
                let (alive, ended) = sync_channel(0);
                seat.admit(serving, device, alive)?;
                End::Member(ended)
            }
            None => {
                // Thread names have 15 characters; the queue number matters most.
                let short_name: String = name.chars().take(10).collect();
                let thread = thread::Builder::new()
                    .name(format!("{short_name}/q{index}"))
                    .spawn(move || lone::run(serving, &*device))?;
                End::Thread(Some(thread))
            }
        };
        Ok(Worker {
            index,
            commands,
            mail,
            end,
        })
    }

    /// Asks the worker to complete what is in flight and end.
    pub(super) fn begin_stop(&self, deadline: Instant, successor: Successor) -> PendingStop {
        let (sender, answer) = sync_channel(1);
        self.send(Command::Stop(Stop {
            successor,
            deadline,
            answer: sender,
        }));
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

    /// Waits for the worker's end. Only after a stop was answered or the worker is known to be
    /// ending.
    pub(super) fn join(mut self) {
        match &mut self.end {
            End::Thread(thread) => {
                if thread.take().is_some_and(|thread| thread.join().is_err()) {
                    tracing::error!(queue = self.index, "queue worker panicked");
                }
            }
            End::Member(ended) => {
                let _ = ended.recv();
            }
        }
    }

    /// As [`Worker::join`], for one that did not answer: a frontend that made `doorbells` blocking
    /// and full at the very instant between look and write holds it up, until they are emptied.
    /// What else may keep it is the device's own work, which must be over before the next frontend
    /// is served: it writes to this one's memory and files.
    pub(super) fn release_and_join(self, doorbells: &[&OwnedFd]) {
        while !self.has_ended() {
            for doorbell in doorbells {
                let _ = eventfd::take(*doorbell);
            }
            thread::sleep(RELEASE_INTERVAL);
        }
        self.join();
    }

    fn has_ended(&self) -> bool {
        match &self.end {
            End::Thread(thread) => thread.as_ref().is_none_or(JoinHandle::is_finished),
            End::Member(ended) => ended.try_recv() == Err(TryRecvError::Disconnected),
        }
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, WorkerError> {
        let (sender, answer) = sync_channel(1);
        self.send(command(sender));
        receive(self.index, &answer, ANSWER_TIMEOUT)
    }

    /// A worker that is gone is noticed by the missing answer, or at the session's end.
    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.mail.post();
    }
}

impl Drop for Worker {
    /// Whoever lets go of a running worker ends it.
    fn drop(&mut self) {
        drop(self.begin_stop(Instant::now(), Successor::Alone));
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
