//! Kills at random instants, and what each of them cost.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest::oracle::Summary;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::fence::Fence;
use crate::guest::{Guest, Habits, verify_image};
use crate::host::{Daemon, Disk, Fencing, Host, PATIENCE, Readiness};
use crate::random::Random;
use crate::transport::await_true;

/// What is done to a daemon.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How often it is killed.
    pub kills: u32,
    /// Time under load before each kill, shortest and longest.
    pub pause: (Duration, Duration),
    /// Each incarnation touches all of the guest's memory before it is killed.
    pub touches_memory: bool,
    /// Whether a spare stands by.
    pub readiness: Readiness,
    /// Whether ghosts are waited for.
    pub fencing: Fencing,
    /// The load.
    pub habits: Habits,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            kills: 10,
            pause: (Duration::from_millis(5), Duration::from_millis(60)),
            touches_memory: false,
            readiness: Readiness::Spare,
            fencing: Fencing::On,
            habits: Habits::default(),
        }
    }
}

/// One kill. Times are from the signal on, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kill {
    /// Requests in flight at that instant.
    pub in_flight: u64,
    /// Until the last request of the dead process was over.
    pub fence_ms: f64,
    /// Until its parent heard of it.
    pub reaped_ms: f64,
    /// Until the next incarnation had its disk.
    pub attached_ms: f64,
    /// Until it completed its first request.
    pub first_io_ms: f64,
    /// From the fence's fall to that.
    pub after_fence_ms: f64,
    /// The longest that any request took.
    pub longest_ms: f64,
    /// The longest time without a completion.
    pub gap_ms: f64,
}

/// What came of a storm.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// One by one.
    pub kills: Vec<Kill>,
    /// What the oracle says.
    pub oracle: Summary,
    /// Why it ended early, if it did.
    pub failure: Option<String>,
}

impl Outcome {
    /// All kills were survived, and nothing was lost or wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failure.is_none() && self.oracle.is_clean()
    }

    /// The value below which `percent` of the kills lie.
    #[must_use]
    pub fn percentile(&self, percent: f64, of: impl Fn(&Kill) -> f64) -> f64 {
        let mut values: Vec<f64> = self.kills.iter().map(of).collect();
        percentile(&mut values, percent)
    }
}

/// Nearest rank; 0 of nothing.
pub fn percentile(values: &mut [f64], percent: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    let index = rank.clamp(1, values.len().max(1)) - 1;
    values.get(index).copied().unwrap_or(0.0)
}

/// Kills the daemon of a disk on `image` again and again, under verified load.
///
/// # Errors
/// The storm could not be raised. What the disk did wrong is in the outcome.
pub fn run(program: &Path, image: &Path, plan: &Plan) -> Result<Outcome> {
    let mut storm = Storm::gather(program, image, plan)?;
    let struck = (0..plan.kills).try_for_each(|_| storm.strike());
    storm.calm(image, struck.err().map(|error| format!("{error:#}")))
}

/// A disk under load whose daemon can be killed.
pub struct Storm {
    plan: Plan,
    host: Host,
    daemon: Daemon,
    fence: Fence,
    guest: Guest,
    random: Random,
    kills: Vec<Kill>,
}

impl Storm {
    /// Starts daemon and load.
    ///
    /// # Errors
    /// The daemon does not start, or nothing completes.
    pub fn gather(program: &Path, image: &Path, plan: &Plan) -> Result<Self> {
        let disk = Disk::raw(image, plan.habits.queues as u16);
        let mut host = Host::new(program, &[disk], plan.readiness, plan.fencing)?;
        let daemon = host.serve()?;
        let fence = Fence::watch(image)?;
        let guest = Guest::boot(host.socket(0), &plan.habits)?;
        let storm = Self {
            random: Random::new(plan.habits.seed ^ 0x6b69_6c6c),
            plan: plan.clone(),
            host,
            daemon,
            fence,
            guest,
            kills: Vec::new(),
        };
        storm.await_io(0)?;
        Ok(storm)
    }

