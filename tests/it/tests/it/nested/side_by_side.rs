//! The daemon of a disk is killed again and again under the same guest with the same verified load, once
//! for each pairing of VMM and daemon: what others do, beside what we do.
//!
//! The table goes to the output; `docs/performance.md` has one.

use std::path::Path;
use std::time::{Duration, Instant};

use guest::oracle::Summary;
use guest::plan::{ENOUGH, End, Job, Plan};
use guest::report::Report;

use super::third_party::qemu_storage_daemon;
use super::{Vmm, device_blk, disk_device, disk_socket, image};
use crate::guest_run;
use crate::process::Process;
use crate::qemu::Qemu;

const KILLS: u32 = 10;
const LEN_BYTES: u64 = 4 << 20;
const SEED: u64 = 0x51de;
/// Requests between two kills.
const ENOUGH_REQUESTS: u64 = 100;
/// A guest whose disk does nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frontend {
    Ours,
    Qemu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Daemon {
    Ours,
    Qemu,
}

/// What became of a guest.
struct Outcome {
    kills: u32,
    summary: Summary,
    longest_ms: u64,
    /// Why it did not come to its end, if it did not.
    hung: Option<String>,
}

impl Outcome {
    fn is_clean(&self) -> bool {
        self.hung.is_none() && self.summary.is_clean()
    }
}

#[test]
#[ignore = "long: forty kills under four pairings of VMM and daemon"]
fn our_guests_stall_less_than_those_of_qemu_and_its_storage_daemon() {
    let pairings = [
        ("vmm-core + device-blk", Frontend::Ours, Daemon::Ours),
        ("QEMU + qemu-storage-daemon", Frontend::Qemu, Daemon::Qemu),
        ("QEMU + device-blk", Frontend::Qemu, Daemon::Ours),
        (
            "vmm-core + qemu-storage-daemon",
            Frontend::Ours,
            Daemon::Qemu,
        ),
    ];
    println!("| pairing | kills survived | longest stall, ms | errors | wrong blocks | end |");
    println!("|---|---|---|---|---|---|");
    let outcomes = pairings.map(|(name, frontend, daemon)| {
        let outcome = storm(frontend, daemon);
        let summary = &outcome.summary;
        println!(
            "| {name} | {} | {} | {} | {} | {} |",
            outcome.kills,
            outcome.longest_ms,
            summary.errors,
            summary.lost + summary.torn + summary.misplaced + summary.foreign,
            outcome.hung.as_deref().unwrap_or("all verified")
        );
        outcome
    });
    let [ours, theirs, ..] = &outcomes;
    assert!(ours.is_clean(), "{:?}: {}", ours.hung, ours.summary);
    assert_eq!(ours.kills, KILLS);
    assert!(
        ours.longest_ms < theirs.longest_ms || !theirs.is_clean(),
        "{} ms, and theirs {} ms",
        ours.longest_ms,
        theirs.longest_ms
    );
}

fn storm(frontend: Frontend, daemon: Daemon) -> Outcome {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let image = image(dir, "disk.raw", 4 * LEN_BYTES);
    let mut serving = serve(daemon, dir, &image);
    let plan = Plan {
        jobs: vec![Job::Oracle {
            device: "vda".into(),
            seed: SEED,
            bytes: LEN_BYTES,
            seconds: 1200,
        }],
        end: End::PowerOff,
        ..Plan::default()
    };
    let mut vmm = boot(frontend, dir, &plan);
    guest_run::wait_for_line(&mut vmm, "\"job\":\"oracle\"", 1);
    let mut outcome = Outcome {
        kills: 0,
        summary: Summary::default(),
        longest_ms: 0,
        hung: None,
    };
    while outcome.kills < KILLS && outcome.hung.is_none() {
        serving.kill();
        serving = serve(daemon, dir, &image);
        outcome.kills += 1;
        outcome.hung = await_progress(&vmm).err();
    }
    // A guest that hangs is asked for its end all the same.
    vmm.tell(ENOUGH);
    let deadline = Instant::now() + PATIENCE;
    while look(&vmm).is_none_or(|look| !look.is_over) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    match look(&vmm) {
        Some(look) => {
            if !look.is_over {
                let unsaid = "never ended".to_owned();
                outcome.hung.get_or_insert(unsaid);
            }
            outcome.summary = look.summary;
            outcome.longest_ms = look.longest_ms;
        }
        None => outcome.hung = Some("said nothing".to_owned()),
    }
    outcome
}

fn boot(frontend: Frontend, dir: &Path, plan: &Plan) -> Process {
    match frontend {
        Frontend::Ours => {
            let vmm = Vmm {
                memory: "512M",
                cpus: 2,
                devices: vec![disk_device(dir)],
                ..Vmm::default()
            };
            vmm.spawn_listening(dir, plan)
        }
        Frontend::Qemu => Qemu::on_kvm(plan)
            .reconnecting()
            .disk(&disk_socket(dir))
            .start_listening(dir),
    }
}

fn serve(daemon: Daemon, dir: &Path, image: &Path) -> Process {
    match daemon {
        Daemon::Ours => device_blk(dir, image),
        Daemon::Qemu => qemu_storage_daemon(dir, image),
    }
}

/// The guest's last word.
struct Look {
    summary: Summary,
    longest_ms: u64,
    is_over: bool,
}

fn look(vmm: &Process) -> Option<Look> {
    let reports = guest_run::reports(&vmm.output());
    reports.into_iter().rev().find_map(|report| match report {
        Report::Oracle {
            summary,
            latency,
            last,
            ..
        } => Some(Look {
            summary,
            longest_ms: latency.max_us / 1000,
            is_over: last,
        }),
        _ => None,
    })
}

/// Waits until so many requests more were done.
fn await_progress(vmm: &Process) -> Result<(), String> {
    let requests = || look(vmm).map_or(0, |look| look.summary.reads + look.summary.writes);
    let before = requests();
    let deadline = Instant::now() + PATIENCE;
    while requests() < before + ENOUGH_REQUESTS {
        if Instant::now() > deadline {
            return Err(format!("hangs for {} s", PATIENCE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
