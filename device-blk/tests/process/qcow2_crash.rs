//! A daemon that is killed while it allocates leaves a sound image with all that was completed.
//!
//! A third party's driver keeps writes, discards and flushes in flight; at a random instant the
//! daemon gets SIGKILL. Then QEMU's tools look at the image: `qemu-img check` may find leaks and
//! nothing worse, and every sector has what was completed last, or what was in flight.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use qcow2::{BackingRef, CreateOptions, Repair};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::crash::{BLOCK_BYTES, Guest, SLOTS};
use crate::daemon::{Daemon, Place, await_some, await_true};
use crate::driver::Client;
use crate::io::pattern;
use crate::locks::has_tool;

const SECTOR_BYTES: usize = 512;
const DISK_SECTORS: usize = 48 << 11;
const IN_FLIGHT: usize = 24;
/// Longest write; also what each request in flight has of the client's buffer.
const MAX_SECTORS: usize = 256;
/// Discards are multiples of this, which is a multiple of every cluster size that is used.
const DISCARD_SECTORS: usize = 4096;
/// The longest that a daemon lives.
const MAX_LIFE: Duration = Duration::from_millis(100);
/// Kills before another image is made.
const KILLS_OF_AN_IMAGE: u64 = 25;

/// What a sector holds: 0 for the backing image's content, `u64::MAX` for zeroes, else the
/// number of the write.
type Version = u64;
const BASE: Version = 0;
const ZEROES: Version = u64::MAX;

fn fill_sector(into: &mut [u8], sector: usize, version: Version) {
    if version == ZEROES {
        into.fill(0);
        return;
    }
    for word in into.chunks_exact_mut(16) {
        word[..8].copy_from_slice(&(sector as u64).to_le_bytes());
        word[8..].copy_from_slice(&version.to_le_bytes());
    }
}

/// An image, and what its sectors must hold.
pub(crate) struct Disk {
    pub(crate) top: PathBuf,
    /// Set for the daemon.
    environment: Option<&'static str>,
    settled: Vec<Version>,
    in_flight: Vec<Option<Version>>,
    next_version: Version,
}

struct Request {
    sectors: std::ops::Range<usize>,
    version: Version,
}

