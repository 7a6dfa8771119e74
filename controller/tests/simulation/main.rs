//! The controller and the agents' lease logic through seeded schedules of faults, under virtual time.
//!
//! What runs is production code: the election, the reconciler with its planner, scheduler and failover,
//! the renewal of leases, users' commands, the embedded store, and [`lease::HostLease`] on each host.
//! What is simulated is below and between them: the network ([`world`]), the store's failures
//! ([`store`]), a host's processes ([`host`]) and the disk's server ([`server`]).
//!
//! At every step: at most one copy of a VM that is let do anything, and at most one writer of a disk.
//! Afterwards: what users did is linearizable ([`linear`]), and every VM that is wanted runs.

mod chaos;
mod host;
mod linear;
mod random;
mod server;
mod store;
mod users;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use world::{Outcome, Settings, World};

/// Threads that run schedules side by side: CI has two cores.
const THREADS: u64 = 2;
/// `MORTISE_SEED` runs one schedule alone, and prints what happens in it.
const SEED: &str = "MORTISE_SEED";

#[test]
fn a_thousand_schedules_keep_one_copy_and_one_writer() {
    let refused = run(0..1_000);
    // Otherwise nothing was put to the test.
    assert!(refused > 0, "no schedule had a stale write");
}

#[test]
#[ignore = "long: 10,000 schedules"]
fn ten_thousand_schedules_keep_one_copy_and_one_writer() {
    run(1_000..11_000);
}

#[test]
fn without_generations_the_checker_finds_a_second_writer() {
    let settings = Settings { fenced: false };
    let found = (0..1_000).find(|seed| {
        let outcome = World::run(*seed, settings);
        outcome
            .violations
            .iter()
            .any(|what| what.contains("stale write"))
    });
    assert!(
        found.is_some(),
        "no schedule of 1,000 had a stale write that was taken"
    );
}

/// Runs schedules; how many stale writes were refused in all.
fn run(seeds: std::ops::Range<u64>) -> u64 {
    let settings = Settings { fenced: true };
    if let Some(seed) = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()) {
        return check(seed, World::run(seed, settings));
    }
    let (next, refused) = (AtomicU64::new(seeds.start), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    refused.fetch_add(check(seed, World::run(seed, settings)), Ordering::Relaxed);
                }
            });
        }
    });
    refused.into_inner()
}

fn check(seed: u64, outcome: Outcome) -> u64 {
    assert!(
        outcome.violations.is_empty(),
        "seed {seed} ({SEED}={seed} shows it alone):\n{}\n--- what happened\n{}",
        outcome.violations.join("\n"),
        outcome.log.join("\n")
    );
    outcome.refused_writes
}
