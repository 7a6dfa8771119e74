//! A contender under load: its processes, how its packets are counted, and one measurement.

use std::thread;
use std::time::{Duration, Instant};

use ::bench::meter::{Pid, Snapshot};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};

use super::super::process::Daemon;
use super::super::rounds::Sample;
use super::super::{Effort, interrupt};
use super::namespace;
use super::testpmd::Testpmd;

/// For the first packet.
const PATIENCE: Duration = Duration::from_secs(30);
/// After which packets that were to circulate are taken for lost, and sent again.
const LOST: Duration = Duration::from_secs(2);
/// How long a pause between two looks may be.
const LOOK: Duration = Duration::from_millis(20);
/// A contender that was stopped needs this at least to be at its pace again.
const WARM_UP_SECONDS: f64 = 0.1;

/// A contender and its load, both at rest unless it is measured: many of them poll.
pub(super) struct Rig {
    /// Whose CPU time counts.
    pub(super) daemons: Vec<Daemon>,
    /// Whether daemons come to rest of themselves when there is no load.
    pub(super) daemons_rest: bool,
    pub(super) frontend: Option<Testpmd>,
    /// Senders and receivers beside the frontend.
    pub(super) generators: Vec<Daemon>,
    /// Packets that arrived so far.
    pub(super) count: Count,
    /// Alive as long as the contender is, to be killed after it.
    pub(super) others: Vec<Daemon>,
}

/// Where packets are counted: always at their destination.
#[derive(Clone, Copy, Debug)]
pub(super) enum Count {
    /// What the kernel got through a tap.
    AtTap(&'static str),
    /// What the kernel handed out through a tap's descriptor.
    FromTap(&'static str),
    /// What the frontend received on that many ports.
    AtFrontend { ports: usize },
    /// What the frontend sent: for a backend that drops it all.
    ByFrontend { ports: usize },
}

impl Rig {
    /// Of a daemon that polls.
    pub(super) fn new(daemon: Daemon, count: Count) -> Self {
        Self {
            daemons: vec![daemon],
            daemons_rest: false,
            frontend: None,
            generators: Vec::new(),
            count,
            others: Vec::new(),
        }
    }

    /// Tells the frontend to begin, waits until packets arrive, and brings everything to rest.
    pub(super) fn begin(&mut self, command: &str) -> Result<()> {
        self.begin_with(command, || Ok(()))
    }

    /// The same with something else that has to be done for packets to come, each time after the command.
    pub(super) fn begin_with(
        &mut self,
        command: &str,
        mut inject: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let running = self.run()?;
        let deadline = Instant::now() + PATIENCE;
        let mut first = None;
        let mut sent_at = Instant::now();
        self.tell(command)?;
        inject()?;
        loop {
            interrupt::check()?;
            match (first, self.packets()) {
                (Some(first), Ok(now)) if now > first => break,
                (_, Err(error)) if Instant::now() > deadline => return Err(error),
                (_, Ok(_)) if Instant::now() > deadline => {
                    bail!("no packet came through; {}", self.last_words())
                }
                (None, Ok(now)) => first = Some(now),
                // What counts them may not have begun yet.
                _ => {}
            }
            if sent_at.elapsed() > LOST {
                sent_at = Instant::now();
                self.tell("stop")?;
                self.tell(command)?;
                inject()?;
            }
            thread::sleep(LOOK);
        }
        drop(running);
        Ok(())
    }

    /// Lets it run for a while without counting.
    pub(super) fn rehearse(&self, time: Duration) -> Result<()> {
        let _running = self.run()?;
        thread::sleep(time);
        interrupt::check()
    }

    /// Lets it run for a while.
    pub(super) fn measure(&self, effort: &Effort) -> Result<Sample> {
        let _running = self.run()?;
        let warm_up = effort.warm_up_seconds.max(WARM_UP_SECONDS);
        thread::sleep(Duration::from_secs_f64(warm_up));
        let (packets, before) = (self.packets()?, self.snapshot()?);
        thread::sleep(Duration::from_secs_f64(effort.seconds));
        let (packets_after, after) = (self.packets()?, self.snapshot()?);
        let usage = before.usage_until(&after);
        let ios = packets_after.saturating_sub(packets);
        if ios == 0 {
            bail!("no packet came through; {}", self.last_words());
        }
        Ok(Sample {
            ios,
            iops: ios as f64 / usage.seconds,
            daemon_cpu_seconds: Some(usage.daemon_cpu_seconds),
            foreign_cpu: usage.foreign_cpu,
        })
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        match &mut self.frontend {
            Some(frontend) => frontend.tell(command),
            None => Ok(()),
        }
    }

    fn packets(&self) -> Result<u64> {
        let frontend = || self.frontend.as_ref().context("there is no frontend");
        match self.count {
            Count::AtTap(tap) => namespace::packets_to_host(tap),
            Count::FromTap(tap) => namespace::packets_from_host(tap),
            Count::AtFrontend { ports } => Ok(frontend()?.counters(ports)?.received),
            Count::ByFrontend { ports } => Ok(frontend()?.counters(ports)?.sent),
        }
        .with_context(|| self.last_words())
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let pid = |daemon: &Daemon| -> Pid { daemon.pid().cast_signed() };
        let daemons: Vec<Pid> = self.daemons.iter().map(pid).collect();
        let load: Vec<Pid> = self.load().map(pid).collect();
        Snapshot::take(&daemons, &load).with_context(|| self.last_words())
    }

    fn load(&self) -> impl Iterator<Item = &Daemon> {
        let frontend = self.frontend.iter().map(|frontend| &frontend.process);
        frontend.chain(&self.generators)
    }

    fn last_words(&self) -> String {
        let all = self.daemons.iter().chain(self.load()).chain(&self.others);
        let words: Vec<String> = all.map(Daemon::last_words).collect();
        words.join("; ")
    }

    fn run(&self) -> Result<Running> {
        let mut pids: Vec<u32> = self.load().map(Daemon::pid).collect();
        if !self.daemons_rest {
            pids.extend(self.daemons.iter().map(Daemon::pid));
        }
        // Also if one of them has ended: the others must stop again.
        let running = Running(pids);
        for &pid in &running.0 {
            signal(pid, Signal::SIGCONT).with_context(|| self.last_words())?;
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
