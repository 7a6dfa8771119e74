//! The life of a machine: one state machine, driven by one thread.
//!
//! ```text
//!               Start                 Pause
//!   Created ───────────► Running ◄──────────────► Paused
//!      │                  │ ▲ │       Resume       │ ▲ │
//!      │                  │ └─┘                    │ └─┘
//!      │ Stop             │ Reset                  │ Reset
//!      │                  │                        │
//!      │                  │ Stop, S5, failure      │ Stop
//!      └────────────► Stopped ◄────────────────────┘
//! ```
//!
//! | state \ request | Start | Pause | Resume | Reset | PowerButton | Stop |
//! |---|---|---|---|---|---|---|
//! | Created | boot -> Running | refused | refused | refused | refused | -> Stopped |
//! | Running | nothing | park -> Paused | nothing | reboot | press | -> Stopped |
//! | Paused | refused | nothing | run -> Running | reboot, stays paused | refused | -> Stopped |
//! | Stopped | refused | refused | refused | refused | refused | nothing |
//!
//! A machine under a lease runs until a moment that [`Handle::allow_run`] moves on. At its end the machine
//! pauses by itself, and resumes by itself when a later moment is told, unless it was asked to pause
//! meanwhile. Nothing makes it run in between.
//!
//! [`Supervisor`] owns the machine and its state. Everybody else holds a [`Handle`]: sends
//! requests and reads snapshots.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use api::boottime;
use tokio::sync::oneshot;
use tracing::{info, warn};
use vhost_user::log_limit::LogLimit;

use crate::error::chain;
use crate::machine::{Machine, MachineError};
use crate::vcpu::{Event, Report};

/// Messages that may wait for the supervisor: all vCPUs' reports and some requests.
const INBOX_CAPACITY: usize = 128;
/// The end of a machine that is under no lease.
const NEVER: u64 = u64::MAX;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Assembled; no vCPU has run.
    Created = 1,
    /// vCPUs run.
    Running,
    /// vCPUs and rings stand still.
    Paused,
    /// Over: the process is about to exit.
    Stopped,
}

/// What others may ask of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Boot.
    Start,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Hard reset.
    Reset,
    /// Press the ACPI power button.
    PowerButton,
    /// Switch off without asking the guest.
    Stop,
    /// Look at the lease again.
    HeedLease,
}

/// What a request leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Nothing,
    Boot,
    Park,
    Run,
    Reboot,
    Press,
    Stop,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not in this state.
    #[error("the machine is {state}: {remedy}")]
    State {
        /// Its state in words.
        state: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
    /// It is under no lease.
    #[error(
        "the machine is under no lease and runs without leave: start it with --run-until-boottime-ns"
    )]
    NotLeased,
    /// Too many requests wait.
    #[error("too many requests are waiting: try again later")]
    Busy,
    /// The machine could not do it, and stops.
    #[error("{0}; the machine stops")]
    Failed(String),
    /// The supervisor has ended.
    #[error("the machine has stopped and its process is about to exit")]
    Gone,
}

impl State {
    /// The state in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }

    fn on(self, request: Request) -> Result<Action, Refusal> {
        let refused = |remedy| {
            Err(Refusal::State {
                state: self.name(),
                remedy,
            })
        };
        match (self, request) {
            (_, Request::HeedLease) | (Self::Stopped, Request::Stop) => Ok(Action::Nothing),
            (_, Request::Stop) => Ok(Action::Stop),
            (Self::Created, Request::Start) => Ok(Action::Boot),
            (Self::Created, _) => refused("start it first"),
            (Self::Running, Request::Start | Request::Resume) => Ok(Action::Nothing),
            (Self::Running, Request::Pause) => Ok(Action::Park),
            (Self::Running, Request::PowerButton) => Ok(Action::Press),
            (Self::Running | Self::Paused, Request::Reset) => Ok(Action::Reboot),
            (Self::Paused, Request::Resume) => Ok(Action::Run),
            (Self::Paused, Request::Pause) => Ok(Action::Nothing),
            (Self::Paused, Request::Start | Request::PowerButton) => refused("resume it first"),
            (Self::Stopped, _) => refused("create it anew"),
        }
    }
}

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off (S5).
    GuestShutdown,
    /// Somebody asked for it.
    StopRequest,
    /// The machine could not go on.
    VmmError(String),
}

