//! The process between two agents: it has the old one's pid and program, and the new one as a child.
//!
//! ```text
//! node-agent guard STATE_DIR ARGUMENTS...
//!
//! Trial ── one byte in the pipe ─▶ end the child ─▶ execute the new program
//!   │  └── child ended, or time is over ─▶ kill the child ─▶ execute the old program
//!   └───── SIGTERM, SIGINT ─▶ end the child ─▶ end
//! ```
//!
//! One thread, no runtime: what goes wrong in the new program cannot go wrong here. The child ends with
//! this process, however that ends, so that a supervisor that starts an agent again finds no other one.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, pipe2},
};

use super::{
    check::Stamp,
    own_program,
    record::{Exchange, Phase},
};

/// What an agent on trial writes when it may stay.
pub(super) const CONFIRMED: u8 = b'1';
/// For an agent to end: it gives calls 2 s, and what blocks its threads 2 s.
const END_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks when nothing wakes this up.
const LOOK_INTERVAL_MS: u16 = 100;

/// How a trial ended.
enum Verdict {
    /// The controller found the new agent well.
    Confirmed,
    /// It is to be rolled back.
    Failed(String),
    /// Somebody wants the agent to end.
    Terminated,
}

/// Does all of it; returns only when the agent is to end, or no program can be executed.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let mut args = args;
    let Some(state_dir) = args.next().map(PathBuf::from) else {
        eprintln!("node-agent: guard: no state directory is named");
        return ExitCode::FAILURE;
    };
    let args: Vec<OsString> = args.collect();
    match exchange(&state_dir, &args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node-agent: guard: {error:#}; the agent of before goes on");
            let error = execute(&own_program(), &args);
            eprintln!("node-agent: guard: error: executing the agent of before: {error}");
            ExitCode::FAILURE
        }
    }
}

fn exchange(state_dir: &Path, args: &[OsString]) -> anyhow::Result<()> {
    let loaded = Exchange::load(state_dir)?;
    let mut exchange = loaded.context("there is no exchange to guard")?;
    let verdict = match Trial::begin(&exchange, args) {
        Ok(mut trial) => {
            let verdict = trial.watch(Duration::from_millis(exchange.confirm_within_ms));
            match verdict {
                Verdict::Failed(_) => trial.kill(),
                Verdict::Confirmed | Verdict::Terminated => trial.end(),
            }
            match verdict {
                // Whoever wants the agent to end does not ask which one it is just then.
                Verdict::Failed(why) if trial.is_terminated() => {
                    eprintln!("node-agent: guard: the new agent is rolled back: {why}");
                    Verdict::Terminated
                }
                Verdict::Confirmed if trial.is_terminated() => Verdict::Terminated,
                verdict => verdict,
            }
        }
        Err(error) => Verdict::Failed(format!("it could not be started: {error}")),
    };
    // It is not this file any more that was checked and seen to work.
    let is_same = Stamp::of(&exchange.binary).is_ok_and(|stamp| stamp == exchange.stamp);
    let verdict = match verdict {
        Verdict::Confirmed if !is_same => {
            Verdict::Failed("its file was changed during its trial".to_owned())
        }
        verdict => verdict,
    };
    match verdict {
        Verdict::Terminated => exchange.roll_back(
            state_dir,
            "the agent was told to end during the exchange".into(),
        ),
        Verdict::Failed(why) => {
            eprintln!("node-agent: guard: the new agent is rolled back: {why}");
            exchange.roll_back(state_dir, why)?;
            Err(execute(&own_program(), args)).context("executing the agent of before")
        }
        Verdict::Confirmed => {
            exchange.phase = Phase::Done;
            exchange.save(state_dir)?;
            let args = with_bin_dir(args, &exchange.bin_dir);
            let error = execute(&exchange.binary, &args);
            let why = format!("{} cannot be executed: {error}", exchange.binary.display());
            exchange.roll_back(state_dir, why.clone())?;
            Err(anyhow::anyhow!(why))
        }
    }
}

impl Exchange {
    fn roll_back(&mut self, state_dir: &Path, why: String) -> anyhow::Result<()> {
        self.phase = Phase::RolledBack;
        self.error = why;
        Ok(self.save(state_dir)?)
    }
}

/// The new agent while it may have to go.
struct Trial {
    child: Pid,
    /// How it ended, once it did.
    ended: Option<String>,
    begun: Instant,
    signals: SignalFd,
    /// Somebody wants the agent to end.
    terminated: bool,
    /// While its other end may be open.
    pipe: Option<File>,
}

