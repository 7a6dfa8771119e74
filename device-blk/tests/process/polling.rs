//! Queues that look for work by themselves, and that sleep when there is none.

use std::fs;
use std::time::{Duration, Instant};

use crate::daemon::{DEADLINE, Daemon, Place, await_true};
use crate::driver::Client;

/// A stretch of time in which nothing must happen.
const QUIET: Duration = Duration::from_millis(300);

/// How often threads of the process went to sleep or lost the CPU.
fn switches(daemon: &Daemon) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok())
        .flat_map(|status| {
            status
                .lines()
                .filter(|line| line.contains("ctxt_switches"))
                .map(|line| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap())
                .collect::<Vec<_>>()
        })
        .sum()
}

/// CPU time of the process in clock ticks.
fn cpu_ticks(daemon: &Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split(' ').collect();
    fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap()
}

fn served(polling: &str) -> (Place, Daemon, Client) {
    let place = Place::new();
    place.image("d.img", 256);
    let disk = format!("{},polling={polling}", place.disk("d"));
    let daemon = Daemon::start(&place, &[&disk]);
    let client = Client::connect(&place.socket("d"));
    (place, daemon, client)
}

fn busy(client: &mut Client) {
    let until = Instant::now() + Duration::from_millis(200);
    let mut sector = 0;
    while Instant::now() < until {
        let data = client.read(sector * 512, 512);
        assert_eq!(data[..8], sector.to_le_bytes());
        sector = (sector + 1) % 256;
    }
}

#[test]
fn queue_that_looked_for_work_sleeps_when_there_is_none() {
    for polling in ["adaptive", "never"] {
        let (_place, daemon, mut client) = served(polling);
        busy(&mut client);
        // Threads that end or time out may still do so at first; the rest must be asleep for good.
        let give_up = Instant::now() + DEADLINE;
        loop {
            let before = switches(&daemon);
            std::thread::sleep(QUIET);
            let woken = switches(&daemon) - before;
            if woken == 0 {
                break;
            }
            assert!(
                Instant::now() < give_up,
                "{polling}: {woken} wake-ups in {QUIET:?}"
            );
        }
        // A sleeper is woken by the next request.
        busy(&mut client);
    }
}

#[test]
fn queue_that_always_looks_serves_obeys_and_ends() {
    let (_place, mut daemon, mut client) = served("always");
    busy(&mut client);
    let before = cpu_ticks(&daemon);
    await_true("it looks while there is nothing", || {
        cpu_ticks(&daemon) > before + 5
    });
    busy(&mut client);
    drop(client);
    let status = daemon.end(nix::sys::signal::Signal::SIGTERM);
    assert!(status.success(), "{status}");
}
