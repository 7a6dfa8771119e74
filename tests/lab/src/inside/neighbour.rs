//! The second of two nested hosts: its node agent, which a controller on the first one tells what to do.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::job::Site;
use crate::tool;

/// Its address on the cable between both hosts; tests know it.
const ADDRESS: &str = "172.16.9.2";
const PORT: u16 = 7071;

/// Serves until the host is switched off.
pub(super) fn run(site: &Site) -> Result<i32> {
    for arguments in [
        &["addr", "add", &format!("{ADDRESS}/24"), "dev", "eth0"][..],
        &["link", "set", "eth0", "up"],
    ] {
        tool::output(Command::new("ip").args(arguments))?;
    }
    let status = Command::new(site.bin_dir.join("node-agent"))
        .args(["--listen", &format!("{ADDRESS}:{PORT}"), "--insecure"])
        .arg("--state-dir")
        .arg(Path::new("/tmp/state"))
        .arg("--run-dir")
        .arg(Path::new("/tmp/run"))
        .envs(site.variables())
        .status()?;
    Ok(status.code().unwrap_or(1))
}
