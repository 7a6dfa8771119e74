//! A disk goes from one process to the next and back, under full load.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest::oracle::Summary;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::guest::{Guest, Habits, verify_image};
use crate::host::{Daemon, Disk, Fencing, Host, PATIENCE, Readiness};
use crate::transport::await_true;

/// Time under load between two hand-overs.
const PAUSE: Duration = Duration::from_millis(30);

/// What a hand-over cost, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HandOver {
    /// The longest that any request took.
    pub longest_ms: f64,
    /// The longest time without a completion.
    pub gap_ms: f64,
    /// Until the next process had the disk.
    pub attached_ms: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// From the old process to a new one.
    pub upgrades: Vec<HandOver>,
    /// From the new one back to the old one.
    pub roll_backs: Vec<HandOver>,
    /// What the oracle says.
    pub oracle: Summary,
    /// Why it ended early, if it did.
    pub failure: Option<String>,
}

/// Upgrades, rolls back and upgrades again, `rounds` times.
///
/// # Errors
/// It could not begin. What the disk did wrong is in the outcome.
pub fn run(program: &Path, image: &Path, habits: &Habits, rounds: u32) -> Result<Outcome> {
    let disk = Disk::raw(image, habits.queues as u16);
    let mut host = Host::new(program, &[disk], Readiness::Cold, Fencing::On)?;
    let serving = host.serve()?;
    let guest = Guest::boot(host.socket(0), habits)?;
    let mut series = Series {
        host,
        guest,
        hang_ups: 0,
        outcome: Outcome::default(),
    };
    let (serving, failure) = series.upgrade_all(serving, rounds);
    let Series {
        guest, mut outcome, ..
    } = series;
    let mut ledger = guest.end();
    if let Some(mut serving) = serving {
        serving.signal(Signal::SIGTERM)?;
        serving.ended()?;
    }
    outcome.oracle = verify_image(image, &mut ledger)?;
    outcome.failure = failure;
    Ok(outcome)
}

struct Series {
    host: Host,
    guest: Guest,
    hang_ups: u64,
    outcome: Outcome,
}

impl Series {
    fn upgrade_all(
        &mut self,
        mut serving: Daemon,
        rounds: u32,
    ) -> (Option<Daemon>, Option<String>) {
        // A backend that has answered nothing yet may leave without a hang-up.
        if let Err(error) = self.await_completion(&serving) {
            return (None, Some(format!("{error:#}")));
        }
        for _ in 0..rounds {
            match self.round(serving) {
                Ok(next) => serving = next,
                Err(error) => return (None, Some(format!("{error:#}"))),
            }
        }
        (Some(serving), None)
    }

    fn round(&mut self, mut old: Daemon) -> Result<Daemon> {
        let mut new = self.host.start()?;
        let upgrade = self.hand_over(&mut old, &mut new).context("upgrade")?;
        let roll_back = self.hand_over(&mut new, &mut old).context("roll-back")?;
        let again = self.hand_over(&mut old, &mut new).context("upgrade")?;
        self.outcome.upgrades.extend([upgrade, again]);
        self.outcome.roll_backs.push(roll_back);
        old.signal(Signal::SIGTERM)?;
        old.ended()?;
        Ok(new)
    }

    fn hand_over(&mut self, from: &mut Daemon, to: &mut Daemon) -> Result<HandOver> {
        std::thread::sleep(PAUSE);
        let display = self.guest.display();
        display.take_latencies();
        display.take_gap();
        let began = Instant::now();
        self.host.hand_over(from, to)?;
        let attached = began.elapsed();
        self.hang_ups += 1;
        self.await_completion(to)?;
        // Requests that waited are among those that complete now.
        std::thread::sleep(PAUSE);
        let longest = display.take_latencies().into_iter().max();
        Ok(HandOver {
            longest_ms: longest.unwrap_or_default().as_secs_f64() * 1e3,
            gap_ms: display.take_gap().as_secs_f64() * 1e3,
            attached_ms: attached.as_secs_f64() * 1e3,
        })
    }

    /// Waits for the first completion after the last hang-up.
    fn await_completion(&self, serving: &Daemon) -> Result<()> {
        let display = self.guest.display();
        let waited = await_true(PATIENCE, || {
            display.first_completion(self.hang_ups).is_some() || display.has_failed()
        });
        if display.has_failed() {
            bail!("the guest gave up");
        }
        waited.with_context(|| {
            let failure = self.guest.progress().last_failure();
            let log = serving.log();
            format!("no request completes ({failure}); {log}")
        })
    }
}
