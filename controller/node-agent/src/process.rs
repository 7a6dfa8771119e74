//! Processes that outlive the agent: spawned detached into a session of their own, watched by
//! pidfd, found again by pid and start time.
//!
//! [`Process`] is a watched process, whoever its parent is. One reaper task per process waits
//! on the pidfd and, when the process is our child, reaps it. [`Guard`] kills a process that
//! nobody took over.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStringExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        signal::Signal,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

/// A log is cut once it is this long; see [`bound_log`].
pub(crate) const MAX_LOG_BYTES: u64 = 8 << 20;
/// What is kept of a log that is cut.
const KEPT_LOG_BYTES: u64 = 1 << 20;

/// Names one process of this boot beyond doubt: pids are reused, pairs of pid and start time
/// are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Process id.
    pub(crate) pid: i32,
    /// proc(5), /proc/PID/stat field 22: clock ticks after boot.
    pub(crate) start_ticks: u64,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Exit status.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Not our child, so nobody told us.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "was killed by {signal}"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
            Self::Unknown => write!(f, "ended"),
        }
    }
}

/// Why a process could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// The program could not be executed.
    #[error("starting {program}", program = .program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its log could not be opened.
    #[error("opening the log {path}", path = .path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It runs, but cannot be watched.
    #[error("watching process {pid}")]
    Watch {
        /// The process.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A process and the means to signal it and to await its end. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Starts `program` in a session of its own and in the root directory, with stdin closed and stdout and stderr appended
    /// to `log`. It keeps running when the agent dies.
    ///
    /// # Errors
    /// When the program or the log cannot be opened, or the process not watched.
    pub(crate) fn spawn(
        program: &Path,
        args: &[OsString],
        log: &Path,
    ) -> Result<Guard, ProcessError> {
        let output = open_log(log)?;
        let errors = output.try_clone().map_err(|source| ProcessError::Log {
            path: log.to_owned(),
            source,
        })?;
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        // SAFETY: between fork and exec only setsid is called, which is async-signal-safe and
        // touches no memory.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
        }
        let child = command.spawn().map_err(|source| ProcessError::Spawn {
            program: program.to_owned(),
            source,
        })?;
        let pid = child.id() as i32;
        // The pid cannot have been reused: only our reaper below, which is not there yet, reaps it.
        let start_ticks = start_ticks(pid).unwrap_or(0);
        let process = Self::watch(Identity { pid, start_ticks })
            .map_err(|source| ProcessError::Watch { pid, source })?;
        Ok(Guard {
            process: Some(process),
        })
    }

    /// Watches a process that an earlier agent started; `None` when it is gone.
    pub(crate) fn adopt(identity: Identity) -> Option<Self> {
        let process = Self::watch(identity).ok()?;
        // Checked after the pidfd was opened, so that it is this very process that is held.
        (start_ticks(identity.pid) == Some(identity.start_ticks)).then_some(process)
    }

    /// Pid and start time.
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Process id.
    pub(crate) fn pid(&self) -> i32 {
        self.identity.pid
    }

    /// How it ended, if it did.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            if exit.changed().await.is_err() {
                // The reaper is gone only when the runtime is.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits for its end, at most for `deadline`.
    pub(crate) async fn exited_within(&self, deadline: Duration) -> Option<Exit> {
        tokio::time::timeout(deadline, self.exited()).await.ok()
    }

    /// Sends a signal. A process that already ended is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        // SAFETY: pidfd_send_signal reads its arguments only; a null siginfo is allowed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    /// SIGKILL; returns when the process is gone.
    pub(crate) async fn kill(&self) {
        /// A killed process ends once the kernel call it is in does; a hung disk may keep it.
        const KILLED_WITHIN: Duration = Duration::from_secs(20);
        self.signal(Signal::SIGKILL);
        if self.exited_within(KILLED_WITHIN).await.is_none() {
            tracing::warn!(
                pid = self.pid(),
                "still there {KILLED_WITHIN:?} after SIGKILL"
            );
        }
    }

    fn watch(identity: Identity) -> io::Result<Self> {
        let pidfd = Arc::new(pidfd_open(identity.pid)?);
        let (ended, exit) = watch::channel(None);
        // SAFETY: the descriptor is owned, never replaced, and closed after the AsyncFd: that holds
        // a reference to its owner.
        let watched =
            unsafe { AsyncFd::register_with_interest(Borrowed(pidfd.clone()), Interest::READABLE) }
                .map_err(io::Error::from)?;
        tokio::spawn(async move {
            let readable = watched.readable().await.is_ok();
            if readable {
                ended.send_replace(Some(reap(watched.get_ref().as_fd())));
            }
        });
        Ok(Self {
            identity,
            pidfd,
            exit,
        })
    }
}

/// A fresh process that is killed unless somebody takes it over with [`Guard::keep`].
#[derive(Debug)]
pub(crate) struct Guard {
    process: Option<Process>,
}

impl Guard {
    /// The process, which is the caller's from now on.
    pub(crate) fn keep(mut self) -> Process {
        self.process.take().expect("taken once, by value")
    }
}