impl Disk {
    pub(crate) fn create(place: &Place, number: u64) -> Self {
        let cluster_bytes = [65536, 4096, 512, 2 << 20][number as usize % 4];
        let has_base = number.is_multiple_of(2) == (number / 4).is_multiple_of(2);
        let base = place.path(&format!("base-{number}.raw"));
        if has_base {
            let mut bytes = vec![0; DISK_SECTORS * SECTOR_BYTES];
            for (sector, bytes) in bytes.chunks_exact_mut(SECTOR_BYTES).enumerate() {
                fill_sector(bytes, sector, BASE);
            }
            std::fs::write(&base, bytes).unwrap();
        }
        let top = place.path(&format!("top-{number}.qcow2"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&top)
            .unwrap();
        let options = CreateOptions {
            capacity_bytes: (DISK_SECTORS * SECTOR_BYTES) as u64,
            cluster_bytes,
            backing: has_base.then(|| BackingRef {
                name: base.file_name().unwrap().to_str().unwrap().into(),
                format: Some("raw".into()),
            }),
            ..CreateOptions::default()
        };
        qcow2::create(&file, &options).unwrap();
        let first = if has_base { BASE } else { ZEROES };
        Self {
            top,
            environment: None,
            settled: vec![first; DISK_SECTORS],
            in_flight: vec![None; DISK_SECTORS],
            next_version: 1,
        }
    }

    /// Keeps requests in flight for a random time, and then kills the daemon.
    fn load_and_kill(&mut self, place: &Place, random: &mut StdRng) -> u64 {
        let life = random.random_range(Duration::ZERO..MAX_LIFE);
        let daemon = self.serve(place, &[]);
        self.load_until_killed(daemon, &place.socket("a"), life, random)
    }

    pub(crate) fn serve(&self, place: &Place, more: &[&str]) -> Daemon {
        let spec = format!(
            "id=a,path={},format=qcow2,socket={}",
            self.top.display(),
            place.socket("a").display()
        );
        Daemon::start_adjusted(place, &[&spec], more, |command| {
            if let Some(name) = self.environment {
                command.env(name, "1");
            }
        })
    }

    pub(crate) fn load_until_killed(
        &mut self,
        mut daemon: Daemon,
        socket: &Path,
        life: Duration,
        random: &mut StdRng,
    ) -> u64 {
        let mut client = Client::connect(socket);
        let mut requests: Vec<Option<Request>> = (0..IN_FLIGHT).map(|_| None).collect();
        let mut completed = 0;
        let start = Instant::now();
        while start.elapsed() < life {
            for (id, request) in requests.iter_mut().enumerate() {
                if request.is_none() {
                    *request = self.submit(&mut client, id, random);
                }
            }
            client.kick(0);
            completed += self.settle(&mut client, &mut requests);
        }
        daemon.end(Signal::SIGKILL);
        completed + self.settle(&mut client, &mut requests)
    }

    fn submit(&mut self, client: &mut Client, id: usize, random: &mut StdRng) -> Option<Request> {
        let kind = random.random_range(0..100);
        if kind < 4 {
            client.submit_flush(0, id);
            return Some(Request {
                sectors: 0..0,
                version: ZEROES,
            });
        }
        let discard = kind < 10;
        let sectors = if discard {
            let slots = DISK_SECTORS / DISCARD_SECTORS;
            let start = random.random_range(0..slots) * DISCARD_SECTORS;
            start..start + DISCARD_SECTORS
        } else {
            let len = match random.random_range(0..3) {
                0 => 8,
                1 => random.random_range(1..=32),
                _ => random.random_range(1..=MAX_SECTORS),
            };
            let start = random.random_range(0..=DISK_SECTORS - len);
            start..start + len
        };
        if self.in_flight[sectors.clone()].iter().any(Option::is_some) {
            return None;
        }
        let offset = (sectors.start * SECTOR_BYTES) as u64;
        let version = if discard { ZEROES } else { self.next_version };
        self.in_flight[sectors.clone()].fill(Some(version));
        if discard {
            client.submit_discard(0, offset, (sectors.len() * SECTOR_BYTES) as u64, id);
        } else {
            self.next_version += 1;
            let at = id * MAX_SECTORS * SECTOR_BYTES;
            let data = &mut client.buffer()[at..at + sectors.len() * SECTOR_BYTES];
            for (sector, bytes) in sectors.clone().zip(data.chunks_exact_mut(SECTOR_BYTES)) {
                fill_sector(bytes, sector, version);
            }
            client.submit_write(0, offset, at, sectors.len() * SECTOR_BYTES, id);
        }
        Some(Request { sectors, version })
    }

    /// Takes what has completed.
    fn settle(&mut self, client: &mut Client, requests: &mut [Option<Request>]) -> u64 {
        let mut completed = 0;
        while let Some((id, result)) = client.poll_completion(0) {
            let request = requests[id].take().expect("a request completes once");
            assert_eq!(result, 0, "{:?}", request.sectors);
            self.settled[request.sectors.clone()].fill(request.version);
            self.in_flight[request.sectors].fill(None);
            completed += 1;
        }
        completed
    }

    /// Reads the image as QEMU does and compares.
    pub(crate) fn verify(&mut self, place: &Place) {
        let raw = place.path("as-qemu-reads-it.raw");
        let converted = Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&self.top, &raw])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&converted.stderr);
        assert!(converted.status.success(), "{said}");
        let content = std::fs::read(&raw).unwrap();
        assert_eq!(content.len(), DISK_SECTORS * SECTOR_BYTES);
        let mut expected = [0; SECTOR_BYTES];
        for (sector, found) in content.chunks_exact(SECTOR_BYTES).enumerate() {
            let candidates = [Some(self.settled[sector]), self.in_flight[sector].take()];
            let matching = candidates.into_iter().flatten().find(|&version| {
                fill_sector(&mut expected, sector, version);
                expected == found
            });
            self.settled[sector] = matching.unwrap_or_else(|| {
                panic!(
                    "sector {sector} of {}: {candidates:?} were possible, found {:?}",
                    self.top.display(),
                    &found[..16]
                )
            });
        }
    }
}

/// Exit status of `qemu-img check`, once what the killed daemon had in flight is over.
pub(crate) fn check(image: &Path) -> i32 {
    await_some("the locks of the killed daemon fall", || {
        let checked = Command::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(image)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&checked.stderr);
        if said.contains("lock") {
            return None;
        }
        let code = checked.status.code().unwrap();
        // 0: nothing; 3: leaks alone.
        assert!(
            matches!(code, 0 | 3),
            "{}: {}{said}",
            image.display(),
            String::from_utf8_lossy(&checked.stdout)
        );
        Some(code)
    })
}

fn kill_and_look(kills: u64, seed: u64) {
    kill_with(kills, seed, None);
}