/// What anybody may read at any time.
pub struct Status {
    state: AtomicU8,
    resets: AtomicU64,
    /// Set once there are vCPUs.
    exits: OnceLock<Arc<[AtomicU64]>>,
    stop_wanted: AtomicBool,
    /// When vCPUs stand still, by `CLOCK_BOOTTIME`; or [`NEVER`].
    run_until_ns: AtomicU64,
}

impl Status {
    /// The state as of the last change.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::SeqCst) {
            1 => State::Created,
            2 => State::Running,
            3 => State::Paused,
            _ => State::Stopped,
        }
    }

    /// Resets since the start of the process.
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::SeqCst)
    }

    /// Whether it is under a lease that is over.
    pub fn lease_ended(&self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }

    /// Until the lease's end, if it is under one.
    fn left(&self) -> Option<Duration> {
        let until_ns = self.run_until_ns.load(Ordering::SeqCst);
        (until_ns != NEVER).then(|| boottime::left_until(until_ns))
    }

    /// Exits handled in user space, all vCPUs together.
    pub fn exits(&self) -> u64 {
        self.exits
            .get()
            .into_iter()
            .flat_map(|exits| exits.iter())
            .map(|exits| exits.load(Ordering::Relaxed))
            .sum()
    }
}

/// Sends requests to the supervisor.
#[derive(Clone)]
pub struct Handle {
    inbox: SyncSender<Message>,
    status: Arc<Status>,
}

impl Handle {
    /// Has `request` carried out; ready when it has been.
    ///
    /// # Errors
    /// It was refused or failed.
    pub async fn request(&self, request: Request) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Request(request, reply))?;
        answer.await.unwrap_or(Err(Refusal::Gone))
    }

    /// Lets the machine run until then, by `CLOCK_BOOTTIME`; ready when it does.
    ///
    /// # Errors
    /// It is under no lease, or could not go on.
    pub async fn allow_run(&self, until_ns: u64) -> Result<(), Refusal> {
        let until = &self.status.run_until_ns;
        if until.load(Ordering::SeqCst) == NEVER {
            return Err(Refusal::NotLeased);
        }
        until.fetch_max(until_ns.min(NEVER - 1), Ordering::SeqCst);
        self.request(Request::HeedLease).await
    }

    /// Has the machine stopped, without waiting for it.
    pub fn stop(&self) {
        let (reply, _) = oneshot::channel();
        if let Err(refusal) = self.send(Message::Request(Request::Stop, reply)) {
            warn!("cannot ask the machine to stop: {refusal}");
        }
    }

    /// Whether somebody asked for the machine to stop: what assembles it looks here.
    pub fn stop_wanted(&self) -> bool {
        self.status.stop_wanted.load(Ordering::SeqCst)
    }

    /// What anybody may read.
    pub fn status(&self) -> &Status {
        &self.status
    }

    fn send(&self, message: Message) -> Result<(), Refusal> {
        if matches!(message, Message::Request(Request::Stop, _)) {
            self.status.stop_wanted.store(true, Ordering::SeqCst);
        }
        self.inbox.try_send(message).map_err(|err| match err {
            TrySendError::Full(_) => Refusal::Busy,
            TrySendError::Disconnected(_) => Refusal::Gone,
        })
    }
}

enum Message {
    Request(Request, oneshot::Sender<Result<(), Refusal>>),
    Report(Report),
}

/// Both ends of the supervisor's inbox, made before the machine because its vCPUs report there.
/// Requests that come before the machine is complete wait in it.
pub struct Inbox {
    sender: SyncSender<Message>,
    receiver: Receiver<Message>,
    status: Arc<Status>,
}

impl Inbox {
    /// An empty inbox, of a machine that runs until then if it is under a lease.
    pub fn new(run_until_ns: Option<u64>) -> Self {
        let (sender, receiver) = sync_channel(INBOX_CAPACITY);
        let status = Arc::new(Status {
            state: AtomicU8::new(State::Created as u8),
            resets: AtomicU64::new(0),
            exits: OnceLock::new(),
            stop_wanted: AtomicBool::new(false),
            run_until_ns: AtomicU64::new(run_until_ns.map_or(NEVER, |until| until.min(NEVER - 1))),
        });
        Self {
            sender,
            receiver,
            status,
        }
    }

