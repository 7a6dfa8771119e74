//! Our daemon is killed again and again under a frontend that is not ours: QEMU connects again, and its
//! guest, which verifies every block, sees nothing but latency.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use guest::oracle::Summary;
use guest::plan::{ENOUGH, End, Job, Plan};
use guest::report::Report;

use crate::guest_run;
use crate::process::Process;
use crate::qemu::Qemu;
use crate::site;

const LEN_BYTES: u64 = 4 << 20;
const SEED: u64 = 0x5eed_0005;
/// Requests between two kills, some of them by chance.
const ENOUGH_REQUESTS: u64 = 200;
/// Bounds the test, not the recovery.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn guest_of_qemu_survives_kills_of_device_blk() {
    survive(3);
}

#[test]
#[ignore = "long: a minute of kills"]
fn guest_of_qemu_survives_twenty_kills_of_device_blk() {
    survive(20);
}

fn survive(kills: u64) {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let file = std::fs::File::create(dir.join("a.raw")).expect("an image can be created");
    file.set_len(4 * LEN_BYTES).expect("an image has a size");
    let mut blk = device_blk(dir);
    let plan = Plan {
        root: None,
        jobs: vec![Job::Oracle {
            device: "vda".into(),
            seed: SEED,
            bytes: LEN_BYTES,
            seconds: 600,
        }],
        end: End::PowerOff,
    };
    let mut qemu = Qemu::new(&plan)
        .reconnecting()
        .disk_with(&dir.join("a.vu"), "num-queues=2")
        .start_listening(dir);
    guest_run::wait_for_line(&mut qemu, "\"job\":\"oracle\"", 1);
    for kill in 0..kills {
        let enough = requests(&last_of(&qemu)) + ENOUGH_REQUESTS + (kill * 37) % 101;
        await_progress(&qemu, &blk, enough);
        blk.kill();
        blk = device_blk(dir);
    }
    let enough = requests(&last_of(&qemu)) + ENOUGH_REQUESTS;
    await_progress(&qemu, &blk, enough);
    qemu.tell(ENOUGH);
    let reports = guest_run::finish(&mut qemu);
    let ends = reports.iter().rev().find_map(|report| match report {
        Report::Oracle {
            last: true,
            summary,
            latency,
            ..
        } => Some((summary, latency)),
        _ => None,
    });
    let (summary, latency) = ends.expect("the guest says what it found");
    println!("{kills} kills: {summary}; {latency:?}");
    assert!(summary.is_clean(), "{summary}");
    blk.terminate(Duration::from_secs(10));
}

/// The next one listens where the last one did.
fn device_blk(dir: &Path) -> Process {
    let control = dir.join("blk.sock");
    let mut command = Command::new(site::program("device-blk"));
    command
        .arg("--control-socket")
        .arg(&control)
        .arg("--disk")
        .arg(format!(
            "id=a,path={},socket={},queues=2",
            dir.join("a.raw").display(),
            dir.join("a.vu").display()
        ));
    let mut blk = Process::spawn(dir, "device-blk", &mut command);
    blk.wait_for_socket(&control);
    blk
}

fn last_of(qemu: &Process) -> Summary {
    let output = qemu.output();
    let reports = guest_run::reports(&output);
    let found = reports.into_iter().rev().find_map(|report| match report {
        Report::Oracle { summary, .. } => Some(summary),
        _ => None,
    });
    found.unwrap_or_default()
}

fn requests(summary: &Summary) -> u64 {
    summary.reads + summary.writes
}

fn await_progress(qemu: &Process, blk: &Process, wanted: u64) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let summary = last_of(qemu);
        assert!(summary.is_clean(), "{summary}");
        if requests(&summary) >= wanted {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the guest does not go on: {summary}\n{}\n{}",
            qemu.output(),
            blk.output()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
