//! `/init` of a nested host: makes the machine usable, runs the job, powers off.
//!
//! The job runs in a child, because process 1 must reap whatever the job orphans: tests
//! look for processes left behind.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::initramfs::{GUEST_BZIMAGE, GUEST_INITRD, GUEST_KERNEL, HOST_MODULE_SET, JOB_FILE};
use crate::job::Event;

const EVENTS: &str = "/dev/ttyS1";

/// Runs as process 1 and does not return.
pub(crate) fn main() -> ! {
    let end = match set_up().and_then(|()| run_job()) {
        // The job reported its end itself.
        Ok(0) => None,
        Ok(status) => Some(Event::End {
            code: 1,
            error: Some(format!("the job died: {status}")),
        }),
        Err(error) => Some(Event::End {
            code: 1,
            error: Some(format!("{error:#}")),
        }),
    };
    if let Some(end) = end {
        report(&end);
    }
    // SAFETY: ends this machine; there is nothing to keep.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        std::thread::park();
    }
}

fn set_up() -> Result<()> {
    leave_rootfs()?;
    mount_on("devtmpfs", "/dev")?;
    mount_on("proc", "/proc")?;
    mount_on("sysfs", "/sys")?;
    for dir in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(dir)?;
    }
    mount_on("devpts", "/dev/pts")?;
    mount_on("tmpfs", "/dev/shm")?;
    mount_on("tmpfs", "/tmp")?;
    mount_on("tmpfs", "/run")?;
    mount_on("debugfs", "/sys/kernel/debug")?;
    mount_on("cgroup2", "/sys/fs/cgroup")?;
    busybox(&["--install", "-s", "/bin"])?;
    load_modules()?;
    busybox(&["ip", "link", "set", "lo", "up"])?;
    ensure!(
        Path::new("/dev/kvm").exists(),
        "kvm-amd did not bring up /dev/kvm; see its console"
    );
    Ok(())
}

/// Makes the root a mount like others: a process cannot confine itself by `pivot_root` while its root is
/// the kernel's first one.
fn leave_rootfs() -> Result<()> {
    const STEP: &str = "/mnt";
    let none = None::<&str>;
    mount(Some("/"), STEP, none, MsFlags::MS_BIND, none)
        .and_then(|()| nix::unistd::chdir(STEP))
        .and_then(|()| mount(Some("."), "/", none, MsFlags::MS_MOVE, none))
        .and_then(|()| nix::unistd::chroot("."))
        .context("cannot leave the initial root")
}

fn mount_on(kind: &str, dir: &str) -> Result<()> {
    mount(Some(kind), dir, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount {kind} on {dir}"))
}

fn busybox(args: &[&str]) -> Result<()> {
    let status = Command::new("/bin/busybox")
        .args(args)
        .status()
        .context("cannot run busybox")?;
    ensure!(status.success(), "busybox {} failed", args.join(" "));
    Ok(())
}

fn load_modules() -> Result<()> {
    for path in fs::read_to_string(HOST_MODULE_SET)?.lines() {
        let file = File::open(path).with_context(|| format!("cannot open {path}"))?;
        // SAFETY: the descriptor is open, the parameter string is NUL-terminated and static.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            return Err(error).with_context(|| format!("cannot load {path}"));
        }
    }
    Ok(())
}

/// Returns the job process's exit code once it ended; reaps everything else meanwhile.
fn run_job() -> Result<i32> {
    let child = Command::new("/init")
        .args(["inside", "--job", JOB_FILE, "--events", EVENTS])
        .env("PATH", "/usr/bin:/bin:/sbin")
        .env("HOME", "/root")
        .env("GUEST_KERNEL", GUEST_KERNEL)
        .env("GUEST_BZIMAGE", GUEST_BZIMAGE)
        .env("GUEST_INITRD", GUEST_INITRD)
        .current_dir("/root")
        .spawn()
        .context("cannot start the job")?;
    let job = Pid::from_raw(child.id().cast_signed());
    loop {
        match waitpid(None, None).context("cannot wait for the job")? {
            WaitStatus::Exited(pid, code) if pid == job => return Ok(code),
            WaitStatus::Signaled(pid, signal, _) if pid == job => return Ok(128 + signal as i32),
            _ => {}
        }
    }
}

fn report(event: &Event) {
    let line = serde_json::to_string(event).unwrap_or_default();
    eprintln!("lab init: {line}");
    if let Ok(mut events) = File::options().write(true).open(EVENTS) {
        let _ = writeln!(events, "{line}");
    }
}
