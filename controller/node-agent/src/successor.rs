//! Another binary of the agent in the place of the one that runs. VMs and daemons do not notice: they
//! outlive agents anyway, and the next one adopts them.
//!
//! ```text
//! old agent ── checks the binary, ends like at SIGTERM, executes itself as guard: same process, same pid
//! guard ─────── starts the new agent beside itself, with the old one's arguments, on trial
//!   confirmed by the controller: trial ends, guard executes the new binary      same pid, DONE
//!   it ends, or is not confirmed in time: killed, guard executes the old one    same pid, ROLLED_BACK
//! ```
//!
//! The process that a supervisor knows never ends, whatever the new binary does, and the old program is
//! always there to go back to: a process keeps the file that it executes, even if it was replaced on disk.
//! That is why the trial is a child and not an exec at once: nobody could make a hanging process the old
//! one again. It costs one more restart, of a binary that has just been seen to work.
//!
//! [`check`] looks at binaries; [`probe`] is what a new one answers about itself; [`guard`] is the process
//! in between; [`record`] is what each of them leaves for the next.

pub(crate) mod check;
pub(crate) mod guard;
pub(crate) mod probe;
pub(crate) mod record;

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::node::{AgentUpgrade, AgentUpgradeState, UpgradeAgentRequest};
use tokio::sync::watch;
use tonic::Code;

use crate::record::RecordError;
use check::{Candidate, CheckError};
use record::{Exchange, Phase};

/// First word of the command line of the process in between.
pub(crate) const GUARD: &str = "guard";
/// First word with which a binary is asked what it is.
pub(crate) const PROBE: &str = "probe";
/// What a controller has time for, with a session that is made anew and VMs that are adopted.
pub(crate) const DEFAULT_CONFIRM_WITHIN: Duration = Duration::from_secs(60);

/// What this process is in an exchange, and how the last one went.
pub(crate) struct Successor {
    state_dir: PathBuf,
    /// What a new one finds its programs by.
    bin_dir: PathBuf,
    inner: Mutex<Inner>,
    /// True once this process is to make room.
    leaving: watch::Sender<bool>,
}

struct Inner {
    last: Option<Exchange>,
    /// To the guard, while this process is on trial.
    trial: Option<File>,
}

/// Why an agent is not exchanged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    /// The binary.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// Something would have to begin anew.
    #[error("this host is busy: {what}; try again when that is over")]
    Busy {
        /// What it does.
        what: String,
    },
    /// There is one.
    #[error("the agent is being exchanged already, as {upgrade_id}")]
    UnderWay {
        /// Its id.
        upgrade_id: String,
    },
    /// Nobody waits to be confirmed.
    #[error("this agent is not on trial as {upgrade_id}; look how far the exchange is")]
    NotOnTrial {
        /// As given.
        upgrade_id: String,
    },
    /// The guard is gone.
    #[error("telling the guard that the agent may stay")]
    Guard(#[source] io::Error),
    /// What is to be left for the next process.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl ExchangeError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Check(error) => error.code(),
            Self::Busy { .. } | Self::UnderWay { .. } => Code::Unavailable,
            Self::NotOnTrial { .. } => Code::FailedPrecondition,
            Self::Guard(_) | Self::Record(_) => Code::Internal,
        }
    }
}

