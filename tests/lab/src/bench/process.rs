//! The processes of a bench: daemons under load, and the program that makes the load.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::interrupt;
use super::rounds::Sample;
use crate::inside::child::{self, Guarded};

/// For everything that takes less than a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon that serves disks; killed on drop.
pub(super) struct Daemon {
    process: Guarded,
    name: String,
    log: PathBuf,
    /// One for each disk.
    pub(super) sockets: Vec<PathBuf>,
}

impl Daemon {
    /// Starts `command`, with its log in `dir`, and waits until it has its sockets.
    pub(super) fn start(
        name: &str,
        command: &mut Command,
        sockets: Vec<PathBuf>,
        dir: &Path,
    ) -> Result<Self> {
        Self::start_with(name, command.stdin(Stdio::null()), sockets, dir)
    }

    /// The same with a standard input that was chosen before.
    pub(super) fn start_with(
        name: &str,
        command: &mut Command,
        sockets: Vec<PathBuf>,
        dir: &Path,
    ) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let process = Guarded::spawn(command.stdout(file.try_clone()?).stderr(file))?;
        let mut daemon = Self {
            process,
            name: name.to_owned(),
            log,
            sockets,
        };
        child::poll(&format!("{name} listens"), PATIENCE, || {
            interrupt::check()?;
            daemon.expect_running()?;
            Ok(daemon
                .sockets
                .iter()
                .all(|socket| socket.exists())
                .then_some(()))
        })?;
        Ok(daemon)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// An error with the end of its log if it has ended.
    pub(super) fn expect_running(&mut self) -> Result<()> {
        self.process
            .expect_running()
            .with_context(|| self.last_words())
    }

    pub(super) fn child(&mut self) -> &mut std::process::Child {
        self.process.child()
    }

    /// The end of its log.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let line = log.lines().rfind(|line| !line.trim().is_empty());
        format!("{}: {}", self.name, line.unwrap_or("it said nothing"))
    }
}

/// What the third-party driver does until a request completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// Sleeps until it is interrupted, as a guest's does.
    Sleeping,
    /// Looks at the ring without pause and takes no interrupts.
    Busy,
}

/// How raw io_uring processes completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ring {
    /// As the kernel does unless told otherwise.
    Plain,
    /// Only when they are waited for (IORING_SETUP_DEFER_TASKRUN).
    Deferred,
}

/// Order, size and number of requests, as the load program takes them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) pattern: &'static str,
    pub(super) block: &'static str,
    pub(super) depth: u32,
}

/// The program that makes the load.
#[derive(Clone, Debug)]
pub(super) struct LoadProgram {
    pub(super) file: PathBuf,
    /// Of each run: what counts, and what goes before.
    pub(super) seconds: f64,
    pub(super) warm_up_seconds: f64,
}

impl LoadProgram {
    /// Load on a daemon's disks, the same on each.
    pub(super) fn on_disks(
        &self,
        daemons: &[&Daemon],
        sockets: &[&Path],
        driver: Driver,
        load: Load,
    ) -> Result<Sample> {
        let mut command = self.command("blk-load", load);
        command.arg("--wait").arg(match driver {
            Driver::Sleeping => "sleep",
            Driver::Busy => "busy",
        });
        for daemon in daemons {
            command.arg("--pid").arg(daemon.pid().to_string());
        }
        for socket in sockets {
            command.arg("--socket").arg(socket);
        }
        sample(&mut command).with_context(|| {
            let names: Vec<String> = daemons.iter().map(|daemon| daemon.last_words()).collect();
            names.join("; ")
        })
    }

    /// Load on a file, by io_uring.
    pub(super) fn on_file(
        &self,
        file: &Path,
        direct: bool,
        ring: Ring,
        load: Load,
    ) -> Result<Sample> {
        let mut command = self.command("io-uring", load);
        command.arg("--file").arg(file);
        if direct {
            command.arg("--direct");
        }
        if ring == Ring::Deferred {
            command.arg("--deferred");
        }
        sample(&mut command)
    }

    /// Keeps disks connected and idle, after some requests on each.
    pub(super) fn hold(&self, sockets: &[&Path], load: Load) -> Result<Guarded> {
        let mut command = self.command("blk-hold", load);
        for socket in sockets {
            command.arg("--socket").arg(socket);
        }
        let mut holder = Guarded::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let mut line = String::new();
        if let Some(output) = holder.child().stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        if line.trim() != "ready" {
            bail!("the disks could not be connected; see above");
        }
        Ok(holder)
    }

    fn command(&self, verb: &str, load: Load) -> Command {
        let mut command = Command::new(&self.file);
        command
            .arg(verb)
            .args(["--pattern", load.pattern, "--block", load.block])
            .args(["--depth", &load.depth.to_string()])
            .args(["--seconds", &self.seconds.to_string()])
            .args(["--warm-up", &self.warm_up_seconds.to_string()])
            .args(["--json", "-"]);
        crate::nested::die_with_this_process(&mut command);
        command
    }
}

fn sample(command: &mut Command) -> Result<Sample> {
    // A command with 64 sockets fills a screen: its error alone is told.
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("cannot run the load")?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().last().unwrap_or("it said nothing");
        bail!("the load ended with {}: {last}", output.status);
    }
    serde_json::from_slice(&output.stdout).context("the load printed no outcome")
}

/// How often all threads of a process have been switched away from so far.
pub(super) fn context_switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("there is no process {pid}"))?;
    for task in tasks {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        sum += switches(&status);
    }
    Ok(sum)
}

fn switches(status: &str) -> u64 {
    status
        .lines()
        .filter_map(|line| line.split_once("ctxt_switches:"))
        .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
        .sum()
}

/// Waits until a process is idle: no thread of it ran for a while.
pub(super) fn await_idle(pid: u32) -> Result<()> {
    const STILL: Duration = Duration::from_millis(300);
    let deadline = Instant::now() + PATIENCE;
    let mut before = context_switches(pid)?;
    while Instant::now() < deadline {
        std::thread::sleep(STILL);
        let after = context_switches(pid)?;
        if after == before {
            break;
        }
        before = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_switches_count() {
        let status = "Name:\ta\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t5\n";
        assert_eq!(switches(status), 12);
        assert_eq!(switches("Name:\ta\n"), 0);
    }

    #[test]
    fn own_switches_are_found() {
        std::thread::sleep(Duration::from_millis(1));
        assert!(context_switches(std::process::id()).unwrap() > 0);
    }
}
