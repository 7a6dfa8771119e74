//! Sessions, ends and restarts, and everything that can be wrong at the start.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::daemon::{Daemon, Place, await_true, read_image};
use crate::driver::{Client, all_features};
use crate::io::pattern;

#[test]
fn sessions_follow_one_another() {
    let place = Place::new();
    place.image("a.img", 2048);
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    for session in 0..10 {
        let mut client = Client::connect(&place.socket("a"));
        if session > 0 {
            let before = pattern(session - 1, 4096);
            assert!(
                client.read((session - 1) * 4096, 4096) == before,
                "session {session}"
            );
        }
        assert_eq!(client.write(session * 4096, &pattern(session, 4096)), 0);
    }
}

#[test]
fn frontend_that_vanishes_with_requests_in_flight_harms_nobody() {
    let place = Place::new();
    place.image("a.img", 32 << 10);
    let mut daemon = Daemon::start(&place, &[&place.disk("a")]);
    for _ in 0..5 {
        let mut client = Client::connect(&place.socket("a"));
        for id in 0..32 {
            client.submit_write(0, id as u64 * 65_536, id * 65_536, 65_536, id);
        }
        client.kick(0);
        drop(client);
    }
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    assert!(client.read(0, 4096) == pattern(1, 4096));
    daemon.assert_alive();
}

#[test]
fn sigkilled_daemon_is_replaced_at_once() {
    let place = Place::new();
    let image = place.image("a.img", 64 << 10);
    for round in 0..5 {
        let mut daemon = Daemon::start(&place, &[&place.disk("a")]);
        let mut client = Client::connect(&place.socket("a"));
        let data = pattern(round, 65_536);
        assert_eq!(client.write(round * 65_536, &data), 0);
        assert_eq!(client.flush(), 0);
        for id in 0..32 {
            client.submit_write(0, (1 << 20) + id as u64 * 65_536, id * 65_536, 65_536, id);
        }
        client.kick(0);
        daemon.end(Signal::SIGKILL);
        assert!(
            read_image(&image, round * 65_536, 65_536) == data,
            "round {round}"
        );
    }
}

#[test]
fn sigterm_completes_what_is_in_flight_and_exits_0() {
    let place = Place::new();
    let image = place.image("a.img", 64 << 10);
    let mut daemon = Daemon::start(&place, &[&place.disk("a")]);
    let mut client = Client::connect(&place.socket("a"));
    for id in 0..32 {
        let at = id * 65_536;
        client.buffer()[at..at + 65_536].copy_from_slice(&pattern(id as u64, 65_536));
        client.submit_write(0, at as u64, at, 65_536, id);
    }
    client.kick(0);
    let first = client.completion(0);
    assert_eq!(first.1, 0);
    let status = daemon.end(Signal::SIGTERM);
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    let id = first.0;
    assert!(read_image(&image, id as u64 * 65_536, 65_536) == pattern(id as u64, 65_536));
}

#[test]
fn limit_on_open_files_is_raised_as_far_as_it_goes() {
    use nix::sys::resource::{Resource, setrlimit};
    let place = Place::new();
    place.image("a.img", 64);
    let daemon = Daemon::spawn(&place, &[&place.disk("a")], &[], |command| {
        // SAFETY: setrlimit is async-signal-safe.
        unsafe {
            command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, 64, 777)?));
        }
    });
    await_true("the daemon serves", || daemon.log().contains("serving"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open"));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(&words[3..5], ["777", "777"]);
}

#[test]
fn idle_disk_wakes_nobody() {
    let place = Place::new();
    place.image("a.img", 64);
    let daemon = Daemon::start(&place, &[&format!("{},queues=4", place.disk("a"))]);
    let mut client = Client::connect_with(&place.socket("a"), 4, all_features());
    assert_eq!(client.write(0, &[1; 4096]), 0);
    assert_eq!(client.flush(), 0);
    let sleeps = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
        let count = |status: String| {
            let lines = status.lines();
            let mut counts = lines.filter_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            counts.next().unwrap().trim().parse::<u64>().unwrap()
        };
        tasks
            .map(|task| {
                count(std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())
            })
            .sum()
    };
    // Threads may still be on their way to sleep. Then only time can tell.
    await_true("half a second passes without anybody waking up", || {
        let before = sleeps();
        std::thread::sleep(std::time::Duration::from_millis(500));
        sleeps() == before
    });
    drop(client);
}

