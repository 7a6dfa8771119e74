//! A contender under load: its processes, how its packets are counted, and one measurement.

use std::thread;
use std::time::{Duration, Instant};

use ::bench::meter::{Pid, Snapshot};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};

use super::super::rounds::Sample;
use super::super::{Effort, interrupt};

/// For the first packet.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a pause between two looks may be.
const LOOK: Duration = Duration::from_millis(20);

/// A contender and its load, both at rest unless it is measured: many of them poll.
pub(super) struct Rig<'a> {
    /// Whose CPU time counts.
    pub(super) daemons: Vec<u32>,
    /// Frontends and generators.
    pub(super) load: Vec<u32>,
    /// Whether daemons come to rest of themselves when there is no load.
    pub(super) daemons_rest: bool,
    /// Packets that arrived so far.
    pub(super) packets: Box<dyn Fn() -> Result<u64> + 'a>,
    /// For an error: what the processes said last.
    pub(super) last_words: Box<dyn Fn() -> String + 'a>,
}

impl Rig<'_> {
    /// Waits until packets arrive, and then brings everything to rest.
    pub(super) fn settle(&self) -> Result<()> {
        let _running = self.run()?;
        let deadline = Instant::now() + PATIENCE;
        let mut first = None;
        loop {
            interrupt::check()?;
            match (first, self.packets()) {
                (Some(first), Ok(now)) if now > first => return Ok(()),
                (_, Err(error)) if Instant::now() > deadline => return Err(error),
                (_, Ok(_)) if Instant::now() > deadline => {
                    bail!("no packet came through; {}", (self.last_words)())
                }
                (None, Ok(now)) => first = Some(now),
                // What counts them may not have begun yet.
                _ => {}
            }
            thread::sleep(LOOK);
        }
    }

    /// Lets it run for a while.
    pub(super) fn measure(&self, effort: &Effort) -> Result<Sample> {
        let _running = self.run()?;
        thread::sleep(Duration::from_secs_f64(effort.warm_up_seconds));
        let (packets, before) = (self.packets()?, self.snapshot()?);
        thread::sleep(Duration::from_secs_f64(effort.seconds));
        let (packets_after, after) = (self.packets()?, self.snapshot()?);
        let usage = before.usage_until(&after);
        let ios = packets_after.saturating_sub(packets);
        if ios == 0 {
            bail!("no packet came through; {}", (self.last_words)());
        }
        Ok(Sample {
            ios,
            iops: ios as f64 / usage.seconds,
            daemon_cpu_seconds: Some(usage.daemon_cpu_seconds),
            foreign_cpu: usage.foreign_cpu,
        })
    }

    fn packets(&self) -> Result<u64> {
        (self.packets)().with_context(|| (self.last_words)())
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let pids =
            |list: &[u32]| -> Vec<Pid> { list.iter().map(|pid| pid.cast_signed()).collect() };
        Snapshot::take(&pids(&self.daemons), &pids(&self.load)).with_context(|| (self.last_words)())
    }

    fn run(&self) -> Result<Running> {
        let mut pids = self.load.clone();
        if !self.daemons_rest {
            pids.extend(&self.daemons);
        }
        // Also if one of them has ended: the others must stop again.
        let running = Running(pids);
        for &pid in &running.0 {
            signal(pid, Signal::SIGCONT).with_context(|| (self.last_words)())?;
        }
        Ok(running)
    }
}

/// Processes that run until this is dropped.
struct Running(Vec<u32>);

impl Drop for Running {
    fn drop(&mut self) {
        for &pid in &self.0 {
            let _ = signal(pid, Signal::SIGSTOP);
        }
    }
}

fn signal(pid: u32, signal: Signal) -> nix::Result<()> {
    kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal)
}
