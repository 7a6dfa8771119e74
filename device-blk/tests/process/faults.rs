//! Storage that fails, fills up, is slow, or changes behind the daemon's back.
//!
//! What must hold each time: the guest gets the right status, the daemon lives and goes on with
//! everything else, and the event is in its statistics and its log.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use api::device::BlkStats;
use faultfs::{Effect, Fault, FaultFs, Op};
use luks::{FormatOptions, NewKdf};
use nix::sys::signal::Signal;

use crate::control::Manager;
use crate::daemon::{Daemon, Place, await_true, numbered_sector};
use crate::driver::{Client, all_features};
use crate::io::pattern;
use crate::locks::has_tool;

const DISK_BYTES: u64 = 8 << 20;
const KEY: &str = "a key";

/// How a disk is stored and served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Raw,
    RawPageCache,
    Qcow2,
    Encrypted,
}

/// The file system, when there is FUSE here.
pub(crate) fn fault_fs() -> Option<FaultFs> {
    or_skip(FaultFs::mount())
}

/// The same of any mount.
pub(crate) fn or_skip(mounted: std::io::Result<FaultFs>) -> Option<FaultFs> {
    match mounted {
        Ok(fs) => Some(fs),
        Err(error) => {
            eprintln!("skipped: no FUSE here: {error}");
            None
        }
    }
}

/// An empty disk of `capacity_bytes` in `file`.
pub(crate) fn make(kind: Kind, file: &Path, capacity_bytes: u64) {
    let image = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(file)
        .unwrap();
    match kind {
        Kind::Raw | Kind::RawPageCache => image.set_len(capacity_bytes).unwrap(),
        Kind::Qcow2 => {
            let options = qcow2::CreateOptions {
                capacity_bytes,
                ..qcow2::CreateOptions::default()
            };
            qcow2::create(&image, &options).unwrap();
        }
        Kind::Encrypted => {
            let options = FormatOptions {
                kdf: NewKdf::Pbkdf2 { iterations: 1000 },
                ..FormatOptions::default()
            };
            image
                .set_len(options.payload_offset_bytes + capacity_bytes)
                .unwrap();
            luks::format(&image, KEY.as_bytes(), &options).unwrap();
        }
    }
}

/// `--disk` for disk `id` in `file`.
pub(crate) fn spec(place: &Place, kind: Kind, id: &str, file: &Path) -> String {
    let mut spec = format!(
        "id={id},path={},socket={},queues=2",
        file.display(),
        place.socket(id).display()
    );
    match kind {
        Kind::Raw => {}
        Kind::RawPageCache => spec.push_str(",page-cache"),
        Kind::Qcow2 => spec.push_str(",format=qcow2"),
        Kind::Encrypted => {
            std::fs::write(place.path("key"), KEY).unwrap();
            spec.push_str(&format!(",key-file={}", place.path("key").display()));
        }
    }
    spec
}

/// Disk `a` on a file system with faults, and a frontend with two queues.
pub(crate) struct Rig {
    /// Dropped first: a daemon can only end when nothing that it waits for is held.
    pub(crate) fs: FaultFs,
    pub(crate) client: Client,
    pub(crate) manager: Manager,
    pub(crate) daemon: Daemon,
}

impl Rig {
    pub(crate) fn new(kind: Kind) -> Option<Self> {
        Self::with(kind, "")
    }

    /// `more` is appended to the disk's options. Beside it there is a disk `b` without faults.
    fn with(kind: Kind, more: &str) -> Option<Self> {
        Some(Self::on(fault_fs()?, kind, more))
    }

    fn on(fs: FaultFs, kind: Kind, more: &str) -> Self {
        let place = Place::new();
        make(kind, &fs.underneath("a.img"), DISK_BYTES);
        place.image("b.img", 2048);
        let spec = spec(&place, kind, "a", &fs.path("a.img"));
        let daemon = Daemon::start(&place, &[&format!("{spec}{more}"), &place.disk("b")]);
        let client = Client::connect_with(&place.socket("a"), 2, all_features());
        Self {
            fs,
            client,
            manager: Manager::of(place),
            daemon,
        }
    }

    fn stats(&mut self) -> BlkStats {
        self.manager.get("a").blk.unwrap()
    }

    fn assert_errors(&mut self, op: &str, count: u64) {
        assert_reported(&mut self.manager, &self.daemon, op, count);
    }
}