impl Trial {
    fn begin(exchange: &Exchange, args: &[OsString]) -> io::Result<Self> {
        let mut watched = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
            watched.add(signal);
        }
        watched.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&watched, flags)?;
        let (pipe, confirms) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let child = start(exchange, args, &confirms)?;
        Ok(Self {
            child,
            ended: None,
            begun: Instant::now(),
            signals,
            terminated: false,
            pipe: Some(pipe.into()),
        })
    }

    fn watch(&mut self, within: Duration) -> Verdict {
        loop {
            self.reap();
            // A confirmation counts however the one who wrote it goes on: it was well.
            if self.is_confirmed() {
                return Verdict::Confirmed;
            }
            let after = self.begun.elapsed();
            if let Some(ended) = &self.ended {
                return Verdict::Failed(format!(
                    "it {ended} {:.1} s after its start; see the agent's log",
                    after.as_secs_f64()
                ));
            }
            if after >= within {
                return Verdict::Failed(format!(
                    "it was not found well within {:.0} s; see the agent's log",
                    within.as_secs_f64()
                ));
            }
            if self.is_terminated() {
                return Verdict::Terminated;
            }
            self.wait();
        }
    }

    fn is_confirmed(&mut self) -> bool {
        let mut byte = [0];
        let read = self.pipe.as_mut().map(|pipe| pipe.read(&mut byte));
        match read {
            Some(Ok(0)) => {
                self.pipe = None;
                false
            }
            Some(Ok(_)) => {
                self.pipe = None;
                byte[0] == CONFIRMED
            }
            // Nothing yet.
            Some(Err(_)) | None => false,
        }
    }

    /// As at a controller's or supervisor's wish: calls in progress are answered.
    fn end(&mut self) {
        let _ = kill(self.child, Signal::SIGTERM);
        let begun = Instant::now();
        while self.ended.is_none() && begun.elapsed() < END_WITHIN {
            self.is_terminated();
            self.wait();
            self.reap();
        }
        self.kill();
    }

    fn kill(&mut self) {
        while self.ended.is_none() {
            let _ = kill(self.child, Signal::SIGKILL);
            self.is_terminated();
            self.wait();
            self.reap();
        }
    }

    /// Also daemons of VMs: they are children of this pid.
    fn reap(&mut self) {
        let any = Pid::from_raw(-1);
        while let Ok(status) = waitpid(any, Some(WaitPidFlag::WNOHANG)) {
            let (pid, ended) = match status {
                WaitStatus::Exited(pid, code) => (pid, format!("ended with status {code}")),
                WaitStatus::Signaled(pid, signal, _) => (pid, format!("was killed by {signal}")),
                WaitStatus::StillAlive => return,
                _ => continue,
            };
            if pid == self.child {
                self.ended = Some(ended);
            }
        }
    }

    /// Takes what arrived, and tells whether the agent is to end, now or when somebody said so earlier.
    fn is_terminated(&mut self) -> bool {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            self.terminated |= signal.ssi_signo != Signal::SIGCHLD as u32;
        }
        self.terminated
    }

    /// Until something happens, or a moment has passed.
    fn wait(&self) {
        let signals = PollFd::new(self.signals.as_fd(), PollFlags::POLLIN);
        let timeout = PollTimeout::from(LOOK_INTERVAL_MS);
        let _ = match &self.pipe {
            Some(pipe) => poll(
                &mut [signals, PollFd::new(pipe.as_fd(), PollFlags::POLLIN)],
                timeout,
            ),
            None => poll(&mut [signals], timeout),
        };
    }
}

fn start(exchange: &Exchange, args: &[OsString], confirms: &OwnedFd) -> io::Result<Pid> {
    let fd = confirms.as_raw_fd();
    let mut command = Command::new(&exchange.binary);
    command
        .args(with_bin_dir(args, &exchange.bin_dir))
        .arg("--trial-fd")
        .arg(fd.to_string());
    // SAFETY: between fork and exec only prctl, fcntl and sigprocmask are called, which are
    // async-signal-safe and touch no memory but their arguments.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                || libc::fcntl(fd, libc::F_SETFD, 0) != 0
            {
                return Err(io::Error::last_os_error());
            }
            SigSet::empty().thread_set_mask().map_err(io::Error::from)
        });
    }
    let child = command.spawn()?;
    // It is reaped with all others.
    Ok(Pid::from_raw(child.id() as i32))
}

/// The other programs stay where they are, wherever the new agent is.
fn with_bin_dir(args: &[OsString], bin_dir: &Path) -> Vec<OsString> {
    let mut args = args.to_vec();
    let is_given = args.iter().any(|arg| {
        let text = arg.to_string_lossy();
        text == "--bin-dir" || text.starts_with("--bin-dir=")
    });
    if !is_given {
        args.extend(["--bin-dir".into(), bin_dir.as_os_str().to_owned()]);
    }
    args
}

/// Returns only if that fails.
fn execute(program: &Path, args: &[OsString]) -> io::Error {
    // What this process held back is the next program's to handle.
    let _ = SigSet::empty().thread_set_mask();
    Command::new(program).args(args).exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_stay_where_they_are() {
        let given: Vec<OsString> = ["--listen", "unix:a", "--bin-dir=/b"]
            .map(Into::into)
            .into();
        assert_eq!(with_bin_dir(&given, Path::new("/c")), given);
        let args: Vec<OsString> = ["--listen", "unix:a"].map(Into::into).into();
        let wanted: Vec<OsString> = ["--listen", "unix:a", "--bin-dir", "/c"]
            .map(Into::into)
            .into();
        assert_eq!(with_bin_dir(&args, Path::new("/c")), wanted);
    }
}
