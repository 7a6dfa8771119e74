//! Many devices on the threads of one group.

use std::sync::atomic::AtomicU64;

use super::peers::Honest;
use super::*;

/// How many times threads of this process whose names begin with `name` went to sleep.
fn sleeps_of(name: &str) -> u64 {
    let mut sleeps = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let Ok(comm) = std::fs::read_to_string(path.join("comm")) else {
            continue;
        };
        let Ok(status) = std::fs::read_to_string(path.join("status")) else {
            continue;
        };
        if comm.starts_with(name) {
            let line = status.lines().find(|line| line.starts_with("voluntary"));
            let count = line.and_then(|line| line.split_whitespace().last());
            sleeps += count.unwrap().parse::<u64>().unwrap();
        }
    }
    sleeps
}

fn served(group: &WorkerGroup, count: usize) -> Vec<Served> {
    (0..count)
        .map(|_| Served::on(Some(group.seat()), &[]))
        .collect()
}

#[test]
fn rings_of_many_devices_are_served_by_few_threads() {
    let group = WorkerGroup::spawn("few", 2).unwrap();
    let served = served(&group, 20);
    let mut honest: Vec<Honest> = served.iter().map(Honest::connect).collect();
    for honest in &mut honest {
        honest.set_up();
        honest.track_inflight();
        honest.start(0);
        honest.start(1);
    }
    for round in 0..20u8 {
        for honest in &mut honest {
            honest.assert_echo(0, &[round; 100]);
            honest.assert_echo(1, &[round; 7]);
        }
    }
    for served in &served {
        assert_eq!(served.status().queues_running, 2);
        eventually("completions are counted", || {
            served.status().completed == 40
        });
    }
}

#[test]
fn idle_rings_cost_no_wake_up() {
    let group = WorkerGroup::spawn("idle", 1).unwrap();
    let served = served(&group, 100);
    let mut honest: Vec<Honest> = served.iter().map(Honest::connect).collect();
    for honest in &mut honest {
        honest.set_up();
        honest.start(0);
        honest.assert_echo(0, b"awake once");
    }
    let mut before = sleeps_of("idle");
    eventually("all is quiet", || {
        thread::sleep(Duration::from_millis(20));
        let now = sleeps_of("idle");
        std::mem::replace(&mut before, now) == now
    });
    thread::sleep(Duration::from_millis(500));
    assert_eq!(sleeps_of("idle"), before);
    honest[50].assert_echo(0, b"and again");
}

#[test]
fn pause_stop_and_reconnection_are_as_on_a_thread_of_its_own() {
    let group = WorkerGroup::spawn("life", 1).unwrap();
    let mut served = served(&group, 2);
    let mut neighbour = Honest::connect(&served[1]);
    neighbour.set_up();
    neighbour.start(0);
    for round in 0..10u8 {
        let mut honest = Honest::connect(&served[0]);
        honest.set_up();
        honest.start(0);
        honest.assert_echo(0, &[round; 16]);
        neighbour.assert_echo(0, &[round; 5]);
        honest.hang_up();
        eventually("the session's state is forgotten", || {
            served[0].device.resets.load(Ordering::SeqCst) == u32::from(round) + 1
        });
    }
    served[0].stop();
    neighbour.assert_echo(0, b"others go on");
    drop(neighbour);
    served[1].stop();
    drop(served);
    drop(group);
    eventually("the threads end", || {
        std::fs::read_dir("/proc/self/task").unwrap().all(|task| {
            let comm = std::fs::read_to_string(task.unwrap().path().join("comm"));
            !comm.unwrap_or_default().starts_with("life/")
        })
    });
}

#[test]
fn broken_ring_leaves_the_others_of_its_thread_alone() {
    let group = WorkerGroup::spawn("broken", 1).unwrap();
    let served = served(&group, 2);
    let mut good = Honest::connect(&served[0]);
    let mut bad = Honest::connect(&served[1]);
    for honest in [&mut good, &mut bad] {
        honest.set_up();
        honest.start(0);
    }
    bad.guest.rings[0].set_avail_idx(60_000);
    bad.guest.kicks[0].write(1).unwrap();
    eventually("the ring is stopped", || {
        served[1].status().queues_running == 0
    });
    good.assert_echo(0, b"unharmed");
    bad.hang_up();
    served[1].assert_serves();
}

/// Others put what they have into a shared ring; when it ends, they find nothing there.
#[test]
fn shared_ring_is_filled_by_another_thread_until_it_ends() {
    let group = WorkerGroup::spawn("shared", 1).unwrap();
    let served = Served::on(Some(group.seat()), &[0]);
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    eventually("the ring is shared", || {
        served.device.shared.lock().unwrap().is_some()
    });
    let shared = served.device.shared.lock().unwrap().clone().unwrap();
    let filled = Arc::new(AtomicU64::new(0));
    let ended = {
        let (shared, filled) = (Arc::clone(&shared), Arc::clone(&filled));
        thread::spawn(move || {
            while let Some(mut ring) = shared.lock() {
                if let Some(chain) = ring.pop().unwrap() {
                    let written = chain.write_at(0, b"from elsewhere");
                    ring.complete(chain, written as u32);
                    ring.notify();
                    filled.fetch_add(1, Ordering::SeqCst);
                }
                drop(ring);
                thread::yield_now();
            }
        })
    };
    for round in 1..=5 {
        honest.guest.offer_writable(0, 64);
        eventually("a buffer is filled", || {
            filled.load(Ordering::SeqCst) == round
        });
    }
    honest.hang_up();
    ended.join().unwrap();
}