/// Disk `a` had so many errors of this kind, and said so.
fn assert_reported(manager: &mut Manager, daemon: &Daemon, op: &str, count: u64) {
    let stats = manager.get("a").blk.unwrap();
    assert_eq!(stats.errors_by_op.get(op), Some(&count), "{stats:?}");
    let log = daemon.log();
    let op = format!("op=\"{op}\"");
    assert!(
        log.lines()
            .any(|line| line.contains("request failed") && line.contains(&op)),
        "{op}: {log}"
    );
}

#[test]
fn errors_of_the_storage_reach_the_guest_and_pass_with_their_cause() {
    for kind in [Kind::Raw, Kind::RawPageCache, Kind::Qcow2, Kind::Encrypted] {
        let Some(mut rig) = Rig::new(kind) else {
            return;
        };
        let data = pattern(1, 64 << 10);
        assert_eq!(rig.client.write(0, &data), 0);
        assert_eq!(rig.client.flush(), 0);

        // What was written is in the page cache.
        let offset = if kind == Kind::RawPageCache {
            4 << 20
        } else {
            0
        };
        for (op, fault) in [("read", Op::Read), ("write", Op::Write)] {
            let fault = rig.fs.inject(Fault::new(fault, Effect::Fail(libc::EIO)));
            for queue in [0, 1] {
                let result = match op {
                    "read" => rig.client.read_at(queue, offset, 0, 64 << 10),
                    _ => rig.client.write_at(queue, offset, 0, 64 << 10),
                };
                assert_eq!(result, -libc::EIO, "{kind:?} {op}");
            }
            assert!(rig.fs.hits(fault) > 0, "{kind:?} {op}");
            rig.fs.lift(fault);
            rig.assert_errors(op, 2);
        }
        assert_eq!(rig.client.write(0, &data), 0, "{kind:?}");
        assert!(rig.client.read(0, data.len()) == data, "{kind:?}");

        let fault = rig.fs.inject(Fault::new(Op::Sync, Effect::Fail(libc::EIO)));
        assert_eq!(rig.client.flush(), -libc::EIO, "{kind:?}");
        assert!(rig.fs.hits(fault) > 0, "{kind:?}");
        rig.fs.lift(fault);
        rig.assert_errors("flush", 1);
        // Pages that could not be written are taken for clean afterwards.
        let after = if kind == Kind::RawPageCache {
            -libc::EIO
        } else {
            0
        };
        assert_eq!(rig.client.flush(), after, "{kind:?}");
        rig.daemon.assert_alive();
    }
}

#[test]
fn error_in_one_place_leaves_the_rest_of_the_disk_alone() {
    let Some(mut rig) = Rig::new(Kind::Raw) else {
        return;
    };
    let fault = Fault::new(Op::Read, Effect::Fail(libc::EIO)).within(1 << 20..(1 << 20) + 4096);
    rig.fs.inject(fault);
    assert_eq!(rig.client.read_at(0, 1 << 20, 0, 4096), -libc::EIO);
    assert_eq!(rig.client.read_at(0, (1 << 20) + 4096, 0, 4096), 0);
    assert_eq!(rig.client.read_at(0, (1 << 20) - 4096, 0, 4096), 0);
    assert_eq!(
        rig.client.read_at(0, (1 << 20) - 4096, 0, 12 << 10),
        -libc::EIO,
        "a request that touches it"
    );
    assert_eq!(rig.client.write(1 << 20, &[1; 4096]), 0, "writes still go");
    rig.assert_errors("read", 2);
}

#[test]
fn transfers_that_stay_short_are_continued() {
    for kind in [Kind::Raw, Kind::RawPageCache, Kind::Qcow2, Kind::Encrypted] {
        let Some(fs) = or_skip(FaultFs::mount_synchronous()) else {
            return;
        };
        let mut rig = Rig::on(fs, kind, "");
        let offset = 1 << 20;
        // Metadata of qcow2 is written now.
        assert_eq!(rig.client.write(offset, &pattern(4, 256 << 10)), 0);
        for (op, short) in [
            (Op::Write, 4096),
            (Op::Write, 8192 + 512),
            (Op::Read, 4096),
            (Op::Read, 8192 + 512),
            (Op::Read, 1000),
        ] {
            let data = pattern(short as u64, 256 << 10);
            let fault = rig.fs.inject(Fault::new(op, Effect::Short(short)).times(3));
            assert_eq!(rig.client.write(offset, &data), 0, "{kind:?} {short}");
            let seen = rig.client.read(offset, data.len());
            assert!(seen == data, "{kind:?} {op:?} {short}");
            // What was just written is in the page cache.
            if (kind, op) != (Kind::RawPageCache, Op::Read) {
                assert!(rig.fs.hits(fault) > 0, "{kind:?} {op:?} {short}");
            }
            rig.fs.lift(fault);
        }
        rig.daemon.assert_alive();
    }
}

