//! Fault injection on this host: experiments, their faults, and what each did to which target.
//!
//! ```text
//!  service::faults ──► Faults ──┬─ rules ...... passed on to daemons and vmm-core, again to each new process
//!                        ▲      ├─ process .... signals and limits, undone at the end
//!   tick (a task) ───────┘      ├─ knobs ...... what other parts of the agent look at: slow starts, ...
//!                               └─ switch ..... off ends all, and stays off in the next agent
//! ```
//!
//! Nothing here is possible unless the agent was started with `--allow-faults`. What was changed is
//! written down before, so that the next agent undoes it if this one dies.

mod experiment;
mod knobs;
mod partition;
mod process;
mod rules;
mod targets;
mod undo;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use api::node::{Fault, FaultEvent, FaultStatus, FaultSwitch};
use tokio::sync::{Mutex, watch};

use self::{experiment::State, undo::Journal};
pub(crate) use self::{
    knobs::{Knobs, StartFault},
    partition::{Either, Partitioned},
};
use crate::agent::Agent;

/// Experiments whose outcome is remembered.
const MAX_EXPERIMENTS: usize = 64;
/// Faults of an experiment that are remembered.
const MAX_FAULTS: usize = 64;
/// How often hits are collected and new processes are looked for while something is armed.
const TICK_INTERVAL: Duration = Duration::from_millis(50);

/// What the command line allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// Faults.
    pub(crate) faults: bool,
    /// Also that the host's clock is set.
    pub(crate) clock: bool,
}

/// Why a fault was not armed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FaultError {
    /// By the command line.
    #[error("this agent does nothing wrong on purpose; start it with --allow-faults")]
    NotAllowed,
    /// By the switch.
    #[error("faults are switched off on this host; switch them on first")]
    Off,
    /// There are [`MAX_FAULTS`].
    #[error(
        "the experiment has {MAX_FAULTS} faults already; disarm some by their names to have them forgotten"
    )]
    TooMany,
    /// There are [`MAX_EXPERIMENTS`], all with armed faults.
    #[error("{MAX_EXPERIMENTS} experiments have armed faults already; disarm some")]
    TooManyExperiments,
}

/// The faults of this host. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Faults {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    allowed: Allowed,
    knobs: Knobs,
    /// Exists while the switch is off.
    off_file: PathBuf,
    state: Mutex<State>,
    /// Number of the last event.
    news: watch::Sender<u64>,
}

impl Faults {
    /// Undoes what an earlier agent left.
    pub(crate) fn open(state_dir: &Path, allowed: Allowed, knobs: Knobs) -> Self {
        let mut journal = Journal::at(state_dir.join("faults.json"));
        journal.undo_all();
        Self {
            inner: Arc::new(Inner {
                allowed,
                knobs,
                off_file: state_dir.join("faults.off"),
                state: Mutex::new(State::new(journal)),
                news: watch::channel(0).0,
            }),
        }
    }

    /// Whether anything may be armed, ever.
    pub(crate) fn is_allowed(&self) -> bool {
        self.inner.allowed.faults
    }

    /// See the API.
    ///
    /// # Errors
    /// Nothing was armed.
    pub(crate) async fn arm(
        &self,
        agent: &Agent,
        experiment: &str,
        faults: Vec<Fault>,
        ttl: Duration,
        seed: u64,
    ) -> Result<Vec<FaultStatus>, FaultError> {
        if !self.is_allowed() {
            return Err(FaultError::NotAllowed);
        }
        if !self.switch().on {
            return Err(FaultError::Off);
        }
        let mut state = self.inner.state.lock().await;
        state.admit(experiment, &faults)?;
        let allowed = self.inner.allowed;
        state
            .arm(
                agent,
                &self.inner.knobs,
                allowed,
                experiment,
                faults,
                ttl,
                seed,
            )
            .await;
        state.tick(agent, &self.inner.knobs).await;
        self.publish(&state);
        Ok(state.statuses(Some(experiment)))
    }

    /// Ends faults; those that are named are forgotten.
    pub(crate) async fn disarm(
        &self,
        agent: &Agent,
        experiment: Option<&str>,
        ids: &[String],
    ) -> Vec<FaultStatus> {
        let mut state = self.inner.state.lock().await;
        let ended = state
            .disarm(agent, &self.inner.knobs, experiment, ids)
            .await;
        self.publish(&state);
        ended
    }

    /// As of the last tick.
    pub(crate) async fn list(&self, experiment: Option<&str>) -> Vec<FaultStatus> {
        self.inner.state.lock().await.statuses(experiment)
    }

    /// What happened after event `after`, as far as it is remembered.
    pub(crate) async fn events_after(&self, after: u64) -> Vec<FaultEvent> {
        self.inner.state.lock().await.events_after(after)
    }

    /// Changes with each event.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.inner.news.subscribe()
    }

    /// Whether faults may be armed.
    pub(crate) fn switch(&self) -> FaultSwitch {
        let allowed = self.is_allowed();
        FaultSwitch {
            on: allowed && !self.inner.off_file.exists(),
            allowed,
        }
    }

    /// Off ends all faults, and holds for the next agent, too.
    ///
    /// # Errors
    /// [`FaultError::NotAllowed`] for on; a file that cannot be written still ends all faults.
    pub(crate) async fn set_switch(
        &self,
        agent: &Agent,
        on: bool,
    ) -> Result<FaultSwitch, FaultError> {
        if on && !self.is_allowed() {
            return Err(FaultError::NotAllowed);
        }
        let changed = match on {
            true => std::fs::remove_file(&self.inner.off_file),
            false => std::fs::write(&self.inner.off_file, "off\n"),
        };
        if let Err(error) = changed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(file = %self.inner.off_file.display(), "keeping the faults' switch: {error}");
        }
        if !on {
            self.disarm(agent, None, &[]).await;
        }
        Ok(self.switch())
    }

    fn publish(&self, state: &State) {
        self.inner.news.send_if_modified(|last| {
            let number = state.last_event();
            std::mem::replace(last, number) != number
        });
    }
}

/// Collects hits, follows processes that are replaced, ends what has expired. For ever.
pub(crate) async fn run(agent: Arc<Agent>) {
    let faults = agent.env.faults.clone();
    if !faults.is_allowed() {
        return;
    }
    let mut changes = agent.env.changes.subscribe();
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK_INTERVAL) => {}
            // A process that is new may be one that is to have rules.
            _ = changes.recv() => {}
        }
        let mut state = faults.inner.state.lock().await;
        if state.is_any_armed() {
            state.tick(&agent, &faults.inner.knobs).await;
            faults.publish(&state);
        }
    }
}
