//! Each step is taken by a real child process, which then tries what it must not.
//!
//! The children are this very program, started again with the name of a scenario in the
//! environment: a confinement cannot be left, so every one needs a process of its own.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::thread;

use sandbox::seccomp::{Arg, Profile, Syscalls, sets};
use sandbox::{Access, Confinement};

const SCENARIO: &str = "SANDBOX_TEST_SCENARIO";

/// Runs the test `name` again in a child, where it is to do its scenario.
fn child(name: &str, envs: &[(&str, &str)]) -> Output {
    Command::new(std::env::current_exe().expect("own path"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(SCENARIO, "1")
        .env_remove("MORTISE_SECCOMP")
        .envs(envs.iter().copied())
        .output()
        .expect("the test binary starts again")
}

fn in_child() -> bool {
    std::env::var_os(SCENARIO).is_some()
}

fn assert_ok(output: &Output) {
    assert!(
        output.status.success(),
        "child: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn assert_killed_by_sigsys(output: &Output) {
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGSYS),
        "child: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn profile() -> Profile {
    Profile::new("test", sets::base().with(sets::unix_sockets()))
}

/// A child scenario ends here: the test harness itself needs more than the profile allows.
fn done() -> ! {
    std::process::exit(0)
}

#[test]
fn forbidden_syscall_kills_with_sigsys() {
    if in_child() {
        profile().apply_to_this_thread().unwrap();
        // SAFETY: getppid has no arguments and no effects.
        unsafe { libc::syscall(libc::SYS_getppid) };
        done();
    }
    assert_killed_by_sigsys(&child("forbidden_syscall_kills_with_sigsys", &[]));
}

#[test]
fn internet_socket_kills_and_unix_socket_passes() {
    if in_child() {
        profile().apply_to_all_threads().unwrap();
        let (_a, _b) = UnixStream::pair().unwrap();
        eprintln!("unix socket passed");
        let _ = TcpStream::connect("127.0.0.1:9");
        done();
    }
    let output = child("internet_socket_kills_and_unix_socket_passes", &[]);
    assert_killed_by_sigsys(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("unix socket passed"));
}

/// Landlock lets a process connect to any socket file that its user may open.
#[test]
fn daemon_that_only_serves_cannot_reach_other_services() {
    let name = "daemon_that_only_serves_cannot_reach_other_services";
    if in_child() {
        let path = std::env::var("SANDBOX_TEST_SOCKET").unwrap();
        Profile::new("test", sets::base().with(sets::tokio()))
            .apply_to_all_threads()
            .unwrap();
        let (_a, _b) = UnixStream::pair().unwrap();
        eprintln!("socket pair passed");
        let _ = UnixStream::connect(path);
        done();
    }
    let path = std::env::temp_dir().join(format!("sandbox-test-{}", std::process::id()));
    let _service = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let output = child(name, &[("SANDBOX_TEST_SOCKET", path.to_str().unwrap())]);
    std::fs::remove_file(&path).unwrap();
    assert_killed_by_sigsys(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("socket pair passed"));
}

#[test]
fn datagram_socket_pair_kills() {
    if in_child() {
        profile().apply_to_all_threads().unwrap();
        let _ = std::os::unix::net::UnixDatagram::pair();
        done();
    }
    assert_killed_by_sigsys(&child("datagram_socket_pair_kills", &[]));
}

#[test]
fn opening_a_file_is_refused_and_threads_still_start() {
    if in_child() {
        let open = File::open("/proc/self/status").unwrap();
        profile().apply_to_all_threads().unwrap();
        open.metadata().unwrap();
        let error = std::fs::metadata("/").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let error = std::fs::remove_file("/does-not-exist").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let error = File::open("/proc/self/status").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let sum: usize = (0..8)
            .map(|n| {
                thread::spawn(move || vec![n; 100_000].len())
                    .join()
                    .unwrap()
            })
            .sum();
        assert_eq!(sum, 800_000);
        done();
    }
    assert_ok(&child(
        "opening_a_file_is_refused_and_threads_still_start",
        &[],
    ));
}

#[test]
fn new_process_kills() {
    if in_child() {
        profile().apply_to_all_threads().unwrap();
        // SAFETY: the child of fork would only exit; it must not come to be at all.
        if unsafe { libc::fork() } == 0 {
            // SAFETY: _exit is always safe.
            unsafe { libc::_exit(0) };
        }
        done();
    }
    assert_killed_by_sigsys(&child("new_process_kills", &[]));
}

#[test]
fn executable_memory_kills() {
    if in_child() {
        profile().apply_to_all_threads().unwrap();
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        done();
    }
    assert_killed_by_sigsys(&child("executable_memory_kills", &[]));
}

#[test]
fn filter_reaches_threads_that_run_already() {
    if in_child() {
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let old = thread::spawn(move || {
            asked.recv().unwrap();
            // SAFETY: getppid has no arguments and no effects.
            unsafe { libc::syscall(libc::SYS_getppid) };
        });
        profile().apply_to_all_threads().unwrap();
        ask.send(()).unwrap();
        old.join().unwrap();
        done();
    }
    assert_killed_by_sigsys(&child("filter_reaches_threads_that_run_already", &[]));
}

#[test]
fn thread_profile_binds_that_thread_alone() {
    if in_child() {
        thread::spawn(|| profile().apply_to_this_thread().unwrap())
            .join()
            .unwrap();
        File::open("/proc/self/status").unwrap();
        done();
    }
    assert_ok(&child("thread_profile_binds_that_thread_alone", &[]));
}

#[test]
fn ioctl_passes_by_request_number_alone() {
    if in_child() {
        Profile::new("test", sets::base().allow_ioctls(&[libc::TIOCGWINSZ]))
            .apply_to_this_thread()
            .unwrap();
        // SAFETY: TIOCGWINSZ writes one winsize at most; 64 bytes are enough.
        let answer = unsafe { libc::ioctl(0, libc::TIOCGWINSZ, [0_u8; 64].as_mut_ptr()) };
        eprintln!("allowed ioctl answered {answer}");
        // SAFETY: TIOCNOTTY takes no pointer.
        unsafe { libc::ioctl(0, libc::TIOCNOTTY) };
        done();
    }
    let output = child("ioctl_passes_by_request_number_alone", &[]);
    assert_killed_by_sigsys(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("allowed ioctl answered"));
}

#[test]
fn allowing_wins_over_refusing_in_any_order() {
    if in_child() {
        let open = Syscalls::new().allow(&[libc::SYS_openat]);
        let set = open
            .with(sets::base())
            .allow_if(libc::SYS_openat, &[Arg::Int(0, 7)]);
        Profile::new("test", set).apply_to_this_thread().unwrap();
        File::open("/proc/self/status").unwrap();
        done();
    }
    assert_ok(&child("allowing_wins_over_refusing_in_any_order", &[]));
}

#[test]
fn log_mode_lets_pass_and_warns() {
    if in_child() {
        let achieved = profile().apply_to_this_thread().unwrap();
        assert_eq!(achieved.missing_names().count(), 1, "{achieved:?}");
        // SAFETY: getppid has no arguments and no effects.
        unsafe { libc::syscall(libc::SYS_getppid) };
        done();
    }
    let output = child(
        "log_mode_lets_pass_and_warns",
        &[("MORTISE_SECCOMP", "log")],
    );
    assert_ok(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("WARNING"));
}

#[test]
fn trap_mode_names_the_forbidden_syscall() {
    if in_child() {
        profile().apply_to_this_thread().unwrap();
        // SAFETY: getppid has no arguments and no effects.
        unsafe { libc::syscall(libc::SYS_getppid) };
        done();
    }
    let output = child(
        "trap_mode_names_the_forbidden_syscall",
        &[("MORTISE_SECCOMP", "trap")],
    );
    let expected = format!("forbidden system call {}", libc::SYS_getppid);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains(&expected),
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(128 + libc::SIGSYS));
}

#[test]
fn unknown_mode_is_an_error_that_lists_the_known() {
    if in_child() {
        let error = profile().apply_to_this_thread().unwrap_err().to_string();
        assert!(error.contains("kill, log, trap or off"), "{error}");
        done();
    }
    assert_ok(&child(
        "unknown_mode_is_an_error_that_lists_the_known",
        &[("MORTISE_SECCOMP", "maybe")],
    ));
}

#[test]
fn denied_filesystem_keeps_open_files_and_allowed_paths_only() {
    if in_child() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kept");
        std::fs::write(&path, "kept").unwrap();
        let open = File::open("/proc/self/status").unwrap();
        let achieved = sandbox::deny_filesystem(&[(dir.path().to_owned(), Access::Read)]).unwrap();
        eprintln!("{achieved:?}");
        if achieved.missing_names().count() > 0 {
            done();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        assert!(std::fs::write(&path, "changed").is_err());
        assert!(File::open("/proc/self/status").is_err());
        io::read_to_string(open).unwrap();
        // The directory cannot be removed from in here.
        let _ = dir.keep();
        done();
    }
    let output = child(
        "denied_filesystem_keeps_open_files_and_allowed_paths_only",
        &[],
    );
    assert_ok(&output);
    note_if_missing(&output);
}

#[test]
fn denied_filesystem_without_exceptions_hides_everything() {
    if in_child() {
        let achieved = sandbox::deny_filesystem(&[]).unwrap();
        eprintln!("{achieved:?}");
        if achieved.missing_names().count() > 0 {
            done();
        }
        assert!(File::open("/proc/self/status").is_err());
        assert!(
            File::open("/").and_then(|root| root.metadata()).is_err()
                || std::fs::read_dir("/").unwrap().count() == 0
        );
        assert!(std::fs::write("/tmp/escaped", "x").is_err());
        done();
    }
    let output = child("denied_filesystem_without_exceptions_hides_everything", &[]);
    assert_ok(&output);
    note_if_missing(&output);
}

#[test]
fn missing_allowed_path_is_named() {
    let error = sandbox::deny_filesystem(&[("/does/not/exist".into(), Access::Read)]).unwrap_err();
    assert!(error.to_string().contains("/does/not/exist"), "{error}");
}

#[test]
fn network_namespace_hides_the_hosts_listeners() {
    if in_child() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        TcpStream::connect(address).expect("reachable before");
        let achieved = sandbox::deny_network();
        eprintln!("{achieved:?}");
        if achieved.missing_names().count() == 0 {
            assert!(TcpStream::connect(address).is_err());
        }
        done();
    }
    let output = child("network_namespace_hides_the_hosts_listeners", &[]);
    assert_ok(&output);
    note_if_missing(&output);
}