    /// To send requests here.
    pub fn handle(&self) -> Handle {
        Handle {
            inbox: self.sender.clone(),
            status: self.status.clone(),
        }
    }

    /// There will be no machine, because it was stopped before it was complete.
    pub fn stopped(self) {
        self.status
            .state
            .store(State::Stopped as u8, Ordering::SeqCst);
        for message in self.receiver.try_iter() {
            if let Message::Request(Request::Stop, reply) = message {
                // Whoever asked may have gone.
                let _ = reply.send(Ok(()));
            }
        }
    }

    /// What vCPU threads call with their reports. It waits while the inbox is full, which the
    /// supervisor empties; a vCPU that reports is out of the guest and has nothing else to do.
    pub fn reporter(&self) -> Box<dyn Fn(Report) + Send + Sync> {
        let sender = self.sender.clone();
        // Without a supervisor the process is about to exit.
        Box::new(move |report| drop(sender.send(Message::Report(report))))
    }
}

/// Owns the machine and its state.
pub struct Supervisor {
    machine: Machine,
    state: State,
    status: Arc<Status>,
    receiver: Receiver<Message>,
    /// It is paused because its lease is over, and goes on with the next one.
    awaits_lease: bool,
    /// The console's length when the guest was last reset.
    console_at_reset: u64,
    /// A guest can reset itself any number of times.
    complaints: LogLimit,
}

impl Supervisor {
    /// Takes over `machine`, whose vCPUs report to `inbox`.
    pub fn new(machine: Machine, inbox: Inbox) -> Self {
        inbox.status.exits.get_or_init(|| machine.exits());
        Self {
            machine,
            state: State::Created,
            status: inbox.status,
            receiver: inbox.receiver,
            awaits_lease: false,
            console_at_reset: 0,
            complaints: LogLimit::new(),
        }
    }

    /// Drives the machine until it stops; boots it at once if `start`.
    pub fn run(mut self, start: bool) -> Outcome {
        let outcome = if start {
            self.perform(Action::Boot).err()
        } else {
            None
        };
        let outcome = match outcome {
            Some(outcome) => outcome,
            None => self.serve(),
        };
        self.enter(State::Stopped);
        self.machine.power_off();
        outcome
    }

    fn serve(&mut self) -> Outcome {
        loop {
            let patience = match self.status.left() {
                Some(left) if self.state == State::Running => left.min(boottime::LOOK_INTERVAL),
                _ => Duration::MAX,
            };
            let result = match self.receiver.recv_timeout(patience) {
                Ok(Message::Request(request, reply)) => {
                    self.heed_lease().and_then(|()| self.answer(request, reply))
                }
                // Of a guest that ran: it is not heard any more once the machine has paused.
                Ok(Message::Report(report)) => self.react(report).and_then(|()| self.heed_lease()),
                Err(RecvTimeoutError::Timeout) => self.heed_lease(),
                Err(RecvTimeoutError::Disconnected) => Err(Outcome::StopRequest),
            };
            if let Err(outcome) = result {
                return outcome;
            }
        }
    }

    /// Pauses at the lease's end, and goes on with the next one.
    fn heed_lease(&mut self) -> Result<(), Outcome> {
        match (self.state, self.status.lease_ended()) {
            (State::Running, true) => {
                warn!("the lease is over: the machine pauses until it is renewed");
                self.awaits_lease = true;
                self.perform(Action::Park)
            }
            (State::Paused, false) if self.awaits_lease => {
                info!("the lease was renewed: the machine goes on");
                self.perform(Action::Run)
            }
            _ => Ok(()),
        }
    }

    /// Carries out `request` and answers; the error is why the machine stops.
    fn answer(
        &mut self,
        request: Request,
        reply: oneshot::Sender<Result<(), Refusal>>,
    ) -> Result<(), Outcome> {
        if request == Request::Pause {
            self.awaits_lease = false;
        }
        let action = match self.state.on(request) {
            Ok(Action::Run) if self.status.lease_ended() => {
                let _ = reply.send(Err(Refusal::State {
                    state: self.state.name(),
                    remedy: "its lease is over, renew that first",
                }));
                return Ok(());
            }
            Ok(action) => action,
            Err(refusal) => {
                let _ = reply.send(Err(refusal));
                return Ok(());
            }
        };
        let result = self.perform(action);
        // Whoever asked may have gone.
        let _ = reply.send(match &result {
            Err(Outcome::VmmError(why)) => Err(Refusal::Failed(why.clone())),
            _ => Ok(()),
        });
        result
    }

