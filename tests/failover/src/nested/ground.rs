//! The network: a namespace that this process enters, with a bridge that hosts' taps are on.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// Of the bridge, and of all that runs here.
pub const ADDRESS: &str = "10.77.0.1";

/// Leaves this machine's network for an empty one; all children follow. Without privileges it becomes
/// root of a user namespace that has them. Call it while there is one thread.
///
/// # Errors
/// When the kernel allows neither.
pub fn enter() -> Result<()> {
    if unshare(CloneFlags::CLONE_NEWNET).is_err() {
        let (user, group) = (geteuid(), getegid());
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context(
            "cannot make a network namespace; run it as root, or allow unprivileged user namespaces",
        )?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    }
    ip("link set lo up")?;
    ip("link add br0 type bridge")?;
    ip("link set br0 up")?;
    ip(&format!("address add {ADDRESS}/24 dev br0"))
}

/// Makes a tap on the bridge.
///
/// # Errors
/// When the kernel refuses.
pub fn add_tap(name: &str) -> Result<()> {
    ip(&format!("tuntap add {name} mode tap"))?;
    ip(&format!("link set {name} master br0 up"))
}

/// Runs ip with words that blanks separate.
fn ip(line: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(line.split_ascii_whitespace())
        .stdin(Stdio::null())
        .output()
        .context("cannot run ip")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("ip {line}: {}", said.trim());
    }
    Ok(())
}