impl Successor {
    /// Of an agent that begins; `trial` is the pipe to its guard, if it has one. A record that cannot be
    /// read or written keeps no host from having an agent.
    pub(crate) fn open(state_dir: &Path, bin_dir: &Path, trial: Option<RawFd>) -> Arc<Self> {
        let mut last = Exchange::load(state_dir).unwrap_or_else(|error| {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                error,
                "how the last exchange of the agent went is not known"
            );
            None
        });
        if let (None, Some(exchange)) = (trial, &mut last)
            && exchange.phase == Phase::Exchanging
        {
            exchange.phase = Phase::RolledBack;
            exchange.error = "the exchange was interrupted: its guard ended".to_owned();
            if let Err(error) = exchange.save(state_dir) {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "how the exchange of the agent went is not kept");
            }
        }
        Arc::new(Self {
            state_dir: state_dir.to_owned(),
            bin_dir: bin_dir.to_owned(),
            inner: Mutex::new(Inner {
                last,
                trial: trial.map(own_pipe),
            }),
            leaving: watch::Sender::new(false),
        })
    }

    /// Completes when this process is to make room.
    pub(crate) async fn leaving(&self) {
        let mut leaving = self.leaving.subscribe();
        // The sender is this one's own.
        let _ = leaving.wait_for(|leaving| *leaving).await;
    }

    /// Whether this process is to make room.
    pub(crate) fn is_leaving(&self) -> bool {
        *self.leaving.borrow()
    }

    /// How the last exchange went.
    pub(crate) fn status(&self) -> AgentUpgrade {
        let inner = self.lock();
        let mut status = inner
            .last
            .as_ref()
            .map(Exchange::status)
            .unwrap_or_default();
        if inner.trial.is_some() {
            status.set_state(AgentUpgradeState::Trial);
        }
        described(status)
    }

    /// Checks what was asked for, and begins it unless `busy` says then what would have to begin anew.
    ///
    /// # Errors
    /// When it cannot be, with nothing changed.
    pub(crate) async fn upgrade(
        &self,
        request: &UpgradeAgentRequest,
        busy: impl Future<Output = Option<String>>,
    ) -> Result<AgentUpgrade, ExchangeError> {
        if let Some(known) = self.known(request)? {
            return Ok(known);
        }
        let candidate = check::all(request, &self.state_dir).await?;
        let mut answer = AgentUpgrade {
            upgrade_id: request.upgrade_id.clone(),
            binary: request.binary.clone(),
            from_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        answer.set_state(AgentUpgradeState::Checked);
        let Some(candidate) = candidate else {
            return Ok(described(answer));
        };
        answer.to_version.clone_from(&candidate.version);
        answer.protocol = candidate.protocol;
        if request.validate_only {
            return Ok(described(answer));
        }
        if let Some(what) = busy.await {
            return Err(ExchangeError::Busy { what });
        }
        let exchange = self.exchange(request, &candidate);
        let mut inner = self.lock();
        if let Some(known) = under_way(&inner, request)? {
            return Ok(known);
        }
        exchange.save(&self.state_dir)?;
        let status = exchange.status();
        let is_done = exchange.phase == Phase::Done;
        inner.last = Some(exchange);
        if !is_done {
            self.leaving.send_replace(true);
        }
        Ok(described(status))
    }

    /// This process may stay.
    ///
    /// # Errors
    /// When it is not on trial, or nobody waits for that.
    pub(crate) fn confirm(&self, upgrade_id: &str) -> Result<AgentUpgrade, ExchangeError> {
        {
            let mut inner = self.lock();
            let is_it = inner
                .last
                .as_ref()
                .is_some_and(|last| last.upgrade_id == upgrade_id);
            let Some(guard) = inner.trial.as_mut().filter(|_| is_it) else {
                return Err(ExchangeError::NotOnTrial {
                    upgrade_id: upgrade_id.to_owned(),
                });
            };
            guard
                .write_all(&[guard::CONFIRMED])
                .map_err(ExchangeError::Guard)?;
        }
        Ok(self.status())
    }

    fn known(&self, request: &UpgradeAgentRequest) -> Result<Option<AgentUpgrade>, ExchangeError> {
        match request.validate_only {
            true => Ok(None),
            false => under_way(&self.lock(), request),
        }
    }

    /// One that is what already runs is done.
    fn exchange(&self, request: &UpgradeAgentRequest, candidate: &Candidate) -> Exchange {
        let confirm_within = match request.confirm_within_ms {
            0 => DEFAULT_CONFIRM_WITHIN,
            ms => Duration::from_millis(ms.into()),
        };
        Exchange {
            version: record::VERSION,
            upgrade_id: request.upgrade_id.clone(),
            binary: candidate.path.clone(),
            stamp: candidate.stamp,
            bin_dir: self.bin_dir.clone(),
            from_version: env!("CARGO_PKG_VERSION").to_owned(),
            to_version: candidate.version.clone(),
            protocol: candidate.protocol,
            confirm_within_ms: u64::try_from(confirm_within.as_millis()).unwrap_or(u64::MAX),
            phase: match executes(&candidate.path) {
                true => Phase::Done,
                false => Phase::Exchanging,
            },
            error: String::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The exchange of this id, however far it is. Another one waits until the present one is over.
fn under_way(
    inner: &Inner,
    request: &UpgradeAgentRequest,
) -> Result<Option<AgentUpgrade>, ExchangeError> {
    let Some(last) = &inner.last else {
        return Ok(None);
    };
    if last.upgrade_id == request.upgrade_id {
        return Ok(Some(described(last.status())));
    }
    match last.phase == Phase::Exchanging || inner.trial.is_some() {
        true => Err(ExchangeError::UnderWay {
            upgrade_id: last.upgrade_id.clone(),
        }),
        false => Ok(None),
    }
}

fn described(mut status: AgentUpgrade) -> AgentUpgrade {
    status.pid = std::process::id();
    let program = std::env::current_exe();
    status.program = program.map_or_else(|_| String::new(), |path| path.display().to_string());
    status
}

/// Executes this program again as the guard of what is to follow; returns only if that fails.
pub(crate) fn make_room(state_dir: &Path) -> io::Error {
    let args = std::env::args_os().skip(1);
    let head = [OsString::from(GUARD), state_dir.as_os_str().to_owned()];
    Command::new(own_program())
        .args(head.into_iter().chain(args))
        .exec()
}

/// What this process executes, by a name that leads to it whatever became of its file since.
fn own_program() -> PathBuf {
    let kept = PathBuf::from("/proc/self/exe");
    match std::env::current_exe() {
        Ok(path) if executes(&path) => path,
        _ => kept,
    }
}

/// Whether this process executes that very file.
fn executes(path: &Path) -> bool {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let own = identity(Path::new("/proc/self/exe"));
    own.is_some() && own == identity(path)
}

/// The pipe that the guard left open. Processes that are started from here do not get it.
fn own_pipe(fd: RawFd) -> File {
    // SAFETY: F_SETFD changes a flag of a descriptor and touches no memory.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: the guard opened it for this process and named it on its command line, which is read once.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}

#[cfg(test)]
mod tests;
