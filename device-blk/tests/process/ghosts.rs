//! Requests that outlive their process, and what happens where a daemon or its frontend would not
//! reckon with them.
//!
//! The storage is a FUSE file system that holds requests: they run on in the kernel when the daemon
//! that made them is long dead. What switches off the fence, the replay or the in-flight region is
//! here and in the crate `recovery`; no daemon can be told to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use api::device::BlkConfig;
use faultfs::{Effect, Fault, FaultFs, Op};
use guest::oracle::{BLOCK_LEN, Summary};
use nix::sys::signal::Signal;
use recovery::guest::Habits;
use recovery::host::{Disk, Fencing, Host, Readiness};
use recovery::storm::{self, Plan, Storm};
use recovery::transport::{Flaw, await_true as await_within};
use tempfile::NamedTempFile;

use crate::crash::{BLOCK_BYTES, Guest, SLOTS};
use crate::daemon::{DEADLINE, await_true};
use crate::faults::fault_fs;
use crate::io::pattern;

/// How long a successor is watched that must not begin.
const WATCH: Duration = Duration::from_millis(200);
/// What is read to touch memory, behind the verified blocks.
const SPARE_BYTES: u64 = 1 << 20;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_device-blk"))
}

fn habits() -> Habits {
    Habits {
        memory_bytes: 8 << 20,
        blocks: 512,
        patience: Duration::from_secs(3),
        ..Habits::default()
    }
}

fn plan(habits: Habits) -> Plan {
    Plan {
        kills: 5,
        pause: (Duration::from_millis(5), Duration::from_millis(20)),
        habits,
        ..Plan::default()
    }
}

fn storm(habits: Habits) -> storm::Outcome {
    let image = NamedTempFile::new().unwrap();
    let len_bytes = habits.blocks * BLOCK_LEN as u64 + SPARE_BYTES;
    image.as_file().set_len(len_bytes).unwrap();
    storm::run(program(), image.path(), &plan(habits)).unwrap()
}

#[test]
fn oracle_finds_nothing_wrong_under_kills() {
    for packed in [false, true] {
        let outcome = storm(Habits { packed, ..habits() });
        assert!(outcome.is_clean(), "packed: {packed}: {outcome:?}");
        assert_eq!(outcome.kills.len(), 5);
        let hit = outcome.kills.iter().filter(|kill| kill.in_flight > 0);
        assert!(hit.count() >= 4, "requests were in flight: {outcome:?}");
    }
}

/// A frontend that goes on at `avail_idx`: other VMMs did.
#[test]
fn oracle_fails_when_nothing_is_replayed() {
    let outcome = storm(Habits {
        flaw: Flaw::NoReplay,
        ..habits()
    });
    assert!(outcome.oracle.unanswered > 0, "{outcome:?}");
}

#[test]
fn oracle_fails_without_an_inflight_region() {
    let outcome = storm(Habits {
        flaw: Flaw::NoInflightRegion,
        ..habits()
    });
    let Summary {
        unanswered,
        unasked,
        lost,
        ..
    } = outcome.oracle;
    assert!(unanswered + unasked + lost > 0, "{outcome:?}");
}

/// Kills a daemon while the storage holds some of its writes, which come to an end much later.
fn storm_with_ghost_writes(fencing: Fencing) -> Option<Summary> {
    const HELD: usize = 4;
    /// Each of the few blocks is written many times.
    const ENOUGH: u64 = 3000;
    let fs = fault_fs()?;
    let habits = Habits {
        queues: 2,
        depth: 8,
        blocks: 64,
        flush_every: 0,
        patience: Duration::from_secs(15),
        ..habits()
    };
    let underneath = File::create_new(fs.underneath("a.img")).unwrap();
    underneath
        .set_len(habits.blocks * BLOCK_LEN as u64 + SPARE_BYTES)
        .unwrap();
    let image = fs.path("a.img");
    let plan = Plan {
        fencing,
        ..plan(habits)
    };
    let mut storm = Storm::gather(program(), &image, &plan).unwrap();
    let held = fs.inject(
        Fault::new(Op::Write, Effect::Hold)
            .of("a.img")
            .times(HELD as u64),
    );
    fs.await_held(HELD);
    let display = Arc::clone(storm.guest().display());
    match fencing {
        Fencing::Off => {
            storm.strike().unwrap();
            let enough = display.completed.load(Ordering::SeqCst) + ENOUGH;
            let much_is_written = || display.completed.load(Ordering::SeqCst) >= enough;
            await_within(DEADLINE, much_is_written).unwrap();
            fs.release();
        }
        Fencing::On => std::thread::scope(|scope| {
            let strike = scope.spawn(|| storm.strike().unwrap());
            let is_dead = || display.hang_ups_noticed() == 1;
            await_within(DEADLINE, is_dead).unwrap();
            let watched = Instant::now();
            while watched.elapsed() < WATCH {
                let first = display.first_completion(1);
                assert_eq!(first, None, "a successor began while ghosts ran");
                std::thread::sleep(Duration::from_millis(5));
            }
            fs.release();
            strike.join().unwrap();
        }),
    }
    let outcome = storm.calm(&image, None).unwrap();
    assert_eq!(fs.hits(held), HELD as u64);
    Some(outcome.oracle)
}