#[test]
fn full_storage_is_an_error_until_there_is_room_again() {
    for kind in [Kind::Raw, Kind::RawPageCache, Kind::Qcow2, Kind::Encrypted] {
        let Some(mut rig) = Rig::new(kind) else {
            return;
        };
        assert_eq!(rig.client.write(0, &pattern(1, 4096)), 0);
        assert_eq!(rig.client.flush(), 0);
        let full = [Op::Write, Op::Allocate]
            .map(|op| rig.fs.inject(Fault::new(op, Effect::Fail(libc::ENOSPC))));
        for offset in [1 << 20, 2 << 20, 4 << 20] {
            assert_eq!(
                rig.client.write(offset, &pattern(offset, 128 << 10)),
                -libc::EIO,
                "{kind:?}"
            );
        }
        assert!(rig.client.read(0, 4096) == pattern(1, 4096), "{kind:?}");
        for fault in full {
            rig.fs.lift(fault);
        }
        for offset in [1 << 20, 2 << 20, 4 << 20] {
            let data = pattern(offset, 128 << 10);
            assert_eq!(rig.client.write(offset, &data), 0, "{kind:?}");
            assert!(rig.client.read(offset, data.len()) == data, "{kind:?}");
        }
        assert_eq!(rig.client.flush(), 0, "{kind:?}");
        rig.assert_errors("write", 3);
        let log = rig.daemon.log();
        assert!(log.contains("No space left"), "{log}");
        if kind == Kind::Qcow2 {
            assert_consistent(rig);
        }
    }
}

/// Ends the daemon and has QEMU check the qcow2 image.
fn assert_consistent(mut rig: Rig) {
    if !has_tool("qemu-img") {
        return;
    }
    drop(rig.client);
    assert!(rig.daemon.end(Signal::SIGTERM).success());
    let check = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(rig.fs.underneath("a.img"))
        .output()
        .unwrap();
    // 3 is for leaked clusters.
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
}

#[test]
fn sparse_image_on_a_full_file_system_is_written_again_when_there_is_room() {
    use nix::mount::{MsFlags, mount};
    // Its mount namespace, which is gone with this thread.
    if fault_fs().is_none() {
        return;
    }
    let place = Place::new();
    let small = place.path("small");
    std::fs::create_dir(&small).unwrap();
    let resize = |flags, size: &str| {
        mount(Some("small"), &small, Some("tmpfs"), flags, Some(size)).unwrap();
    };
    resize(MsFlags::empty(), "size=4m");
    make(Kind::Raw, &small.join("a.img"), DISK_BYTES);
    let spec = spec(&place, Kind::Raw, "a", &small.join("a.img"));
    let mut daemon = Daemon::start(&place, &[&spec]);
    let mut client = Client::connect_with(&place.socket("a"), 2, all_features());
    let results: Vec<i32> = (0..8)
        .map(|index| client.write(index << 20, &pattern(index, 1 << 20)))
        .collect();
    assert_eq!(results[0], 0, "{results:?}");
    assert_eq!(results[7], -libc::EIO, "{results:?}");
    for (index, result) in results.iter().enumerate() {
        if *result == 0 {
            let index = index as u64;
            assert!(client.read(index << 20, 1 << 20) == pattern(index, 1 << 20));
        }
    }
    daemon.assert_alive();
    resize(MsFlags::MS_REMOUNT, "size=16m");
    for index in 0..8 {
        assert_eq!(client.write(index << 20, &pattern(index, 1 << 20)), 0);
        assert!(client.read(index << 20, 1 << 20) == pattern(index, 1 << 20));
    }
    assert_eq!(client.flush(), 0);
}

