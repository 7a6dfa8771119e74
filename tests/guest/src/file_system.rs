//! A disk under a real file system: ext4 made by mke2fs, files verified by fio, e2fsck at the end.

use std::process::Command;
use std::time::Duration;

use guest::report::Report;
use nix::mount::umount;

use crate::system::{mount_on, wait_for};

const MOUNT_POINT: &str = "/mnt";
/// Files that fio writes; every second one is deleted before the trim.
const FILES: u64 = 4;

/// Makes a file system, writes `bytes` of files, deletes some, trims, checks, reads the rest again.
pub(crate) fn check(device: &str, bytes: u64) -> Report {
    let (bytes, trimmed_bytes, error) = match try_check(device, bytes) {
        Ok(trimmed_bytes) => (bytes, trimmed_bytes, None),
        Err(error) => (0, 0, Some(error)),
    };
    Report::FileSystem {
        device: device.to_owned(),
        bytes,
        trimmed_bytes,
        error,
    }
}

fn try_check(device: &str, bytes: u64) -> Result<u64, String> {
    let path = format!("/dev/{device}");
    wait_for(&path, Duration::from_secs(20), || {
        std::fs::exists(&path).unwrap_or(false)
    })?;
    run("mke2fs", &["-q", "-F", "-t", "ext4", &path])?;
    mount_on("ext4", &path, MOUNT_POINT)?;
    for file in 0..FILES {
        fio(file, bytes / FILES, "--do_verify=1")?;
    }
    for file in (1..FILES).step_by(2) {
        std::fs::remove_file(format!("{MOUNT_POINT}/file-{file}"))
            .map_err(|error| format!("file-{file}: {error}"))?;
    }
    let trimmed = run("busybox", &["fstrim", "-v", MOUNT_POINT])?;
    let trimmed_bytes = trimmed
        .split_whitespace()
        .find_map(|word| word.parse().ok())
        .ok_or_else(|| format!("fstrim said {trimmed:?}"))?;
    unmount()?;
    run("e2fsck", &["-f", "-n", &path])?;
    mount_on("ext4", &path, MOUNT_POINT)?;
    for file in (0..FILES).step_by(2) {
        fio(file, bytes / FILES, "--verify_only=1")?;
    }
    unmount()?;
    Ok(trimmed_bytes)
}

/// Random direct writes of several sizes, each block with its checksum; then reads them.
fn fio(file: u64, bytes: u64, how: &str) -> Result<String, String> {
    run(
        "fio",
        &[
            "--name=verify",
            &format!("--filename={MOUNT_POINT}/file-{file}"),
            &format!("--size={bytes}"),
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--ioengine=io_uring",
            "--iodepth=16",
            "--direct=1",
            "--end_fsync=1",
            "--verify=crc32c",
            "--verify_fatal=1",
            &format!("--randseed={file}"),
            how,
        ],
    )
}

fn unmount() -> Result<(), String> {
    umount(MOUNT_POINT).map_err(|error| format!("unmount: {error}"))
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(args)
        .env("PATH", "/bin:/usr/bin")
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = format!("{} {}", text(&output.stdout), text(&output.stderr));
    Err(format!("{program}: {}: {said}", output.status))
}
