//! A guest under QEMU works on disks of every format through our daemon; then QEMU's own code, on
//! the same images, must see what the guest saw.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use guest::plan::{End, Job, Plan};
use guest::report::Report;

use crate::guest_run;
use crate::process::Process;
use crate::qemu::Qemu;
use crate::qemu_frontend::expect_pattern;
use crate::site;

const DISK_BYTES: u64 = 64 << 20;
const FILES_BYTES: u64 = 12 << 20;
const PATTERN_BYTES: u64 = 4 << 20;
const PATTERN_SEED: u64 = 0x5eed_0003;
const PASSPHRASE: &str = "correct horse battery staple";

#[test]
fn file_system_and_pattern_are_the_same_for_guest_and_qemu() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let path = |name: &str| dir.join(name);
    std::fs::copy(site::path("GUEST_TOOLS_ROOTFS"), path("root.raw"))
        .expect("the root file system can be copied");
    let size = DISK_BYTES.to_string();
    qemu_img(&["create", "-q", "-f", "raw"], &[&path("base.raw")], &size);
    qemu_img(
        &["create", "-q", "-f", "qcow2"],
        &[&path("plain.qcow2")],
        &size,
    );
    overlay(&path("middle.qcow2"), &path("base.raw"), "raw");
    overlay(&path("top.qcow2"), &path("middle.qcow2"), "qcow2");
    overlay(&path("root.qcow2"), &path("root.raw"), "raw");

    std::fs::write(path("key"), PASSPHRASE).expect("a file can be written");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "luks", "--object"])
        .arg(secret(&path("key")))
        .args(["-o", "key-secret=key,iter-time=10"])
        .arg(path("luks.raw"))
        .arg(&size));

    // vda: an overlay on the root disk; vdb: qcow2 alone; vdc: the third of a chain; vdd: LUKS.
    let disks = [
        ("root.qcow2", "format=qcow2".to_owned()),
        ("plain.qcow2", "format=qcow2".to_owned()),
        ("top.qcow2", "format=qcow2".to_owned()),
        ("luks.raw", format!("key-file={}", path("key").display())),
    ];
    let mut command = Command::new(site::program("device-blk"));
    command.arg("--control-socket").arg(path("blk.sock"));
    for (number, (image, options)) in disks.iter().enumerate() {
        command.arg("--disk").arg(format!(
            "id=disk-{number},path={},socket={},{options}",
            path(image).display(),
            path(image).with_extension("vu").display()
        ));
    }
    let mut blk = Process::spawn(dir, "device-blk", &mut command);
    blk.wait_for_socket(&path("blk.sock"));

    let plan = Plan {
        root: Some("vda".into()),
        jobs: vec![
            Job::FileSystem {
                device: "vdb".into(),
                bytes: FILES_BYTES,
            },
            Job::Disk {
                device: "vdc".into(),
                seed: PATTERN_SEED,
                bytes: PATTERN_BYTES,
            },
            Job::Disk {
                device: "vdd".into(),
                seed: !PATTERN_SEED,
                bytes: PATTERN_BYTES,
            },
        ],
        end: End::PowerOff,
    };
    let mut qemu = Qemu::new(&plan);
    for (image, _) in &disks {
        qemu = qemu.disk(&path(image).with_extension("vu"));
    }
    let reports = guest_run::finish(&mut qemu.start(dir));
    let trimmed = reports.iter().find_map(|report| match report {
        Report::FileSystem { trimmed_bytes, .. } => Some(*trimmed_bytes),
        _ => None,
    });
    assert!(trimmed.is_some_and(|bytes| bytes > 0), "{reports:?}");
    blk.terminate(Duration::from_secs(10));

    for image in ["root.qcow2", "plain.qcow2", "top.qcow2"] {
        run(Command::new("qemu-img")
            .args(["check", "-q"])
            .arg(path(image)));
    }
    let files = converted(&path("plain.qcow2"));
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(files));
    expect_pattern(&converted(&path("top.qcow2")), PATTERN_SEED, PATTERN_BYTES);
    expect_pattern(
        &decrypted(&path("luks.raw"), &path("key")),
        !PATTERN_SEED,
        PATTERN_BYTES,
    );
    let base = std::fs::read(path("base.raw")).expect("the base is there");
    assert!(base.iter().all(|byte| *byte == 0), "a backing file changed");
}

/// The image as QEMU's own code reads it.
fn converted(image: &Path) -> PathBuf {
    let raw = image.with_extension("converted");
    run(Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([image, &raw]));
    raw
}

/// The same of an encrypted one.
fn decrypted(image: &Path, key: &Path) -> PathBuf {
    let raw = image.with_extension("decrypted");
    run(Command::new("qemu-img")
        .args(["convert", "--object"])
        .arg(secret(key))
        .arg("--image-opts")
        .arg(format!(
            "driver=luks,key-secret=key,file.driver=file,file.filename={}",
            image.display()
        ))
        .args(["-O", "raw"])
        .arg(&raw));
    raw
}

fn secret(key: &Path) -> String {
    format!("secret,id=key,file={}", key.display())
}

fn overlay(image: &Path, backing: &Path, format: &str) {
    let backing = backing.to_str().expect("UTF-8");
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-b", backing, "-F", format],
        &[image],
        "",
    );
}

fn qemu_img(arguments: &[&str], images: &[&Path], size: &str) {
    let size = Some(size).filter(|size| !size.is_empty());
    run(Command::new("qemu-img")
        .args(arguments)
        .args(images)
        .args(size));
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