    fn react(&mut self, report: Report) -> Result<(), Outcome> {
        if self.state != State::Running || !self.machine.is_current(&report) {
            return Ok(());
        }
        match report.what {
            Event::Reset => {
                if let Some(withheld) = self.complaints.admit() {
                    info!(withheld, "the guest resets");
                }
                self.perform(Action::Reboot)
            }
            Event::TripleFault => self.after_triple_fault(report.vcpu),
            Event::Shutdown => {
                info!("the guest switched itself off");
                self.enter(State::Stopped);
                Err(Outcome::GuestShutdown)
            }
            Event::Failed(why) => {
                self.enter(State::Stopped);
                Err(Outcome::VmmError(why))
            }
        }
    }

    /// A PC resets. A guest that has not printed anything since the last reset would do so for ever.
    fn after_triple_fault(&mut self, vcpu: u32) -> Result<(), Outcome> {
        if self.machine.console().end() == self.console_at_reset {
            self.enter(State::Stopped);
            let why = format!(
                "the guest crashed (triple fault on vCPU {vcpu}) before it wrote anything to its console: is the \
                 kernel for this machine, and is console=ttyS0 on its command line?"
            );
            return Err(Outcome::VmmError(why));
        }
        if let Some(withheld) = self.complaints.admit() {
            warn!(
                withheld,
                "the guest ran into a triple fault on vCPU {vcpu} and is reset"
            );
        }
        self.perform(Action::Reboot)
    }

    fn perform(&mut self, action: Action) -> Result<(), Outcome> {
        let result = match action {
            Action::Nothing => Ok(()),
            Action::Press => self.machine.press_power_button(),
            Action::Stop => return Err(Outcome::StopRequest),
            Action::Boot => self.machine.boot().and_then(|()| self.go()),
            Action::Park => self.machine.park().map(|()| self.enter(State::Paused)),
            Action::Run => self.go(),
            Action::Reboot => self.reboot(),
        };
        result.map_err(|err| Outcome::VmmError(chain(&err)))
    }

    fn reboot(&mut self) -> Result<(), MachineError> {
        self.machine.reset()?;
        self.status.resets.fetch_add(1, Ordering::SeqCst);
        self.console_at_reset = self.machine.console().end();
        self.machine.boot()?;
        match self.state {
            State::Running => self.go(),
            _ => Ok(()),
        }
    }

    /// Lets the guest run, or has it wait for the lease.
    fn go(&mut self) -> Result<(), MachineError> {
        self.awaits_lease = self.status.lease_ended();
        if self.awaits_lease {
            self.enter(State::Paused);
            return Ok(());
        }
        self.machine.run()?;
        self.enter(State::Running);
        Ok(())
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.status.state.store(state as u8, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transitions_are_those_of_the_table() {
        use Request::{Pause, PowerButton, Reset, Resume, Start, Stop};
        let requests = [Start, Pause, Resume, Reset, PowerButton, Stop];
        let row = |state: State| requests.map(|request| state.on(request).ok());
        let refused = None;
        assert_eq!(
            row(State::Created),
            [
                Some(Action::Boot),
                refused,
                refused,
                refused,
                refused,
                Some(Action::Stop)
            ]
        );
        let nothing = Some(Action::Nothing);
        assert_eq!(
            row(State::Running),
            [
                nothing,
                Some(Action::Park),
                nothing,
                Some(Action::Reboot),
                Some(Action::Press),
                Some(Action::Stop)
            ]
        );
        assert_eq!(
            row(State::Paused),
            [
                refused,
                nothing,
                Some(Action::Run),
                Some(Action::Reboot),
                refused,
                Some(Action::Stop)
            ]
        );
        assert_eq!(
            row(State::Stopped),
            [refused, refused, refused, refused, refused, nothing]
        );
    }

    #[test]
    fn refusal_names_the_state_and_the_remedy() {
        let refusal = State::Paused.on(Request::PowerButton).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "the machine is paused: resume it first"
        );
    }
}