    /// Who makes the load.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Lets the load run for a while, kills the daemon, and waits until the next one completes
    /// something.
    ///
    /// # Errors
    /// It does not come back.
    pub fn strike(&mut self) -> Result<()> {
        self.host.prepare()?;
        if self.plan.touches_memory {
            self.touch_memory().context("memory is not touched")?;
        }
        let (shortest, longest) = self.plan.pause;
        let spread = (longest - shortest).as_micros() as u64 + 1;
        thread::sleep(shortest + Duration::from_micros(self.random.below(spread)));
        let number = self.kills.len() as u64 + 1;
        let kill = self.kill(number);
        self.kills
            .push(kill.with_context(|| format!("kill {number}"))?);
        Ok(())
    }

    /// Ends load and daemon and verifies the image.
    ///
    /// # Errors
    /// The daemon does not end, or the image cannot be read.
    pub fn calm(self, image: &Path, failure: Option<String>) -> Result<Outcome> {
        let Self {
            mut daemon,
            guest,
            kills,
            ..
        } = self;
        let mut ledger = guest.end();
        daemon.signal(Signal::SIGTERM)?;
        daemon.ended()?;
        let oracle = verify_image(image, &mut ledger)?;
        Ok(Outcome {
            kills,
            oracle,
            failure,
        })
    }

    fn kill(&mut self, number: u64) -> Result<Kill> {
        self.guest.display().take_latencies();
        self.guest.display().take_gap();
        let in_flight = self.guest.display().in_flight.load(Ordering::SeqCst);
        let killed = Instant::now();
        self.daemon.signal(Signal::SIGKILL)?;
        self.daemon.ended()?;
        let reaped = Instant::now();
        self.daemon = self.host.serve()?;
        let attached = Instant::now();
        let first = self.await_io(number)?;
        let fallen = match self.plan.fencing {
            Fencing::On => self.await_fall(killed)?,
            Fencing::Off => killed,
        };
        let since_kill = |time: Instant| (time - killed).as_secs_f64() * 1e3;
        let latencies = self.guest.display().take_latencies();
        let longest = latencies.into_iter().max().unwrap_or_default();
        Ok(Kill {
            in_flight,
            fence_ms: since_kill(fallen),
            reaped_ms: since_kill(reaped),
            attached_ms: since_kill(attached),
            first_io_ms: since_kill(first),
            after_fence_ms: first.saturating_duration_since(fallen).as_secs_f64() * 1e3,
            longest_ms: longest.as_secs_f64() * 1e3,
            gap_ms: self.guest.display().take_gap().as_secs_f64() * 1e3,
        })
    }

    /// Waits for the first completion after hang-up number `hang_up`.
    fn await_io(&self, hang_up: u64) -> Result<Instant> {
        let display = self.guest.display();
        let mut first = None;
        let waited = await_true(PATIENCE, || {
            first = display.first_completion(hang_up);
            first.is_some() || display.has_failed()
        });
        if display.has_failed() {
            bail!("the guest gave up");
        }
        waited.with_context(|| {
            let failure = self.guest.progress().last_failure();
            format!("no request completes ({failure}); {}", self.daemon.log())
        })?;
        first.context("no request completed")
    }

    /// It has fallen, else nothing would have completed; only the thread that notes it may not have
    /// run yet.
    fn await_fall(&self, killed: Instant) -> Result<Instant> {
        let mut fallen = None;
        let waited = await_true(PATIENCE, || {
            fallen = self.fence.fall_since(killed);
            fallen.is_some()
        });
        waited.context("nobody saw the fence fall")?;
        fallen.context("nobody saw the fence fall")
    }

    fn touch_memory(&self) -> Result<()> {
        let display = self.guest.display();
        display.set_quiet(true);
        display.begin_touch();
        let touched = await_true(PATIENCE, || display.is_touched() || display.has_failed());
        display.set_quiet(false);
        Ok(touched?)
    }
}
