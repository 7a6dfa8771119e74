//! Encrypted disks are copied while they are used, to targets that are encrypted as well.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use api::device::{FdRef, JobState, SnapshotRequest, Target};
use luks::{FormatOptions, Limits, NewKdf, Volume};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::control::Manager;
use crate::daemon::{Daemon, Place};
use crate::jobs::{
    DISK_BLOCKS, DISK_BYTES, Writer, assert_is_an_instant, assert_is_final, await_job, backup,
    complete, mirror, target,
};

const PAYLOAD_OFFSET_BYTES: u64 = 16 << 20;

/// A volume that `key` opens.
fn volume(place: &Place, name: &str, key: &str) -> PathBuf {
    let path = place.path(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.set_len(PAYLOAD_OFFSET_BYTES + DISK_BYTES).unwrap();
    let options = FormatOptions {
        kdf: NewKdf::Pbkdf2 { iterations: 1000 },
        ..FormatOptions::default()
    };
    luks::format(&file, key.as_bytes(), &options).unwrap();
    path
}

/// What a volume holds, without the daemon.
fn content(image: &Path, key: &str) -> Vec<u8> {
    let file = File::open(image).unwrap();
    let volume = Volume::open(&file, key.as_bytes(), Limits::default()).unwrap();
    let mut sectors = vec![0; DISK_BYTES as usize];
    file.read_exact_at(&mut sectors, volume.payload_offset_bytes)
        .unwrap();
    volume.cipher.decrypt(0, &mut sectors);
    sectors
}

/// Overwritten: a volume's free space reads as noise.
fn zeroed(place: &Place) {
    let mut client = crate::driver::Client::connect(&place.socket("a"));
    for part in 0..DISK_BYTES >> 20 {
        assert_eq!(client.write_zeroes(part << 20, 1 << 20, false), 0);
    }
    assert_eq!(client.flush(), 0);
}

fn start() -> (Daemon, Manager) {
    let place = Place::new();
    volume(&place, "a.img", "first");
    volume(&place, "copy.img", "second");
    std::fs::write(place.path("key"), "first").unwrap();
    let spec = format!(
        "{},key-file={}",
        place.disk("a"),
        place.path("key").display()
    );
    let fds = place.fds().display().to_string();
    let daemon = Daemon::start_with(&place, &[&spec], &["--fd-socket", &fds]);
    zeroed(&place);
    (daemon, Manager::of(place))
}

fn encrypted_target(manager: &Manager, key: &str) -> Target {
    let path = manager.place.path("key-of-copy");
    std::fs::write(&path, key).unwrap();
    manager.send("key", File::open(path).unwrap().as_fd());
    Target {
        key_fd: Some(FdRef {
            token: "key".into(),
        }),
        ..target(manager, "copy.img", "raw")
    }
}

#[test]
fn mirror_of_an_encrypted_disk_goes_on_encrypted_with_another_key() {
    let (mut daemon, mut manager) = start();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 2);
    writer.await_more(300);
    let to = encrypted_target(&manager, "second");
    mirror(&mut manager, "m", to, false).unwrap();
    await_job(&mut manager, "m", JobState::Ready);
    writer.await_more(50);
    complete(&mut manager, "m");
    writer.await_more(200);
    let log = writer.stop();
    assert!(manager.get("a").blk.unwrap().encrypted);
    assert!(daemon.end(Signal::SIGTERM).success(), "{}", daemon.log());
    assert_is_final(&content(&manager.place.path("copy.img"), "second"), &log);
}

#[test]
fn backup_of_an_encrypted_disk_is_an_encrypted_instant() {
    let (_daemon, mut manager) = start();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 2);
    writer.await_more(300);
    let to = encrypted_target(&manager, "second");
    backup(&mut manager, "b", to, "", "").unwrap();
    await_job(&mut manager, "b", JobState::Done);
    writer.await_more(50);
    let log = writer.stop();
    let copy = content(&manager.place.path("copy.img"), "second");
    assert!(assert_is_an_instant(&copy, &log) >= 300);
    assert_is_final(&content(&manager.place.path("a.img"), "first"), &log);
}

#[test]
fn copies_that_would_not_be_encrypted_are_refused_with_a_remedy() {
    let (mut daemon, mut manager) = start();
    let plain = target(&manager, "plain.img", "raw");
    let error = mirror(&mut manager, "m", plain, false).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("luksFormat"), "{error}");
    let plain = target(&manager, "plain.img", "raw");
    let error = backup(&mut manager, "b", plain, "", "").unwrap_err();
    assert!(error.message().contains("luksFormat"), "{error}");
    let to = encrypted_target(&manager, "not the key");
    let error = mirror(&mut manager, "m", to, false).unwrap_err();
    assert!(error.message().contains("passphrase"), "{error}");
    let file = tempfile::tempfile().unwrap();
    manager.send("overlay", file.as_fd());
    let request = SnapshotRequest {
        id: "a".into(),
        overlay_fd: Some(FdRef {
            token: "overlay".into(),
        }),
        overlay_name: "/overlay".into(),
    };
    let error = manager
        .disks(async |disks| disks.snapshot(request).await)
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("key_fd"), "{error}");
    daemon.assert_alive();
}
