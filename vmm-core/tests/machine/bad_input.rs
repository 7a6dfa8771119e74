//! Each thing that can be wrong ends in one clear line that names it and the remedy, and leaves
//! nothing behind.

use std::fs;
use std::os::unix::net::UnixListener;

use crate::tiny_guest::{Code, kvm_is_usable, run};
use tempfile::TempDir;

fn dir_with_kernel() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("kernel"), Code::default().shutdown().elf()).unwrap();
    dir
}

/// Runs it, expects `status`, and `words` in the one line on standard error.
fn fails(dir: &TempDir, args: &[&str], status: i32, words: &[&str]) {
    let (ended, stderr) = run(dir.path(), args);
    assert_eq!(ended.code(), Some(status), "{args:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: no {word:?} in {stderr}");
    }
    let errors = stderr
        .lines()
        .filter(|line| line.starts_with("vmm-core: error: "))
        .count();
    assert_eq!(errors, usize::from(status == 1), "{args:?}: {stderr}");
}

#[test]
fn kernels_and_initramfs_that_cannot_be_booted() {
    let dir = dir_with_kernel();
    fails(
        &dir,
        &["--kernel", "nowhere"],
        1,
        &["cannot read kernel nowhere", "check the path"],
    );
    fs::write(dir.path().join("text"), "#!/bin/sh\n").unwrap();
    fails(
        &dir,
        &["--kernel", "text"],
        1,
        &["text is no kernel", "vmlinux or a bzImage"],
    );
    fails(
        &dir,
        &["--kernel", "."],
        1,
        &["cannot read kernel", "not a regular file"],
    );
    fails(
        &dir,
        &["--kernel", "kernel", "--initramfs", "nowhere"],
        1,
        &["cannot read initramfs nowhere"],
    );
    if kvm_is_usable("kernels_and_initramfs_that_cannot_be_booted") {
        fs::File::create(dir.path().join("huge"))
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        let args = [
            "--kernel",
            "kernel",
            "--initramfs",
            "huge",
            "--memory",
            "32M",
        ];
        fails(
            &dir,
            &args,
            1,
            &["initramfs huge (64 MiB) does not fit", "--memory"],
        );
    }
}

#[test]
fn machines_that_cannot_be() {
    let dir = dir_with_kernel();
    for cpus in ["0", "33"] {
        fails(
            &dir,
            &["--kernel", "kernel", "--cpus", cpus],
            2,
            &["1..=32"],
        );
    }
    fails(
        &dir,
        &["--kernel", "kernel", "--memory", "lots"],
        2,
        &["512M"],
    );
    fails(
        &dir,
        &[
            "--kernel",
            "kernel",
            "--device",
            "tag=a,type=toaster,socket=s",
        ],
        2,
        &["toaster"],
    );
    if kvm_is_usable("machines_that_cannot_be") {
        fails(
            &dir,
            &["--kernel", "kernel", "--memory", "1M"],
            1,
            &["at least 16 MiB"],
        );
        fails(
            &dir,
            &["--kernel", "kernel", "--memory", "900000G"],
            1,
            &["more than this host has", "--memory"],
        );
    }
}

#[test]
fn kvm_that_is_missing_or_is_none() {
    let dir = dir_with_kernel();
    fails(
        &dir,
        &["--kernel", "kernel", "--kvm", "nokvm"],
        1,
        &["nokvm does not exist", "kvm-amd"],
    );
    fails(
        &dir,
        &["--kernel", "kernel", "--kvm", "/dev/null"],
        1,
        &["/dev/null", "is it a KVM device"],
    );
}

#[test]
fn control_socket_that_is_in_use_is_left_alone() {
    if !kvm_is_usable("control_socket_that_is_in_use_is_left_alone") {
        return;
    }
    let dir = dir_with_kernel();
    let path = dir.path().join("vmm.sock");
    let _other = UnixListener::bind(&path).unwrap();
    fails(
        &dir,
        &["--kernel", "kernel", "--control-socket", "vmm.sock"],
        1,
        &["vmm.sock"],
    );
    assert!(path.exists());
}