#[test]
fn descriptors_that_are_not_kept_are_closed() {
    if in_child() {
        let [keep, lose]: [OwnedFd; 2] =
            [(); 2].map(|()| File::open("/proc/self/status").unwrap().into());
        sandbox::close_other_fds(&[keep.as_raw_fd()]).unwrap();
        assert!(is_open(keep.as_raw_fd()));
        assert!(!is_open(lose.as_raw_fd()));
        assert!(is_open(2));
        std::mem::forget(lose);
        done();
    }
    assert_ok(&child("descriptors_that_are_not_kept_are_closed", &[]));
}

fn is_open(fd: i32) -> bool {
    // SAFETY: F_GETFD takes no pointer.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

#[test]
fn whole_confinement_leaves_nothing_but_the_profile() {
    if in_child() {
        // The harness runs tests on threads; the confinement binds the one that enters it.
        let achieved = Confinement::new(profile()).enter().unwrap();
        eprintln!("{achieved:?}");
        for name in [
            "no_core_dumps",
            "no_capabilities",
            "no_new_privs",
            "seccomp:test",
        ] {
            assert!(achieved.names().iter().any(|held| held == name), "{name}");
        }
        assert!(File::open("/proc/self/status").is_err());
        thread::spawn(|| UnixStream::pair().unwrap())
            .join()
            .unwrap();
        done();
    }
    let output = child("whole_confinement_leaves_nothing_but_the_profile", &[]);
    assert_ok(&output);
    note_if_missing(&output);
}

#[test]
fn dropped_capabilities_do_not_come_back() {
    if in_child() {
        sandbox::drop_capabilities(&[]).unwrap();
        // SAFETY: sethostname reads the given bytes; without the capability it does nothing.
        let answer = unsafe { libc::sethostname(c"x".as_ptr(), 1) };
        assert_eq!(answer, -1);
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"] {
            assert!(status.contains(line), "{status}");
        }
        done();
    }
    assert_ok(&child("dropped_capabilities_do_not_come_back", &[]));
}

/// Says in the test's output what this machine could not give.
fn note_if_missing(output: &Output) {
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        if line.contains("\"!") {
            eprintln!("not fully tried on this machine: {line}");
        }
    }
}
