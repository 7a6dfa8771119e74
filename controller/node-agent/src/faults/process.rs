//! What is done to processes and to the host with system calls.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::process::{Identity, start_ticks};

/// A process of that number, as it is now.
pub(super) fn identify(pid: i32) -> io::Result<Identity> {
    let start_ticks = start_ticks(pid).ok_or_else(gone)?;
    Ok(Identity { pid, start_ticks })
}

/// Whether it still is.
pub(super) fn is_alive(identity: Identity) -> bool {
    start_ticks(identity.pid) == Some(identity.start_ticks)
}

/// Sends a signal to that very process. One that is gone gets none.
pub(super) fn signal(identity: Identity, signal: Signal) -> io::Result<()> {
    let pidfd = open(identity)?;
    // SAFETY: pidfd_send_signal reads its arguments only; a null siginfo is allowed.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the limit of open files; returns the one before, soft and hard.
pub(super) fn limit_open_files(identity: Identity, soft: u64, hard: u64) -> io::Result<(u64, u64)> {
    let _held = open(identity)?;
    let new = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    let mut old = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both are valid for the call, which reads the one and writes the other.
    if unsafe { libc::prlimit(identity.pid, libc::RLIMIT_NOFILE, &new, &mut old) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((old.rlim_cur, old.rlim_max))
}

/// The limit of open files as it is, soft and hard.
pub(super) fn open_files_limit(identity: Identity) -> io::Result<(u64, u64)> {
    let mut old = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a null new limit leaves things as they are; the old one is written to ours.
    let asked = unsafe {
        libc::prlimit(
            identity.pid,
            libc::RLIMIT_NOFILE,
            std::ptr::null(),
            &mut old,
        )
    };
    if asked < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((old.rlim_cur, old.rlim_max))
}

/// Where a cgroup of its own for `identity` would be: version 2 if the host has its memory controller
/// there, else version 1.
pub(super) fn memory_cgroup(identity: Identity) -> io::Result<PathBuf> {
    let name = format!("mortise-fault-{}-{}", identity.pid, identity.start_ticks);
    for (root, file) in [
        ("/sys/fs/cgroup", "cgroup.controllers"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ] {
        let is_there = match file {
            "cgroup.controllers" => {
                fs::read_to_string(Path::new(root).join(file)).is_ok_and(|controllers| {
                    controllers.split(' ').any(|word| word.trim() == "memory")
                })
            }
            _ => Path::new(root).join(file).exists(),
        };
        if is_there {
            return Ok(Path::new(root).join(name));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "no memory cgroup on this host: mount cgroup2 at /sys/fs/cgroup",
    ))
}

/// Puts the process into a new cgroup that has no more memory than `limit_bytes`.
pub(super) fn starve(identity: Identity, cgroup: &Path, limit_bytes: u64) -> io::Result<()> {
    fs::create_dir(cgroup)?;
    let limit = limit_bytes.to_string();
    let write = |file: &str, text: &str| fs::write(cgroup.join(file), text);
    if cgroup.join("memory.max").exists() {
        write("memory.max", &limit)?;
        let _ = write("memory.swap.max", "0");
    } else {
        // What the process has already comes along.
        let _ = write("memory.move_charge_at_immigrate", "3");
        write("memory.limit_in_bytes", &limit)?;
    }
    let _held = open(identity)?;
    write("cgroup.procs", &identity.pid.to_string())
}

/// Removes a cgroup; what lives in it goes back to its parent.
pub(super) fn leave_cgroup(cgroup: &Path) -> io::Result<()> {
    const PATIENCE: Duration = Duration::from_millis(500);
    const LOOK_INTERVAL: Duration = Duration::from_millis(5);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let (Ok(pids), Some(parent)) = (
            fs::read_to_string(cgroup.join("cgroup.procs")),
            cgroup.parent(),
        ) {
            for pid in pids.lines() {
                let _ = fs::write(parent.join("cgroup.procs"), pid);
            }
        }
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A process that was killed leaves a moment later.
            Err(_) if Instant::now() < deadline => std::thread::sleep(LOOK_INTERVAL),
            result => return result,
        }
    }
}

/// Moves the host's wall clock.
pub(super) fn step_clock(offset_ms: i64) -> io::Result<()> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid buffer.
    if unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut now) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let nanos = i128::from(now.tv_sec) * 1_000_000_000
        + i128::from(now.tv_nsec)
        + i128::from(offset_ms) * 1_000_000;
    let stepped = libc::timespec {
        tv_sec: nanos.div_euclid(1_000_000_000) as libc::time_t,
        tv_nsec: nanos.rem_euclid(1_000_000_000) as libc::c_long,
    };
    // SAFETY: `stepped` is a valid time.
    if unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &stepped) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A descriptor of that very process.
fn open(identity: Identity) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open reads its arguments only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, identity.pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // Looked at after the descriptor was opened, so that it is this very process.
    if is_alive(identity) {
        Ok(pidfd)
    } else {
        Err(gone())
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the process is gone")
}
