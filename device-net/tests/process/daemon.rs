//! `device-net` as a process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long anything may take before a test fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn await_true(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < until, "never came true: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A running daemon and its directory. Killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    /// Serves one NIC `net0`; `rest` continues the specification.
    pub(crate) fn with_nic(rest: &str) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        Daemon::in_dir(dir, rest)
    }

    /// Ends this process as a crash would and starts the next one in its place.
    pub(crate) fn crash_and_restart(mut self, rest: &str) -> Daemon {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        Daemon::in_dir(dir, rest)
    }

    /// As [`Daemon::crash_and_restart`], with what [`Daemon::start`] takes.
    pub(crate) fn crash_and_start(mut self, args: &[&str]) -> Daemon {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        Daemon::start(dir, args)
    }

    fn in_dir(dir: TempDir, rest: &str) -> Daemon {
        let socket = dir.path().join("net0.vu");
        let nic = format!("id=net0,socket={},{rest}", socket.display());
        let daemon = Daemon::start(dir, &["--nic", &nic]);
        await_true("the vhost-user socket listens", || {
            api::listen::answers(&daemon.socket())
        });
        daemon
    }

    /// With a descriptor socket and whatever `args` say.
    pub(crate) fn start(dir: TempDir, args: &[&str]) -> Daemon {
        let child = command(dir.path())
            .args(args)
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let daemon = Daemon { child, dir };
        await_true("the control socket listens", || {
            api::listen::answers(&daemon.control())
        });
        daemon
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("net0.vu")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    pub(crate) fn fds(&self) -> PathBuf {
        self.dir.path().join("fds")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    #[track_caller]
    pub(crate) fn assert_alive(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "the daemon ended");
    }

    /// SIGTERM, and how it ended.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        // SAFETY: kill takes no pointers; the child was not waited for, so the pid is its own.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let mut status = None;
        await_true("the daemon ends after SIGTERM", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon to be started in `dir`.
pub(crate) fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_device-net"));
    command
        .arg("--control-socket")
        .arg(dir.join("control"))
        .arg("--fd-socket")
        .arg(dir.join("fds"))
        .stdin(Stdio::null());
    command
}
