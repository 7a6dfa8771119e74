//! `cargo lab bench control`: the controller with thousands of simulated hosts. `tests/fleet` does it; here
//! it gets its programs and etcd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::build;
use crate::artifacts::Artifacts;
use crate::progress::step;
use crate::wrappers;

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
    /// Where the controller keeps its state; both one after the other if left out.
    #[arg(long)]
    store: Option<Store>,
    /// Take controller and fleet from DIR instead of building them.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Store {
    /// In its own file.
    Embedded,
    /// In three members of etcd on loopback.
    Etcd,
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
        let stores = match self.store {
            Some(store) => vec![store],
            None => vec![Store::Embedded, Store::Etcd],
        };
        let mut reports = Vec::new();
        for store in stores {
            reports.push(self.measure(&bin_dir, store)?);
        }
        let text = serde_json::to_string_pretty(&reports)?;
        match &self.json {
            Some(file) => {
                fs::write(file, text)
                    .with_context(|| format!("cannot write {}", file.display()))?;
            }
            None => println!("{text}"),
        }
        Ok(0)
    }

    fn measure(&self, bin_dir: &Path, store: Store) -> Result<Value> {
        let (hosts, vms, curve) = match self.quick {
            true => (100, 5_000, "100,1000"),
            false => (1_000, 50_000, "100,1000,10000"),
        };
        let hosts = self.hosts.unwrap_or(hosts);
        let vms = self.vms.unwrap_or(vms);
        let name = store.to_possible_value();
        let name = name.as_ref().map_or("", |value| value.get_name());
        step(format_args!(
            "{vms} VMs on {hosts} simulated hosts, store: {name}"
        ));
        let mut fleet = Command::new(bin_dir.join("fleet"));
        fleet
            .arg("--controller")
            .arg(bin_dir.join("controller"))
            .args(["--hosts", &hosts.to_string(), "--vms", &vms.to_string()])
            .args(["--curve", curve, "--store", name])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        if matches!(store, Store::Etcd) {
            let (variable, program) = wrappers::etcd(&Artifacts::obtain()?)?;
            fleet.env(variable, program);
        }
        let output = fleet.output().context("cannot run fleet")?;
        ensure!(output.status.success(), "fleet failed; see above");
        serde_json::from_slice(&output.stdout).context("cannot read what fleet found")
    }
}
