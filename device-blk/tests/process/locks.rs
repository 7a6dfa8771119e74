//! An image has one writer: between our own processes, and between us and QEMU's tools.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::daemon::{Daemon, Place, await_true};

/// Whether one of QEMU's tools is here; says so when not.
pub(crate) fn has_tool(name: &str) -> bool {
    let runs = Command::new(name)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !runs {
        eprintln!("skipped: {name} is not installed");
    }
    runs
}

fn try_to_serve(place: &Place, spec: &str) -> (Option<i32>, String) {
    let mut daemon = Daemon::spawn(place, &[spec], &["--lock-wait", "0.1"], |_| ());
    let status = daemon.ended();
    (status.code(), daemon.log())
}

fn assert_refused_as_in_use(place: &Place, spec: &str, image: &Path) {
    let (code, log) = try_to_serve(place, spec);
    assert_eq!(code, Some(1), "{log}");
    let error = log
        .lines()
        .find(|line| line.starts_with("device-blk: error: "))
        .unwrap();
    assert!(error.contains(image.to_str().unwrap()), "{error}");
    assert!(
        error.contains("in use") && error.contains("stop that process"),
        "{error}"
    );
}

#[test]
fn image_served_by_another_daemon_is_refused() {
    let (first, second) = (Place::new(), Place::new());
    let image = first.image("a.img", 64);
    let _daemon = Daemon::start(&first, &[&first.disk("a")]);
    let socket = second.socket("a");
    for options in ["", ",readonly"] {
        let spec = format!(
            "id=b,path={},socket={}{options}",
            image.display(),
            socket.display()
        );
        assert_refused_as_in_use(&second, &spec, &image);
        assert!(!socket.exists(), "nothing is left behind");
        assert!(!second.control().exists(), "nothing is left behind");
    }
}

#[test]
fn readers_share_an_image() {
    let (first, second) = (Place::new(), Place::new());
    let image = first.image("a.img", 64);
    let _daemon = Daemon::start(&first, &[&format!("{},readonly", first.disk("a"))]);
    let spec = |options| {
        format!(
            "id=b,path={},socket={}{options}",
            image.display(),
            second.socket("b").display()
        )
    };
    assert_refused_as_in_use(&second, &spec(""), &image);
    let _second_reader = Daemon::start(&second, &[&spec(",readonly")]);
}

#[test]
fn one_image_for_two_disks_of_one_daemon_is_refused() {
    let place = Place::new();
    let image = place.image("a.img", 64);
    let again = format!(
        "id=b,path={},socket={}",
        image.display(),
        place.socket("b").display()
    );
    let mut daemon = Daemon::spawn(
        &place,
        &[&place.disk("a"), &again],
        &["--lock-wait", "0"],
        |_| (),
    );
    assert_eq!(daemon.ended().code(), Some(1));
    assert!(daemon.log().contains("in use"), "{}", daemon.log());
}

#[test]
fn qemu_refuses_an_image_that_is_served() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let place = Place::new();
    let image = place.image("a.img", 64);
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    let copy = place.path("copy.img");
    let convert = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw"])
        .args([&image, &copy])
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&convert.stderr).into_owned();
    assert!(
        !convert.status.success() && complaint.contains("lock"),
        "{complaint}"
    );
    let write = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(&image)
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&write.stderr).into_owned();
    assert!(
        !write.status.success() && complaint.contains("lock"),
        "{complaint}"
    );
    // Looking without a lock is QEMU's documented way around, and harmless.
    let forced = Command::new("qemu-img")
        .args(["convert", "--force-share", "-f", "raw", "-O", "raw"])
        .args([&image, &copy])
        .output()
        .unwrap();
    assert!(
        forced.status.success(),
        "{}",
        String::from_utf8_lossy(&forced.stderr)
    );
}

#[test]
fn qemu_reads_an_image_that_is_served_read_only() {
    if !has_tool("qemu-io") {
        return;
    }
    let place = Place::new();
    let image = place.image("a.img", 64);
    let _daemon = Daemon::start(&place, &[&format!("{},readonly", place.disk("a"))]);
    let io = |command: &str, more: &[&str]| {
        Command::new("qemu-io")
            .args(["-f", "raw", "-c", command])
            .args(more)
            .arg(&image)
            .output()
            .unwrap()
    };
    let read = io("read 0 512", &["-r"]);
    assert!(
        read.status.success(),
        "{}",
        String::from_utf8_lossy(&read.stderr)
    );
    let write = io("write 0 512", &[]);
    assert!(!write.status.success(), "a reader keeps writers out");
}

#[test]
fn image_that_qemu_uses_is_refused_until_it_lets_go() {
    if !has_tool("qemu-storage-daemon") {
        return;
    }
    let place = Place::new();
    let image = place.image("a.img", 64);
    let pid_file = place.path("qsd.pid");
    let mut qemu = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=disk,filename={}",
            image.display()
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            place.path("qsd.vu").display()
        ))
        .arg("--pidfile")
        .arg(&pid_file)
        .stdin(Stdio::null())
        .stderr(File::create(place.path("qsd.log")).unwrap())
        .spawn()
        .unwrap();
    await_true("qemu-storage-daemon serves", || pid_file.exists());
    assert_refused_as_in_use(&place, &place.disk("a"), &image);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
}
