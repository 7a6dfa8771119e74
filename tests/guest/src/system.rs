//! What process 1 owes its machine: file systems, modules, the end.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

/// Mounts proc, sysfs, devtmpfs and tmpfs.
pub(crate) fn mount_file_systems() -> Result<(), String> {
    for (kind, dir) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
    ] {
        mount_on(kind, kind, dir)?;
    }
    Ok(())
}

/// Mounts `source`, a file system of `kind`.
pub(crate) fn mount_on(kind: &str, source: &str, dir: &str) -> Result<(), String> {
    mount(
        Some(source),
        dir,
        Some(kind),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|error| format!("cannot mount {kind} on {dir}: {error}"))
}

/// Makes a disk's file system the root and starts its `/sbin/init`; returns only a failure.
pub(crate) fn continue_from(device: &str, arg: &str) -> String {
    let path = format!("/dev/{device}");
    let moved = wait_for(&path, Duration::from_secs(20), || {
        fs::exists(&path).unwrap_or(false)
    })
    .and_then(|()| mount_on("ext4", &path, "/mnt"))
    .and_then(|()| {
        let entered =
            std::os::unix::fs::chroot("/mnt").and_then(|()| std::env::set_current_dir("/"));
        entered.map_err(|error| format!("cannot enter {path}: {error}"))
    });
    match moved {
        Ok(()) => format!(
            "cannot start /sbin/init: {}",
            Command::new("/sbin/init").arg(arg).exec()
        ),
        Err(error) => error,
    }
}

/// Loads the modules listed in `/modules/SET`, one path a line, in that order.
pub(crate) fn load_modules(set: &str) -> Result<(), String> {
    let list = format!("/modules/{set}");
    let order =
        fs::read_to_string(&list).map_err(|error| format!("cannot read {list}: {error}"))?;
    for path in order.lines() {
        load_module(path).map_err(|error| format!("cannot load {path}: {error}"))?;
    }
    Ok(())
}

fn load_module(path: &str) -> std::io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open, the parameter string is NUL-terminated and static.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match std::io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        // Two sets may share a dependency.
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

/// Waits until a condition holds, as devices appear some time after their driver.
pub(crate) fn wait_for(
    what: &str,
    limit: Duration,
    ready: impl Fn() -> bool,
) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    while !ready() {
        if Instant::now() > deadline {
            return Err(format!(
                "{what} did not appear within {} s",
                limit.as_secs()
            ));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Returns when the power button was pressed.
pub(crate) fn wait_for_power_button() -> Result<(), String> {
    const EVENT_LEN: usize = size_of::<libc::input_event>();
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let device = "/dev/input/event0";
    wait_for(device, Duration::from_secs(20), || {
        fs::exists(device).unwrap_or(false)
    })?;
    let mut events =
        File::open(device).map_err(|error| format!("cannot open {device}: {error}"))?;
    guest::report::print_line("waiting for the power button");
    let mut event = [0; EVENT_LEN];
    loop {
        events
            .read_exact(&mut event)
            .map_err(|error| format!("{device}: {error}"))?;
        // struct input_event ends with __u16 type, __u16 code, __s32 value.
        let field = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
        if field(EVENT_LEN - 8) == EV_KEY && field(EVENT_LEN - 6) == KEY_POWER {
            return Ok(());
        }
    }
}

/// Runs a shell on the console until it ends.
pub(crate) fn shell() {
    guest::report::print_line("waiting for the shell to end");
    if let Err(error) = Command::new("/bin/busybox").arg("sh").status() {
        guest::report::print_line(&format!("cannot run a shell: {error}"));
    }
}

/// What is typed is not repeated, so that it never splits a report.
pub(crate) fn silence_console() {
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
    let console = std::io::stdin();
    // A console that is no terminal repeats nothing.
    if let Ok(mut settings) = tcgetattr(&console) {
        settings.local_flags.remove(LocalFlags::ECHO);
        let _ = tcsetattr(&console, SetArg::TCSANOW, &settings);
    }
}

/// Resets the machine.
pub(crate) fn reboot() -> ! {
    end(libc::RB_AUTOBOOT)
}

/// Turns the machine off.
pub(crate) fn power_off() -> ! {
    end(libc::RB_POWER_OFF)
}

fn end(how: libc::c_int) -> ! {
    // SAFETY: ends this guest; there is nothing to keep.
    unsafe {
        libc::sync();
        libc::reboot(how);
    }
    loop {
        thread::park();
    }
}