impl std::ops::Deref for Guard {
    type Target = Process;
    fn deref(&self) -> &Process {
        self.process.as_ref().expect("there until it is kept")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.signal(Signal::SIGKILL);
        }
    }
}

/// Lets one descriptor be both polled by the runtime and used for signals.
#[derive(Debug)]
struct Borrowed(Arc<OwnedFd>);

impl AsFd for Borrowed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Borrowed {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open reads its arguments only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us alone, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn reap(pidfd: BorrowedFd<'_>) -> Exit {
    loop {
        match waitid(
            Id::PIDFd(pidfd),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::Exited(_, code)) => return Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Exit::Signal(signal as i32),
            Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => return Exit::Unknown,
        }
    }
}

/// Start time of a live process; `None` when there is none or only its zombie.
pub(crate) fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_start_ticks(&stat)
}

/// proc(5): the command's name, field 2, is in parentheses and may contain anything.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat
        .get(stat.rfind(')')? + 1..)?
        .split_ascii_whitespace()
        .collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(22 - 3)?.parse().ok(),
    }
}

/// Pids of all processes whose command line names a control socket in `dir`, or any other socket there that
/// they are to serve.
pub(crate) fn pids_serving(dir: &Path) -> Vec<i32> {
    let mut wanted = dir.as_os_str().as_encoded_bytes().to_vec();
    wanted.push(b'/');
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else {
                return false;
            };
            let args: Vec<&[u8]> = cmdline.split(|&byte| byte == 0).collect();
            args.windows(2).any(|pair| {
                matches!(pair[0], b"--control-socket" | b"--socket") && pair[1].starts_with(&wanted)
            })
        })
        .collect()
}

/// The arguments of a process, without its own name.
pub(crate) fn args(pid: i32) -> Option<Vec<OsString>> {
    let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let cmdline = cmdline.strip_suffix(b"\0").unwrap_or(&cmdline);
    let words = cmdline.split(|&byte| byte == 0).skip(1);
    Some(
        words
            .map(|word| OsString::from_vec(word.to_vec()))
            .collect(),
    )
}

/// This boot's id: pids and start times mean nothing in another one.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

fn open_log(path: &Path) -> Result<File, ProcessError> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|source| ProcessError::Log {
            path: path.to_owned(),
            source,
        })
}

/// The last line of a log that is not empty, at most 400 bytes of it.
pub(crate) fn last_line(log: &Path) -> Option<String> {
    let tail = tail(log, 4096).ok()?;
    let text = String::from_utf8_lossy(&tail);
    let line = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())?;
    Some(line.chars().take(400).collect())
}

/// Cuts a log longer than [`MAX_LOG_BYTES`] down to its last MiB. The writer appends, so it goes
/// on at the new end; what it writes during the cut may be lost.
pub(crate) fn bound_log(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_LOG_BYTES => {
            let kept = tail(path, KEPT_LOG_BYTES)?;
            let mut log = OpenOptions::new().append(true).open(path)?;
            log.set_len(0)?;
            io::Write::write_all(&mut log, &kept)
        }
        _ => Ok(()),
    }
}

fn tail(path: &Path, len_bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(end.saturating_sub(len_bytes)))?;
    let mut bytes = Vec::new();
    file.take(len_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn sleeper(dir: &Path) -> Guard {
        Process::spawn(Path::new("/bin/sleep"), &["1000".into()], &dir.join("log")).unwrap()
    }

    #[test]
    fn start_time_is_found_behind_a_hostile_name() {
        let stat = "42 (a) R (b) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3";
        assert_eq!(parse_start_ticks(stat), Some(987_654));
        let zombie = "42 (x) Z 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3";
        assert_eq!(parse_start_ticks(zombie), None);
    }

    #[tokio::test]
    async fn killed_child_is_reaped_and_reported() {
        let dir = tempfile::tempdir().unwrap();
        let process = sleeper(dir.path()).await.keep();
        assert_eq!(process.exit(), None);
        process.kill().await;
        assert_eq!(process.exit(), Some(Exit::Signal(libc::SIGKILL)));
        assert_eq!(
            start_ticks(process.pid()),
            None,
            "not even a zombie is left"
        );
    }

    #[tokio::test]
    async fn process_nobody_keeps_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let guard = sleeper(dir.path()).await;
        let process = (*guard).clone();
        drop(guard);
        assert_eq!(
            process.exited_within(Duration::from_secs(10)).await,
            Some(Exit::Signal(libc::SIGKILL))
        );
    }

    #[tokio::test]
    async fn reused_pid_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let guard = sleeper(dir.path()).await;
        let identity = guard.identity();
        assert!(Process::adopt(identity).is_some());
        let other = Identity {
            start_ticks: identity.start_ticks + 1,
            ..identity
        };
        assert!(Process::adopt(other).is_none());
    }

    #[test]
    fn long_log_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut bytes = vec![b'x'; MAX_LOG_BYTES as usize];
        bytes.extend_from_slice(b"\nlast words\n\n");
        std::fs::write(&path, &bytes).unwrap();
        bound_log(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), KEPT_LOG_BYTES);
        assert_eq!(last_line(&path).as_deref(), Some("last words"));
    }
}
