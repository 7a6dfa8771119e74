//! Starting and ending, well and badly.

use std::process::{Output, Stdio};

use crate::control::Manager;
use crate::daemon::{Daemon, command};
use crate::host::{create_tap, enter_namespace, is_up, open_tap};

fn fail(args: &[&str]) -> (Output, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let output = command(dir.path())
        .args(args)
        .stdout(Stdio::null())
        .output()
        .unwrap();
    (output, dir)
}

#[track_caller]
fn assert_one_clear_line(output: &Output, named: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    for name in named {
        assert!(stderr.contains(name), "{name} in {stderr}");
    }
}

fn leftovers(dir: &tempfile::TempDir) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

#[test]
fn tap_in_use_is_named_and_nothing_is_left_behind() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let _held = open_tap("tap0", 1);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("x.vu");
    let nic = format!("id=n,tap=tap0,socket={}", socket.display());
    let (output, own_dir) = fail(&["--nic", &nic]);
    assert_one_clear_line(&output, &["\"tap0\"", "in use", "choose another tap"]);
    assert!(leftovers(&dir).is_empty() && leftovers(&own_dir).is_empty());
}

#[test]
fn tap_with_other_queues_says_how_to_recreate_it() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let nic = "id=n,tap=tap0,socket=/nonexistent/x,queue-pairs=2";
    let (output, dir) = fail(&["--nic", nic]);
    assert_one_clear_line(
        &output,
        &[
            "\"tap0\"",
            "ip tuntap add tap0 mode tap vnet_hdr multi_queue",
        ],
    );
    assert!(leftovers(&dir).is_empty());
}

#[test]
fn tap_without_permission_says_how_to_create_it() {
    if !enter_namespace() {
        return;
    }
    // Without CAP_NET_ADMIN: dropped from what the child inherits.
    let dir = tempfile::tempdir().unwrap();
    let mut command = command(dir.path());
    command.args(["--nic", "id=n,tap=tap9,socket=/nonexistent/x"]);
    // SAFETY: the closure calls prctl and capset only, which are async-signal-safe.
    unsafe {
        use std::os::unix::process::CommandExt;
        command.pre_exec(|| {
            sandbox::drop_capabilities(&[])
                .map(drop)
                .map_err(std::io::Error::other)?;
            Ok(())
        });
    }
    // A root user regains capabilities at exec unless they left the bounding set, as they did.
    let output = command.output().unwrap();
    assert_one_clear_line(
        &output,
        &["not permitted", "\"tap9\"", "ip tuntap add tap9"],
    );
    assert!(!is_up("tap9"));
}

#[test]
fn socket_directory_that_is_missing_is_named() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let (output, dir) = fail(&["--nic", "id=n,tap=tap0,socket=/nonexistent/x.vu"]);
    assert_one_clear_line(&output, &["\"n\"", "/nonexistent/x.vu"]);
    assert!(leftovers(&dir).is_empty());
}

#[test]
fn usage_errors_exit_with_2() {
    for nic in ["id=n", "id=n,tap=t,socket=/x,mac=nonsense", "tap"] {
        let (output, dir) = fail(&["--nic", nic]);
        assert_eq!(output.status.code(), Some(2), "{nic}");
        assert!(leftovers(&dir).is_empty());
    }
}

#[test]
fn second_daemon_on_the_same_sockets_is_refused_and_the_first_goes_on() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let mut daemon = Daemon::with_nic("tap=tap0");
    let output = command(daemon.dir()).output().unwrap();
    assert_one_clear_line(&output, &["control", "another process"]);
    daemon.assert_alive();
    assert!(api::listen::answers(&daemon.control()));
}

#[test]
fn tap_that_the_daemon_created_goes_with_it() {
    if !enter_namespace() {
        return;
    }
    let daemon = Daemon::with_nic("tap=fresh0");
    assert!(is_up("fresh0"));
    // It has reached the point from which SIGTERM is an orderly end.
    assert_eq!(Manager::of(&daemon).list().len(), 1);
    assert!(daemon.terminate().success());
    assert!(!is_up("fresh0"));
}