#[test]
fn sigterm_between_attaching_and_serving_is_not_lost() {
    for round in 0..10 {
        let place = Place::new();
        place.image("a.img", 64);
        let mut daemon = Daemon::spawn(&place, &[&place.disk("a")], &[], |_| ());
        await_true("the disk is attached", || daemon.log().contains("attached"));
        let status = daemon.end(Signal::SIGTERM);
        assert_eq!(status.code(), Some(0), "round {round}: {}", daemon.log());
        assert!(daemon.log().contains("drained"), "round {round}");
    }
}

#[test]
fn inherited_descriptors_are_served() {
    let place = Place::new();
    let image = place.image("a.img", 64);
    let listener = UnixListener::bind(place.socket("a")).unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let (image_fd, socket_fd) = (file.as_raw_fd(), listener.as_raw_fd());
    let start = || {
        let spec = "id=a,fd=100,socket-fd=101";
        Daemon::spawn(&place, &[spec], &[], |command| {
            // SAFETY: dup2 is async-signal-safe and takes integers.
            unsafe {
                command.pre_exec(move || {
                    let copied = libc::dup2(image_fd, 100) >= 0 && libc::dup2(socket_fd, 101) >= 0;
                    if copied {
                        Ok(())
                    } else {
                        Err(std::io::Error::last_os_error())
                    }
                });
            }
        })
    };
    let mut daemon = start();
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &pattern(5, 4096)), 0);
    daemon.end(Signal::SIGKILL);
    drop(client);
    // The next incarnation finds the same socket: nobody bound it anew.
    let _daemon = start();
    let mut client = Client::connect(&place.socket("a"));
    assert!(client.read(0, 4096) == pattern(5, 4096));
}

/// Starts a daemon that must fail; returns its one line.
fn failure(place: &Place, spec: &str, more: &[&str]) -> String {
    let mut daemon = Daemon::spawn(place, &[spec], more, |_| ());
    assert_eq!(daemon.ended().code(), Some(1), "{}", daemon.log());
    let log = daemon.log();
    let errors: Vec<_> = log
        .lines()
        .filter(|line| line.starts_with("device-blk: error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{log}");
    assert!(
        !place.control().exists(),
        "the control socket is left behind"
    );
    errors[0].to_owned()
}

#[test]
fn images_that_cannot_be_served_are_named_with_the_remedy() {
    let place = Place::new();
    let spec = |path: &Path| {
        format!(
            "id=a,path={},socket={}",
            path.display(),
            place.socket("a").display()
        )
    };
    let missing = place.path("none.img");
    let error = failure(&place, &spec(&missing), &[]);
    assert!(
        error.contains(missing.to_str().unwrap()) && error.contains("qemu-img create"),
        "{error}"
    );

    let directory = place.path("dir");
    std::fs::create_dir(&directory).unwrap();
    let error = failure(&place, &spec(&directory), &[]);
    assert!(error.contains("directory"), "{error}");

    let empty = place.image("empty.img", 0);
    let error = failure(&place, &spec(&empty), &[]);
    assert!(
        error.contains("0 bytes") && error.contains("truncate"),
        "{error}"
    );
    assert!(
        !place.socket("a").exists(),
        "the vhost-user socket is left behind"
    );
}

#[test]
fn sockets_that_cannot_be_bound_are_named() {
    let place = Place::new();
    place.image("a.img", 64);
    let _other = UnixListener::bind(place.socket("a")).unwrap();
    let error = failure(&place, &place.disk("a"), &[]);
    assert!(
        error.contains(place.socket("a").to_str().unwrap()),
        "{error}"
    );
    assert!(place.socket("a").exists(), "somebody else's socket stays");

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    let error = failure(&place, &place.disk("b"), &["--metrics-listen", &address]);
    assert!(error.contains(&address), "{error}");
}

#[test]
fn descriptor_that_was_not_passed_is_named() {
    let place = Place::new();
    let spec = format!("id=a,fd=77,socket={}", place.socket("a").display());
    let error = failure(&place, &spec, &[]);
    assert!(error.contains("77"), "{error}");
}

#[test]
fn bad_usage_exits_2() {
    let place = Place::new();
    let mut daemon = Daemon::spawn(&place, &["id=a,path=x"], &[], |_| ());
    assert_eq!(daemon.ended().code(), Some(2));
    assert!(daemon.log().contains("socket="), "{}", daemon.log());
}

#[test]
fn image_of_another_format_is_served_raw_with_a_warning() {
    let place = Place::new();
    let mut qcow2 = vec![0; 65_536];
    qcow2[..4].copy_from_slice(b"QFI\xfb");
    std::fs::write(place.path("a.img"), &qcow2).unwrap();
    let daemon = Daemon::start(&place, &[&place.disk("a")]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.read(0, 512)[..4], *b"QFI\xfb");
    assert!(
        daemon.log().contains("qemu-img convert"),
        "{}",
        daemon.log()
    );
}
