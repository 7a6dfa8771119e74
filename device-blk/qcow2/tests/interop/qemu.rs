//! qemu-img and qemu-io, where they are installed.

use std::path::Path;
use std::process::{Command, Output};

/// Says that the test is skipped when there is no qemu-img.
pub(crate) fn is_missing() -> bool {
    let found = Command::new("qemu-img").arg("--version").output();
    let missing = !found.is_ok_and(|output| output.status.success());
    if missing {
        eprintln!("skipped: qemu-img is not installed");
    }
    missing
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

/// Runs qemu-img, which must succeed, and returns what it prints.
pub(crate) fn img(args: &[&str]) -> String {
    let output = run("qemu-img", args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Runs qemu-io commands on a qcow2 image.
pub(crate) fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    let output = run("qemu-io", &args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && !said.contains("failed"),
        "qemu-io {args:?}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Panics unless `qemu-img check` finds nothing, leaks included.
pub(crate) fn assert_clean(path: &Path) {
    let output = run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    assert!(
        output.status.code() == Some(0),
        "qemu-img check {}: {}{}",
        path.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The whole disk as QEMU reads it.
pub(crate) fn read_all(path: &Path, dir: &Path) -> Vec<u8> {
    let raw = dir.join("as-qemu-reads-it.raw");
    img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    std::fs::read(raw).unwrap()
}
