//! What a crash storm does to a disk of another process: the same light load beside the same heavy
//! one, in turn with kills and without.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest::oracle::Summary;
use serde::{Deserialize, Serialize};

use crate::guest::{Guest, Habits, verify_image};
use crate::host::{Disk, Fencing, Host, Readiness};
use crate::storm::{Plan, Storm, percentile};

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The bystander's 99th percentile while nobody is killed, by rounds, in milliseconds.
    pub quiet_p99_ms: Vec<f64>,
    /// While its neighbour is killed again and again.
    pub storm_p99_ms: Vec<f64>,
    /// How often it was, in all.
    pub kills: usize,
    /// What the bystander's oracle says.
    pub oracle: Summary,
    /// What the neighbour's does.
    pub neighbour: Summary,
}

/// Runs `rounds` of `length` each, with kills and without.
///
/// # Errors
/// A daemon does not start, or does not come back.
pub fn run(
    program: &Path,
    (image, neighbours_image): (&Path, &Path),
    plan: &Plan,
    rounds: u32,
    length: Duration,
) -> Result<Outcome> {
    let habits = Habits {
        queues: 1,
        depth: 1,
        flush_every: 0,
        memory_bytes: 4 << 20,
        ..plan.habits.clone()
    };
    let disk = [Disk::raw(image, 1)];
    let mut host = Host::new(program, &disk, Readiness::Cold, Fencing::On)?;
    let _daemon = host.serve()?;
    let bystander = Guest::boot(host.socket(0), &habits)?;
    let mut storm = Storm::gather(program, neighbours_image, plan)?;
    let mut outcome = Outcome::default();
    for _ in 0..rounds {
        let measure = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            bystander.display().take_latencies();
            let began = Instant::now();
            while began.elapsed() < length {
                work()?;
            }
            let latencies = bystander.display().take_latencies();
            ensure!(!latencies.is_empty(), "the bystander stands still");
            let mut ms: Vec<f64> = latencies
                .iter()
                .map(|took| took.as_secs_f64() * 1e3)
                .collect();
            Ok(percentile(&mut ms, 99.0))
        };
        let quiet = measure(&mut || {
            thread::sleep(Duration::from_millis(10));
            Ok(())
        })?;
        let stormy = measure(&mut || storm.strike())?;
        outcome.quiet_p99_ms.push(quiet);
        outcome.storm_p99_ms.push(stormy);
    }
    let calmed = storm.calm(neighbours_image, None)?;
    outcome.kills = calmed.kills.len();
    outcome.neighbour = calmed.oracle;
    outcome.oracle = verify_image(image, &mut bystander.end())?;
    Ok(outcome)
}
