//! Who used the CPUs during a run: this program, the daemon, others.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::load::{Load, Outcome};

/// A daemon whose CPU time is of interest.
pub type Pid = libc::pid_t;

/// Decides when a run's counted time begins and ends, and takes the CPUs' times at both ends.
#[derive(Debug)]
pub struct Meter {
    daemons: Vec<Pid>,
    begins: Instant,
    duration: Duration,
    phase: Phase,
    before: Option<Snapshot>,
    counted_from: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Counting,
}

/// Times since boot or since a process began.
#[derive(Debug)]
pub struct Snapshot {
    at: Instant,
    load: Duration,
    daemons: Duration,
    /// Of all CPUs, without interrupts: those are caused by the I/O itself.
    busy: Duration,
}

impl Meter {
    /// Starts a run's clock.
    pub fn start(load: &Load, daemons: &[Pid]) -> Self {
        Self {
            daemons: daemons.to_vec(),
            begins: Instant::now() + load.warm_up,
            duration: load.duration,
            phase: Phase::WarmUp,
            before: None,
            counted_from: 0,
        }
    }

    /// To be called often, with the requests completed so far; the outcome when time is up.
    ///
    /// # Errors
    /// When the kernel does not tell a time, for instance because the daemon has ended.
    pub fn check(&mut self, ios: u64) -> io::Result<Option<Outcome>> {
        let now = Instant::now();
        match (&self.before, self.phase) {
            (None, Phase::WarmUp) if now >= self.begins => {
                let snapshot = Snapshot::take(&self.daemons, &[])?;
                self.begins = snapshot.at;
                self.before = Some(snapshot);
                self.counted_from = ios;
                self.phase = Phase::Counting;
                Ok(None)
            }
            (Some(before), Phase::Counting) if now >= self.begins + self.duration => {
                let after = Snapshot::take(&self.daemons, &[])?;
                let ios = ios - self.counted_from;
                Ok(Some(before.outcome(&after, ios, !self.daemons.is_empty())))
            }
            _ => Ok(None),
        }
    }

    /// When `check` has something to do next.
    pub fn next_deadline(&self) -> Instant {
        match self.phase {
            Phase::WarmUp => self.begins,
            Phase::Counting => self.begins + self.duration,
        }
    }
}

/// Who used the CPUs between two snapshots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Between the two.
    pub seconds: f64,
    /// CPU time of this process and others that make the load.
    pub load_cpu_seconds: f64,
    /// CPU time of the daemons.
    pub daemon_cpu_seconds: f64,
    /// Share of all CPUs' time that went neither to load nor to daemons.
    pub foreign_cpu: f64,
}

impl Snapshot {
    /// The time now; `load` names processes that make the load beside this one.
    ///
    /// # Errors
    /// When the kernel does not tell a time, for instance because a process has ended.
    pub fn take(daemons: &[Pid], load: &[Pid]) -> io::Result<Self> {
        let busy = busy_time(&fs::read_to_string("/proc/stat")?, tick()?).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "/proc/stat has no cpu line")
        })?;
        Ok(Self {
            at: Instant::now(),
            load: process_time(0)? + times(load)?,
            daemons: times(daemons)?,
            busy,
        })
    }

    /// What happened from here to `after`.
    pub fn usage_until(&self, after: &Self) -> Usage {
        let load = after.load.saturating_sub(self.load);
        let daemons = after.daemons.saturating_sub(self.daemons);
        let busy = after.busy.saturating_sub(self.busy);
        let seconds = (after.at - self.at).as_secs_f64();
        Usage {
            seconds,
            load_cpu_seconds: load.as_secs_f64(),
            daemon_cpu_seconds: daemons.as_secs_f64(),
            foreign_cpu: foreign_share(busy, load + daemons, seconds),
        }
    }

    fn outcome(&self, after: &Self, ios: u64, has_daemon: bool) -> Outcome {
        let usage = self.usage_until(after);
        Outcome {
            ios,
            seconds: usage.seconds,
            iops: ios as f64 / usage.seconds,
            driver_cpu_seconds: usage.load_cpu_seconds,
            daemon_cpu_seconds: has_daemon.then_some(usage.daemon_cpu_seconds),
            foreign_cpu: usage.foreign_cpu,
        }
    }
}

fn times(processes: &[Pid]) -> io::Result<Duration> {
    processes.iter().map(|&pid| process_time(pid)).sum()
}

/// What others took of all CPUs' time.
fn foreign_share(busy: Duration, ours: Duration, seconds: f64) -> f64 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let share = busy.saturating_sub(ours).as_secs_f64() / (seconds * cpus);
    (share * 1e4).round() / 1e4
}

/// User, nice, system and steal time of the first line of proc(5)'s stat.
fn busy_time(stat: &str, tick: Duration) -> Option<Duration> {
    let fields: Vec<u64> = stat
        .lines()
        .find_map(|line| line.strip_prefix("cpu "))?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    let [user, nice, system, _, _, _, _, steal, ..] = fields[..] else {
        return None;
    };
    let ticks = user + nice + system + steal;
    Some(Duration::from_secs_f64(ticks as f64 * tick.as_secs_f64()))
}

fn tick() -> io::Result<Duration> {
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs(1) / u32::try_from(per_second).unwrap_or(100))
}

/// CPU time of all threads of a process, ended ones included; 0 names this process.
///
/// # Errors
/// When there is no such process.
pub fn process_time(pid: Pid) -> io::Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the pointer is to a live clockid_t.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let time = nix::time::clock_gettime(nix::time::ClockId::from_raw(clock))?;
    Ok(Duration::from(time))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(10);

    #[test]
    fn busy_time_leaves_out_idle_and_interrupts() {
        let stat = "cpu  100 10 200 99999 50 7 8 30 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(busy_time(stat, TICK), Some(TICK * 340));
        assert_eq!(busy_time("intr 5\n", TICK), None);
        assert_eq!(busy_time("cpu  1 2 x\n", TICK), None);
    }

    #[test]
    fn foreign_share_is_never_negative() {
        let second = Duration::from_secs(1);
        assert_eq!(foreign_share(second, second * 2, 1.0), 0.0);
        assert!(foreign_share(second * 2, second, 1.0) > 0.0);
    }

    #[test]
    fn own_time_passes_while_computing() {
        let before = process_time(0).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while process_time(0).unwrap() <= before {
            assert!(Instant::now() < deadline, "CPU time stands still");
        }
    }

    #[test]
    fn time_of_a_missing_process_is_an_error() {
        // Above the largest that Linux gives out.
        assert!(process_time(5_000_000).is_err());
    }

    #[test]
    fn only_what_follows_the_warm_up_counts() {
        let load = Load {
            pattern: crate::load::Pattern::Read,
            block_bytes: 512,
            depth: 1,
            warm_up: Duration::from_millis(5),
            duration: Duration::from_millis(20),
        };
        let pid = libc::pid_t::try_from(std::process::id()).unwrap();
        let mut meter = Meter::start(&load, &[pid]);
        let mut ios = 1000;
        let outcome = loop {
            if let Some(outcome) = meter.check(ios).unwrap() {
                break outcome;
            }
            ios = if meter.before.is_some() { 1500 } else { 1000 };
        };
        assert_eq!(outcome.ios, 500);
        assert!(outcome.seconds >= 0.02);
        assert!(outcome.daemon_cpu_seconds.is_some());
    }
}
