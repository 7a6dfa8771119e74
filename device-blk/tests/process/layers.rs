//! Snapshots, commits and copies in qcow2, under a guest that writes; QEMU's tools judge what is in
//! the files.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use api::device::{
    FdRef, GetImageRequest, Image, Job, JobState, SnapshotRequest, StartCheckRequest,
    StartCommitRequest,
};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

use crate::control::Manager;
use crate::daemon::{Daemon, Place, read_image};
use crate::driver::Client;
use crate::jobs::{
    BLOCK, DISK_BLOCKS, DISK_BYTES, Writer, assert_is_an_instant, assert_is_final, await_job,
    backup, complete, disk, image_of, mirror, target,
};
use crate::locks::has_tool;

fn send_overlay(manager: &Manager, name: &str) -> SnapshotRequest {
    let path = manager.place.path(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let token = name.replace('.', "-");
    manager.send(&token, file.as_fd());
    SnapshotRequest {
        id: "a".into(),
        overlay_fd: Some(FdRef { token }),
        overlay_name: path.display().to_string(),
    }
}

fn snapshot(manager: &mut Manager, name: &str) -> Image {
    let request = send_overlay(manager, name);
    manager
        .disks(async |disks| disks.snapshot(request).await)
        .unwrap()
}

fn commit(manager: &mut Manager, job_id: &str, base: Option<&Path>) -> Result<Job, Status> {
    let base_fd = base.map(|path| {
        let file = File::options().read(true).write(true).open(path).unwrap();
        manager.send(job_id, file.as_fd());
        FdRef {
            token: job_id.into(),
        }
    });
    let request = StartCommitRequest {
        id: "a".into(),
        job_id: job_id.into(),
        base_fd,
    };
    manager.disks(async |disks| disks.start_commit(request).await)
}

fn qemu_img(args: &[&str], path: &Path) {
    let output = Command::new("qemu-img").args(args).arg(path).output();
    let output = output.unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

/// What QEMU reads from an image and all it is based on.
fn as_qemu_reads(place: &Place, name: &str) -> Vec<u8> {
    let raw = place.path("converted.raw");
    let image = place.path(name);
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    let output = Command::new("qemu-img")
        .args(convert)
        .args([&image, &raw])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    read_image(&raw, 0, DISK_BYTES as usize)
}

#[test]
fn snapshots_under_load_freeze_what_is_below_and_can_be_merged_again() {
    let (mut daemon, mut manager) = disk();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 4);
    writer.await_more(300);
    let image = snapshot(&mut manager, "one.qcow2");
    assert_eq!((image.format.as_str(), image.backing.len()), ("qcow2", 1));
    assert!(image.backing[0].name.ends_with("a.img"), "{image:?}");
    let frozen = image_of(&manager.place.path("a.img"));
    writer.await_more(300);
    let image = snapshot(&mut manager, "two.qcow2");
    assert_eq!(image.backing.len(), 2);
    writer.await_more(300);
    assert!(
        frozen == image_of(&manager.place.path("a.img")),
        "the base changed"
    );

    // The second overlay goes into the first again.
    commit(&mut manager, "c", None).unwrap();
    await_job(&mut manager, "c", JobState::Done);
    let request = GetImageRequest { id: "a".into() };
    let image = manager
        .disks(async |disks| disks.get_image(request).await)
        .unwrap();
    assert!(
        image.name.ends_with("one.qcow2") && image.backing.len() == 1,
        "{image:?}"
    );
    writer.await_more(300);
    let log = writer.stop();
    assert!(assert_is_an_instant(&frozen, &log) >= 300);
    assert!(frozen == image_of(&manager.place.path("a.img")));
    assert!(daemon.end(Signal::SIGTERM).success());
    if has_tool("qemu-img") {
        qemu_img(&["check", "-f", "qcow2"], &manager.place.path("one.qcow2"));
        assert_is_final(&as_qemu_reads(&manager.place, "one.qcow2"), &log);
    }
}

/// Whether anybody holds the byte of a disk, which a successor of its daemon waits for.
fn is_fenced(path: &Path) -> bool {
    /// Where such bytes begin; locks of QEMU's kind are before.
    const DISKS: i64 = 1 << 40;
    let file = File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: all zeroes is a lock of nothing.
    let mut query: libc::flock = unsafe { std::mem::zeroed() };
    query.l_type = libc::F_WRLCK as libc::c_short;
    query.l_whence = libc::SEEK_SET as libc::c_short;
    query.l_start = DISKS;
    // SAFETY: F_OFD_GETLK reads and writes one live flock.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut query) };
    assert_eq!(asked, 0);
    i32::from(query.l_type) != libc::F_UNLCK
}

#[test]
fn successor_waits_for_requests_on_every_layer_of_two_snapshots() {
    let (mut daemon, mut manager) = disk();
    snapshot(&mut manager, "one.qcow2");
    snapshot(&mut manager, "two.qcow2");
    let layers = ["a.img", "one.qcow2", "two.qcow2"].map(|name| manager.place.path(name));
    assert_eq!(layers.each_ref().map(|path| is_fenced(path)), [true; 3]);
    let to = target(&manager, "copy.raw", "raw");
    mirror(&mut manager, "m", to, false).unwrap();
    await_job(&mut manager, "m", JobState::Ready);
    complete(&mut manager, "m");
    assert!(is_fenced(&manager.place.path("copy.raw")));
    snapshot(&mut manager, "three.qcow2");
    assert!(is_fenced(&manager.place.path("copy.raw")));
    assert!(daemon.end(Signal::SIGTERM).success());
    assert_eq!(layers.each_ref().map(|path| is_fenced(path)), [false; 3]);
}

#[test]
fn image_below_is_merged_into_only_through_a_descriptor_that_can_write() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = Place::new();
    let base = place.path("base.img");
    File::create(&base).unwrap().set_len(DISK_BYTES).unwrap();
    let top = place.path("a.img");
    let name = base.display().to_string();
    let size = DISK_BYTES.to_string();
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &name])
        .arg(&top)
        .arg(&size)
        .status();
    assert!(status.unwrap().success());
    let fds = place.fds().display().to_string();
    let disk = format!("{},format=qcow2", place.disk("a"));
    let mut daemon = Daemon::start_with(&place, &[&disk], &["--fd-socket", &fds]);
    let mut manager = Manager::of(place);
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 8);
    writer.await_more(200);
    let error = commit(&mut manager, "c", None).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let other = manager.place.path("other.img");
    File::create(&other).unwrap().set_len(DISK_BYTES).unwrap();
    let error = commit(&mut manager, "c", Some(&other)).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(image_of(&base).iter().all(|&byte| byte == 0));
    commit(&mut manager, "c", Some(&base)).unwrap();
    await_job(&mut manager, "c", JobState::Done);
    writer.await_more(200);
    let log = writer.stop();
    assert_is_final(&image_of(&base), &log);
    daemon.assert_alive();
}

