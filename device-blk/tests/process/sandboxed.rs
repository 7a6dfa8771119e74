//! What the process may still do while it serves.

use crate::daemon::{Daemon, Place};
use crate::driver::Client;

fn status_field(path: &str, field: &str) -> String {
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line[field.len()..].trim().to_owned()
}

#[test]
fn every_thread_is_filtered_and_without_privileges() {
    let place = Place::new();
    place.image("a.img", 64);
    let daemon = Daemon::start(&place, &[&format!("{},queues=2", place.disk("a"))]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &[1; 512]), 0);
    let mut queue_threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = task.unwrap().path().join("status").display().to_string();
        assert_eq!(status_field(&status, "NoNewPrivs:"), "1", "{status}");
        assert_eq!(status_field(&status, "Seccomp:"), "2", "{status}");
        assert_eq!(
            status_field(&status, "CapEff:"),
            "0000000000000000",
            "{status}"
        );
        let filters: u32 = status_field(&status, "Seccomp_filters:").parse().unwrap();
        if status_field(&status, "Name:").contains("/q") {
            queue_threads += 1;
            assert!(
                filters > 1,
                "a queue's thread has a filter of its own: {filters}"
            );
        }
    }
    assert!(queue_threads > 0);
}

#[test]
fn only_known_descriptors_are_open() {
    let place = Place::new();
    place.image("a.img", 64);
    let secret = std::fs::File::create(place.path("secret")).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&secret);
    let mut daemon = Daemon::spawn(&place, &[&place.disk("a")], &[], |command| {
        // SAFETY: dup2 is async-signal-safe and takes integers.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(command, move || {
                libc::dup2(fd, 50);
                Ok(())
            });
        }
    });
    crate::daemon::await_true("the daemon serves", || daemon.log().contains("serving"));
    daemon.assert_alive();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap();
        assert!(
            !target.ends_with("secret"),
            "an inherited descriptor is still open"
        );
    }
}