fn kill_with(kills: u64, seed: u64, environment: Option<&'static str>) {
    if !has_tool("qemu-img") {
        return;
    }
    let mut random = StdRng::seed_from_u64(seed);
    let mut place = Place::new();
    let (mut disk, mut images) = (Disk::create(&place, 0), 1);
    let (mut completed, mut with_leaks) = (0, 0);
    for kill in 0..kills {
        // The short tier sees every kind of image, too.
        let per_image = KILLS_OF_AN_IMAGE.min(kills / 8 + 1);
        if kill > 0 && kill.is_multiple_of(per_image) {
            place = Place::new();
            disk = Disk::create(&place, images);
            images += 1;
        }
        disk.environment = environment;
        completed += disk.load_and_kill(&place, &mut random);
        if check(&disk.top) == 3 {
            with_leaks += 1;
        }
        disk.verify(&place);
        if kill % 5 == 4 {
            let file = File::options().read(true).write(true).open(&disk.top);
            let report = qcow2::check(&file.unwrap(), Repair::Leaks).unwrap();
            assert_eq!(report.repaired_clusters, report.leaked_clusters);
            assert_eq!(check(&disk.top), 0, "repaired");
        }
    }
    eprintln!(
        "{kills} kills of {images} images, {completed} requests completed, \
         {with_leaks} times leaks, never a corruption"
    );
    assert!(
        completed > kills,
        "the daemons lived too short to do anything"
    );
}

#[test]
fn killed_daemon_leaves_a_sound_qcow2_image() {
    kill_and_look(25, 1);
}

/// A daemon that counts clusters after it uses them is not sound, and must not look so.
#[test]
#[cfg(debug_assertions)]
fn wrong_order_of_writes_is_found() {
    if !has_tool("qemu-img") {
        return;
    }
    let broken = || kill_with(25, 1, Some("MORTISE_TEST_COUNT_LATE"));
    let found = std::panic::catch_unwind(broken).expect_err("25 kills found nothing");
    let said = found.downcast_ref::<String>().map_or("", String::as_str);
    assert!(said.contains("errors were found on the image"), "{said}");
}

#[test]
#[ignore = "minutes"]
fn thousand_kills_leave_sound_qcow2_images() {
    kill_and_look(1000, 2);
}

#[test]
fn requests_of_a_killed_daemon_are_run_again_on_a_qcow2_image() {
    if !has_tool("qemu-img") {
        return;
    }
    for cluster_size in ["64k", "4k", "512", "2M"] {
        run_again(cluster_size);
    }
}

fn qemu_img(args: &[&str], paths: &[&Path]) {
    let output = Command::new("qemu-img").args(args).args(paths).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {args:?}: {said}");
}

/// The first round allocates, the second finds its clusters there; the daemon is killed in both.
fn run_again(cluster_size: &str) {
    let place = Place::new();
    place.image("base.img", SLOTS * BLOCK_BYTES / 512);
    let (image, raw) = (place.path("a.img"), place.path("read.raw"));
    let options = format!("cluster_size={cluster_size}");
    let create = ["create", "-q", "-f", "qcow2", "-o", &options];
    let overlay = [&create[..], &["-b", "base.img", "-F", "raw"]].concat();
    qemu_img(&overlay, &[&image]);
    let spec = format!("{},format=qcow2", place.disk("a"));
    let mut daemon = Daemon::start(&place, &[&spec]);
    let mut guest = Guest::boot(&place);
    for round in 0..2 {
        for slot in 0..SLOTS {
            let data = pattern(round * SLOTS + slot, BLOCK_BYTES as usize);
            guest.submit(slot, &data);
        }
        let mut completed = 0;
        await_true("some writes complete", || {
            completed += guest.reap();
            completed >= 5 * cluster_size.len()
        });
        daemon.end(Signal::SIGKILL);
        daemon = Daemon::start(&place, &[&spec]);
        await_true("every write completes", || {
            guest.reap();
            guest.pending == 0
        });
        // The daemon is idle, and everything it did is in the file.
        qemu_img(
            &["convert", "-U", "-f", "qcow2", "-O", "raw"],
            &[&image, &raw],
        );
        let content = std::fs::read(&raw).unwrap();
        for (slot, found) in (0..SLOTS).zip(content.chunks_exact(BLOCK_BYTES as usize)) {
            let expected = pattern(round * SLOTS + slot, BLOCK_BYTES as usize);
            assert!(
                found == expected,
                "{cluster_size}, round {round}, slot {slot}"
            );
        }
    }
    guest.link.pause(Duration::from_secs(10));
    assert!(daemon.end(Signal::SIGTERM).success(), "{}", daemon.log());
    check(&image);
}