#[test]
fn late_writes_of_a_killed_daemon_are_waited_for() {
    if let Some(oracle) = storm_with_ghost_writes(Fencing::On) {
        assert!(oracle.is_clean(), "{oracle}");
    }
}

#[test]
fn oracle_fails_without_the_fence() {
    if let Some(oracle) = storm_with_ghost_writes(Fencing::Off) {
        assert!(oracle.lost > 0, "{oracle}");
    }
}

/// A disk on storage that holds one read of a killed daemon, and a guest that gives the memory to
/// something else as soon as the read has completed for it.
struct GhostRead {
    fs: FaultFs,
    host: Host,
    guest: Guest,
}

impl GhostRead {
    const REUSED: [u8; BLOCK_BYTES as usize] = [0x11; BLOCK_BYTES as usize];

    /// The daemon is dead when this returns.
    fn haunt(fencing: Fencing, read_only: bool) -> Option<Self> {
        let fs = fault_fs()?;
        let underneath = File::create_new(fs.underneath("a.img")).unwrap();
        underneath.set_len(SLOTS * BLOCK_BYTES).unwrap();
        underneath.write_all_at(&Self::content(), 0).unwrap();
        let disk = Disk {
            config: BlkConfig {
                read_only,
                ..BlkConfig::default()
            },
            ..Disk::raw(&fs.path("a.img"), 1)
        };
        let mut host = Host::new(program(), &[disk], Readiness::Spare, fencing).unwrap();
        let mut daemon = host.serve().unwrap();
        let mut guest = Guest::boot_at(host.socket(0));
        fs.inject(Fault::new(Op::Read, Effect::Hold).of("a.img").times(1));
        guest.submit_read(0);
        fs.await_held(1);
        host.prepare().unwrap();
        daemon.signal(Signal::SIGKILL).unwrap();
        daemon.ended().unwrap();
        Some(Self { fs, host, guest })
    }

    fn content() -> Vec<u8> {
        pattern(7, BLOCK_BYTES as usize)
    }

    /// The next daemon serves while the ghost runs; what the reused memory holds in the end.
    fn go_on_unfenced(mut self) -> Vec<u8> {
        let _daemon = self.host.serve().unwrap();
        self.reuse_memory();
        self.fs.release();
        let reused = || self.guest.data(0) == Self::REUSED;
        let _ = await_within(Duration::from_secs(5), || !reused());
        self.guest.data(0)
    }

    /// The same with a fence: nothing begins until the ghost has ended.
    fn go_on_fenced(mut self) -> Vec<u8> {
        let _daemon = std::thread::scope(|scope| {
            let host = &mut self.host;
            let next = scope.spawn(|| host.serve().unwrap());
            let watched = Instant::now();
            while watched.elapsed() < WATCH {
                assert!(!next.is_finished(), "a successor began while a ghost ran");
                self.guest.reap();
                assert_eq!(self.guest.pending, 1);
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(self.fs.release(), 1);
            next.join().unwrap()
        });
        self.reuse_memory();
        assert_eq!(self.fs.held(), 0);
        self.guest.data(0)
    }

    fn reuse_memory(&mut self) {
        await_true("the read completes", || {
            self.guest.reap();
            self.guest.pending == 0
        });
        assert!(self.guest.data(0) == Self::content(), "it was replayed");
        self.guest.reuse(0, &Self::REUSED);
    }
}

#[test]
fn late_reads_of_a_killed_daemon_are_waited_for() {
    for read_only in [false, true] {
        if let Some(haunted) = GhostRead::haunt(Fencing::On, read_only) {
            let found = haunted.go_on_fenced();
            assert!(found == GhostRead::REUSED, "read-only: {read_only}");
        }
    }
}

#[test]
fn without_the_fence_late_reads_overwrite_memory_in_use() {
    for read_only in [false, true] {
        if let Some(haunted) = GhostRead::haunt(Fencing::Off, read_only) {
            let found = haunted.go_on_unfenced();
            assert!(found == GhostRead::content(), "read-only: {read_only}");
        }
    }
}