#[test]
fn disk_that_hangs_keeps_no_other_disk_and_no_other_queue_waiting() {
    for kind in [Kind::Raw, Kind::Qcow2, Kind::Encrypted] {
        let Some(mut rig) = Rig::new(kind) else {
            return;
        };
        let Rig {
            fs,
            client: a,
            manager,
            ..
        } = &mut rig;
        let mut b = Client::connect(&manager.place.socket("b"));
        // So that all is allocated, and the map of qcow2 is loaded.
        let data = pattern(1, 1 << 20);
        assert_eq!(a.write(0, &data), 0);
        assert_eq!(a.flush(), 0);
        assert!(a.read(0, data.len()) == data);

        let hold = fs.inject(Fault::new(Op::Write, Effect::Hold));
        const HELD: usize = 8;
        for id in 0..HELD {
            a.submit_write(0, id as u64 * 4096, id * 4096, 4096, id);
        }
        a.kick(0);
        fs.await_held(1);
        for round in 0..200 {
            assert_eq!(b.write(round * 512, &[round as u8; 512]), 0);
            assert_eq!(b.read(round * 512, 512), [round as u8; 512]);
            let at = 512 << 10;
            assert_eq!(a.read_at(1, at as u64, at, 4096), 0, "the other queue");
        }
        assert_eq!(b.flush(), 0);
        let listed = manager.get("a");
        assert_eq!(listed.inflight, HELD as u64, "{kind:?}");
        assert_eq!(manager.get("b").inflight, 0);

        fs.lift(hold);
        let mut done = 0;
        await_true("what was held completes", || {
            fs.release();
            while let Some((_, result)) = a.poll_completion(0) {
                assert_eq!(result, 0);
                done += 1;
            }
            done == HELD
        });
    }
}

#[test]
fn slow_requests_are_counted_and_logged() {
    let Some(mut rig) = Rig::with(Kind::Raw, ",slow-ms=500") else {
        return;
    };
    assert_eq!(rig.client.read_at(0, 0, 0, 4096), 0);
    assert_eq!(rig.stats().slow_requests, 0);
    let delay = Duration::from_millis(600);
    rig.fs
        .inject(Fault::new(Op::Read, Effect::Delay(delay)).within(4096..8192));
    let began = Instant::now();
    assert_eq!(rig.client.read_at(0, 4096, 0, 4096), 0);
    assert!(began.elapsed() >= delay);
    let stats = rig.stats();
    assert_eq!(stats.slow_requests, 1, "{stats:?}");
    assert!(stats.latency.unwrap().max_us >= 600_000.0);
    let log = rig.daemon.log();
    assert!(log.contains("slow request"), "{log}");
}

#[test]
fn image_truncated_behind_our_back_is_an_error_and_no_end() {
    for kind in [Kind::Raw, Kind::RawPageCache, Kind::Qcow2, Kind::Encrypted] {
        let place = Place::new();
        let path = place.path("a.img");
        make(kind, &path, DISK_BYTES);
        let mut daemon = Daemon::start(&place, &[&spec(&place, kind, "a", &path)]);
        let mut client = Client::connect_with(&place.socket("a"), 2, all_features());
        let mut manager = Manager::of(place);
        assert_eq!(client.write(0, &pattern(8, 4096)), 0);
        assert_eq!(client.write(4 << 20, &pattern(9, 1 << 20)), 0);
        assert_eq!(client.flush(), 0);
        let image = File::options().write(true).open(&path).unwrap();
        let kept = match kind {
            Kind::Encrypted => (16 << 20) + (4 << 20) + 1000,
            // Metadata and the first cluster.
            Kind::Qcow2 => 768 << 10,
            Kind::Raw | Kind::RawPageCache => (4 << 20) + 1000,
        };
        image.set_len(kept).unwrap();
        assert_eq!(
            client.read_at(0, 4 << 20, 0, 1 << 20),
            -libc::EIO,
            "{kind:?}"
        );
        assert_eq!(client.read_at(1, 0, 0, 4096), 0, "{kind:?}");
        assert!(client.buffer()[..4096] == pattern(8, 4096), "{kind:?}");
        assert_reported(&mut manager, &daemon, "read", 1);
        daemon.assert_alive();
    }
}

#[test]
fn image_swapped_behind_our_back_is_another_image() {
    let (first, second) = (Place::new(), Place::new());
    let image = first.image("a.img", 64);
    let mut old = Daemon::start(&first, &[&first.disk("a")]);
    let mut to_old = Client::connect(&first.socket("a"));
    assert_eq!(to_old.write(0, &[1; 512]), 0);

    std::fs::write(first.path("new.img"), [7; 64 * 512]).unwrap();
    std::fs::rename(first.path("new.img"), &image).unwrap();
    assert_eq!(to_old.write(512, &[2; 512]), 0);
    assert_eq!(to_old.flush(), 0);
    assert_eq!(to_old.read(0, 512), [1; 512]);
    assert_eq!(to_old.read(1024, 512), numbered_sector(2));

    let again = format!(
        "id=b,path={},socket={}",
        image.display(),
        second.socket("b").display()
    );
    let mut new = Daemon::start(&second, &[&again]);
    let mut to_new = Client::connect(&second.socket("b"));
    assert_eq!(to_new.read(512, 512), [7; 512]);
    assert_eq!(to_new.write(0, &[8; 512]), 0);
    assert_eq!(to_new.flush(), 0);
    assert_eq!(to_old.read(0, 512), [1; 512]);
    old.end(Signal::SIGKILL);
    assert_eq!(to_new.read(0, 512), [8; 512]);
    new.assert_alive();
}

