//! The controller and the agents' lease logic through seeded schedules of faults, under virtual time.
//!
//! What runs is production code: the election, the reconciler with its planner, scheduler and failover,
//! the renewal of leases, users' commands, the embedded store, and [`lease::HostLease`] on each host.
//! What is simulated is below and between them: the network ([`world`]), the store's failures
//! ([`store`]), a host's processes ([`host`]) and the disk's server ([`server`]). What goes wrong is in
//! [`chaos`]; replicas stand still by [`frozen`].
//!
//! At every step: at most one copy of a VM that is let do anything, and at most one writer of a disk.
//! Afterwards: what users did is linearizable ([`linear`]), every VM that is wanted runs, and all that was
//! to be met was met ([`hits`]).

mod chaos;
mod frozen;
mod hits;
mod host;
mod linear;
mod random;
mod server;
mod store;
mod users;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use hits::{Hit, Hits};
use world::{Outcome, Settings, World};

/// Threads that run schedules side by side: CI has two cores.
const THREADS: u64 = 2;
/// Schedules among which one at the latest shows what a protection is good for.
const MANY: u64 = 1_000;
/// `MORTISE_SEED` runs one schedule alone, and prints what happens in it.
const SEED: &str = "MORTISE_SEED";
/// Everything is as in production.
const SOUND: Settings = Settings {
    fenced: true,
    deadlines: true,
};

#[test]
fn a_thousand_schedules_keep_one_copy_and_one_writer() {
    run(0..MANY);
}

#[test]
#[ignore = "long: 10,000 schedules"]
fn ten_thousand_schedules_keep_one_copy_and_one_writer() {
    run(1_000..11_000);
}

#[test]
fn without_generations_the_checker_finds_a_second_writer() {
    let settings = Settings {
        fenced: false,
        ..SOUND
    };
    finds("stale write", settings);
}

#[test]
fn without_deadlines_of_devices_the_checker_finds_a_second_copy() {
    let settings = Settings {
        deadlines: false,
        ..SOUND
    };
    finds("two copies", settings);
}

fn finds(what: &str, settings: Settings) {
    let found = (0..MANY).find(|seed| {
        let outcome = World::run(*seed, settings);
        outcome.violations.iter().any(|found| found.contains(what))
    });
    assert!(found.is_some(), "no schedule of {MANY} showed: {what}");
}

/// Runs schedules, which are to meet everything that there is.
fn run(seeds: std::ops::Range<u64>) {
    if let Some(seed) = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()) {
        drop(check(seed, World::run(seed, SOUND)));
        return;
    }
    let (next, hits) = (AtomicU64::new(seeds.start), Hits::default());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    hits.take_in(&check(seed, World::run(seed, SOUND)));
                }
            });
        }
    });
    for hit in Hit::ALL {
        println!("{hit:?}: {}", hits.of(hit));
    }
    let missed = Hit::ALL.into_iter().filter(|hit| hits.of(*hit) == 0);
    let missed: Vec<Hit> = missed.collect();
    // Otherwise that was not put to the test.
    assert!(missed.is_empty(), "no schedule met {missed:?}");
}

fn check(seed: u64, outcome: Outcome) -> Hits {
    assert!(
        outcome.violations.is_empty(),
        "seed {seed} ({SEED}={seed} shows it alone):\n{}\n--- what happened\n{}",
        outcome.violations.join("\n"),
        outcome.log.join("\n")
    );
    outcome.hits
}
