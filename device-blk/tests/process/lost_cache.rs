//! A daemon dies together with the page cache: the machine has lost its power. What the guest had
//! flushed is there all the same, and the oracle sees where it is not.
//!
//! The storage is a FUSE file system that keeps what was not flushed in memory, and loses a part of it,
//! each page by chance: caches write back when they like.

use std::path::Path;
use std::sync::atomic::Ordering;

use api::device::BlkConfig;
use faultfs::{Effect, Fault, FaultFs, Op};
use guest::oracle::{BLOCK_LEN, Ledger, Summary};
use nix::sys::signal::Signal;
use recovery::guest::{Guest, Habits};
use recovery::host::{Disk, Fencing, Host, Readiness};
use recovery::random::Random;
use recovery::transport::await_true as await_within;

use crate::daemon::DEADLINE;
use crate::driver::Client;
use crate::faults::{Kind, make, or_skip};

const BLOCKS: u64 = 256;
/// Survived before the one that takes the cache along.
const KILLS: u64 = 2;
/// Requests between two kills.
const ENOUGH: u64 = 1500;
/// A flush among so many requests: seldom, because one that is in flight at the end is carried out.
const FLUSH_EVERY: u64 = 200;

fn config(kind: Kind) -> BlkConfig {
    let format = if kind == Kind::Qcow2 { "qcow2" } else { "" };
    BlkConfig {
        page_cache: kind == Kind::RawPageCache,
        format: format.to_owned(),
        ..BlkConfig::default()
    }
}

/// What is found after a power cut.
struct Found {
    /// Pages that were lost.
    lost_pages: u64,
    /// When what was flushed is asked for.
    flushed: Summary,
    /// When all that was acknowledged is asked for.
    acknowledged: Summary,
}

/// Kills the daemon of a disk under load a few times, the last time together with its host.
fn cut_power(fs: &FaultFs, kind: Kind, seed: u64) -> Found {
    let image = fs.path("a.img");
    let disk = Disk {
        config: config(kind),
        ..Disk::raw(&image, 2)
    };
    let program = Path::new(env!("CARGO_BIN_EXE_device-blk"));
    let mut host = Host::new(program, &[disk], Readiness::Cold, Fencing::On).unwrap();
    let mut daemon = host.serve().unwrap();
    let habits = Habits {
        queues: 2,
        depth: 8,
        memory_bytes: 8 << 20,
        blocks: BLOCKS,
        flush_every: FLUSH_EVERY,
        // A page cache shows who reads what is being written a mixture, byte by byte.
        writes_percent: match kind {
            Kind::RawPageCache => 100,
            _ => 50,
        },
        seed,
        ..Habits::default()
    };
    let guest = Guest::boot(host.socket(0), &habits).unwrap();
    let mut random = Random::new(seed);
    for kill in 0..=KILLS {
        let display = guest.display();
        let enough = display.completed.load(Ordering::SeqCst) + ENOUGH + random.below(100);
        let has_worked = || display.completed.load(Ordering::SeqCst) >= enough;
        await_within(DEADLINE, || has_worked() || display.has_failed()).unwrap();
        if display.has_failed() {
            let ledger = guest.abandon();
            panic!("kill {kill}: {}\n{}", ledger.summary(), daemon.log());
        }
        daemon.signal(Signal::SIGKILL).unwrap();
        daemon.ended().unwrap();
        if kill < KILLS {
            daemon = host.serve().unwrap();
        }
    }
    let ledger = guest.abandon();
    assert!(ledger.summary().is_clean(), "{}", ledger.summary());
    assert!(ledger.summary().flushes > 10, "{}", ledger.summary());
    let lost_pages = fs.forget(|| random.below(3) > 0).unwrap();
    let _next = host.serve().unwrap();
    let content = read_all(host.socket(0));
    let check = |mut ledger: Ledger, check: fn(&mut Ledger, u64, &[u8])| {
        for (block, content) in (0..).zip(content.chunks_exact(BLOCK_LEN)) {
            check(&mut ledger, block, content);
        }
        ledger.summary().clone()
    };
    Found {
        lost_pages,
        flushed: check(ledger.clone(), Ledger::check_flushed),
        acknowledged: check(ledger, Ledger::check),
    }
}

fn read_all(socket: &Path) -> Vec<u8> {
    const CHUNK_BYTES: u64 = 64 << 10;
    let mut client = Client::connect(socket);
    let offsets = (0..BLOCKS * BLOCK_LEN as u64).step_by(CHUNK_BYTES as usize);
    offsets
        .flat_map(|offset| client.read(offset, CHUNK_BYTES as usize))
        .collect()
}

fn volatile(kind: Kind) -> Option<FaultFs> {
    let fs = or_skip(FaultFs::mount_volatile())?;
    make(kind, &fs.underneath("a.img"), BLOCKS * BLOCK_LEN as u64);
    Some(fs)
}

fn flushed_writes_survive(kind: Kind) {
    let (mut lost_pages, mut lost_writes) = (0, 0);
    for seed in 1..=3 {
        let Some(fs) = volatile(kind) else { return };
        let found = cut_power(&fs, kind, seed);
        assert!(
            found.flushed.is_clean(),
            "{kind:?}, seed {seed}: {}",
            found.flushed
        );
        lost_pages += found.lost_pages;
        lost_writes += found.acknowledged.lost;
    }
    assert!(
        lost_pages > 0 && lost_writes > 0,
        "what was not flushed was lost: else this shows nothing"
    );
}

#[test]
fn flushed_writes_survive_the_daemon_and_the_page_cache() {
    flushed_writes_survive(Kind::Raw);
}

#[test]
fn flushed_writes_through_the_page_cache_survive_it() {
    flushed_writes_survive(Kind::RawPageCache);
}

#[test]
fn flushed_writes_to_a_qcow2_image_survive_the_daemon_and_the_page_cache() {
    flushed_writes_survive(Kind::Qcow2);
}

#[test]
fn oracle_fails_when_flushes_are_acknowledged_and_not_done() {
    let Some(fs) = volatile(Kind::Raw) else {
        return;
    };
    let lying = fs.inject(Fault::new(Op::Sync, Effect::Skip));
    let found = cut_power(&fs, Kind::Raw, 3);
    assert!(fs.hits(lying) > 10);
    assert!(found.flushed.lost > 0, "{}", found.flushed);
}