/// Whether the process has this file open.
fn has_open(pid: u32, file: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    entries
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|target| target == file)
}

/// A killed daemon's write can still reach the image much later, and would undo what its successor
/// wrote to the same place.
#[test]
fn successor_waits_until_the_last_write_of_a_killed_daemon_is_over() {
    for kind in [Kind::Raw, Kind::Qcow2, Kind::Encrypted] {
        let Some(mut rig) = Rig::new(kind) else {
            return;
        };
        let image = rig.fs.path("a.img");
        assert_eq!(rig.client.write(0, &[1; 4096]), 0);
        assert_eq!(rig.client.flush(), 0);
        let hold = rig.fs.inject(Fault::new(Op::Write, Effect::Hold));
        rig.client.buffer()[..4096].fill(2);
        rig.client.submit_write(0, 0, 0, 4096, 7);
        rig.client.kick(0);
        rig.fs.await_held(1);
        rig.daemon.end(Signal::SIGKILL);
        assert_eq!(rig.fs.held(), 1, "the process is gone, its write is not");
        drop(rig.client);

        let place = rig.manager.place;
        let spec = spec(&place, kind, "a", &image);
        let mut refused = Daemon::spawn(&place, &[&spec], &["--lock-wait", "0.1"], |_| ());
        assert_eq!(refused.ended().code(), Some(1));
        assert!(refused.log().contains("in use"), "{}", refused.log());

        let mut successor = Daemon::spawn(&place, &[&spec], &["--lock-wait", "30"], |_| ());
        await_true("the successor has opened the image", || {
            has_open(successor.pid(), &image)
        });
        let watch_until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < watch_until {
            assert!(!successor.log().contains("serving"), "{}", successor.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(rig.fs.held(), 1);
        rig.fs.lift(hold);
        assert_eq!(rig.fs.release(), 1);
        await_true("the successor serves", || {
            successor.log().contains("serving")
        });
        let mut client = Client::connect_with(&place.socket("a"), 2, all_features());
        assert_eq!(client.read(0, 4096), [2; 4096], "the ghost came first");
        assert_eq!(client.write(0, &[3; 4096]), 0);
        assert_eq!(client.flush(), 0);
        assert_eq!(client.read(0, 4096), [3; 4096]);
        successor.assert_alive();
    }
}

/// The same for a file that is served by several queues at once, and written at random places.
#[test]
fn many_ghost_writes_are_all_waited_for() {
    let Some(mut rig) = Rig::new(Kind::Raw) else {
        return;
    };
    let image = rig.fs.path("a.img");
    let hold = rig.fs.inject(Fault::new(Op::Write, Effect::Hold));
    for queue in [0, 1] {
        for id in 0..16 {
            let at = (queue * 16 + id) * 4096;
            rig.client.buffer()[at..at + 4096].fill(id as u8 + 1);
            rig.client.submit_write(queue, at as u64, at, 4096, id);
        }
        rig.client.kick(queue);
    }
    rig.fs.await_held(32);
    rig.daemon.end(Signal::SIGKILL);
    drop(rig.client);
    let place = rig.manager.place;
    let spec = spec(&place, Kind::Raw, "a", &image);
    let successor = Daemon::spawn(&place, &[&spec], &["--lock-wait", "30"], |_| ());
    await_true("the successor has opened the image", || {
        has_open(successor.pid(), &image)
    });
    assert!(!successor.log().contains("serving"));
    rig.fs.lift(hold);
    assert_eq!(rig.fs.release(), 32);
    await_true("the successor serves", || {
        successor.log().contains("serving")
    });
    let mut stored = vec![0; 32 * 4096];
    File::open(rig.fs.underneath("a.img"))
        .unwrap()
        .read_exact_at(&mut stored, 0)
        .unwrap();
    for (index, block) in stored.chunks(4096).enumerate() {
        assert!(block.iter().all(|&byte| byte == (index % 16) as u8 + 1));
    }
}
