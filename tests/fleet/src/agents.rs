//! Hosts in processes of their own: ten thousand of them need more descriptors than one process may have
//! on many machines.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::host::{Served, socket};

/// Hosts of one process: with five descriptors each they fit below 20,000.
const MAX_HOSTS: usize = 3_000;
const READY: &str = "ready";

/// Processes that serve hosts; they end when this is dropped.
pub(crate) struct Agents(Vec<Child>);

impl Agents {
    /// Serves `count` hosts on sockets in `dir`; all of them are there when this returns.
    pub(crate) fn start(dir: &Path, count: usize) -> Result<Self> {
        let mut agents = Self(Vec::new());
        for first in (0..count).step_by(MAX_HOSTS) {
            let some = MAX_HOSTS.min(count - first).to_string();
            let child = Command::new(std::env::current_exe()?)
                .arg("--agents-in")
                .arg(dir)
                .args(["--first", &first.to_string(), "--hosts", &some])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start a process for hosts")?;
            agents.0.push(child);
        }
        for child in &mut agents.0 {
            let stdout = child.stdout.take().context("no pipe to the hosts")?;
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line)?;
            ensure!(line.trim() == READY, "a process for hosts did not begin");
        }
        Ok(agents)
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The address of a host that is served in `dir`, as the controller's command line has it.
pub(crate) fn address(dir: &Path, number: usize) -> String {
    format!("unix:{}", socket(dir, number).display())
}

/// What such a process does: until nobody holds the other end of its stdin.
pub(crate) async fn serve(dir: &Path, first: usize, count: usize) -> Result<()> {
    let hosts: Result<Vec<Served>> = (first..first + count)
        .map(|number| Served::start(dir, number))
        .collect();
    let _hosts = hosts?;
    println!("{READY}");
    std::io::stdout().flush()?;
    let until_end = tokio::task::spawn_blocking(|| {
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest)
    });
    until_end.await??;
    Ok(())
}
