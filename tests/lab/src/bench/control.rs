//! `cargo lab bench control`: the controller with thousands of simulated hosts. `tests/fleet` does it; here
//! it gets its programs and, where it is asked for, an etcd.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::build;
use crate::progress::step;

/// The command line.
#[derive(Debug, Args)]
pub(super) struct Control {
    /// Write the figures to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A tenth of hosts and VMs, and a growth curve of 100 and 1,000 hosts: a minute.
    #[arg(long)]
    quick: bool,
    /// Hosts.
    #[arg(long, value_name = "COUNT")]
    hosts: Option<usize>,
    /// VMs on them.
    #[arg(long, value_name = "COUNT")]
    vms: Option<usize>,
    /// Endpoints of an etcd that has nothing in it, instead of the embedded store.
    #[arg(long, value_name = "HOST:PORT,...")]
    etcd: Option<String>,
    /// Take controller and fleet from DIR instead of building them.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

impl Control {
    /// Exit code 0 when the bench ran, whatever it found.
    pub(super) fn run(self) -> Result<i32> {
        if let Some(file) = &self.json {
            // A FILE that cannot be written is better known now than in ten minutes.
            fs::write(file, "").with_context(|| format!("cannot write {}", file.display()))?;
        }
        let bin_dir = match &self.bin_dir {
            Some(dir) => dir.clone(),
            None => build(&["controller", "fleet"])?,
        };
        let (hosts, vms, curve) = match self.quick {
            true => (100, 5_000, "100,1000"),
            false => (1_000, 50_000, "100,1000,10000"),
        };
        let hosts = self.hosts.unwrap_or(hosts);
        let vms = self.vms.unwrap_or(vms);
        step(format_args!("{vms} VMs on {hosts} simulated hosts"));
        let mut fleet = Command::new(bin_dir.join("fleet"));
        fleet
            .arg("--controller")
            .arg(bin_dir.join("controller"))
            .args(["--hosts", &hosts.to_string(), "--vms", &vms.to_string()])
            .args(["--curve", curve])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        if let Some(etcd) = &self.etcd {
            fleet.args(["--etcd", etcd]);
        }
        let output = fleet.output().context("cannot run fleet")?;
        ensure!(output.status.success(), "fleet failed; see above");
        match &self.json {
            Some(file) => fs::write(file, output.stdout)
                .with_context(|| format!("cannot write {}", file.display()))?,
            None => print!("{}", String::from_utf8_lossy(&output.stdout)),
        }
        Ok(0)
    }
}
