//! A daemon that is killed while a disk goes over to other files leaves a sound disk.
//!
//! Requests are kept in flight and, at a random instant, a snapshot with a commit or a mirror is
//! asked for; at another one the daemon gets SIGKILL. What is the disk then follows from the files
//! alone, as for a manager that comes back: the one with the mark, or the overlay that is there.
//! QEMU's tools look at all of them, and the disk has every write that was completed.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use api::device::{
    FdRef, JobState, SnapshotRequest, StartCommitRequest, StartMirrorRequest, Target,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::Status;

use crate::control::Manager;
use crate::daemon::Place;
use crate::jobs::job;
use crate::locks::has_tool;
use crate::qcow2_crash::{Disk, check};

const TOKEN: &str = "other";
/// Until something is asked for, and from then until the daemon's death, by operation.
const MAX_DELAY: Duration = Duration::from_millis(30);
const MAX_LIFE: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(1200)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// An overlay, which is merged again.
    SnapshotAndCommit,
    /// To an image of its own.
    Mirror,
}

impl Operation {
    /// Returns when it is over, or the daemon dead.
    fn carry_out(self, manager: &mut Manager, other: &Path) -> Result<(), Status> {
        let reference = FdRef {
            token: TOKEN.into(),
        };
        match self {
            Self::SnapshotAndCommit => {
                let request = SnapshotRequest {
                    id: "a".into(),
                    overlay_fd: Some(reference),
                    overlay_name: other.display().to_string(),
                };
                manager.disks(async |disks| disks.snapshot(request).await)?;
                let request = StartCommitRequest {
                    id: "a".into(),
                    job_id: "j".into(),
                    base_fd: None,
                };
                manager.disks(async |disks| disks.start_commit(request).await)?;
            }
            Self::Mirror => {
                let request = StartMirrorRequest {
                    id: "a".into(),
                    job_id: "j".into(),
                    target: Some(Target {
                        image_fd: Some(reference),
                        format: "qcow2".into(),
                        name: other.display().to_string(),
                        ..Target::default()
                    }),
                    auto_complete: true,
                    bytes_per_second: 0,
                };
                manager.disks(async |disks| disks.start_mirror(request).await)?;
            }
        }
        while matches!(
            job(manager, "j")?.state(),
            JobState::Running | JobState::Ready
        ) {
            thread::yield_now();
        }
        Ok(())
    }

    /// Which file is the disk, after a crash.
    fn current(self, first: &Path, other: &Path) -> PathBuf {
        let is_other = match self {
            Self::SnapshotAndCommit => !is_marked(first) && is_qcow2(other),
            Self::Mirror => is_marked(other),
        };
        if is_other { other } else { first }.to_owned()
    }
}

/// Whether the daemon left its mark: see `docs/device-blk.md`, "Jobs".
fn is_marked(image: &Path) -> bool {
    let path = CString::new(image.as_os_str().as_bytes()).unwrap();
    let name = c"user.mortise.current";
    // SAFETY: both are strings that end with NUL; no value is asked for.
    unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) > 0 }
}

/// Without attributes a manager could not tell what became of a mirror.
fn has_attributes(place: &Place) -> bool {
    let path = place.path("probe");
    File::create(&path).unwrap();
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let (name, value) = (c"user.probe", b"1");
    // SAFETY: two strings that end with NUL, and a value of the length given.
    let set = unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    set == 0
}

/// An overlay that was not finished is none yet.
fn is_qcow2(image: &Path) -> bool {
    let info = Command::new("qemu-img")
        .args(["info", "-U", "-f", "qcow2"])
        .arg(image)
        .output();
    info.unwrap().status.success()
}

fn kill_during(operation: Operation, kills: u64, seed: u64) {
    if !has_tool("qemu-img") {
        return;
    }
    let mut random = StdRng::seed_from_u64(seed);
    let (mut over, mut switched, mut completed) = (0, 0, 0);
    for kill in 0..kills {
        let place = Place::new();
        if !has_attributes(&place) {
            eprintln!("skipped: no extended attributes here");
            return;
        }
        let mut disk = Disk::create(&place, kill);
        let first = disk.top.clone();
        let other = place.path("other.qcow2");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&other)
            .unwrap();
        let (fds, socket) = (place.fds().display().to_string(), place.socket("a"));
        let daemon = disk.serve(&place, &["--fd-socket", &fds]);
        let mut manager = Manager::of(place);
        manager.send(TOKEN, file.as_fd());
        drop(file);
        let delay = random.random_range(Duration::ZERO..MAX_DELAY);
        let life = delay + random.random_range(Duration::ZERO..MAX_LIFE[operation as usize]);
        let is_over = thread::scope(|scope| {
            let operator = scope.spawn(|| {
                thread::sleep(delay);
                operation.carry_out(&mut manager, &other)
            });
            completed += disk.load_until_killed(daemon, &socket, life, &mut random);
            operator.join().unwrap().is_ok()
        });
        check(&first);
        disk.top = operation.current(&first, &other);
        check(&disk.top);
        over += u64::from(is_over);
        switched += u64::from(disk.top == other);
        disk.verify(&manager.place);
    }
    eprintln!(
        "{operation:?}: {kills} kills, {over} after the end, {switched} times the other file, \
         {completed} requests completed"
    );
    assert!(completed > kills, "the daemons lived too short");
}

#[test]
fn daemon_killed_in_a_snapshot_or_commit_leaves_a_sound_disk() {
    kill_during(Operation::SnapshotAndCommit, 12, 1);
}

#[test]
fn daemon_killed_in_a_mirror_leaves_a_sound_disk() {
    kill_during(Operation::Mirror, 8, 2);
}

#[test]
#[ignore = "minutes"]
fn hundreds_of_kills_in_jobs_leave_sound_disks() {
    kill_during(Operation::SnapshotAndCommit, 150, 3);
    kill_during(Operation::Mirror, 150, 4);
}
