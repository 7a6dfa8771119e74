//! Child processes that never outlive the job and are never waited for without end.

use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Killed on drop.
pub(crate) struct Guarded {
    name: String,
    child: Child,
}

impl Guarded {
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy();
        let name = name.rsplit('/').next().unwrap_or_default().to_owned();
        crate::nested::die_with_this_process(command);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// An error if it has ended.
    pub(crate) fn expect_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{} ended early: {status}", self.name),
            None => Ok(()),
        }
    }

    /// Waits for its end.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "{} did not end in time",
                self.name
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends SIGTERM and expects an orderly end.
    pub(crate) fn terminate(mut self, limit: Duration) -> Result<()> {
        self.expect_running()?;
        kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGTERM)?;
        let status = self.wait_until(Instant::now() + limit)?;
        ensure!(
            status.success(),
            "{} ended with {status} after SIGTERM",
            self.name
        );
        Ok(())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls until `ready` answers, or fails with what it was waiting for.
pub(crate) fn poll<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        ensure!(
            Instant::now() < deadline,
            "{what} did not happen within {} s",
            limit.as_secs()
        );
        thread::sleep(Duration::from_millis(20));
    }
}