#[test]
fn mirror_to_qcow2_is_what_qemu_reads() {
    let (mut daemon, mut manager) = disk();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 2);
    writer.await_more(500);
    let to = target(&manager, "copy.qcow2", "qcow2");
    mirror(&mut manager, "m", to, false).unwrap();
    await_job(&mut manager, "m", JobState::Ready);
    complete(&mut manager, "m");
    writer.await_more(500);
    let check = StartCheckRequest {
        id: "a".into(),
        job_id: "check".into(),
        repair_leaks: true,
    };
    manager
        .disks(async |disks| disks.start_check(check).await)
        .unwrap();
    let checked = await_job(&mut manager, "check", JobState::Done);
    let found = checked.check.unwrap();
    assert_eq!(found.corruptions, 0, "{found:?}");
    let log = writer.stop();
    assert!(daemon.end(Signal::SIGTERM).success());
    if has_tool("qemu-img") {
        qemu_img(&["check", "-f", "qcow2"], &manager.place.path("copy.qcow2"));
        assert_is_final(&as_qemu_reads(&manager.place, "copy.qcow2"), &log);
    }
}

#[test]
fn increment_in_qcow2_restores_exactly_over_the_full_backup() {
    if !has_tool("qemu-img") {
        return;
    }
    let (_daemon, mut manager) = disk();
    let mut client = Client::connect(&manager.place.socket("a"));
    let pattern = |client: &mut Client, block: u64, byte: u8| {
        assert_eq!(client.write(block * BLOCK as u64, &[byte; BLOCK]), 0);
    };
    for block in 0..64 {
        pattern(&mut client, block * 7, 1);
    }
    let to = target(&manager, "full.qcow2", "qcow2");
    backup(&mut manager, "full", to, "", "b").unwrap();
    await_job(&mut manager, "full", JobState::Done);
    for block in 0..16 {
        pattern(&mut client, block * 14, 2);
    }
    // Zeroes over what the full backup has.
    assert_eq!(
        client.write_zeroes(64 * BLOCK as u64, 32 * BLOCK as u64, true),
        0
    );
    pattern(&mut client, 5000, 3);
    let to = target(&manager, "inc.qcow2", "qcow2");
    let job = backup(&mut manager, "inc", to, "b", "").unwrap();
    assert!(job.total_bytes < DISK_BYTES / 4, "{job:?}");
    await_job(&mut manager, "inc", JobState::Done);
    let expected = client.read(0, 1 << 20);
    let end = client.read(5000 * BLOCK as u64, BLOCK);
    let full: PathBuf = manager.place.path("full.qcow2");
    let name = full.display().to_string();
    let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &name];
    qemu_img(&rebase, &manager.place.path("inc.qcow2"));
    let restored = as_qemu_reads(&manager.place, "inc.qcow2");
    for (block, (restored, expected)) in restored
        .chunks(BLOCK)
        .zip(expected.chunks(BLOCK))
        .enumerate()
    {
        assert!(
            restored == expected,
            "block {block} has {} instead of {}",
            restored[0],
            expected[0]
        );
    }
    assert!(restored[5000 * BLOCK..5001 * BLOCK] == end);
}
