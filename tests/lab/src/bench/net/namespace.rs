//! The network namespace in which a bench's taps are. It ends with the last process in it, so
//! nothing of a bench is left on the machine.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Uid, getgid, getuid};

use super::super::interrupt;
use crate::inside::child;

/// For a tap to be made by a process that has just begun.
const PATIENCE: Duration = Duration::from_secs(10);

/// Moves this thread, and what it starts from now on, to a namespace of its own.
pub(super) fn enter() -> Result<()> {
    if Uid::effective().is_root() {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    } else {
        enter_as_user()?;
    }
    ensure!(
        Path::new("/dev/net/tun").exists(),
        "/dev/net/tun is not there; load the module tun"
    );
    // Neighbour discovery would send packets of its own. Without IPv6 there is nothing to do.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    Ok(())
}

/// A user may have one in a user namespace, where this user is called root.
fn enter_as_user() -> Result<()> {
    let (uid, gid) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context(
        "cannot make a network namespace; run this as root, or allow unprivileged user namespaces",
    )?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    Ok(())
}

/// Gives a command a namespace of its own within that.
pub(super) fn own(command: &mut Command) {
    let leave = || Ok(unshare(CloneFlags::CLONE_NEWNET)?);
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(leave) };
}

/// Waits until somebody has made a tap.
pub(super) fn await_tap(tap: &str) -> Result<()> {
    child::poll(&format!("the tap {tap}"), PATIENCE, || {
        interrupt::check()?;
        Ok(packets_to_host(tap).is_ok().then_some(()))
    })
}

/// What came to the host through a tap's descriptor, in packets.
pub(super) fn packets_to_host(tap: &str) -> Result<u64> {
    counters(tap, 1)
}

/// What the host sent out through a tap, in packets: what was read from its descriptor.
pub(super) fn packets_from_host(tap: &str) -> Result<u64> {
    counters(tap, 9)
}

fn counters(tap: &str, column: usize) -> Result<u64> {
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    field(&table, tap, column).with_context(|| format!("there is no tap {tap}"))
}

/// `NAME: BYTES PACKETS ...`: eight columns of what the interface received, then as many of what
/// it sent.
fn field(table: &str, interface: &str, column: usize) -> Option<u64> {
    let fields = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    fields.split_whitespace().nth(column)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_counted_in_both_directions() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs|bytes packets\n\
                tap0: 640 10 0 0 0 0 0 0 90 1\n  tap: 64 7 0 0 0 0 0 0 0 0\n";
        assert_eq!(field(text, "tap", 1), Some(7));
        assert_eq!(field(text, "tap0", 9), Some(1));
        assert_eq!(field(text, "lo", 1), None);
    }
}
